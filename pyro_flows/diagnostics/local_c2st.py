"""A test of an amortised posterior at one observation, by simulations near it.

*Neighbours.*  Half of the latents are drawn from the prior π, and half from a proposal q̃, a widened posterior of the
observation.  The rows whose data are near the observation are kept.  A selection by the data alone leaves the posterior
of each row as it is.  The proposal does not: the latents of a row follow π(θ | x) r(θ) / Z with r = (1 + q̃ / π) / 2.
The proposal of a hierarchy is one of the latents outside of its plate; those in rows follow the prior given these.

So let θ₀ be the latents of a row and θ₁, ..., θ_M draws of the guide given its data.  If the guide is right, then given
the set of all M + 1, the one that the data were simulated from is each θ_j with a probability in proportion to r(θ_j).
So statistics of true latents and of candidates picked at random are exchangeable.

*Statistics.*  A logistic regression on features φ separates the true latents of the rows from draws of the guide, with
the rows weighted by their nearness w to the observation.  At coefficients zero its gradient is
G = Σ_i w_i (φ(true_i) - E φ_i), where E φ_i is the mean over the row's candidates.  After one Newton step, the mean
squared deviation of its probabilities from 1/2 is proportional to Gᵀ V⁻¹ G.  L-C2ST uses this deviation as its
statistic.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, softplus

from .. import plots
from ..arguments import check_integers, check_numbers
from ..encoders.training_record import unjudged
from ..guides.amortised import LatentPrior, OfDatasets
from ..programs.program import Function, runs_programs
from ..programs.simulator import Simulations, Simulator
from .amortised import ObservationTest, Statistic, check_observed, largest, posteriors, simulator_of


@dataclass(frozen=True, repr=False)
class LocalC2ST(ObservationTest):
    """Test of an amortised posterior at one observation: the result of :func:`~pyro_flows.local_c2st`.

    Attributes:
        names: The names of the K elements of the latents.
        statistic: The largest of several statistics; each is 1 at its 98 % quantile for an exact guide.
        null: The same statistic for an exact guide, ``(R,)``.
        p_value: The p-value, exact for any number of simulations.
        level: The p-value at which the guide fails.
        fault: The fault that the largest statistic shows, in words.
        location: The mean of true latents minus that of draws, in standard errors, ``(K,)``.
        spread: The mean square of true latents minus that of draws, in standard errors, ``(K,)``.
        shift: The mean of true latents minus that of draws, in standard deviations of the draws, ``(K,)``.
        ratio: The standard deviation of true latents over that of draws, ``(K,)``.
        truths: True latents of the n nearest rows, standardised in each row, ``(n, K)``.
        draws: One draw of the guide for each row, standardised likewise, ``(n, K)``.
        distance: The distance of each row's posterior from that of the observation, in its standard deviations,
            ``(n,)``.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> from pyro_flows.encoders import MLPEncoder
        >>> def model(x=None):
        ...     theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1).to_event(1))
        ...     return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)
        >>> narrow = AutoFlow(model, encoder=MLPEncoder(2, context_dim=8)).setup(torch.zeros(2))  # untrained
        >>> found = local_c2st(model, narrow, observed={"x": torch.ones(2)}, num_simulations=1000)
        >>> found.passed, found.p_value, found.reason[:37]
        (False, 0.001, 'The draws are not right for this data')
    """

    location: Tensor
    spread: Tensor
    shift: Tensor
    ratio: Tensor
    truths: Tensor
    draws: Tensor
    distance: Tensor

    @property
    def reason(self) -> str:
        """The result in words, which names the worst latent or the number of simulations that show no error."""
        if self.passed:
            near = f"{len(self.distance)} simulations within {float(self.distance[-1]):.2g} standard deviations"
            return f"No test finds an error for this dataset (p = {self.p_value:.2g}), by {near} of its posterior."
        shift, ratio = self.shift[self.shift.abs().argmax()], self.ratio[self.ratio.log().abs().argmax()]
        means, spreads = f"Means are off by up to {float(shift.abs()):.2g} standard deviations", f"{ratio:.2g}"
        sizes = f"{means}, spreads by a factor of {spreads}"
        return f"The draws are not right for this dataset (p = {self.p_value:.2g}): {self.fault}. {sizes}."

    def plot(self) -> Any:
        """Plot the latents near the observation and the statistic with :func:`pyro_flows.plots.local_c2st`."""
        return plots.local_c2st(self)


@runs_programs
@torch.no_grad()
@unjudged()
def local_c2st(
    model: Function,
    guide: Any,
    *args: Any,
    observed: dict[str, Tensor],
    num_simulations: int = 20_000,
    num_samples: int = 31,
    num_null: int = 999,
    level: float = 0.01,
    **kwargs: Any,
) -> LocalC2ST:
    """Test an amortised guide at one observation, by new simulations near it.

    Over the simulations whose data are near the observation, the true latents and the guide's draws must have the same
    distribution.  A classifier that is weighted by the nearness separates them: a local classifier two-sample test
    (Linhart, Gramfort, Rodrigues 2023, arXiv:2306.03580), in the coordinates of the flow's base and of each latent.  It
    is a logistic regression after one Newton step, with quadratic and periodic features.  The largest of its statistics
    is compared with those of draws in place of the true latents, so that the p-value is exact.

    Half of the simulations take their latents from the prior, and half from a widened posterior of the observation,
    whose effect on the null distribution is computed.  No likelihood is evaluated.

    Of a hierarchy it tests the latents outside of the plate, and those in one row at random.  The posterior of the
    observation then proposes only those outside of the plate.

    Args:
        model: A Pyro model that takes its data by arguments, as for :func:`~pyro_flows.fit_amortized`.
        guide: An ``AutoFlow`` with an encoder, or an ``AutoPlateFlow`` with a ``global_encoder``.
        *args: The model's arguments without the data.
        observed: The observation, by the names of the model's arguments.
        num_simulations: The number of simulations, at least 1000.  The nearest 6 % of them are used.
        num_samples: The number of the guide's draws per simulation, at least 10.
        num_null: The number R of null statistics, at least 100.
        level: The p-value at which the guide fails.

    Returns:
        The :class:`~pyro_flows.diagnostics.LocalC2ST`.

    Raises:
        TypeError: If ``observed`` holds no tensors.
        ValueError: As for :func:`~pyro_flows.calibrate`, if ``observed`` is not one dataset of the model, or if no
            simulations are near it.  Then :func:`~pyro_flows.misspecification` tells more.
        FloatingPointError: If the guide's draws for ``observed`` are not finite.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow, fit_amortized
        >>> from pyro_flows.encoders import MLPEncoder
        >>> def model(x=None):
        ...     theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1).to_event(1))
        ...     return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)
        >>> guide = AutoFlow(model, encoder=MLPEncoder(2, context_dim=8))
        >>> fit = fit_amortized(model, guide, simulations=200, max_epochs=2, progress=False)
        >>> local_c2st(model, guide, observed={"x": torch.ones(2)}, num_simulations=1000).null.shape
        torch.Size([999])
    """
    check_integers("local_c2st", 1000, num_simulations=num_simulations)
    check_integers("local_c2st", 10, num_samples=num_samples)
    check_integers("local_c2st", 100, num_null=num_null)
    check_numbers("local_c2st", above=0, below=1, level=level)
    simulator = simulator_of("local_c2st", model, guide, args, kwargs)
    check_observed(guide, simulator, observed)
    rows = [max(LOCAL.rows, round(share * num_simulations)) for share in LOCAL.shares]
    one = {name: value.unsqueeze(0) for name, value in observed.items()}
    near = neighbours_of(guide, simulator, one, num_simulations, rows[-1], num_samples)
    return scored(near, rows, num_null, level)


@dataclass(frozen=True)
class Local:
    """Constants of nearness, of the features, and of their statistics.

    Attributes:
        shares: The shares of the simulations that are looked at, the nearest few and the nearest many.
        rows: The fewest rows to look at.
        wide: The scale of the proposal's base: tails of the posterior are simulated too.
        pilot: The share of the simulations that define nearness.
        points: Base points whose images tell how near two posteriors are.
        raw: Numbers of a dataset up to which they count next to the context.
        fewest: Rows that can be tested.
        tilt: Nats at which the log of r is cut off; narrow posteriors of 30 latents reach more than 50.
        near: Standard deviations of the posterior up to which a quarter of the rows must lie.
        same: A spread of the nearest rows, relative to all rows, below which they are equal.
        outside: How far an observation may lie from the mean of the rows' data, relative to the farthest row.
        cut: The standard deviations at which coordinates are cut off: one draw in a heavy tail must not decide.
        frequencies: Those of the features of a latent's shape.
        waves: The random features of the joint shape.
        paired: The latents beyond which pairs are left out.
        ridge: The ridge of the regression of latents on data, per row.
        shrunk: The ridge of V, relative to its mean eigenvalue.
    """

    shares: tuple[float, ...] = (0.015, 0.06)
    rows: int = 50
    wide: float = 1.5
    pilot: float = 0.1
    points: int = 4
    raw: int = 100
    fewest: int = 20
    tilt: float = 1e4
    near: float = 3.0
    same: float = 1e-3
    outside: float = 2.0
    cut: float = 5.0
    frequencies: tuple[float, ...] = (1.5, 2.5)
    waves: int = 48
    paired: int = 40
    ridge: float = 1e-3
    shrunk: float = 0.01


LOCAL = Local()


class Neighbours(NamedTuple):
    """The n simulations nearest to an observation, each with its true latents and M draws of the guide.

    Attributes:
        names: The names of the K numbers of the latents.
        numbers: The numbers of the M + 1 candidates, the true ones first, ``(n, M + 1, K)``.
        base: Their coordinates in the flow's base, ``(n, M + 1, D)``.
        log_weights: The logarithm of r, ``(n, M + 1)``.
        distance: The distance of each row's posterior from that of the observation, in its standard deviations,
            ``(n,)`` in ascending order.
    """

    names: list[str]
    numbers: Tensor
    base: Tensor
    log_weights: Tensor
    distance: Tensor


def neighbours_of(
    guide: Any, simulator: Simulator, observed: dict[str, Tensor], num_simulations: int, number: int, num_samples: int
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
    here, first = posteriors(guide, simulator, observed), round(LOCAL.pilot * num_simulations)
    pilot = simulator.draw(first)
    pilot = pilot.take(pilot.has_finite_data)
    if len(pilot) < LOCAL.fewest:
        must = f"at least {LOCAL.fewest} of {first} simulations must have finite data, got {len(pilot)}"
        raise ValueError(f"{simulator.caller}: {must}. Increase num_simulations, or correct the model.")
    nearness = Nearness(here, observed, posteriors(guide, simulator, pilot.data), pilot)
    proposal = Proposal(simulator, here)
    drawn = proposal.simulate(num_simulations - first)
    drawn = drawn.take(drawn.has_finite_data)
    of_drawn = posteriors(guide, simulator, drawn.data)
    distance, order = (part[:number] for part in nearness(of_drawn, drawn.data).sort())
    of_rows, rows = of_drawn.take(order), drawn.take(order)
    if fault := nearness.remoteness(distance, _columns(of_rows, rows.data)):
        args, kwargs = simulator.arguments({name: value[0] for name, value in observed.items()})
        guide.sample(100, *args, **kwargs)  # its error tells more if the draws are not finite
        way = "Call misspecification(model, guide, observed=...) to see whether the model makes such data; if so, use "
        way += f"more than num_simulations={num_simulations}"
        raise ValueError(f"{simulator.caller}: observed must lie near some simulations, but {fault}. {way}.")
    truth, _ = of_rows.pack(of_rows.pick(rows.latents))
    z = torch.cat((truth[None], of_rows.q.sample((num_samples,))))  # (M + 1, n, D)
    log_weights = proposal.log_weights(z.flatten(0, 1)).reshape(z.shape[:2])
    numbers, base = of_rows.numbers(z).transpose(0, 1), of_rows.q.coordinates(z).transpose(0, 1)
    return Neighbours(here.labels, numbers, base, log_weights.T, distance)


class Proposal:
    """The distribution of simulated latents: half from the prior, half from a widened posterior of the observation.

    All are drawn from the prior if its density is unknown, since the model draws other sites before the latents.

    Args:
        simulator: The model.
        here: The posterior of the observation.
    """

    def __init__(self, simulator: Simulator, here: OfDatasets) -> None:
        self.simulator, self.of = simulator, here.shared
        self.q = self.of.widened(LOCAL.wide)
        self.prior = LatentPrior(simulator, list(self.of.shapes))
        self.is_mixed = self.prior.is_complete and bool(self.log_ratio(self._near(20)).isfinite().all())

    def simulate(self, number: int) -> Simulations:
        """Draw latents and data."""
        near = int((torch.rand(number) < 0.5).sum()) if self.is_mixed else 0
        if not near:
            return self.simulator.draw(number)
        far = self.simulator.draw(number - near) if near < number else None
        drawn = self.simulator.draw(near, self.of.values(self._near(near)))
        return far.join(drawn) if far else drawn

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
        ratio = self.log_ratio(z[:, : self.q.event_shape[0]]).nan_to_num(-LOCAL.tilt).clamp(-LOCAL.tilt, LOCAL.tilt)
        return softplus(ratio) - math.log(2)


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
        self._here, self._own = here, _columns(here, observed)
        self._points = here.q.noise((LOCAL.points, 1))
        draws = here.q.sample((500,))[:, 0]
        self._whiten = _whitening(draws - draws.mean(0))
        rows = _columns(of_pilot, pilot.data)
        z, _ = of_pilot.pack(of_pilot.pick(pilot.latents))
        kept = z.isfinite().all(-1) & rows.isfinite().all(-1)
        rows, z = rows[kept], z[kept]
        self._loc, self._scale = rows.mean(0), rows.std(0).clamp(min=1e-9)
        features = self._features(rows)
        gram = features.T @ features
        gram = gram + LOCAL.ridge * len(z) * torch.eye(len(gram)).to(gram)
        self._weights = torch.linalg.solve(gram, features.T @ z)
        self._whiten_rest = _whitening(z - features @ self._weights)

    def _features(self, rows: Tensor) -> Tensor:
        x = ((rows - self._loc) / self._scale).clamp(-LOCAL.cut, LOCAL.cut)
        return torch.cat((torch.ones_like(x[:, :1]), x, x**2), -1)

    def __call__(self, of: OfDatasets, data: dict[str, Tensor]) -> Tensor:
        """Return the distance of each dataset, ``(N,)``, infinite if the guide fails on it."""
        moved = of.q.place(self._points) - self._here.q.place(self._points)
        square = (moved @ self._whiten).square().sum(-1).mean(0)
        near, here = (self._features(columns) @ self._weights for columns in (_columns(of, data), self._own))
        square = (square + ((near - here) @ self._whiten_rest).square().sum(-1)) / (2 * moved.shape[-1])
        return square.sqrt().nan_to_num(torch.inf)

    def remoteness(self, distance: Tensor, rows: Tensor) -> str:
        """Return in words why the rows nearest to the observation are not near it, or an empty string.

        The second reason sees data to which the guide's posterior and the regression are blind, such as huge numbers.

        Args:
            distance: Their distances, ``(n,)`` in ascending order.
            rows: The columns of their data, ``(n, F)``.
        """
        number = max(1, len(distance) // 4)
        if not distance[number - 1] <= LOCAL.near:
            return (
                f"the nearest {number} are up to {distance[number - 1]:.2g} standard deviations of its posterior away"
            )
        columns = torch.cat((rows, self._own)).double()
        spread = columns.std(0).maximum(LOCAL.same * self._scale)  # rows of equal data differ by round-off
        off = ((columns - columns.mean(0)) / spread.clamp(min=1e-30)).abs().amax(1)
        is_inside = off[-1] <= max(1.0, LOCAL.outside * float(off[:-1].max()))
        return "" if is_inside else f"its data lie outside of those of the nearest {len(rows)}"


def _columns(of: OfDatasets, data: dict[str, Tensor]) -> Tensor:
    """Return the contexts of N datasets, and their numbers if they are few, ``(N, F)``."""
    assert of.context is not None
    flat = [x.reshape(len(x), -1).to(of.context) for x in data.values()]
    return torch.cat([of.context, *(x for x in flat if x.shape[1] <= LOCAL.raw)], -1)


def _whitening(rest: Tensor) -> Tensor:
    """Return W such that the rows of ``rest @ W`` have about unit covariance, ``(D, D)``."""
    cov = rest.T @ rest / len(rest)
    if not cov.isfinite().all():  # so that distances are infinite
        return torch.full_like(cov, torch.nan)
    cov = cov + 1e-6 * cov.diagonal().mean().clamp(min=1e-30) * torch.eye(len(cov)).to(cov)
    values, vectors = torch.linalg.eigh(cov)
    return vectors / values.clamp(min=1e-30).sqrt()


def scored(found: Neighbours, rows: list[int], repeats: int, level: float) -> LocalC2ST:
    """Compare all statistics of true latents with those of R sets of candidates picked at random.

    Args:
        found: The rows.
        rows: The numbers of nearest rows to look at.
        repeats: The number R of picks.
        level: The p-value at which the true latents fail.
    """
    names, shares = found.names, found.log_weights.softmax(1)
    picks = torch.cat((torch.zeros_like(shares[:, :1], dtype=torch.long), shares.multinomial(repeats, True)), 1).T
    standard = _standardised(found.numbers, shares)
    base = found.base.nan_to_num(LOCAL.cut, LOCAL.cut, -LOCAL.cut).clamp(-LOCAL.cut, LOCAL.cut)
    named = _named(standard, names)
    scores: list[Statistic] = []
    for number in rows:
        part = _Choices(shares[:number], picks[:, :number], _weights(found.distance, number))
        scores += [part.largest(features, faults) for features, faults in named if faults]
        scores += [part.joint(features) for features in (_quadratic(base), _waves(base))]
    moments = named[0][0]
    z, mean = (sums[0, : 2 * len(names)].reshape(2, -1) for sums in (part.standardised(moments), part.sums(moments)[0]))
    shift, more = mean / part.weights.sum()
    ratio = (1 + more).clamp(min=0).sqrt()  # candidates have the mean square 1
    first = standard[torch.arange(len(standard)).to(picks), picks[1]]
    shown = z[0], z[1], shift, ratio, standard[:, 0], first, found.distance
    return LocalC2ST(names, *largest(scores, 0, level), *shown)


class _Choices(NamedTuple):
    """Rows with a choice of one candidate for each.

    Attributes:
        shares: The probability of each candidate to be the true one, ``(n, M + 1)``.
        picks: The true candidates, and R random choices, ``(R + 1, n)``.
        weights: The weights of the rows, ``(n,)``.
    """

    shares: Tensor
    picks: Tensor
    weights: Tensor

    def sums(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient G of each choice, ``(R + 1, P)``, and its covariance over choices, ``(P, P)``."""
        values = features[: len(self.weights)]  # (n, M + 1, P)
        centred = values - (self.shares.unsqueeze(-1) * values).sum(1, keepdim=True)
        scale = self.weights.unsqueeze(-1) * self.shares.sqrt()
        table, spread = (part.flatten(0, 1) for part in (centred, scale.unsqueeze(-1) * centred))
        places = self.picks + values.shape[1] * torch.arange(len(values)).to(self.picks)
        each = self.weights.to(table).expand(len(places), -1).contiguous()
        total = embedding_bag(places, table.contiguous(), mode="sum", per_sample_weights=each)
        return total, spread.T @ spread

    def standardised(self, features: Tensor) -> Tensor:
        """Return each feature's gradient over its standard deviation, ``(R + 1, P)``."""
        total, variance = self.sums(features)
        return total / variance.diagonal().clamp(min=1e-12).sqrt()

    def largest(self, features: Tensor, faults: list[tuple[str, str]]) -> Statistic:
        """Return the largest standardised gradient of all features."""
        z = self.standardised(features)
        best = int(z[0].abs().argmax())
        return Statistic(z.abs().amax(1), faults[best][int(z[0, best] < 0)])

    def joint(self, features: Tensor) -> Statistic:
        """Return the square root of Gᵀ V⁻¹ G."""
        total, variance = self.sums(features)
        ridge = LOCAL.shrunk * variance.diagonal().mean().clamp(min=1e-12)
        factor = torch.linalg.cholesky(variance + ridge * torch.eye(len(variance)).to(variance))
        size = torch.linalg.solve_triangular(factor, total.T, upper=False).norm(dim=0)
        return Statistic(size, "the joint distribution of the draws is wrong", weight=0.5)  # a named latent tells more


def _weights(distance: Tensor, number: int) -> Tensor:
    """Return weights that fall to zero at the row after the last, ``(number,)``."""
    reach = distance[min(number, len(distance) - 1)].clamp(min=1e-12)
    return 1 - 0.99 * (distance[:number] / reach).clamp(max=1).square()


def _standardised(numbers: Tensor, shares: Tensor) -> Tensor:
    """Return numbers ``(n, M + 1, K)`` minus their mean in each row, over their standard deviation there."""
    loc = (shares.unsqueeze(-1) * numbers).sum(1, keepdim=True)
    scale = (shares.unsqueeze(-1) * (numbers - loc).square()).sum(1, keepdim=True).sqrt()
    return ((numbers - loc) / scale).nan_to_num(0.0, LOCAL.cut, -LOCAL.cut).clamp(-LOCAL.cut, LOCAL.cut)


def _named(t: Tensor, names: list[str]) -> list[tuple[Tensor, list[tuple[str, str]]]]:
    """Return features of standardised numbers, ``(n, M + 1, P)``: moments, pairs, and shapes of single latents.

    Each has two faults, which it shows if true latents have more of it than draws, and if they have less.
    """
    own = [f"the draws of {name}" for name in names]
    moments, of_moments = [t, t**2], [(f"{one} lie too low", f"{one} lie too high") for one in own]
    of_moments += [(f"{one} lie too narrow", f"{one} lie too wide") for one in own]
    if len(names) > 1:
        moments.append((t**2).sum(-1, keepdim=True))
        of_moments.append(("the draws of all latents lie too narrow", "the draws of all latents lie too wide"))
    pairs = list(itertools.combinations(range(len(names)), 2)) if len(names) <= LOCAL.paired else []
    first, second = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    words = [f"the correlation of the draws of {names[a]} and {names[b]} is too" for a, b in pairs]
    waves = [wave(frequency * t) for frequency in LOCAL.frequencies for wave in (torch.cos, torch.sin)]
    fault = [2 * (f"the distribution of {one} has a wrong shape",) for one in own]
    return [
        (torch.cat(moments, -1), of_moments),
        (t[..., first] * t[..., second], [(f"{word} low", f"{word} high") for word in words]),
        (torch.cat(waves, -1), fault * len(waves)),
    ]


def _quadratic(u: Tensor) -> Tensor:
    size = u.shape[-1]
    first, second = torch.triu_indices(size, size) if size <= LOCAL.paired else torch.arange(size).expand(2, -1)
    return torch.cat((u, u[..., first] * u[..., second]), -1)


def _waves(u: Tensor) -> Tensor:
    phase = u @ (torch.randn(u.shape[-1], LOCAL.waves).to(u) * 1.5 / u.shape[-1] ** 0.5)
    return torch.cat((phase.cos(), phase.sin()), -1)
