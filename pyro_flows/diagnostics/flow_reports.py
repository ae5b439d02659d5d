"""Reports on a flow: bits per dimension, pictures of its images, its round-off, and the cost of its ODE solver.

*Round-off.*  A float32 value is known to one part in 2²⁴, and a map with a large condition number amplifies this error.
The error of a log-density is about 1e-7 times the condition number of dy/dx, for any algorithm in float32.
Understanding and Mitigating Exploding Inverses in Invertible Neural Networks (Behrmann, Vicol, Wang, Grosse, Jacobsen
2020, arXiv:2006.09347).
"""

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import check_integers
from ..atomic_files import write_atomically
from ..flows import Flow
from ..flows.arguments import check_value, parameter_of
from ..flows.continuous import continuous_of, solved
from ..plots.images import tiled
from ..transforms import Continuous
from ..user_code import warn_user

LARGE = 0.1  # nats, an error of a log-density that is warned of if a hundredth of the rows have one


def bits_per_dim(log_prob: Tensor, event_shape: Sequence[int]) -> Tensor:
    """Return the bits per dimension of images, ``-log_prob / (D log 2)``; smaller is better.

    For a lower bound of the log-mass, such as that of :class:`~pyro_flows.flows.Dequantized`, it is an upper bound.

    Args:
        log_prob: Log-masses in nats, of any shape.
        event_shape: The shape of an image, of D numbers.

    Returns:
        Bits per dimension, of the shape of ``log_prob``.

    Example::

        >>> import math
        >>> import torch
        >>> bits_per_dim(torch.tensor(-784 * math.log(256)), (1, 28, 28)).item()  # a uniform model of 256 levels
        8.0
    """
    return -log_prob / (math.prod(event_shape) * math.log(2))


def save_images(images: Tensor, path: str | os.PathLike[str], *, columns: int = 8, levels: int | None = None) -> None:
    """Write a grid of images to a PNG file, atomically.

    Args:
        images: ``(N, C, H, W)``, with one channel (grey) or three (red, green, blue).
        path: The file.
        columns: The number of images in a row.
        levels: The number of integer levels of the model.  Without it, the range from black to white holds all values
            but the 1 % at each end.

    Raises:
        ValueError: If the images have another shape, or another number of channels, or ``columns`` is below 1.

    Example::

        >>> import tempfile
        >>> import torch
        >>> save_images(torch.rand(20, 1, 8, 8), f"{tempfile.mkdtemp()}/noise.png")
    """
    pixels = tiled("save_images", images, columns, levels)
    zoom = max(1, round(40 / images.shape[2]))
    picture = pixels.repeat(zoom, 0).repeat(zoom, 1)
    from matplotlib.image import imsave

    write_atomically(Path(path), lambda draft: imsave(draft, picture, format="png"))


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


@dataclass(frozen=True)
class OdeReport:
    """Report of a continuous flow's solver on N rows: the result of :func:`~pyro_flows.ode_report`.

    Attributes:
        log_prob: The log-density of each row, ``(N,)``, in nats.
        log_prob_se: The standard error of ``log_prob`` from the probes, ``(N,)``, in nats; 0 for exact divergences.
        evaluations: The number of evaluations of the fields from data to base, for all rows together.
        evaluations_back: The number of evaluations from base to data.
        round_trip: The error of each row after both directions, ``(N,)``: the largest ``|x' - x| / (1 + |x|)`` over its
            features.
        kinetic: The kinetic energy ``∫ |v|² dt`` of each row's path, ``(N,)``, with v the field along the path.
        jacobian: The squared norm ``∫ |J|² dt`` of the field's Jacobian J along the path, ``(N,)``, without bias.

    For rows ``(*batch, D)`` the tensors have the shape ``batch``.

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> found = ode_report(flows.ffjord(4, num_probes=2), torch.randn(5, 4))
        >>> found.log_prob.shape, bool(found.round_trip.max() < 1e-3)
        (torch.Size([5]), True)
    """

    log_prob: Tensor
    log_prob_se: Tensor
    evaluations: int
    evaluations_back: int
    round_trip: Tensor
    kinetic: Tensor
    jacobian: Tensor

    def __repr__(self) -> str:
        return (
            f"OdeReport(log_prob={self.log_prob.mean():.4f}, log_prob_se={self.log_prob_se.square().mean().sqrt():.2g},"
            f" evaluations={self.evaluations}, evaluations_back={self.evaluations_back}, "
            f"round_trip={self.round_trip.max():.1e}, kinetic={self.kinetic.mean():.3g}, "
            f"jacobian={self.jacobian.mean():.3g}) of {self.log_prob.numel()} rows"
        )


@torch.no_grad()
def ode_report(flow: Flow, x: Tensor, context: Tensor | None = None, *, num_probes: int = 16) -> OdeReport:
    """Return the log-densities of rows under a flow with continuous transforms, with a report of its solver.

    ``log_prob_se`` is the error of an estimated divergence (Hutchinson 1990).  ``round_trip`` shows the error of the
    solver, from data to base and back.

    Args:
        flow: A flow with continuous transforms, such as ``flows.cnf``.
        x: Rows, ``(*batch, D)``; N of them.
        context: Their contexts, ``(*batch, context_dim)`` or the inputs of the flow's encoder; None for a flow without.
        num_probes: The number of random vectors that estimate a divergence and ``jacobian``, at least 2.

    Returns:
        The :class:`~pyro_flows.diagnostics.OdeReport`.  Printed, it shows means over the rows, the root mean square of
        ``log_prob_se`` and the largest ``round_trip``.

    Raises:
        TypeError: If ``flow`` is not a flow, or ``x`` or ``context`` is not a tensor.
        ValueError: If the flow has no continuous transform or has one inside another transform, if rows or contexts do
            not fit it, or if a number is out of its range.
        FloatingPointError: If a field is too stiff for its solver, or not finite along the path.

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> ode_report(flows.cnf(2), torch.zeros(5, 2))
        OdeReport(log_prob=-1.8379, log_prob_se=0, evaluations=13, evaluations_back=13, round_trip=0.0e+00,
        kinetic=0, jacobian=0) of 5 rows
    """
    check_integers("ode_report", 2, num_probes=num_probes)
    if not isinstance(flow, Flow):
        raise TypeError(f"ode_report: flow must be a Flow, got {type(flow).__name__}. Pass guide.flow for a guide.")
    continuous_of(flow, "ode_report")
    check_value(x, flow.event_shape, parameter_of(flow.transforms), "ode_report", "x")
    distribution, back = flow(context), 0
    z, log_prob, solutions = solved(distribution, x, num_probes)
    for view in distribution.transforms:
        if isinstance(view.transform, Continuous):
            found = view.transform.solve(z, view.context)
            z, back = found.value, back + found.evaluations
        else:
            z, _ = view.transform.forward_and_log_det(z, view.context)
    round_trip = ((z - x).abs() / (1 + x.abs())).amax(-1)
    costs = [torch.broadcast_tensors(*parts) for parts in zip(*(found[2:5] for found in solutions), strict=True)]
    errors, kinetic, jacobian = map(torch.stack, costs)
    there = sum(found.evaluations for found in solutions)
    return OdeReport(log_prob, errors.norm(dim=0), there, back, round_trip, kinetic.sum(0), jacobian.sum(0))
