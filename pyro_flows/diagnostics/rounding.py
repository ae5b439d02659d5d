"""The round-off of log-densities: how far those of a flow are from the same flow's in float64.

A value of float32 is known to one part in 2²⁴, and a map with a large condition number moves it by more: the error of
a log-density is about 1e-7 times the condition number of dy/dx, which no algorithm in float32 can avoid.  Stability of
invertible networks: Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann, Vicol,
Wang, Grosse, Jacobsen 2020, arXiv:2006.09347).
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor

from ..flows import Flow
from ..flows.arguments import check_value, parameter_of

TOLERANCE = 0.1  # nats, beyond which a log-density is called wrong
SHARE = 0.01  # of the rows, beyond which their round-off is told
ROWS = 256  # how many rows a fit looks at


@torch.no_grad()
def round_off(flow: Flow, value: Tensor, context: Tensor | None = None) -> Tensor:
    """Return the round-off of a flow's log-densities: how far they are from those that a copy in float64 computes.

    The log-density of a value y in the precision ε of the flow's dtype (6e-8 in float32) is that of a point within
    round-off of y.  With κ(y) the condition number of dy/dx, the ratio of its extreme singular values, the error is
    about::

        |log p̂(y) - log p(y)| ≈ ε κ(y)  nats

    So float32 is exact to 0.01 nats as long as κ stays below some 1e5.  Beyond, use ``flow.double()``.  Draws that are
    scored in the same pass, by ``rsample_and_log_prob`` or in a guide, are not affected.

    Args:
        flow: A flow.
        value: Events ``(*batch, *event_shape)``, of the flow's dtype.
        context: Their contexts, or None.

    Returns:
        The absolute differences, ``(*batch)`` in nats and float64.  A flow whose log-densities are estimates, such as
        a residual one in training mode, has their noise in them.

    Raises:
        TypeError: If the value is no tensor.
        ValueError: If value or context do not fit.

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> flow = flows.nsf(2)
        >>> bool(round_off(flow, torch.randn(100, 2)).max() < 1e-5)
        True
    """
    check_value(value, flow.event_shape, parameter_of(flow.transforms), "round_off")
    place = "cpu" if value.device.type == "mps" else value.device  # which has no float64
    exact = copy.deepcopy(flow).to(place).double()

    def widened(given: Tensor) -> Tensor:
        return given.to(place, torch.float64) if given.is_floating_point() else given.to(place)

    with exact.uncompiled():
        log_prob = exact.log_prob(widened(value), None if context is None else widened(context))
    return (flow.log_prob(value, context).to(log_prob) - log_prob).abs()


@torch.no_grad()
def warn_of_round_off(caller: str, flow: Flow, value: Tensor, context: Tensor | None) -> None:
    """Warn where the round-off of some log-densities is far above the noise that they have in any precision."""
    if value.dtype == torch.float64:
        return
    value, context = value[:ROWS], None if context is None else context[:ROWS]
    with flow.uncompiled():  # a fit that was not compiled should not compile at its end
        noise = (flow.log_prob(value, context) - flow.log_prob(value, context)).abs().max()
        error = round_off(flow, value, context) - 10 * noise
    if (error > TOLERANCE).double().mean() > SHARE:
        warnings.warn(
            f"{caller}: in {str(value.dtype).removeprefix('torch.')} round-off moves the log-densities of "
            f"{int((error > TOLERANCE).sum())} of {len(value)} rows by more than {TOLERANCE} nats, up to "
            f"{error.max():.3g}. Train in float64: flow.double(), with the data in float64.",
            stacklevel=3,
        )
