"""The result of sampling a posterior by Markov chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Draws of a posterior by Markov chains, and how far they have converged: the result of :func:`~pyro_flows.sample`.

    Attributes:
        draws: Draws of latents and deterministic sites: name -> ``(chains, draws, *site_shape)``.
        names: The names of the K tested quantities; angles count as their cosine and sine.
        rhat: Rank-normalised split R-hat, ``(K,)``.
        ess_bulk: The effective sample size of the bulk, ``(K,)``.
        ess_tail: The effective sample size of the tails, the smaller of the two, ``(K,)``.
        converged: True if every R-hat is at most 1.01 and every effective sample size at least as large as asked for.
        divergences: The number of divergent trajectories after the warm-up.
        acceptance: The mean acceptance of the chains' transitions, between 0 and 1, per set of coordinates.
        chance: The mean acceptance of draws of the guide, between 0 and 1.
        sweeps: The number of sweeps, those of the warm-up included.
        seconds: The wall time.
        guide: The guide that the chains started from.

    Example::

        >>> import pyro, pyro_flows as pf
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> found = pf.sample(model, model, num_draws=1000, progress=False)
        >>> found.converged, found.names, found.rhat.shape, len(found.flat["x"]) >= 1000
        (True, ['x'], torch.Size([1]), True)
    """

    draws: dict[str, Tensor]
    names: list[str]
    rhat: Tensor
    ess_bulk: Tensor
    ess_tail: Tensor
    converged: bool
    divergences: int
    acceptance: list[float]
    chance: float
    sweeps: int
    seconds: float
    guide: Any

    @property
    def flat(self) -> dict[str, Tensor]:
        """The draws of all chains together, by site, each ``(chains * draws, *site_shape)``."""
        return {name: value.flatten(0, 1) for name, value in self.draws.items()}

    @property
    def worst(self) -> str:
        """The largest R-hat and the smallest effective sample size, in words."""
        ess = self.ess_bulk.minimum(self.ess_tail)
        highest, lowest = int(self.rhat.argmax()), int(ess.argmin())
        return (
            f"R-hat <= {float(self.rhat[highest]):.3f} ({self.names[highest]}), "
            f"ESS >= {float(ess[lowest]):,.0f} ({self.names[lowest]})"
        )

    def __repr__(self) -> str:
        chains, draws = next(iter(self.draws.values())).shape[:2]
        return (
            f"Samples({chains} chains x {draws} draws, {'converged' if self.converged else 'NOT converged'}, "
            f"{self.worst}, {self.divergences} divergences, {self.seconds:.1f} s)"
        )
