"""The end of a run and the step sizes up to it: why a run stops, and the test of convergence.

The step size rises linearly, since the first steps of Adam have full size and deep flows compound them.  Then it falls
along a cosine (Loshchilov, Hutter 2016, arXiv:1608.03983).

A run ends early once it has converged.  Near the posterior the log-weights of draws have a variance v of about twice
the gap between the ELBO and the log evidence.  A mean over K draws has the variance v / K.  So the standard deviation
of the latest losses estimates the gap at no extra cost.  A trend adds to it: a loss that still falls by more than its
noise has not converged.  If rounding hides the noise, the run takes all steps.  Draws may show that a run has converged
at a somewhat larger gap.  A run for a looser end looks at draws whatever the losses are, but less and less often.  It
also looks at those of the start, which may be good enough.
"""

import math
from collections.abc import Callable

import torch

LOOK = 25  # steps between two tests of convergence
FINISH = 50  # the fewest steps after convergence, while the step size falls to zero
FEWEST = 10  # the steps of a run whose start is good enough
SHARE = 0.5  # of the steps before convergence; the tails of log-weights are learned last, by small steps
EARLY = 4  # looks, before which draws tell too little unless the gap is small
NEAR = 10.0  # times the gap at convergence, below which draws are looked at
ROUNDED = 4  # the noise at convergence must exceed as many rounding errors of a loss


def noise_at(gap: float, draws: int) -> float:
    """Return the standard deviation of losses, in nats, at a gap to the log evidence; each is a mean over draws."""
    return math.sqrt(2 * gap / draws)


class Horizon:
    """Step sizes and the last step of one run.

    Args:
        steps: The largest number of steps.
        noise: The standard deviation of the losses, in nats, below which the run has converged; 0 to take all steps.
        eps: The relative rounding error of a loss.
        is_good: Returns True if draws of the present state show that the run has converged; None to go by losses.
        near: The gap, in units of that at convergence, below which it is asked; if infinite, less and less often, at
            whatever gap.

    Attributes:
        converged_at: The step after which the run had converged, or its draws could be weighted; or None.
        by_draws: True if only draws, asked at any gap, have shown that.
    """

    def __init__(
        self,
        steps: int,
        noise: float,
        eps: float = 0.0,
        is_good: Callable[[], bool] | None = None,
        near: float = NEAR,
    ) -> None:
        self.steps, self.noise, self.eps = steps, noise, eps
        self.converged_at: int | None = None
        self._is_good, self._near, self._seen, self.by_draws = is_good, near, 0, False

    def resume(self, step: int, converged_at: int | None, *, by_draws: bool) -> None:
        """Go on after a step, at the state of a run that was saved there."""
        self._seen, self.converged_at, self.by_draws = step // LOOK * LOOK, converged_at, by_draws

    @property
    def last(self) -> int:
        """The last step of the run."""
        if self.converged_at is None:
            return self.steps
        further = max(FINISH, int(SHARE * self.converged_at)) if self.converged_at else FEWEST
        return min(self.steps, self.converged_at + further)

    def begin(self, is_ready: Callable[[], bool] | None) -> None:
        """Ask draws of the start whether it is good enough."""
        if self.noise and is_ready is not None and is_ready():
            self.converged_at, self.by_draws = 0, True

    def observe(self, losses: list[float]) -> None:
        """Test for convergence, given the losses of all steps so far."""
        while self.noise and self.converged_at is None and self._seen + LOOK <= len(losses):
            self._seen += LOOK
            latest = torch.tensor(losses[self._seen - LOOK : self._seen], dtype=torch.float64)
            rounding = ROUNDED * self.eps * float(latest.abs().max())
            seen = max(float(latest.std()), rounding)  # NaN if a step was skipped
            is_near = seen < math.sqrt(self._near) * self.noise and (math.isfinite(self._near) or self._is_due)
            if seen < self.noise or (self._is_good is not None and is_near and self._is_good()):
                self.converged_at = self._seen
                self.by_draws = seen >= self.noise and not math.isfinite(self._near)

    @property
    def _is_due(self) -> bool:
        """True at 4, 6, 8, 12, 16, … times the steps between two tests; earlier, draws seldom show narrow necks."""
        odd = number = self._seen // LOOK
        while odd % 2 == 0:
            odd //= 2
        return number >= EARLY and odd in (1, 3)

    def reason_to_stop(self, step: int, *, stale: bool, interrupted: bool) -> str:
        """Return why the run ends after a step, or an empty string if it goes on.

        Args:
            step: The number of steps taken.
            stale: True if the loss on held-out data has not improved for too long.
            interrupted: True after Ctrl-C.
        """
        if stale:
            return "held-out"
        if step >= self.last:
            return "weights" if self.by_draws else "steps" if self.converged_at is None else "converged"
        return "interrupted" if interrupted else ""

    def share(self, step: int) -> float:
        """Return the step size of a step, as a share of the largest."""
        if self.converged_at is None:
            return self._share(step)
        part = (step - self.converged_at - 1) / (self.last - self.converged_at)
        return self._share(self.converged_at or step) * _cosine(part)

    def _share(self, step: int) -> float:
        warm_up = min(100, max(20, self.steps / 4))
        return min(1.0, step / warm_up) * _cosine((step - 1) / self.steps)


def _cosine(part: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * part))
