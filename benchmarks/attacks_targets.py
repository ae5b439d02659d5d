"""Known posteriors: the targets of ``attacks.py``.

Most posteriors are given distributions: the model is a prior times a factor, so that the posterior is exact.  The other
posteriors have data and symmetries.  They are sampled around one mode, by importance sampling from a Student t.  The
group of the symmetries then copies the draws to all modes.
"""

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.stats
import torch
from attacks_laws import Chain, Mixture, Tabulated, normal
from torch import Tensor
from torch.distributions import Distribution

Draws = dict[str, Tensor]
Program = Callable[[], Any]
Factor = Callable[[Tensor], Tensor]  # log-likelihood of latents, broadcast over leading dimensions
DRAWS = 100_000  # draws around a mode
ROUNDING = 34.0  # nats below a density at which double precision loses a term


@dataclass(frozen=True)
class Target:
    """Known posterior.

    Attributes:
        model: The Pyro model.
        truth: Returns n exact draws, ``(n, *shape)`` for each latent.
        exact: A guide that equals the posterior, up to negligible errors.
        law: The distribution of ``x``, for models of a single latent.
        log_evidence: The logarithm of the model's evidence, or None if unknown.
    """

    model: Program
    truth: Callable[[int], Draws]
    exact: Program
    law: Any = None
    log_evidence: float | None = None


def sampling(law: Distribution) -> Program:
    """Return a guide that draws ``x`` from a distribution."""

    def guide() -> None:
        pyro.sample("x", law)

    return guide


def factored(prior: Distribution, log_factor: Factor) -> Program:
    """Return a model of one latent: its prior times a factor."""

    def model() -> None:
        x = pyro.sample("x", prior)
        pyro.factor("data", log_factor(x))

    return model


def posterior(law: Distribution, prior: Distribution) -> Target:
    """Return the target whose posterior is a given distribution."""
    model = factored(prior, lambda x: law.log_prob(x) - prior.log_prob(x))
    return Target(model, lambda n: {"x": law.sample(torch.Size((n,)))}, sampling(law), law, 0.0)


def free(law: Distribution, scale: float) -> Target:
    """Return the target of an unconstrained distribution; the prior is normal with the given scale."""
    return posterior(law, normal(0.0, scale, law.event_shape[0]))


def repeated(law: Distribution, dim: int) -> Distribution:
    """Return the distribution of independent copies of a number."""
    return law.expand((dim,)).to_event(1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers for data, identical in each run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Needle(NamedTuple):
    """A narrow mode in a standard normal posterior: its share of the mass, standard deviation and place."""

    share: float
    scale: float
    loc: Tensor
    where: str

    @property
    def shown(self) -> float:
        """The expected number of draws that show it: 70,000 of the guide and 40,000 spread up to 4 times as widely."""
        dim, apart = len(self.loc), float(self.loc.square().sum())
        excess = math.log(self.share / (1 - self.share)) - dim * math.log(self.scale) + apart / 2
        reach = 2 * self.scale**2 * (excess + ROUNDING)  # the square of the distance from which it is visible
        spreads = 16 ** np.linspace(0, 1, 64)  # squares of factors
        chances = scipy.stats.ncx2.cdf(reach / spreads, dim, apart / spreads)
        return float(70_000 * chances[0] + 40_000 * chances.mean())


def needle_place(seed: int) -> Needle:
    """Return a random narrow mode in 2 to 10 dimensions, of scale .01 to .1 and share .1 to .5."""
    numbers = random.Random(seed)
    dim = numbers.choice((2, 3, 4, 5, 7, 10))
    scale, share = 0.01 * 10 ** numbers.random(), 0.1 * 5 ** numbers.random()
    where = numbers.choice(("inside", "beside"))
    way = torch.tensor([numbers.gauss(0, 1) for _ in range(dim)], dtype=torch.float64)
    size = numbers.random() if where == "inside" else (math.sqrt(dim) + numbers.uniform(1, 4)) / way.norm()
    return Needle(share, scale, way * size, where)


def needle(seed: int) -> Target:
    """Return a standard normal with a narrow mode as target."""
    share, scale, loc, _ = needle_place(seed)
    return free(Mixture([1 - share, share], [normal(0.0, 1.0, len(loc)), normal(loc, scale, len(loc))]), 3.0)


# Posteriors of data with symmetries.


def signs(dim: int) -> Tensor:
    """Return all sign changes, as matrices."""
    return torch.stack([torch.tensor(row).diag() for row in itertools.product((1.0, -1.0), repeat=dim)])


def permutations(dim: int) -> Tensor:
    """Return all permutations, as matrices; the identity is first."""
    return torch.stack([torch.eye(dim)[list(order)] for order in itertools.permutations(range(dim))])


def one(dim: int) -> Tensor:
    """Return the group of the identity alone."""
    return torch.eye(dim).unsqueeze(0)


def symmetric(prior: Distribution, log_factor: Factor, start: Tensor, group: Tensor | None = None) -> Target:
    """Return the target of a likelihood that is invariant under a group of orthogonal matrices.

    Args:
        prior: The prior of the latent vector, also invariant.
        log_factor: The log-likelihood.
        start: A point close to a mode and far from its copies.
        group: The matrices ``(G, D, D)``, the identity first.  Default: only the identity.
    """
    group = one(len(start)) if group is None else group
    copies = group @ start

    def log_density(x: Tensor) -> Tensor:
        apart = torch.stack([(x - copy).square().sum(-1) for copy in copies])
        return torch.where(apart.argmin(0) == 0, prior.log_prob(x) + log_factor(x), -torch.inf)

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        core = resampled(log_density, start)
    mean, covariance = core.mean(0), torch.cov(core.T)

    def truth(n: int) -> Draws:
        chosen = group[torch.randint(len(group), (n,))]
        return {"x": (chosen @ core[torch.randint(len(core), (n,))].unsqueeze(-1)).squeeze(-1)}

    laws = [dist.MultivariateNormal(g @ mean, g @ covariance @ g.T) for g in group]
    law = Mixture(torch.ones(len(group)) / len(group), laws)
    return Target(factored(prior, log_factor), truth, sampling(law), law)


def resampled(log_density: Factor, start: Tensor) -> Tensor:
    """Return draws from a unimodal density, by importance sampling from a Student t that adapts to it."""
    place = start.clone()
    for _ in range(30):
        score = torch.func.grad(log_density)(place)
        curvature = -torch.func.hessian(log_density)(place)
        values, vectors = torch.linalg.eigh(curvature)
        step = vectors @ ((vectors.T @ score) / values.abs().clamp_min(1e-3))
        while log_density(place + step) < log_density(place) and step.norm() > 1e-9:
            step = step / 2
        place = place + step
    loc, covariance = place, vectors @ (1 / values.abs().clamp_min(1e-3)).diag() @ vectors.T
    for number in (10_000, 10_000, 20_000, 3 * DRAWS):
        law = dist.MultivariateStudentT(torch.tensor(5.0), loc, torch.linalg.cholesky(covariance))
        x = law.sample(torch.Size((number,)))
        log_weights = torch.cat([log_density(part) - law.log_prob(part) for part in x.split(1000)])
        weights = log_weights.softmax(0)
        loc = weights @ x
        covariance = (weights.unsqueeze(-1) * (x - loc)).T @ (x - loc)
    if 1 / weights.square().sum() < DRAWS / 2:
        raise RuntimeError("resampled: the weights of the exact draws are uneven. Choose another start.")
    return x[torch.multinomial(weights, DRAWS, replacement=True)]


@functools.cache
def clusters(truth: Sequence[float], rows: int) -> Target:
    """Return the means of a mixture of equal unit normals, whose labels are not identified."""
    dim = len(truth)
    y = torch.tensor(truth).repeat(rows) + noise(rows * dim)

    def log_factor(x: Tensor) -> Tensor:
        return (dist.Normal(x.unsqueeze(-2), 1.0).log_prob(y.unsqueeze(-1)).logsumexp(-1) - math.log(dim)).sum(-1)

    return symmetric(normal(0.0, 10.0, dim), log_factor, torch.tensor(truth), permutations(dim))


@functools.cache
def squares(dim: int, rows: int, power: float = 2.0) -> Target:
    """Return the weights w of a regression on |w|^power, whose signs are not identified."""
    weights, design = torch.linspace(0.8, 1.3, dim), noise(rows, dim)
    y = design @ weights**power + 0.5 * noise(rows, seed=1)

    def log_factor(x: Tensor) -> Tensor:
        return dist.Normal(x.abs() ** power @ design.T, 0.5).log_prob(y).sum(-1)

    return symmetric(normal(0.0, 1.0, dim), log_factor, weights, signs(dim))


@functools.cache
def loadings(dim: int, rows: int) -> Target:
    """Return the loadings of one factor, whose sign is not identified."""
    weights = torch.linspace(0.6, 1.4, dim)
    y = noise(rows, 1) * weights + 0.7 * noise(rows, dim, seed=1)
    scatter = y.T @ y

    def log_factor(x: Tensor) -> Tensor:  # of Normal(0, x x' + .49), by the matrix determinant lemma
        total = 0.49 + x.square().sum(-1)
        explained = (x @ scatter * x).sum(-1) / total
        return -(rows * total.log() + (scatter.trace() - explained) / 0.49) / 2

    return symmetric(normal(0.0, 1.0, dim), log_factor, weights, torch.stack((torch.eye(dim), -torch.eye(dim))))


@functools.cache
def ranges(rows: int, at: float) -> Target:
    """Return a point observed by its distances to two anchors; its mirror image fits equally."""
    anchors, place = torch.tensor([[-2.0, 0.0], [3.0, 0.0]]), torch.tensor([0.5, at])
    y = (place - anchors).norm(dim=-1) + 0.3 * noise(rows, 2)

    def log_factor(x: Tensor) -> Tensor:
        far = (x.unsqueeze(-2) - anchors).norm(dim=-1)
        return dist.Normal(far.unsqueeze(-2), 0.3).log_prob(y).sum((-1, -2))

    return symmetric(normal(0.0, 5.0, 2), log_factor, place, torch.tensor([[1.0, 1.0], [1.0, -1.0]]).diag_embed())


@functools.cache
def network(rows: int) -> Target:
    """Return a network of two hidden units.  Their order and signs are not identified, so there are 8 modes."""
    inputs = torch.linspace(-3, 3, rows)

    def outputs(x: Tensor) -> Tensor:
        slopes, sizes = x[..., :2], x[..., 2:]
        return (sizes.unsqueeze(-2) * (slopes.unsqueeze(-2) * inputs.unsqueeze(-1)).tanh()).sum(-1)

    weights = torch.tensor([0.7, 3.0, 2.0, -1.5])
    y = outputs(weights) + 0.1 * noise(rows)
    flips = [torch.cat((s.diagonal(), s.diagonal())).diag() for s in signs(2)]
    swaps = [torch.block_diag(p, p) for p in permutations(2)]
    group = torch.stack([flip @ swap for flip in flips for swap in swaps])
    return symmetric(normal(0.0, 2.0, 4), lambda x: dist.Normal(outputs(x), 0.1).log_prob(y).sum(-1), weights, group)


@functools.cache
def logistic(dim: int, rows: int) -> Target:
    """Return the coefficients of a logistic regression."""
    weights, design = torch.linspace(-1.0, 1.0, dim), noise(rows, dim)
    y = (noise(rows, seed=1) * 1.6 < design @ weights).double()

    def log_factor(x: Tensor) -> Tensor:
        return dist.Bernoulli(logits=x @ design.T).log_prob(y).sum(-1)

    return symmetric(normal(0.0, 2.0, dim), log_factor, weights)


# Posteriors of one number, tabulated, and of two numbers.


def tabulated(log_factor: Factor, scale: float, reach: float, dim: int = 1) -> Target:
    """Return independent numbers with a normal prior and the same likelihood, truncated at ± ``reach``."""
    prior = dist.Normal(0.0, scale)
    law = repeated(Tabulated(lambda x: prior.log_prob(x) + log_factor(x), -reach, reach), dim)
    model = factored(normal(0.0, scale, dim), lambda x: log_factor(x).sum(-1))
    return Target(model, lambda n: {"x": law.sample(torch.Size((n,)))}, sampling(law), law)


def magnitude(y: float, scale: float) -> Factor:
    """Return the likelihood of y ~ Normal(|x|, scale)."""
    return lambda x: dist.Normal(x.abs(), scale).log_prob(torch.tensor(y))


def wave(rows: int, spread: float) -> Factor:
    """Return the likelihood of the phase of a sine, which is known up to full turns."""
    times = torch.linspace(0, 6, rows)
    y = (times + 0.8).sin() + spread * noise(rows)
    return lambda x: dist.Normal((x.unsqueeze(-1) + times).sin(), spread).log_prob(y).sum(-1)


def alias(rows: int, spread: float) -> Factor:
    """Return the likelihood of the frequency of a cosine at integer times; aliases and signs fit equally."""
    times = torch.arange(1.0, rows + 1)
    y = (times * 1.1).cos() + spread * noise(rows)
    return lambda x: dist.Normal((x.unsqueeze(-1) * times).cos(), spread).log_prob(y).sum(-1)


def outliers(y: Sequence[float]) -> Factor:
    """Return the likelihood of a location under Cauchy noise, for data that disagree."""
    return lambda x: dist.Cauchy(x.unsqueeze(-1), 0.5).log_prob(torch.tensor(y)).sum(-1)


def product(y: float, scale: float, low: float = -8.0) -> Chain:
    """Return the posterior of standard normal (a, b) with a above ``low``, given y ~ Normal(a b, scale)."""

    def given(a: Tensor) -> Distribution:
        precision = 1 + (a / scale).square()
        return dist.Normal((a * y / scale**2 / precision).unsqueeze(-1), precision.rsqrt().unsqueeze(-1)).to_event(1)

    def marginal(a: Tensor) -> Tensor:
        return dist.Normal(0.0, 1.0).log_prob(a) + dist.Normal(0.0, (scale**2 + a.square()).sqrt()).log_prob(
            torch.tensor(y)
        )

    return Chain(Tabulated(marginal, low, 8.0), given, 2)


def products(y: float, scale: float) -> Target:
    """Return the target of :func:`product`."""
    law = product(y, scale)
    model = factored(normal(0.0, 1.0, 2), lambda x: dist.Normal(x[..., 0] * x[..., 1], scale).log_prob(torch.tensor(y)))
    return Target(model, lambda n: {"x": law.sample(torch.Size((n,)))}, sampling(law), law)


# Conjugate posteriors.


def regression(dim: int, rows: int, shared: float = 0.0) -> Target:
    """Return the coefficients of a linear regression, whose columns share a common component."""
    design = noise(rows, dim) + shared * noise(rows, 1, seed=2)
    y = design @ torch.linspace(-1, 1, dim) + noise(rows, seed=1)
    precision = design.T @ design + torch.eye(dim) / 4
    loc = torch.linalg.solve(precision, design.T @ y)
    law = dist.MultivariateNormal(loc, precision_matrix=precision)

    def model() -> None:
        x = pyro.sample("x", normal(0.0, 2.0, dim))
        pyro.sample("y", dist.Normal(x @ design.T, 1.0).to_event(1), obs=y)

    return Target(model, lambda n: {"x": law.sample(torch.Size((n,)))}, sampling(law), law)


def normal_gamma(rows: int) -> tuple[Program, Callable[[float, float], Program]]:
    """Return the model of a mean and a precision, and its guides by factors of the precision's and mean's sd.

    Both factors are 1 for the posterior.
    """
    y = 1.5 + 2 * noise(rows)
    shape = torch.tensor(2 + rows / 2)
    loc = y.sum() / (rows + 0.1)
    rate = 2 + (y.square().sum() - (rows + 0.1) * loc.square()) / 2

    def model() -> None:
        tau = pyro.sample("tau", dist.Gamma(torch.tensor(2.0), torch.tensor(2.0)))
        mu = pyro.sample("mu", dist.Normal(0.0, (0.1 * tau).rsqrt()))
        law = dist.Normal(mu.unsqueeze(-1), tau.rsqrt().unsqueeze(-1)).expand((*mu.shape, rows))
        pyro.sample("y", law.to_event(1), obs=y)

    def guided(narrow: float, short: float) -> Program:
        def guide() -> None:
            tau = pyro.sample("tau", dist.Gamma(shape / narrow**2, rate / narrow**2))
            pyro.sample("mu", dist.Normal(loc, short * ((rows + 0.1) * tau).rsqrt()))

        return guide

    return model, guided


def precisions(rows: int) -> Target:
    """Return the target of :func:`normal_gamma`."""
    model, guided = normal_gamma(rows)
    exact = guided(1.0, 1.0)

    def truth(n: int) -> Draws:
        with pyro.plate("draws", n):
            nodes = pyro.poutine.trace(exact).get_trace().nodes
        return {name: nodes[name]["value"] for name in ("tau", "mu")}

    return Target(model, truth, exact, guided)


def enumerated(means: Sequence[float], rows: int) -> Target:
    """Return the means of two components as in :func:`clusters`, with the labels of the rows as discrete latents."""
    same = clusters(means, rows)
    y = torch.tensor(means).repeat(rows) + noise(rows * len(means))

    def model() -> None:
        x = pyro.sample("x", normal(0.0, 10.0, len(means)))
        with pyro.plate("row", len(y)):
            label = pyro.sample("label", dist.Categorical(torch.ones(len(means))), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(x[label], 1.0), obs=y)

    return Target(model, same.truth, same.exact, same.law)
