"""Report of a continuous flow's ODE solver on given rows: its cost, its errors, and the regularity of the paths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_integers
from ..flows import Flow
from ..flows.arguments import check_value, parameter_of
from ..flows.continuous import continuous_of, solved
from ..transforms import Continuous


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
