"""An initial value problem handed to torchdiffeq, and watched: what cannot be solved ends with an error that says why.

The error of a step is judged row by row, as the root mean square over a row's numbers, and the worst row decides.  Were
it a mean over the batch, as is usual, a row that needs short steps would get them in bad company only.

Solving Ordinary Differential Equations I (Hairer, Nørsett, Wanner 1993), section II.4; in the adjoint equation, whose
parameters' share is an integral and need not be judged: "Hey, that's not an ODE" (Kidger, Chen, Lyons 2020,
arXiv:2009.09457).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_integers, check_numbers

ADAPTIVE = "dopri5", "dopri8", "bosh3", "adaptive_heun"
FIXED = "rk4", "heun3", "midpoint", "euler"
FIRST_STEP = 0.1  # of an adaptive method, as a share of the way
LEAST_STEP = 1e-7  # about what float32 can tell from none
ENDS = "(the data are at 1, the base at 0)"
Rates = Callable[[Tensor, Tensor], Tensor]  # (t, state) -> what the state changes by
PENALTY = "objectives.Likelihood(kinetic=0.01, jacobian=0.01)"
REGULARISE = f"train with a penalty that keeps the field smooth, {PENALTY}"


@dataclass(frozen=True)
class Solver:
    """A Runge-Kutta method and its settings; see :class:`~pyro_flows.transforms.Continuous`."""

    method: str
    rtol: float
    atol: float
    num_steps: int
    adjoint: bool
    max_num_steps: int

    def __post_init__(self) -> None:
        if self.method not in ADAPTIVE + FIXED:
            raise ValueError(
                f"Continuous: solver must be one of {', '.join(ADAPTIVE)}, whose steps adapt, or of "
                f"{', '.join(FIXED)}, whose steps are fixed, got {self.method!r}."
            )
        check_numbers("Continuous", above=0, rtol=self.rtol, atol=self.atol)
        check_integers("Continuous", num_steps=self.num_steps, max_num_steps=self.max_num_steps)

    def solve(
        self,
        rates: Rates,
        start: Tensor,
        inverse: bool,
        judged: int,
        needs: Sequence[Tensor],
    ) -> tuple[Tensor, int]:
        """Solve dy/dt = rates(t, y) from time 0 to 1, or back.

        Args:
            rates: The right-hand side; of the state, ``(*batch, n)``.
            start: The initial state.
            inverse: Whether to go back.
            judged: How many numbers of each row, the first ones, are held to the tolerances.
            needs: The tensors other than the state that the rates depend on, for the adjoint method.

        Returns:
            The state at the end, and the number of evaluations.
        """
        from torchdiffeq import odeint, odeint_adjoint  # here, since it takes all of SciPy's integrators along

        begin, goal = (1.0, 0.0) if inverse else (0.0, 1.0)
        watched = Watched(self, rates, start.dtype, goal)
        times = torch.tensor([begin, goal], dtype=start.dtype, device=start.device)
        least = 10 * torch.finfo(start.dtype).eps
        settings: dict[str, Any] = {"method": self.method, "rtol": max(self.rtol, least), "atol": max(self.atol, least)}
        options = self._options(goal, judged)
        if self.adjoint:
            # torchdiffeq goes back through negative times where it has gone forth through falling ones.
            back = self._options(-begin if inverse else begin, judged)
            settings["adjoint_options"] = {**back, "norm": _norm_of_gradients} if "norm" in back else back
            settings["adjoint_params"] = [tensor for tensor in needs if tensor.requires_grad]
        end = (odeint_adjoint if self.adjoint else odeint)(watched, start, times, options=options, **settings)[1]
        watched.check_state(goal, end)
        if self.adjoint and end.requires_grad:
            end.register_hook(_check_gradient)
        return end, watched.evaluations

    def _options(self, goal: float, judged: int) -> dict[str, Any]:
        if self.method in FIXED:
            return {"grid_constructor": lambda _, state, t: torch.linspace(t[0], t[-1], self.num_steps + 1).to(t)}

        def norm(errors: Tensor) -> Tensor:
            rows = errors[..., :judged].square().mean(-1)
            return rows.amax().sqrt() if rows.numel() else rows.new_zeros(())

        # Without the goal, the last step would lead beyond it.
        return {"norm": norm, "first_step": FIRST_STEP, "step_t": torch.tensor([goal], dtype=torch.float64)}


def _norm_of_gradients(errors: tuple[Tensor, ...]) -> Tensor:
    """Of errors in time, state, its gradient, and those of the tensors needed: the worst row's of the state, and the
    mean over all rows' of the gradient, since they add up."""
    _, state, gradient, *_ = errors
    rows = state.square().mean(-1)
    return torch.maximum(rows.amax(), gradient.square().mean()).sqrt() if rows.numel() else rows.new_zeros(())


def _check_gradient(gradient: Tensor | None) -> None:
    """Look at what reaches an adjoint equation before it is solved."""
    if torch.is_grad_enabled():
        raise RuntimeError("Continuous: with adjoint=True there are no second derivatives; use adjoint=False.")
    if gradient is not None and not gradient.isfinite().all():
        raise FloatingPointError("Continuous: the gradient of the loss is not finite where it reaches the solve.")


class Watched:
    """The rates of a state; they count how often they are asked for, and an error ends what leads nowhere.

    Args:
        solver: The method.
        rates: The right-hand side.
        dtype: That of the state.
        begin_back: The time at which torchdiffeq begins the adjoint equation.
    """

    def __init__(self, solver: Solver, rates: Rates, dtype: torch.dtype, begin_back: float) -> None:
        self.solver, self.rates, self.dtype, self.begin_back = solver, rates, dtype, begin_back
        self.evaluations = self.steps = self.steps_back = 0

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        self.evaluations += 1
        return self.rates(t, state)

    def callback_step(self, t: Tensor, state: Tensor, dt: Tensor) -> None:
        """What torchdiffeq calls before each step, at the time, the state, and the length of the step."""
        self.steps += 1
        self.check_state(float(t), state)
        if self.solver.method in ADAPTIVE:
            self._check_step(self.steps, t, state, float(dt))

    def callback_step_adjoint(self, t: Tensor, state: tuple[Tensor, ...], dt: Tensor) -> None:
        """The same of the adjoint equation, which may be solved more than once."""
        first = float(t) == self.begin_back and float(dt) == FIRST_STEP
        self.steps_back = 1 if first else self.steps_back + 1
        if not all(part.isfinite().all() for part in state):
            raise FloatingPointError(
                f"Continuous: gradients of the adjoint equation are not finite near time {abs(float(t)):.6g} {ENDS}: "
                "the field has no finite derivative there."
            )
        if self.solver.method in ADAPTIVE:
            self._check_step(self.steps_back, t, state[1], float(dt))

    def check_state(self, t: float, state: Tensor) -> None:
        if not state.isfinite().all():
            raise FloatingPointError(
                f"Continuous: the field is not finite near time {t:.6g} {ENDS}: its parameters have grown too large. "
                f"Train with a smaller lr, or with a penalty, {PENALTY}."
            )

    def _check_step(self, number: int, t: Tensor, state: Tensor, dt: float) -> None:
        at = f"at time {abs(float(t)):.6g} {ENDS}"
        tolerances = f"rtol={self.solver.rtol:g} and atol={self.solver.atol:g}"
        if dt == 0:  # what torchdiffeq makes of an error that is NaN
            self.check_state(abs(float(t)), self.rates(t.to(state).abs(), state))
            raise FloatingPointError(
                f"Continuous: from {at.removeprefix('at ')}, a step of {self.solver.method} reached points where the "
                "field is not finite: it is too steep, or undefined there. Train with a smaller lr, or with a "
                f"penalty, {PENALTY}."
            )
        if dt < LEAST_STEP:
            finer = "" if self.dtype == torch.float64 else "go to float64, "
            raise FloatingPointError(
                f"Continuous: the step of {self.solver.method} fell to {dt:.1e} {at}: {tolerances} ask for more than "
                f"{self.dtype} resolves there, or the field jumps. Loosen them, {finer}or {REGULARISE}."
            )
        if number > self.solver.max_num_steps:
            raise FloatingPointError(
                f"Continuous: {self.solver.method} has taken max_num_steps={self.solver.max_num_steps} steps and is "
                f"{at}: the field is stiff. Loosen {tolerances}, raise max_num_steps, or {REGULARISE}."
            )
