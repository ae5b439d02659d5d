"""A continuous transform follows a vector field: y = x(1), where dx/dt = v(t, x) and x(0) = x.

Its log-determinant is the integral of the divergence along the path,

    log|det dy/dx| = ∫₀¹ tr J(t, x(t)) dt,    J = ∂v/∂x,

so one solve of the augmented equation gives both; run from 1 to 0 it gives the inverse.  The divergence is exact where
that is cheap.  Else it is estimated without bias as εᵀ J ε, with E ε εᵀ = I (Hutchinson 1990) and ε the same all along
a path, so that what is integrated is smooth.  Steps are as long as the worst row of the batch allows: the others change
its result no more than the tolerance does.

Neural Ordinary Differential Equations (Chen, Rubanova, Bettencourt, Duvenaud 2018, arXiv:1806.07366); FFJORD
(Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud 2018, arXiv:1810.01367); How to Train Your Neural ODE: the World of
Jacobian and Kinetic Regularization (Finlay, Jacobsen, Nurbekyan, Oberman 2020, arXiv:2002.02798).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_choice, check_flags, check_integers, check_kind
from ..conditioners import VectorField
from .base import FlowTransform
from .ode import ADAPTIVE, Solver

FEW = 16  # up to how many features a field that is differentiated by autograd has an exact divergence


class Solution(NamedTuple):
    """What one solve of a :class:`Continuous` transform has found.

    Attributes:
        value: Where the points arrive, ``(*batch, D)``.
        log_det: The log-determinant, ``(*batch)``, in nats.
        log_det_se: Its standard error, ``(*batch)``, in nats, where it is estimated by several probes; 0 where it is
            exact, NaN with one probe.
        kinetic: The kinetic energy ∫|v|² dt of each path, ``(*batch)``.
        jacobian: The squared Frobenius norm ∫|J|² dt along each path, ``(*batch)``, estimated without bias.
        evaluations: How often the field was evaluated, for all rows at once.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import VectorField
        >>> class Growth(VectorField):
        ...     def forward(self, t, x, context=None):
        ...         return x  # by e in each of two directions
        >>> found = Continuous(Growth(2), solver="rk4", num_steps=10).solve(torch.ones(2))
        >>> round(found.value[0].item(), 4), round(found.log_det.item(), 4), found.evaluations
        (2.7183, 2.0, 40)
    """

    value: Tensor
    log_det: Tensor
    log_det_se: Tensor
    kinetic: Tensor
    jacobian: Tensor
    evaluations: int


class Continuous(FlowTransform):
    """A continuous transform of a vector ``(*batch, D)``, y = x(1), which follows a vector field from x(0) = x::

        dx/dt = v(t, x, c),    log|det dy/dx| = ∫₀¹ tr ∂v/∂x dt

    It starts at the identity where the field starts at zero, as an :class:`~pyro_flows.conditioners.MLPField` does.
    Where the divergence is not exact it is estimated without bias as εᵀ (∂v/∂x) ε, with one random ε for a path.

    Both directions cost the same, and are exact up to the tolerances.  The number of evaluations follows the data, so
    it neither compiles to one graph nor maps under ``torch.func``.  Rows that hold NaN or inf become NaN.

    Neural Ordinary Differential Equations (Chen, Rubanova, Bettencourt, Duvenaud 2018, arXiv:1806.07366); FFJORD
    (Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud 2018, arXiv:1810.01367).

    Args:
        field: The vector field, such as an ``MLPField``.
        exact: Whether the divergence is exact, or estimated anew in each solve by torch's generators; by default it is
            exact where that costs little: for an ``MLPField`` of at most two hidden layers, and for others up to 16
            features.
        num_probes: How many vectors ε an estimate takes; with several, :meth:`solve` tells its standard error.
        noise: The law of ε: ``"rademacher"``, which has the least variance, or ``"gaussian"``.
        solver: An adaptive Runge-Kutta method: ``"dopri5"``, ``"dopri8"``, ``"bosh3"`` or ``"adaptive_heun"``; or one
            of fixed steps: ``"rk4"``, ``"heun3"``, ``"midpoint"`` or ``"euler"``.
        rtol: The relative tolerance of each step of an adaptive method; none below ten times the dtype's precision, in
            float32 1.2e-6, is aimed at.
        atol: The absolute tolerance, likewise.
        num_steps: The number of fixed steps.
        adjoint: Whether gradients are found by solving the adjoint equation backwards, in memory that does not depend
            on the number of steps.  They are as exact as the tolerances are in the mean over the batch, and reach the
            values, the context and the field's own parameters.  By default they are those of the very steps that were
            taken, which is faster, and has second derivatives.
        max_num_steps: How many steps an adaptive method may take, those that it rejects included.

    Raises:
        TypeError: If ``field`` is no ``VectorField``.
        ValueError: If an argument is out of its range.
        FloatingPointError: In use, if the field is not finite somewhere on the way, or too stiff for ``max_num_steps``
            or for the dtype; the error names the time and what to change.
        RuntimeError: In use, if second derivatives are asked for with ``adjoint=True``.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import MLPField
        >>> layer = Continuous(MLPField(3, context_dim=4))
        >>> x = torch.randn(5, 3)
        >>> y, log_det = layer.forward_and_log_det(x, torch.randn(4))
        >>> torch.allclose(y, x, atol=1e-5), log_det.shape, layer.is_exact
        (True, torch.Size([5]), True)
    """

    def __init__(
        self,
        field: VectorField,
        *,
        exact: bool | None = None,
        num_probes: int = 1,
        noise: str = "rademacher",
        solver: str = "dopri5",
        rtol: float = 1e-6,
        atol: float = 1e-6,
        num_steps: int = 20,
        adjoint: bool = False,
        max_num_steps: int = 1000,
    ) -> None:
        check_kind("Continuous", VectorField, "a VectorField such as conditioners.MLPField(input_dim)", field=field)
        super().__init__((field.input_dim,), field.context_dim)
        self.field = field
        self.exact = exact
        self.num_probes = num_probes
        self.noise = noise
        self.solver = solver
        self.rtol, self.atol = rtol, atol
        self.num_steps = num_steps
        self.adjoint = adjoint
        self.max_num_steps = max_num_steps
        check_integers("Continuous", num_probes=num_probes)
        check_flags("Continuous", optional=True, exact=exact)
        check_flags("Continuous", adjoint=adjoint)
        check_choice("Continuous", ("rademacher", "gaussian"), noise=noise)
        self._solver()

    @property
    def is_exact(self) -> bool:
        """Whether log-determinants are exact up to the tolerances."""
        return (self.field.cheap_trace or self.field.input_dim <= FEW) if self.exact is None else self.exact

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.solve(x, context)[:2]

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.solve(y, context, inverse=True)[:2]

    def compiles(self, inverse: bool) -> bool:
        return False

    def solve(
        self,
        value: Tensor,
        context: Tensor | None = None,
        *,
        inverse: bool = False,
        costs: bool = False,
        num_probes: int | None = None,
    ) -> Solution:
        """Follow the field, and tell all that is known of the way.

        Args:
            value: Where to start, ``(*batch, D)``.
            context: ``(*batch, context_dim)``; its batch broadcasts with that of ``value``.
            inverse: Whether to go from data to base.
            costs: Whether to integrate ``kinetic`` and ``jacobian`` too; else they are zero.
            num_probes: In place of the transform's own number.

        Returns:
            Where the points arrive, the log-determinants, and the rest of a :class:`Solution`.

        Raises:
            FloatingPointError: If the field is not finite somewhere on the way, or too stiff.
        """
        batch = self._batch_of(value, context)
        value = value.expand(*batch, -1)
        broken = ~value.isfinite().all(-1, keepdim=True)
        value = value.masked_fill(broken, 0.0)
        probes = None
        if costs or not self.is_exact:
            probes = self._probes(value, num_probes or self.num_probes)
        columns = 1 if self.is_exact or probes is None else len(probes)
        rates = self.field.at(context)

        def augmented(t: Tensor, state: Tensor) -> Tensor:
            # The adjoint method differentiates each evaluation by itself, down to the parameters.
            v, jacobian = (self.field.at(context) if self.adjoint else rates)(t, state[..., : value.shape[-1]])
            pulled = v if probes is None else jacobian.pull(probes)  # (K, *batch, D)
            parts = [v]
            if self.is_exact or probes is None:
                parts.append(jacobian.trace().unsqueeze(-1))
            else:
                parts.append((pulled * probes).sum(-1).movedim(0, -1))
            if costs:
                parts += [v.square().sum(-1, True), pulled.square().sum(-1).mean(0).unsqueeze(-1)]
            return torch.cat(parts, -1)

        start = torch.cat((value, value.new_zeros(*batch, columns + 2 * costs)), -1)
        needs = [*self.field.parameters(), *([] if context is None else [context])]
        end, evaluations = self._solver().solve(augmented, start, inverse, value.shape[-1] + columns, needs)
        end = end.masked_fill(broken, math.nan)
        x, log_dets, more = end.split((value.shape[-1], columns, 2 * costs), -1)
        kinetic, jacobian = more.abs().unbind(-1) if costs else (torch.zeros_like(x[..., 0]),) * 2
        return Solution(x, log_dets.mean(-1), self._error(log_dets), kinetic, jacobian, evaluations)

    def extra_repr(self) -> str:
        steps = f"rtol={self.rtol:g}, atol={self.atol:g}" if self.solver in ADAPTIVE else f"num_steps={self.num_steps}"
        divergence = "exact" if self.is_exact else f"{self.num_probes} {self.noise} probes"
        return f"solver={self.solver!r}, {steps}, adjoint={self.adjoint}, divergence: {divergence}"

    def _solver(self) -> Solver:
        return Solver(self.solver, self.rtol, self.atol, self.num_steps, self.adjoint, self.max_num_steps)

    def _probes(self, like: Tensor, number: int) -> Tensor:
        """Vectors of mean zero and unit covariance, ``(number, *batch, D)``."""
        shape = number, *like.shape
        if self.noise == "gaussian":
            return torch.randn(shape, dtype=like.dtype, device=like.device)
        return torch.randint(0, 2, shape, dtype=like.dtype, device=like.device) * 2 - 1

    def _error(self, log_dets: Tensor) -> Tensor:
        """The standard error of the mean of estimates, ``(*batch, K)``."""
        if self.is_exact:
            return torch.zeros_like(log_dets[..., 0])
        number = log_dets.shape[-1]
        return log_dets.std(-1) / math.sqrt(number) if number > 1 else torch.full_like(log_dets[..., 0], math.nan)
