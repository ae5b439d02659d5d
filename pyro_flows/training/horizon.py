"""How large the steps of a run are, and which is the last.

They rise along a line, since Adam's first steps are all of full size and deep flows compound them, and fall along a
cosine (Loshchilov, Hutter 2016, arXiv:1608.03983).  Where losses have come to rest the cosine ends early.  Of a guide q
near the posterior p the log-weights log p - log q of draws have about twice the gap to the evidence as their variance,
and a loss of K draws has that over K: so the losses themselves tell, with nothing else to compute, what is left to
learn.  What drifts by more than their noise has not come to rest.  Where a loss is so large that rounding hides the
noise, nothing is concluded.
"""

from __future__ import annotations

import math

import torch

LOOK = 25  # steps, after which losses are looked at
END = 50  # steps that are taken once they have come to rest
ROUNDED = 4  # how many roundings of a loss its noise at rest must exceed


def noise_at(gap: float, draws: int) -> float:
    """Return the standard deviation of losses of some draws, in nats, where the gap to the evidence is as given."""
    return math.sqrt(2 * gap / draws)


class Horizon:
    """The steps of one run.

    Args:
        steps: The most that are taken.
        rest: The standard deviation of losses, in nats, at which they have come to rest; 0 to take all steps.
        eps: The relative error of a loss by rounding.

    Attributes:
        turned: The step after which they had, or 0.
    """

    def __init__(self, steps: int, rest: float, eps: float = 0.0) -> None:
        self.steps, self.rest, self.eps, self.turned = steps, rest, eps, 0
        self._seen = 0

    @property
    def last(self) -> int:
        """The step that ends the run."""
        return min(self.steps, self.turned + END) if self.turned else self.steps

    def saw(self, losses: list[float]) -> None:
        """Look at the losses of all steps so far."""
        while self.rest and not self.turned and self._seen + LOOK <= len(losses):
            self._seen += LOOK
            latest = torch.tensor(losses[self._seen - LOOK : self._seen], dtype=torch.float64)
            rounding = ROUNDED * self.eps * float(latest.abs().max())
            if max(float(latest.std()), rounding) < self.rest:  # False where a step was skipped, whose loss is NaN
                self.turned = self._seen

    def share(self, step: int) -> float:
        """The size of a step, as a share of the largest."""
        if not self.turned:
            return self._share(step)
        return self._share(self.turned) * _cosine((step - self.turned - 1) / (self.last - self.turned))

    def _share(self, step: int) -> float:
        warm_up = min(100, max(20, self.steps / 4))
        return min(1.0, step / warm_up) * _cosine((step - 1) / self.steps)


def _cosine(part: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * part))
