"""Round-off of a flow's log-densities, measured against a copy of the flow in float64.

A float32 value is known to one part in 2²⁴, and a map with a large condition number amplifies this error.  The error of
a log-density is about 1e-7 times the condition number of dy/dx, for any algorithm in float32.  Understanding and
Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann, Vicol, Wang, Grosse, Jacobsen 2020,
arXiv:2006.09347).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..flows import Flow
from ..flows.arguments import check_value, parameter_of
from ..user_code import warn_user

LARGE = 0.1  # nats, an error of a log-density that is warned of if a hundredth of the rows have one


@torch.no_grad()
def round_off(flow: Flow, value: Tensor, context: Tensor | None = None) -> Tensor:
    """Return the differences between a flow's log-densities and those of a copy in float64.

    With precision ε of the flow's dtype (6e-8 in float32), the computed log-density at y is that of a point within
    round-off of y.  With κ(y) the condition number of dy/dx, the ratio of its extreme singular values, the error is
    about::

        |log p̂(y) - log p(y)| ≈ ε κ(y)  nats

    So float32 is exact to 0.01 nats if κ is below about 1e5.  For larger κ, use ``flow.double()``.  Draws that are
    scored in the same pass, by ``rsample_and_log_prob`` or in a guide, are not affected.

    Args:
        flow: A flow.
        value: Events ``(*batch, *event_shape)``, of the flow's dtype.
        context: Their contexts, or None.

    Returns:
        The absolute differences, ``(*batch)`` in nats and float64.  They include the noise of estimated log-densities,
        for example of a residual flow in training mode.

    Raises:
        TypeError: If the value is not a tensor.
        ValueError: If value or context do not fit the flow.

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> flow = flows.nsf(2)
        >>> bool(round_off(flow, torch.randn(100, 2)).max() < 1e-5)
        True
    """
    check_value(value, flow.event_shape, parameter_of(flow.transforms), "round_off")
    place = "cpu" if value.device.type == "mps" else value.device  # because MPS has no float64
    exact = copy.deepcopy(flow).to(place).double()

    def widened(given: Tensor) -> Tensor:
        return given.to(place, torch.float64) if given.is_floating_point() else given.to(place)

    with exact.uncompiled():
        log_prob = exact.log_prob(widened(value), None if context is None else widened(context))
    return (flow.log_prob(value, context).to(log_prob) - log_prob).abs()


@torch.no_grad()
def warn_of_round_off(caller: str, flow: Flow, value: Tensor, context: Tensor | None) -> None:
    """Warn if the round-off of some log-densities is far above their noise in any precision."""
    if value.dtype == torch.float64:
        return
    value, context = value[:256], None if context is None else context[:256]
    with flow.uncompiled():  # a fit that was not compiled should not compile at its end
        noise = (flow.log_prob(value, context) - flow.log_prob(value, context)).abs().max()
        error = round_off(flow, value, context) - 10 * noise
    if (error > LARGE).double().mean() > 0.01:
        warn_user(
            f"{caller}: in {str(value.dtype).removeprefix('torch.')} round-off moves the log-densities of "
            f"{int((error > LARGE).sum())} of {len(value)} rows by more than {LARGE} nats, up to "
            f"{error.max():.3g}. Train in float64: flow.double(), with the data in float64."
        )
