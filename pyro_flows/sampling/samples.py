"""The record of draws of a posterior that Markov chains have made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Draws of a posterior, and how far their chains have converged: the result of :func:`~pyro_flows.sample`.

    Attributes:
        draws: Draws of latents and deterministic sites: name -> ``(chains, draws, *site_shape)``.
        names: The names of the K quantities that were looked at; angles count as their cosine and sine.
        rhat: Rank-normalised split R-hat of each, ``(K,)``.
        ess_bulk: The effective sample size of its bulk, ``(K,)``.
        ess_tail: That of its tails, the smaller of the two.
        converged: True if every R-hat is at most 1.01 and every effective sample size as large as asked for.
        divergences: In how many trajectories after the warm-up the energy went astray.
        acceptance: The mean acceptance of the chains' moves, between 0 and 1, in each of their coordinates.
        chance: The mean chance of a draw of the guide to be accepted as a chain's next place.
        sweeps: How often the chains were moved.
        seconds: How long sampling took, without the fit.
        guide: The guide whose draws the chains started from.
        fit: Its fit, None if the guide was given.

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
    fit: Any = None

    @property
    def flat(self) -> dict[str, Tensor]:
        """The draws of all chains together, by site, each ``(chains * draws, *site_shape)``."""
        return {name: value.flatten(0, 1) for name, value in self.draws.items()}

    @property
    def worst(self) -> str:
        """The largest R-hat and the smallest effective sample size, in words."""
        ess, lowest = self.ess_bulk.minimum(self.ess_tail), int(self.ess_bulk.minimum(self.ess_tail).argmin())
        highest = int(self.rhat.argmax())
        return (
            f"R-hat <= {float(self.rhat[highest]):.3f} ({self.names[highest]}), "
            f"ESS >= {float(ess[lowest]):,.0f} ({self.names[lowest]})"
        )

    def __repr__(self) -> str:
        chains, draws = next(iter(self.draws.values())).shape[:2]
        fit = f" and {self.fit.seconds:.1f} s for the fit" if self.fit is not None else ""
        return (
            f"Samples({chains} chains x {draws} draws, {'converged' if self.converged else 'NOT converged'}, "
            f"{self.worst}, {self.divergences} divergences, {self.seconds:.1f} s{fit})"
        )
