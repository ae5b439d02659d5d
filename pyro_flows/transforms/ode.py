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
from torchdiffeq import odeint, odeint_adjoint

ADAPTIVE = "dopri5", "dopri8", "bosh3", "adaptive_heun"
FIXED = "rk4", "heun3", "midpoint", "euler"
FIRST_STEP = 0.1  # of an adaptive method, as a share of the way
LEAST_STEP = 1e-7  # about what float32 can tell from none
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
        for name in ("rtol", "atol", "num_steps", "max_num_steps"):
            value, kind = getattr(self, name), int if name.endswith("steps") else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < float("inf"):
                what = "a positive integer" if kind is int else "positive and finite"
                raise ValueError(f"Continuous: {name} must be {what}, got {value!r}.")

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
        if not start.isfinite().all():
            raise FloatingPointError("Continuous: the values to start from hold NaN or inf.")
        watched = Watched(self, rates, start.dtype)
        begin, goal = (1.0, 0.0) if inverse else (0.0, 1.0)
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
        return end, watched.evaluations

    def _options(self, goal: float, judged: int) -> dict[str, Any]:
        if self.method in FIXED:
            return {"step_size": 1 / self.num_steps}

        def norm(errors: Tensor) -> Tensor:
            rows = errors[..., :judged].square().mean(-1)
            return rows.amax().sqrt() if rows.numel() else rows.new_zeros(())

        # Without the goal, the last step would lead beyond it.
        return {"norm": norm, "first_step": FIRST_STEP, "step_t": torch.tensor([goal], dtype=torch.float64)}


def _norm_of_gradients(errors: tuple[Tensor, ...]) -> Tensor:
    """Of errors in time, state, its gradient, and those of the tensors needed: rows add up, so their mean is judged."""
    _, state, gradient, *_ = errors
    return torch.maximum(state.square().mean(), gradient.square().mean()).sqrt()


class Watched:
    """The rates of a state; they count how often they are asked for, and an error ends what leads nowhere.

    Args:
        solver: The method.
        rates: The right-hand side.
        dtype: That of the state.
    """

    def __init__(self, solver: Solver, rates: Rates, dtype: torch.dtype) -> None:
        self.solver, self.rates, self.dtype = solver, rates, dtype
        self.evaluations = self.steps = self.steps_back = 0

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        self.evaluations += 1
        return self.rates(t, state)

    def callback_step(self, t: Tensor, state: Tensor, dt: Tensor) -> None:
        """What torchdiffeq calls before each step, at the time, the state, and the length of the step."""
        self.steps += 1
        if self.solver.method in FIXED:
            self.check_state(float(t), state)
        else:
            self._check_step(self.steps, abs(float(t)), float(dt))

    def callback_step_adjoint(self, t: Tensor, state: tuple[Tensor, ...], dt: Tensor) -> None:
        """The same of the adjoint equation."""
        self.steps_back += 1
        if self.solver.method in ADAPTIVE:
            self._check_step(self.steps_back, abs(float(t)), float(dt))

    def check_state(self, t: float, state: Tensor) -> None:
        if not state.isfinite().all():
            self._refuse_nonfinite(t)

    def _check_step(self, number: int, t: float, dt: float) -> None:
        at = f"at time {t:.6g} (the data are at 1, the base at 0)"
        tolerances = f"rtol={self.solver.rtol:g} and atol={self.solver.atol:g}"
        if dt == 0:  # what torchdiffeq makes of an error that is NaN
            self._refuse_nonfinite(t)
        if dt < LEAST_STEP:
            raise FloatingPointError(
                f"Continuous: the step of {self.solver.method} fell to {dt:.1e} {at}: {tolerances} ask for more than "
                f"{self.dtype} resolves there, or the field jumps. Loosen them, go to float64, or {REGULARISE}."
            )
        if number > self.solver.max_num_steps:
            raise FloatingPointError(
                f"Continuous: {self.solver.method} has taken max_num_steps={self.solver.max_num_steps} steps and is "
                f"{at}: the field is stiff. Loosen {tolerances}, raise max_num_steps, or {REGULARISE}."
            )

    def _refuse_nonfinite(self, t: float) -> None:
        raise FloatingPointError(
            f"Continuous: the field is not finite at time {t:.6g} (the data are at 1, the base at 0): its parameters "
            f"have grown too large. Train with a smaller lr, or with a penalty, {PENALTY}."
        )
