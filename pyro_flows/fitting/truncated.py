"""The prior truncated to the region of a guide's posterior of some data: θ ~ p(θ) given log q(θ | x) > τ.

All but a share ε of the guide's own draws exceed the threshold τ.  Within the region the draws follow the prior, so
they are training data like all others.  Truncated proposals for scalable and hassle-free simulation-based inference
(Deistler, Goncalves, Macke 2022, arXiv:2210.04815).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_integers, check_tensors
from ..guides import AutoFlow
from ..guides.amortised import LatentPrior
from ..programs.engines import Values, in_batches
from ..programs.simulator import Simulator
from ..training import distributed

EPSILON = 1e-4


@dataclass(frozen=True)
class Observed:
    """Data of interest, near which ``fit_amortized`` draws its simulations.

    Later rounds draw latents from the prior truncated to the region of the guide's posterior of the data: truncated
    sequential neural posterior estimation (Deistler, Goncalves, Macke 2022, arXiv:2210.04815).

    Args:
        data: The data, by the names of the model's arguments.
        rounds: The number of rounds, at least 2, which share the simulations.

    Raises:
        TypeError: If the data are no tensors by name.
        ValueError: If there are fewer rounds.

    Example::

        >>> Observed({"x": torch.zeros(3)}, rounds=3).rounds
        3
    """

    data: dict[str, Tensor]
    rounds: int = 2

    def __post_init__(self) -> None:
        check_tensors("Observed", "data", self.data)
        check_integers("Observed", 2, rounds=self.rounds)


class Truncated:
    """Truncated prior of the latents.

    Args:
        simulator: The model.
        guide: A guide trained on it.
        observed: The data, by the model's arguments.
    """

    @torch.no_grad()
    def __init__(self, simulator: Simulator, guide: AutoFlow, observed: dict[str, Tensor]) -> None:
        self.guide = guide
        self.names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
        self.prior, self.given = LatentPrior(simulator, self.names), simulator.arguments(observed)
        own = self._log_q(guide.sample(10_000, *self.given[0], **self.given[1]))
        self.threshold = distributed.broadcast(lambda: torch.quantile(own, EPSILON).cpu()).to(own.device)

    @torch.no_grad()
    def draw(self, number: int, batch_size: int = 10_000) -> dict[str, Tensor]:
        """Draw ``number`` values of each latent of the guide, and of each latent before it that the guide hides.

        They are drawn from the prior by rejection.  If less than one in a thousand is kept, they are resampled from
        draws of the guide.
        """
        kept: list[dict[str, Tensor]] = []
        tried = found = 0
        while found < number and (tried < 10 * batch_size or found > tried / 1000):
            values, _ = self.prior.run(batch_size)
            inside = self._log_q(values) > self.threshold
            kept.append({name: value[inside] for name, value in values.items()})
            tried, found = tried + batch_size, found + int(inside.sum())
        if found >= number:
            return {name: torch.cat([values[name] for values in kept])[:number] for name in kept[0]}
        if hidden := kept[0].keys() - set(self.names):
            raise ValueError(
                "fit_amortized: too few of the prior's draws are near the posterior of observed to draw anew the "
                f"latent site {min(hidden)!r}, which the guide does not show. Use one that shows it, or all datasets."
            )
        return self._resampled(number)

    def _resampled(self, number: int, each: int = 1024) -> dict[str, Tensor]:
        """Draw from many draws of the guide in the region, with probabilities in proportion to prior / guide."""

        def step(_: Values, rows: int) -> Values:
            values = self.guide.sample(rows * each, *self.given[0], **self.given[1])
            log_q = self._log_q(values)
            _, log_p = self.prior.run(rows * each, values)
            weights = (log_p - log_q).where(log_q > self.threshold, -torch.inf).reshape(rows, each)
            weights = weights.where(weights.isfinite().any(1, keepdim=True), 0.0)
            first = each * torch.arange(rows, device=weights.device)
            picked = torch.distributions.Categorical(logits=weights).sample() + first
            return {name: values[name][picked] for name in self.names}

        return in_batches(step, {}, number, 100)

    def _log_q(self, values: dict[str, Tensor]) -> Tensor:
        return self.guide.log_prob(values, *self.given[0], **self.given[1])
