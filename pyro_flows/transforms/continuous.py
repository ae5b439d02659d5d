"""Continuous transforms: one solve of an augmented equation gives the end of a path and the log-determinant.

The divergence of the field is exact if that is cheap.  Otherwise it is estimated without bias (Hutchinson 1990), by
random vectors that stay the same along a path, so that the integrand is smooth.

The error of a step is the root mean square over the numbers of a row, and its maximum over rows.  With the usual mean
over the batch, a row that needs short steps would hide among the others.  So the row that needs the shortest steps sets
their length, which changes the results of the other rows by at most the tolerance.  Solving Ordinary Differential
Equations I (Hairer, Nørsett, Wanner 1993), section II.4.  In the adjoint equation, the share of the parameters is an
integral whose error need not be judged: "Hey, that's not an ODE" (Kidger, Chen, Lyons 2020, arXiv:2009.09457).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_choice, check_flags, check_integers, check_kind, check_numbers
from ..conditioners import VectorField
from .base import TwoWay

ADAPTIVE = "dopri5", "dopri8", "bosh3", "adaptive_heun"
FIXED = "rk4", "heun3", "midpoint", "euler"
MAX_EXACT_DIM = 16  # up to how many features a field that is differentiated by autograd has an exact divergence
FIRST_STEP = 0.1  # of an adaptive method, as a share of the way
MIN_STEP = 1e-7  # about the least that float32 resolves
PENALTY = "a penalty that keeps the field smooth, objectives.Likelihood(kinetic=0.01, jacobian=0.01)"
Rates = Callable[[Tensor, Tensor], Tensor]  # (t, state) -> the derivative of the state


@dataclass(frozen=True)
class Solver:
    """The method and the settings by which a :class:`Continuous` transform is solved with torchdiffeq.

    Args:
        method: An adaptive method: ``"dopri5"``, ``"dopri8"``, ``"bosh3"`` or ``"adaptive_heun"``; or one of fixed
            steps: ``"rk4"``, ``"heun3"``, ``"midpoint"`` or ``"euler"``.
        rtol: The relative tolerance of each step of an adaptive method, raised to at least ten times the dtype's
            precision, in float32 1.2e-6.
        atol: The absolute tolerance, likewise.
        num_steps: The number of fixed steps.
        adjoint: True if gradients come from solving the adjoint equation backwards, in memory that does not depend on
            the number of steps.  They are as exact as the tolerances are in the mean over the batch, and reach the
            values, the context and the field's own parameters.  By default they are those of the very steps that were
            taken, which is faster, and has second derivatives.
        max_num_steps: The greatest number of steps of an adaptive method, including those that it rejects.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> from pyro_flows import flows
        >>> flows.cnf(2, solver=Solver("rk4", num_steps=10)).transforms[0].solver.num_steps
        10
    """

    method: str = "dopri5"
    rtol: float = 1e-6
    atol: float = 1e-6
    num_steps: int = 20
    adjoint: bool = False
    max_num_steps: int = 1000

    def __post_init__(self) -> None:
        check_choice("Solver", ADAPTIVE + FIXED, method=self.method)
        check_numbers("Solver", above=0, rtol=self.rtol, atol=self.atol)
        check_integers("Solver", num_steps=self.num_steps, max_num_steps=self.max_num_steps)
        check_flags("Solver", adjoint=self.adjoint)

    def integrate(
        self, rates: Rates, start: Tensor, inverse: bool, judged: int, needs: Sequence[Tensor]
    ) -> tuple[Tensor, int]:
        """Solve an equation from time 0 to 1.

        Args:
            rates: The right-hand side; of the state, ``(*batch, n)``.
            start: The initial state.
            inverse: True to go from time 1 to 0.
            judged: How many numbers of each row, the first ones, are held to the tolerances.
            needs: The tensors that the adjoint method differentiates.

        Returns:
            The state at the end, and the number of evaluations.
        """
        from torchdiffeq import odeint, odeint_adjoint  # a late import, since it loads all of SciPy's integrators

        if torch._C._get_tracing_state() and (self.method in ADAPTIVE or self.adjoint):
            why = "since a trace repeats the steps of the data that it has seen"
            raise ValueError(f'Continuous: torch.jit.trace needs fixed steps and no adjoint, {why}. Use Solver("rk4").')
        begin, goal = (1.0, 0.0) if inverse else (0.0, 1.0)
        watched = _Watched(self, rates, goal)
        times = torch.tensor([begin, goal], dtype=start.dtype, device=start.device)
        least = 10 * torch.finfo(start.dtype).eps
        settings: dict[str, Any] = {"method": self.method, "rtol": max(self.rtol, least), "atol": max(self.atol, least)}
        settings["options"] = self._options(goal, judged)
        if self.adjoint:
            # torchdiffeq goes back through negative times if it has gone forth through falling ones.
            back = self._options(-begin if inverse else begin, judged)
            settings["adjoint_options"] = {**back, "norm": _norm_of_gradients} if "norm" in back else back
            settings["adjoint_params"] = [tensor for tensor in needs if tensor.requires_grad]
        end = (odeint_adjoint if self.adjoint else odeint)(watched, start, times, **settings)[1]
        watched.check_finite(goal, end)
        if self.adjoint and end.requires_grad:
            end.register_hook(_check_gradient)
        return end, watched.evaluations

    def _options(self, goal: float, judged: int) -> dict[str, Any]:
        """Return torchdiffeq's options of the method, for a solve up to the time ``goal``."""
        if self.method in FIXED:
            return {"grid_constructor": lambda _, state, t: torch.linspace(t[0], t[-1], self.num_steps + 1).to(t)}

        def norm(errors: Tensor) -> Tensor:
            rows = errors[..., :judged].square().mean(-1)
            return rows.amax().sqrt() if rows.numel() else rows.new_zeros(())

        # Without the goal, the last step would lead beyond it.
        return {"norm": norm, "first_step": FIRST_STEP, "step_t": torch.tensor([goal], dtype=torch.float64)}


DEFAULT = Solver()


class _Watched:
    """The right-hand side that torchdiffeq calls; it counts the evaluations and checks every step.

    Args:
        solver: The solver.
        rates: The right-hand side.
        goal: The time at the end, where the adjoint equation begins.
    """

    def __init__(self, solver: Solver, rates: Rates, goal: float) -> None:
        self.solver, self.rates, self.goal = solver, rates, goal
        self.evaluations = self.steps = 0

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        self.evaluations += 1
        return self.rates(t, state)

    def callback_step(self, t: Tensor, state: Tensor, dt: Tensor) -> None:
        """Check a step; torchdiffeq calls this before each one, with the time, the state, and the step's length."""
        self.check_finite(float(t), state)
        self._check_step(float(t), float(dt), state.dtype)

    def callback_step_adjoint(self, t: Tensor, state: tuple[Tensor, ...], dt: Tensor) -> None:
        """Check a step of the adjoint equation, which may be solved more than once."""
        if float(t) == self.goal and float(dt) == FIRST_STEP:
            self.steps = 0
        self.check_finite(float(t), *state, what="gradients of the adjoint equation are")
        self._check_step(float(t), float(dt), state[1].dtype)

    def check_finite(self, t: float, *numbers: Tensor, what: str = "the field is") -> None:
        if not all(part.isfinite().all() for part in numbers):
            raise FloatingPointError(f"Continuous: {what} not finite {_time(t)}. Use a smaller lr, or {PENALTY}.")

    def _check_step(self, t: float, dt: float, dtype: torch.dtype) -> None:
        self.steps += 1
        solver, most = self.solver, self.solver.max_num_steps
        if solver.method in FIXED or (dt >= MIN_STEP and self.steps <= most):
            return
        if dt == 0:
            self.check_finite(t, torch.tensor(math.nan))  # of which torchdiffeq makes such a step
        what, way = f"has taken max_num_steps={most} steps, so the field is stiff", "raise max_num_steps"
        if dt < MIN_STEP:
            what, way = f"fell to steps of {dt:.1e}, which {dtype} does not resolve", "use float64"
        loosen = f"Loosen rtol={solver.rtol:g} and atol={solver.atol:g}"
        raise FloatingPointError(f"Continuous: {solver.method} {what} {_time(t)}. {loosen}, {way}, or add {PENALTY}.")


def _time(t: float) -> str:
    return f"near time {abs(t):.6g} (the data are at 1, the base at 0)"


def _norm_of_gradients(errors: tuple[Tensor, ...]) -> Tensor:
    """Return the norm of errors in time, state, its gradient, and the gradients of the other tensors.

    It is the worst row's error in the state, or the mean over all rows of the error in the gradient, whichever is
    larger.  The latter is a mean since the gradients of rows add up.
    """
    _, state, gradient, *_ = errors
    rows = state.square().mean(-1)
    return torch.maximum(rows.amax(), gradient.square().mean()).sqrt() if rows.numel() else rows.new_zeros(())


def _check_gradient(gradient: Tensor | None) -> None:
    """Check the gradient that reaches an adjoint equation before it is solved."""
    if torch.is_grad_enabled():
        raise RuntimeError("Continuous: with adjoint=True there are no second derivatives; use adjoint=False.")
    if gradient is not None and not gradient.isfinite().all():
        raise FloatingPointError("Continuous: the gradient of the loss is not finite where it reaches the solve.")


class Solution(NamedTuple):
    """The results of one solve of a :class:`Continuous` transform.

    Attributes:
        value: The ends of the paths, ``(*batch, D)``.
        log_det: The log-determinant, ``(*batch)``, in nats.
        log_det_se: Its standard error, ``(*batch)``, in nats, if it is estimated by several probes; 0 if it is exact,
            NaN with one probe.
        kinetic: The kinetic energy ∫|v|² dt of each path, ``(*batch)``.
        jacobian: The squared Frobenius norm ∫|J|² dt along each path, ``(*batch)``, estimated without bias.
        evaluations: The number of evaluations of the field, for all rows together.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import VectorField
        >>> class Growth(VectorField):
        ...     def forward(self, t, x, context=None):
        ...         return x  # by e in each of two directions
        >>> found = Continuous(Growth(2), Solver("rk4", num_steps=10)).solve(torch.ones(2))
        >>> round(found.value[0].item(), 4), round(found.log_det.item(), 4), found.evaluations
        (2.7183, 2.0, 40)
    """

    value: Tensor
    log_det: Tensor
    log_det_se: Tensor
    kinetic: Tensor
    jacobian: Tensor
    evaluations: int


class Continuous(TwoWay):
    """A continuous transform of a vector ``(*batch, D)``, y = x(1), which follows a vector field from x(0) = x::

        dx/dt = v(t, x, c),    log|det dy/dx| = ∫₀¹ tr J(t, x(t)) dt,    J = ∂v/∂x

    The inverse runs from 1 to 0.  It starts at the identity if the field starts at zero, as an
    :class:`~pyro_flows.conditioners.MLPField` does.  If the divergence is not exact it is estimated without bias as
    εᵀ J ε, with one random ε, E ε εᵀ = I, for a path.

    Both directions cost the same, and are exact up to the tolerances.  The number of evaluations follows the data, so
    it neither compiles to one graph nor maps under ``torch.func``; ``torch.jit.trace`` needs fixed steps.  Rows that
    hold NaN or inf become NaN.

    Neural Ordinary Differential Equations (Chen, Rubanova, Bettencourt, Duvenaud 2018, arXiv:1806.07366); FFJORD
    (Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud 2018, arXiv:1810.01367); for the costs of paths, How to Train
    Your Neural ODE: the World of Jacobian and Kinetic Regularization (Finlay, Jacobsen, Nurbekyan, Oberman 2020,
    arXiv:2002.02798).

    Args:
        field: The vector field, such as an ``MLPField``.
        solver: The method and its settings.
        exact: True for an exact divergence, False for an estimate that torch's generators draw anew in each solve.  By
            default it is exact for an ``MLPField`` of at most two hidden layers, where that costs little, and for other
            fields up to 16 features.
        num_probes: How many vectors ε an estimate takes; with several, :meth:`solve` returns its standard error.

    Raises:
        TypeError: If ``field`` is not a ``VectorField``, or ``solver`` not a ``Solver``.
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
        self, field: VectorField, solver: Solver = DEFAULT, *, exact: bool | None = None, num_probes: int = 1
    ) -> None:
        check_kind("Continuous", VectorField, "a VectorField such as conditioners.MLPField(input_dim)", field=field)
        check_kind("Continuous", Solver, 'a Solver such as transforms.Solver("rk4")', solver=solver)
        check_integers("Continuous", num_probes=num_probes)
        check_flags("Continuous", optional=True, exact=exact)
        super().__init__((field.input_dim,), field.context_dim)
        self.field, self.solver, self.exact, self.num_probes = field, solver, exact, num_probes

    @property
    def is_exact(self) -> bool:
        """True if log-determinants are exact up to the tolerances."""
        return (self.field.cheap_trace or self.field.input_dim <= MAX_EXACT_DIM) if self.exact is None else self.exact

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return self.solve(value, context, inverse=inverse)[:2]

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
        """Follow the field, and return everything that is known of the paths.

        Args:
            value: The starts of the paths, ``(*batch, D)``.
            context: ``(*batch, context_dim)``; its batch broadcasts with that of ``value``.
            inverse: True to go from data to base.
            costs: True to integrate ``kinetic`` and ``jacobian`` too; they are zero otherwise.
            num_probes: Replaces the transform's own number.

        Returns:
            The ends of the paths, the log-determinants, and the rest of a :class:`Solution`.

        Raises:
            FloatingPointError: If the field is not finite somewhere on the way, or too stiff.
        """
        exact, batch, dim = self.is_exact, self._batch_of(value, context), value.shape[-1]
        value = value.expand(*batch, -1)
        broken = ~value.isfinite().all(-1, keepdim=True)
        value = value.masked_fill(broken, 0.0)
        probes = None
        if costs or not exact:  # random signs have the least variance (Hutchinson 1990)
            shape = num_probes or self.num_probes, *value.shape
            probes = torch.randint(0, 2, shape, dtype=value.dtype, device=value.device) * 2 - 1
        columns = 1 if exact or probes is None else len(probes)
        rates = self.field.at(context)

        def augmented(t: Tensor, state: Tensor) -> Tensor:
            # The adjoint method differentiates each evaluation by itself, down to the parameters.
            v, jacobian = (self.field.at(context) if self.solver.adjoint else rates)(t, state[..., :dim])
            if probes is None:
                return torch.cat((v, jacobian.trace().unsqueeze(-1)), -1)
            pulled = jacobian.pull(probes)  # (K, *batch, D)
            traces = jacobian.trace().unsqueeze(-1) if exact else (pulled * probes).sum(-1).movedim(0, -1)
            if not costs:
                return torch.cat((v, traces), -1)
            return torch.cat((v, traces, v.square().sum(-1, True), pulled.square().sum(-1).mean(0).unsqueeze(-1)), -1)

        start = torch.cat((value, value.new_zeros(*batch, columns + 2 * costs)), -1)
        needs = [*self.field.parameters()] if context is None else [*self.field.parameters(), context]
        end, evaluations = self.solver.integrate(augmented, start, inverse, dim + columns, needs)
        x, log_dets, more = end.masked_fill(broken, math.nan).split((dim, columns, 2 * costs), -1)
        zeros = torch.zeros_like(x[..., 0])
        kinetic, jacobian = more.abs().unbind(-1) if costs else (zeros, zeros)
        if columns > 1:
            error = log_dets.std(-1) / math.sqrt(columns)
        else:
            error = zeros if exact else torch.full_like(zeros, math.nan)
        return Solution(x, log_dets.mean(-1), error, kinetic, jacobian, evaluations)

    def extra_repr(self) -> str:
        return f"{self.solver}, divergence: {'exact' if self.is_exact else f'{self.num_probes} probes'}"
