"""Simulations near an observation, and draws of a guide that are exchangeable with their true latents.

Half of the latents are drawn from the prior π, and half from a proposal q̃, a widened posterior of the observation.  The
rows whose data are near the observation are kept.  A selection by the data alone leaves the posterior of each row as it
is.  The proposal does not: the latents of a row follow π(θ | x) r(θ) / Z with r = (1 + q̃ / π) / 2.

The proposal of a hierarchy is one of the latents outside of its plate; those in rows follow the prior given these.

So let θ₀ be the latents of a row and θ₁, ..., θ_M draws of the guide given its data.  If the guide is right, then given
the set of all M + 1, the one that the data were simulated from is each θ_j with a probability in proportion to r(θ_j).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..guides.amortised import LatentPrior, OfDatasets
from ..programs.simulator import Simulations, Simulator
from .amortised import posteriors


@dataclass(frozen=True)
class Near:
    """Constants of nearness.

    Attributes:
        wide: The scale of the proposal's base: tails of the posterior are simulated too.
        pilot: The share of the simulations that define nearness.
        points: Base points whose images tell how near two posteriors are.
        raw: Numbers of a dataset up to which they count next to the context.
        far: Standard deviations at which features of a dataset are cut off.
        ridge: The ridge of the regression of latents on data, per row.
        fewest: Rows that can be tested.
        tilt: Nats at which the log of r is cut off; narrow posteriors of 30 latents reach more than 50.
        near: Standard deviations of the posterior up to which a quarter of the rows must lie.
        same: A spread of the nearest rows, relative to all rows, below which they are equal.
        outside: How far an observation may lie from the mean of the rows' data, relative to the farthest row.
    """

    wide: float = 1.5
    pilot: float = 0.1
    points: int = 4
    raw: int = 100
    far: float = 5.0
    ridge: float = 1e-3
    fewest: int = 20
    tilt: float = 1e4
    near: float = 3.0
    same: float = 1e-3
    outside: float = 2.0


NEAR = Near()


class Neighbours(NamedTuple):
    """The n simulations nearest to an observation, each with its true latents and M draws of the guide.

    Attributes:
        names: The names of the K numbers of the latents.
        latents: Packed latents of the M + 1 candidates, the true ones first, ``(n, M + 1, D)``.
        numbers: Their numbers, ``(n, M + 1, K)``.
        base: Their coordinates in the flow's base, ``(n, M + 1, D)``.
        log_weights: The logarithm of r, ``(n, M + 1)``.
        distance: The distance of each row's posterior from that of the observation, in its standard deviations,
            ``(n,)`` in ascending order.
    """

    names: list[str]
    latents: Tensor
    numbers: Tensor
    base: Tensor
    log_weights: Tensor
    distance: Tensor


class Proposal:
    """The distribution of simulated latents: half from the prior, half from a widened posterior of the observation.

    All are drawn from the prior if its density is unknown, since the model draws other sites before the latents.

    Args:
        simulator: The model.
        here: The posterior of the observation.
    """

    def __init__(self, simulator: Simulator, here: OfDatasets) -> None:
        self.simulator, self.of = simulator, here.shared
        self.q = self.of.widened(NEAR.wide)
        self.prior = LatentPrior(simulator, list(self.of.shapes))
        self.is_mixed = self.prior.is_complete and bool(self.log_ratio(self._near(20)).isfinite().all())

    def simulate(self, number: int) -> Simulations:
        """Draw latents and data."""
        near = int((torch.rand(number) < 0.5).sum()) if self.is_mixed else 0
        parts = []
        if near < number:
            parts.append(self.simulator.draw(number - near))
        if near:
            parts.append(self.simulator.draw(near, self.of.values(self._near(near))))
        return parts[0].join(parts[1]) if len(parts) > 1 else parts[0]

    def _near(self, number: int) -> Tensor:
        found: Tensor = self.q.sample((number,))[:, 0]
        return found

    def log_ratio(self, z: Tensor) -> Tensor:
        """Return log q̃(z) / π(z), ``(N,)`` in nats, of packed latents ``(N, D)``."""
        values = self.of.values(z)
        _, log_det = self.of.pack(values)
        log_prior = self.prior.run(len(z), values)[1] - log_det
        found: Tensor = self.q.log_prob(z[:, None])[:, 0] - log_prior
        return found

    def log_weights(self, z: Tensor) -> Tensor:
        """Return log r, ``(N,)``, of packed latents that begin with those of the proposal, ``(N, D)``."""
        if not self.is_mixed:
            return torch.zeros_like(z[:, 0])
        ratio = self.log_ratio(z[:, : self.q.event_shape[0]]).nan_to_num(-NEAR.tilt).clamp(-NEAR.tilt, NEAR.tilt)
        return torch.nn.functional.softplus(ratio) - math.log(2)


class Nearness:
    """The distance of datasets from an observation, in standard deviations of its posterior.

    It adds two distances: of the images of a few base points under the flow, and of the latents' means by a regression
    on context and data.  The second sees data that the guide ignores.

    Args:
        here: The posterior of the observation.
        observed: The observation, by the model's arguments, each ``(1, *shape)``.
        of_pilot: The posteriors of simulations from the prior, on which the regression is fitted.
        pilot: These simulations.
    """

    def __init__(self, here: OfDatasets, observed: dict[str, Tensor], of_pilot: OfDatasets, pilot: Simulations) -> None:
        self.here, self.observed = here, observed
        self.points = here.q.noise((NEAR.points, 1))
        draws = here.q.sample((500,))[:, 0]
        self.whiten = _whitening(draws - draws.mean(0))
        rows = _columns(of_pilot, pilot.data)
        z, _ = of_pilot.pack(of_pilot.pick(pilot.latents))
        kept = z.isfinite().all(-1) & rows.isfinite().all(-1)
        rows, z = rows[kept], z[kept]
        self.loc, self.scale = rows.mean(0), rows.std(0).clamp(min=1e-9)
        features = self._features(rows)
        gram = features.T @ features
        gram = gram + NEAR.ridge * len(z) * torch.eye(len(gram)).to(gram)
        self.weights = torch.linalg.solve(gram, features.T @ z)
        self.whiten_rest = _whitening(z - features @ self.weights)

    def _features(self, rows: Tensor) -> Tensor:
        x = ((rows - self.loc) / self.scale).clamp(-NEAR.far, NEAR.far)
        return torch.cat((torch.ones_like(x[:, :1]), x, x**2), -1)

    def __call__(self, of: OfDatasets, data: dict[str, Tensor]) -> Tensor:
        """Return the distance of each dataset, ``(N,)``, infinite if the guide fails on it."""
        moved = of.q.place(self.points) - self.here.q.place(self.points)
        square = (moved @ self.whiten).square().sum(-1).mean(0)
        pairs = (of, data), (self.here, self.observed)
        near, here = (self._features(_columns(*pair)) @ self.weights for pair in pairs)
        square = (square + ((near - here) @ self.whiten_rest).square().sum(-1)) / (2 * moved.shape[-1])
        return square.sqrt().nan_to_num(torch.inf)


def _columns(of: OfDatasets, data: dict[str, Tensor]) -> Tensor:
    """Return the contexts of N datasets, and their numbers if they are few, ``(N, F)``."""
    assert of.context is not None
    columns = [of.context]
    for x in data.values():
        flat = x.reshape(len(x), -1)
        if flat.shape[1] <= NEAR.raw:
            columns.append(flat.to(columns[0]))
    return torch.cat(columns, -1)


def _whitening(rest: Tensor) -> Tensor:
    """Return W such that the rows of ``rest @ W`` have about unit covariance, ``(D, D)``."""
    cov = rest.T @ rest / len(rest)
    if not cov.isfinite().all():  # so that distances are infinite
        return torch.full_like(cov, torch.nan)
    cov = cov + 1e-6 * cov.diagonal().mean().clamp(min=1e-30) * torch.eye(len(cov)).to(cov)
    values, vectors = torch.linalg.eigh(cov)
    return vectors / values.clamp(min=1e-30).sqrt()


def _remoteness(distance: Tensor, rows: Tensor, own: Tensor, scale: Tensor) -> str:
    """Return in words why the rows nearest to an observation are not near it, or an empty string.

    The second reason sees data to which the guide's posterior and the regression are blind, such as huge numbers.

    Args:
        distance: Their distances, ``(n,)`` in ascending order.
        rows: The columns of their data, ``(n, F)``.
        own: The columns of the observation, ``(1, F)``.
        scale: The standard deviations of the columns over simulations from the prior, ``(F,)``.
    """
    number = max(1, len(distance) // 4)
    if not distance[number - 1] <= NEAR.near:
        return f"the nearest {number} are up to {distance[number - 1]:.2g} standard deviations of its posterior away"
    columns = torch.cat((rows, own)).double()
    spread = columns.std(0).maximum(NEAR.same * scale)  # rows of equal data differ by round-off in their contexts
    off = ((columns - columns.mean(0)) / spread.clamp(min=1e-30)).abs().amax(1)
    return (
        ""
        if off[-1] <= max(1.0, NEAR.outside * float(off[:-1].max()))
        else f"its data lie outside of those of the nearest {len(rows)}"
    )


def neighbours_of(
    guide: Any,
    simulator: Simulator,
    observed: dict[str, Tensor],
    *,
    num_simulations: int,
    number: int,
    num_samples: int,
) -> Neighbours:
    """Simulate, keep the nearest rows, and draw from the guide given their data.

    Args:
        guide: The guide.
        simulator: The model.
        observed: The observation, by the model's arguments, each ``(1, *shape)``.
        num_simulations: The number of simulations.
        number: The number n of rows to keep.
        num_samples: The number M of draws per row.

    Raises:
        ValueError: If too few simulations have finite data, or none are near the observation.
    """
    here, first = posteriors(guide, simulator, observed), round(NEAR.pilot * num_simulations)
    pilot = simulator.draw(first)
    pilot = pilot.take(pilot.has_finite_data)
    if len(pilot) < NEAR.fewest:
        must = f"at least {NEAR.fewest} of {first} simulations must have finite data, got {len(pilot)}"
        raise ValueError(f"{simulator.caller}: {must}. Increase num_simulations, or correct the model.")
    nearness = Nearness(here, observed, posteriors(guide, simulator, pilot.data), pilot)
    proposal = Proposal(simulator, here)
    drawn = proposal.simulate(num_simulations - first)
    drawn = drawn.take(drawn.has_finite_data)
    of_drawn = posteriors(guide, simulator, drawn.data)
    distance, order = nearness(of_drawn, drawn.data).sort()
    distance, order = distance[:number], order[:number]
    of_rows, rows = of_drawn.take(order), drawn.take(order)
    if fault := _remoteness(distance, _columns(of_rows, rows.data), _columns(here, observed), nearness.scale):
        args, kwargs = simulator.arguments({name: value[0] for name, value in observed.items()})
        guide.sample(100, *args, **kwargs)  # its error tells more if the draws are not finite
        way = "Call misspecification(model, guide, observed=...) to see whether the model makes such data; if so, use "
        way += f"more than num_simulations={num_simulations}"
        raise ValueError(f"{simulator.caller}: observed must lie near some simulations, but {fault}. {way}.")
    truth, _ = of_rows.pack(of_rows.pick(rows.latents))
    z = torch.cat((truth[None], of_rows.q.sample((num_samples,))))  # (M + 1, n, D)
    log_weights = proposal.log_weights(z.flatten(0, 1)).reshape(z.shape[:2])
    candidates = z, of_rows.numbers(z), of_rows.q.coordinates(z), log_weights
    latents, numbers, base, log_weights = (part.transpose(0, 1) for part in candidates)
    return Neighbours(here.labels, latents, numbers, base, log_weights, distance)
