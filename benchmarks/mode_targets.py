"""Pyro models whose posteriors have several modes, with known evidence and known shares of the modes.

Most of the posteriors are constructed: the model samples from a prior and multiplies by target / prior, so that Z is
the integral of the target.  ``forty`` is the mixture of Midgley et al. (2022, arXiv:2208.01893), as in their code.
``shells`` are the twin shells of Feroz, Hobson and Bridges (2009, doi:10.1111/j.1365-2966.2009.14548.x).  ``labels-2``
and ``labels-3`` are mixtures whose components have no order.  The posteriors of ``targets.py`` have log Z from
``evidence.csv``, and no known modes.

Space is divided into regions, one for each mode, and the measure is each region's share of the posterior.  ``report``
compares every log Z and every share with other computations.
"""

import csv
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import evidence
import pyro
import pyro.distributions as dist
import targets
import torch
from pyro import poutine
from pyro.distributions import constraints
from targets import Draws
from torch import Tensor

Density = Callable[[Tensor], Tensor]  # from (*batch, D) to (*batch,)

NAMES = "forty", "two-2", "two-10", "two-50", "labels-2", "labels-3", "angles", "spike", "shell", "shells"
LABELS = {  # log Z and its standard error, by importance sampling from ``proposal``
    "labels-2": (-93.2518, 0.0003),
    "labels-3": (-121.1019, 0.0005),
}
CENTRES = {"labels-2": (-3.0, 3.0), "labels-3": (-3.0, 0.0, 3.0)}
POINTS, NOISE = 60, 0.5  # number and standard deviation of the mixtures' data
RADIUS, WIDTH, APART = 2.0, 0.1, 3.5  # radius and width of a shell, half the distance between two centres
SEPARATION = 4.0  # half the distance between the two modes, in standard deviations
ANGLES = 3.0, 3.0 - math.pi  # centres of the modes of the first angle
GRID = 2000  # points of a grid per dimension


@dataclass(frozen=True)
class ModeTarget:
    """Posterior with known evidence and modes.

    Attributes:
        name: The name in tables.
        dim: The number of latents.
        model: The Pyro model, without arguments.
        log_evidence: log Z.
        error: Its standard error; zero if it is exact.
        shares: The posterior probability of each region, ``(K,)``; empty without regions.
        regions: From draws of the latents to the index of each draw's region, ``(N,)``.
    """

    name: str
    dim: int
    model: Callable[[], None]
    log_evidence: float
    error: float
    shares: Tensor
    regions: Callable[[Draws], Tensor]


def load(name: str) -> ModeTarget:
    """Return a target by name: one of ``NAMES`` or of ``targets.NAMES``."""
    if name in targets.NAMES:
        return _known(name)
    if name not in NAMES:
        raise ValueError(f"load: name must be one of {', '.join(NAMES + targets.NAMES)}, got {name!r}.")
    family, _, size = name.partition("-")
    build: Callable[..., ModeTarget] = globals()[f"_{family}"]
    return build(int(size)) if size else build()


def _known(name: str) -> ModeTarget:
    with evidence.OUT.open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["target"] == name)
    target = targets.load(name)
    truth = float(row["log_evidence"]), float(row["standard_error"])
    return ModeTarget(name, target.dim, target.model, *truth, torch.zeros(0), lambda draws: torch.zeros(0))


def _constructed(dim: int, target: Density, scale: float) -> Callable[[], None]:
    """Return a model with prior N(0, scale^2 I) whose joint density is the target's."""
    prior = dist.Normal(torch.zeros(dim), scale).to_event(1)

    def model() -> None:
        x = pyro.sample("x", prior)
        pyro.factor("target", target(x) - prior.log_prob(x))

    return model


@dataclass(frozen=True)
class Mixture:
    """Mixture of Gaussians with weights (K,), means (K, D) and scales (K, D); the weights need not sum to 1."""

    weights: Tensor
    means: Tensor
    scales: Tensor

    def parts(self, x: Tensor) -> Tensor:
        """Return each component's log-density with its weight, ``(*batch, K)``."""
        components = dist.Normal(self.means, self.scales).to_event(1)
        return components.log_prob(x.unsqueeze(-2)) + self.weights.log()

    def log_density(self, x: Tensor) -> Tensor:
        return self.parts(x).logsumexp(-1)

    def regions(self, draws: Draws) -> Tensor:
        """Return the component with the highest responsibility for each draw."""
        return torch.cat([self.parts(x).argmax(-1) for x in draws["x"].split(10_000)])

    def proposal(self, number: int, wider: float) -> tuple[Draws, Tensor]:
        """Draw from the mixture with equal weights and scales times ``wider``."""
        equal = torch.full_like(self.weights, 1 / len(self.weights))
        other = Mixture(equal, self.means, self.scales * wider)
        index = torch.randint(len(equal), (number,))
        x = other.means[index] + other.scales[index] * torch.randn(number, other.means.shape[-1])
        return {"x": x}, torch.cat([other.log_density(part) for part in x.split(10_000)])


def mixture(name: str) -> Mixture:
    """Return the mixture of Gaussians behind a target."""
    if name == "forty":
        uniform = torch.rand((40, 2), dtype=torch.float32, generator=torch.Generator().manual_seed(0)).double()
        return Mixture(torch.full((40,), 1 / 40), (uniform - 0.5) * 80, torch.full((40, 2), math.log1p(math.e)))
    if name == "spike":
        means, scales = torch.tensor([[0.0], [3.0]]), torch.tensor([[0.1], [1.0]])
        return Mixture(torch.tensor([0.3, 0.7]), means.expand(2, 5), scales.expand(2, 5))
    dim = int(name.removeprefix("two-"))
    mean = torch.full((dim,), SEPARATION / math.sqrt(dim))
    return Mixture(torch.tensor([0.5, 0.2]), torch.stack((mean, -mean)), torch.ones(2, dim))


def _of_gaussians(name: str, scale: float, shares: Tensor | None = None) -> ModeTarget:
    parts = mixture(name)
    dim, total = parts.means.shape[-1], parts.weights.sum()
    model = _constructed(dim, parts.log_density, scale)
    shares = parts.weights / total if shares is None else shares
    return ModeTarget(name, dim, model, float(total.log()), 0.0, shares, parts.regions)


def _forty() -> ModeTarget:
    return _of_gaussians("forty", 30.0, _shares_of_forty())


@lru_cache
def _shares_of_forty() -> Tensor:
    """Return the shares by a grid.  Some components overlap, so the shares of their regions differ from the weights."""
    parts, line = mixture("forty"), torch.linspace(-50.0, 50.0, 1001)
    log_density = [parts.parts(torch.cartesian_prod(row, line)) for row in line.split(10)]
    region = torch.cat([part.argmax(-1) for part in log_density])
    mass = torch.cat([part.logsumexp(-1).exp() for part in log_density])
    shares = torch.zeros(40).index_add(0, region, mass)
    return shares / shares.sum()


def _two(dim: int) -> ModeTarget:
    return _of_gaussians(f"two-{dim}", 5.0)


def _spike() -> ModeTarget:
    return _of_gaussians("spike", 3.0)


def data(name: str) -> Tensor:
    """Return the data of ``labels-2`` or ``labels-3``: the same number of points around each centre."""
    centres = torch.tensor(CENTRES[name])
    noise = torch.randn(POINTS, generator=torch.Generator().manual_seed(0), dtype=torch.float32).double()
    return centres.repeat_interleave(POINTS // len(centres)) + NOISE * noise


def _labels(number: int) -> ModeTarget:
    name = f"labels-{number}"
    y = data(name)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(number), 10.0).to_event(1))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(number)))
        scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(2.0)))
        shape = *mu.shape[:-1], POINTS, number
        which = dist.Categorical(weights.unsqueeze(-2).expand(shape))
        parts = dist.Normal(mu.unsqueeze(-2).expand(shape), scale[..., None, None])
        pyro.sample("y", dist.MixtureSameFamily(which, parts).to_event(1), obs=y)

    orders = torch.tensor(list(itertools.permutations(range(number))))

    def regions(draws: Draws) -> Tensor:
        order = draws["mu"].argsort(-1)
        return (order.unsqueeze(-2) == orders).all(-1).long().argmax(-1)

    shares = torch.full((len(orders),), 1 / len(orders))
    return ModeTarget(name, 2 * number, model, *LABELS[name], shares, regions)


def _log_angles(a: Tensor, b: Tensor) -> Tensor:
    return 8 * torch.cos(2 * (a - ANGLES[0])) + 8 * torch.cos(2 * b - a)


def _angle_model() -> None:
    zero = torch.zeros(())
    a = pyro.sample("a", dist.VonMises(zero, torch.tensor(0.5)))
    b = pyro.sample("b", dist.VonMises(zero + 1, torch.tensor(0.5)))
    pyro.factor("target", _log_angles(a, b))


def _angle_regions(draws: Draws) -> Tensor:
    """Return the nearest of two values of ``a``, and given ``a`` the nearest of two values of ``b``."""
    a, b = draws["a"], draws["b"]
    first = torch.cos(a - ANGLES[0]) > 0
    # a / 2 jumps where a wraps around, so the regions of b follow the distance of a from its mode.
    near = torch.where(first, ANGLES[0], ANGLES[1])
    away = torch.remainder(a - near + math.pi, 2 * math.pi) - math.pi
    second = torch.cos(b - (near + away) / 2) > 0
    return 2 * first.long() + second.long()


def _angles() -> ModeTarget:
    line = (torch.arange(GRID) + 0.5) / GRID * 2 * math.pi - math.pi
    grid = torch.cartesian_prod(line, line)
    draws = {"a": grid[:, 0], "b": grid[:, 1]}
    log_joint = log_density(_angle_model, draws)
    total = log_joint.logsumexp(0)
    shares = torch.zeros(4).index_add(0, _angle_regions(draws), (log_joint - total).exp())
    log_z = float(total) + 2 * math.log(2 * math.pi / GRID)
    return ModeTarget("angles", 2, _angle_model, log_z, 0.0, shares, _angle_regions)


def _log_shell(distance: Tensor) -> Tensor:
    return dist.Normal(RADIUS, WIDTH).log_prob(distance)


def _of_shells(name: str, centres: Tensor) -> ModeTarget:
    """Return one or two shells in a box from -6 to 6."""
    number, dim = centres.shape
    prior = dist.Uniform(torch.full((dim,), -6.0), torch.tensor(6.0)).to_event(1)

    def model() -> None:
        x = pyro.sample("x", prior)
        pyro.factor("shell", _log_shell((x.unsqueeze(-2) - centres).norm(dim=-1)).logsumexp(-1))

    def regions(draws: Draws) -> Tensor:
        """Return the quarter of a shell, or the nearer of two shells."""
        x = draws["x"]
        return 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long() if number == 1 else (x[:, 0] > 0).long()

    radius = torch.linspace(RADIUS - 10 * WIDTH, RADIUS + 10 * WIDTH, 10_001)
    sphere = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)  # the area of the unit sphere
    integral = (_log_shell(radius).exp() * radius ** (dim - 1)).sum() * (radius[1] - radius[0])
    log_z = float(integral.log()) + sphere + math.log(number) - dim * math.log(12)
    shares = torch.full((4 if number == 1 else 2,), 0.25 if number == 1 else 0.5)
    return ModeTarget(name, dim, model, log_z, 0.0, shares, regions)


def _shell() -> ModeTarget:
    return _of_shells("shell", torch.zeros(1, 5))


def _shells() -> ModeTarget:
    return _of_shells("shells", torch.eye(5)[:1] * torch.tensor([[APART], [-APART]]))


def log_density(model: Callable[[], None], draws: Draws) -> Tensor:
    """Return the model's log-density at draws of its latents, ``(N,)``, in their own coordinates."""
    number = len(next(iter(draws.values())))
    with pyro.plate("draws", number):
        trace = poutine.trace(poutine.condition(model, data=draws)).get_trace()
    trace.compute_log_prob()
    parts = [node["log_prob"] for node in trace.nodes.values() if node["type"] == "sample"]
    return sum((part.reshape(number, -1).sum(-1) for part in parts), torch.zeros(number))


def proposal(name: str, number: int) -> tuple[Draws, Tensor]:
    """Draw from a distribution that covers the posterior.  For labelled mixtures it covers one labelling."""
    if name.startswith("labels"):
        return _labels_proposal(name, number)
    if name == "angles":
        uniform = 2 * math.pi * torch.rand(2, number) - math.pi
        return {"a": uniform[0], "b": uniform[1]}, torch.full((number,), -2 * math.log(2 * math.pi))
    if not name.startswith("shell"):
        return mixture(name).proposal(number, {"two-50": 1.05, "spike": 1.1}.get(name, 1.2))
    direction, radii = torch.nn.functional.normalize(torch.randn(number, 5), dim=-1), dist.Normal(RADIUS, 1.2 * WIDTH)
    radius = radii.sample((number,))
    shift = 0.0 if name == "shell" else APART * (2 * torch.randint(2, (number, 1)) - 1) * torch.eye(5)[0]
    sphere = math.log(2) + 2.5 * math.log(math.pi) - math.lgamma(2.5)
    log_q = radii.log_prob(radius) - 4 * radius.log() - sphere
    return {"x": radius.unsqueeze(-1) * direction + shift}, log_q - (0.0 if name == "shell" else math.log(2))


def _labels_proposal(name: str, number: int) -> tuple[Draws, Tensor]:
    groups = torch.stack(data(name).chunk(len(CENTRES[name])))
    size, sd = groups.shape[1], (groups - groups.mean(1, keepdim=True)).square().mean().sqrt()
    mu = dist.StudentT(5.0, groups.mean(1), 1.1 * sd / math.sqrt(size)).to_event(1)
    weights = dist.Dirichlet(torch.full((len(groups),), 1 + 0.8 * size))
    log_scale = dist.StudentT(5.0, sd.log(), 1.1 / math.sqrt(2 * POINTS))
    draws = {"mu": mu.sample((number,)), "weights": weights.sample((number,))}
    draws["scale"] = log_scale.sample((number,)).exp()
    log_q = mu.log_prob(draws["mu"]) + weights.log_prob(draws["weights"])
    return draws, log_q + log_scale.log_prob(draws["scale"].log()) - draws["scale"].log()


def by_importance(target: ModeTarget, number: int) -> tuple[float, float, Tensor]:
    """Return log Z, its standard error and the shares, by importance sampling from the proposal."""
    draws, log_q = proposal(target.name, number)
    size = 20_000
    parts = [{k: v[i : i + size] for k, v in draws.items()} for i in range(0, number, size)]
    log_weights = torch.cat([log_density(target.model, part) for part in parts]) - log_q
    shares = torch.zeros(len(target.shares))
    if target.name.startswith("labels"):  # the proposal covers one labelling, and the labellings are alike
        ordered = (draws["mu"].diff(dim=-1) > 0).all(-1)
        log_weights = torch.where(ordered, log_weights, -math.inf) + math.log(len(shares))
    mean = log_weights.logsumexp(0) - math.log(number)
    relative = (log_weights - mean).exp()
    shares = shares.index_add(0, target.regions(draws), relative / number)
    return float(mean), float(relative.std() / math.sqrt(number)), shares


def by_ordered(name: str, number: int, runs: int) -> tuple[float, float]:
    """Return log Z of a labelled mixture and its standard error: SMC over increasing means, times k!."""
    size, y = len(CENTRES[name]), data(name)

    def model() -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, torch.Size(), torch.Size((size,))))
        pyro.factor("prior", dist.Normal(torch.zeros(()), 10.0).log_prob(mu).sum(-1))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(size)))
        scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(2.0)))
        parts = dist.Normal(mu.unsqueeze(-2), scale[..., None, None]).log_prob(y.unsqueeze(-1))
        pyro.factor("y", (parts + weights.log().unsqueeze(-2)).logsumexp(-1).sum(-1))

    ordered = targets.Target(name, 2 * size, model, lambda draws: {})
    log_z, error, _ = evidence.evidence(ordered, number, runs)
    return log_z + math.lgamma(size + 1), error


def by_grid(target: ModeTarget, reach: float) -> tuple[float, Tensor]:
    """Return log Z and the shares of a target with one latent x in two dimensions, by a grid."""
    line = (torch.arange(GRID) + 0.5) / GRID * 2 * reach - reach
    total, shares = torch.zeros(()), torch.zeros(len(target.shares))
    for rows in line.split(20):
        draws = {"x": torch.cartesian_prod(rows, line)}
        mass = log_density(target.model, draws).exp() * (2 * reach / GRID) ** 2
        total, shares = total + mass.sum(), shares.index_add(0, target.regions(draws), mass)
    return float(total.log()), shares / total


def report(name: str, draws: int) -> list[str]:
    """Return lines that compare the assumed log Z and shares of a target with other computations."""
    target = load(name)

    def line(method: str, log_z: float, error: float, shares: Tensor | None) -> str:
        worst = (
            "" if shares is None else f"   share differs by at most {float((shares - target.shares).abs().max()):.5f}"
        )
        return f"{name:9} {method:34} log Z = {log_z:9.4f} ± {error:.4f}{worst}"

    shares = " ".join(f"{share:.4f}" for share in target.shares.tolist())
    lines = [line("assumed", target.log_evidence, target.error, None) + f"   shares {shares}"]
    log_z, error, found = by_importance(target, draws)
    lines.append(line(f"importance sampling, {draws:,} draws", log_z, error, None if name in LABELS else found))
    if name in ("forty", "two-2"):
        log_z, found = by_grid(target, 60.0 if name == "forty" else 15.0)
        lines.append(line(f"grid of {GRID}^2 points", log_z, 0.0, found))
    if name in LABELS:
        lines.append(line("SMC over increasing means, times k!", *by_ordered(name, 1000, 8), None))
    return lines
