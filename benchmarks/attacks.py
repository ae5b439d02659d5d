"""Can ``check`` be fooled?  Wrong and right guides on known posteriors that are chosen to mislead it.

    python benchmarks/attacks.py                          # all guides, about 10 minutes on one core
    python benchmarks/attacks.py --only "spike" "a ring"  # guides whose names contain one of these words
    python benchmarks/attacks.py --truth                  # compare the draws of each guide with exact draws

A guide is *wrong* if one of these errors is large.  A mean is off by more than .12 sd.  An sd is off by more than 12 %
along some direction.  More than 6 % of the mass is missing.  The total variation is above .2 for a marginal, or above
.4 for the joint distribution.  A guide is *right* if it is exact, or if its errors are below .03 sd, 3 % and a total
variation of .03.  ``--truth`` measures all of these and fails if a label is wrong.

A wrong guide fools the check if the verdict is "trust".  It also fools the check if the verdict is "reweight" and the
reweighted draws have a wrong mean, sd or marginal.  A right guide fools the check if the verdict is "do not trust".
Writes ``attacks.csv`` and ``attacks.md`` into ``docs/benchmarks``.
"""

import argparse
import itertools
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import attacks_targets as targets
import posteriors
import pyro.distributions as dist
import torch
from attacks_laws import (
    Blocks,
    Chain,
    Checkerboard,
    Correlations,
    Edged,
    ExpGamma,
    Law,
    Mixture,
    Shell,
    Tabulated,
    Triangle,
    box,
    normal,
)
from attacks_targets import Program, Target, free, posterior, repeated, sampling
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.distributions import Distribution

import pyro_flows as pf
from pyro_flows.programs.density import Density
from pyro_flows.programs.model_and_guide import Task

KINDS = {
    "labels": "symmetric modes near the centre of the prior",
    "spike": "a broad mode and a narrow one",
    "narrow": "a far narrower mode within or beside a broad one",
    "beyond": "the same, where fewer than 5 of 110,000 draws can show the mode",
    "far": "a small mode far away",
    "edges": "hard edges",
    "shape": "correct moments, wrong shape",
    "part": "errors in correlations, tails or one latent",
    "support": "angles, positive latents, simplices, discrete latents",
    "plain": "unimodal posteriors",
}
VERDICTS = "trust", "reweight", "do not trust"
COLUMNS = "name", "kind", "wrong", "verdict", "fooled", "seconds", "khat", "drift", "missing", "how", "reason"
LOST = 3.0  # nats: mass is missing where the guide's log-density is below the posterior's by more
DRAWS = 100_000
NARROW, SHOWN = 120, 5.0  # targets of a narrow mode, and the draws that must be expected to show it
Row = dict[str, str]


@dataclass(frozen=True)
class Attack:
    """Guide of known quality, and its posterior.

    Attributes:
        name: A unique name.
        kind: The class, a key of ``KINDS``.
        model: Builds the target: the model, with exact draws of its posterior.
        guide: Builds the guide from the target.
        wrong: True if the check must not trust the guide.
        how: The error of the guide, in a few words.
    """

    name: str
    kind: str
    model: Callable[[], Target]
    guide: Callable[[Target], Any]
    wrong: bool
    how: str

    def build(self, seed: int = 0) -> tuple[Target, Any]:
        """Set the seed, then return the target and the guide, fitted if necessary."""
        posteriors.prepare(seed)
        target = self.model()
        return target, self.guide(target)


# Guides.


def exact(target: Target) -> Program:
    """Return the guide that equals the posterior, up to negligible errors."""
    return target.exact


def component(*indices: int) -> Callable[[Target], Program]:
    """Return the guide that draws from some components of a mixture."""

    def guide(target: Target) -> Program:
        parts, weights = [target.law.laws[i] for i in indices], target.law.weights[list(indices)]
        return sampling(parts[0] if len(parts) == 1 else Mixture(weights / weights.sum(), parts))

    return guide


def matched(target: Target) -> Program:
    """Return the normal guide with the posterior's means and covariances."""
    x = target.truth(4 * DRAWS)["x"]
    return sampling(dist.MultivariateNormal(x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])))


def uncorrelated(target: Target) -> Program:
    """Return the normal guide with the posterior's means and standard deviations."""
    x = target.truth(4 * DRAWS)["x"]
    return sampling(normal(x.mean(0), x.std(0), x.shape[1]))


def mean_field(target: Target) -> Program:
    """Return the independent normals that maximise the ELBO for a normal posterior."""
    return sampling(normal(target.law.loc, target.law.precision_matrix.diagonal().rsqrt(), len(target.law.loc)))


def drawing(law: Callable[[], Distribution]) -> Callable[[Target], Program]:
    """Return the guide that draws from a given distribution."""
    return lambda target: sampling(law())


def moved(shift: float, factor: float, latents: int | None = None) -> Callable[[Target], Program]:
    """Return a normal guide for a normal posterior, with some means moved by ``shift`` sd and their sds scaled."""

    def guide(target: Target) -> Program:
        mean, covariance = target.law.mean, target.law.covariance_matrix
        mine = (torch.arange(len(mean)) < (latents or len(mean))).double()
        scale, loc = 1 + (factor - 1) * mine, mean + shift * mine * covariance.diagonal().sqrt()
        return sampling(dist.MultivariateNormal(loc, scale.unsqueeze(-1) * covariance * scale))

    return guide


def fitted(kind: str, steps: int = 500, particles: int = 16) -> Callable[[Target], Any]:
    """Return a guide fitted by ``fit_svi``."""

    def guide(target: Target) -> Any:
        if kind == "AutoFlow":
            found: Any = pf.AutoFlow(target.model)
            pf.fit_svi(target.model, found, progress=False)
            return found
        found = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}[kind](target.model)
        found()
        objective = Trace_ELBO(particles, vectorize_particles=True)
        pf.fit_svi(target.model, found, steps=steps, lr=0.05, objective=objective, progress=False)
        return found

    return guide


# The attacks, by class.


def labels() -> Iterator[Attack]:
    """Yield posteriors with copies of a mode: label switching, signs, periods and mirror images."""
    models: dict[str, tuple[Callable[[], Target], int, str]] = {
        "two clusters": (partial(targets.clusters, (-2.0, 2.0), 60), 2, "1 of 2 labellings"),
        "two close clusters": (partial(targets.clusters, (-1.5, 1.5), 100), 2, "1 of 2 labellings"),
        "three clusters": (partial(targets.clusters, (-4.0, 0.0, 4.0), 15), 6, "1 of 6 labellings"),
        "four clusters": (partial(targets.clusters, (-9.0, -3.0, 3.0, 9.0), 40), 24, "1 of 24 labellings"),
        "three squared weights": (partial(targets.squares, 3, 200), 8, "1 of 8 sign patterns"),
        "five absolute weights": (partial(targets.squares, 5, 200, 1.0), 32, "1 of 32 sign patterns"),
        "loadings of 5": (partial(targets.loadings, 5, 1000), 2, "1 of 2 signs"),
        "loadings of 10": (partial(targets.loadings, 10, 1000), 2, "1 of 2 signs"),
        "a place by ranges": (partial(targets.ranges, 20, 3.0), 2, "1 of 2 mirror images"),
        "a network": (partial(targets.network, 60), 8, "1 of 8 copies"),
    }
    for name, (model, modes, how) in models.items():
        if name != "a network":  # a mixture of normals does not fit the shape of its modes
            yield Attack(name, "labels", model, exact, False, "mixture over all copies")
        yield Attack(f"{name}, one copy", "labels", model, component(0), True, how)
        if modes > 2:
            half = component(*range(modes // 2))
            yield Attack(f"{name}, half the copies", "labels", model, half, True, "half of the modes are missing")
    yield from numbers()
    for kind, name in (
        ("AutoNormal", "two clusters"),
        ("AutoNormal", "loadings of 5"),
        ("AutoFlow", "a place by ranges"),
        ("AutoMultivariateNormal", "three squared weights"),
    ):
        how = "fitted by the ELBO, which keeps one copy"
        yield Attack(f"{name}, {kind}", "labels", models[name][0], fitted(kind), True, how)


def numbers() -> Iterator[Attack]:
    """Yield posteriors with several modes of one number, or of independent numbers."""
    cases: dict[str, tuple[Callable[[], targets.Factor], float, float, float, float, int]] = {
        "a magnitude": (partial(targets.magnitude, 1.5, 0.2), 1.0, 6.0, 0.0, 6.0, 1),
        "five magnitudes": (partial(targets.magnitude, 1.5, 0.3), 1.0, 6.0, 0.0, 6.0, 5),
        "20 magnitudes": (partial(targets.magnitude, 0.8, 0.1), 1.0, 6.0, 0.0, 6.0, 20),
        "a phase": (partial(targets.wave, 30, 0.3), 10.0, 60.0, 0.8 - math.pi, 0.8 + math.pi, 1),
        "a frequency": (partial(targets.alias, 40, 0.5), 3.0, 20.0, 0.0, math.pi, 1),
        "data that disagree": (partial(targets.outliers, (-6.0, -6.5, 6.0, 6.3)), 10.0, 60.0, -60.0, 0.0, 1),
    }
    for name, (likelihood, scale, reach, low, high, dim) in cases.items():
        model = partial(tabulated, likelihood, scale, reach, dim)
        yield Attack(name, "labels", model, exact, False, "exact")
        mode = drawing(partial(mode_between, likelihood, scale, low, high, dim))
        yield Attack(f"{name}, one mode", "labels", model, mode, True, "exact within one mode")
    positive = drawing(lambda: repeated(dist.LogNormal(math.log(1.44), 0.135), 1))
    model = partial(tabulated, cases["a magnitude"][0], 1.0, 6.0, 1)
    yield Attack(
        "a magnitude, a guide of positive support", "labels", model, positive, True, "half missing; support is one mode"
    )
    for y, scale in ((1.0, 0.1), (2.0, 0.5), (0.5, 0.02)):
        model = partial(targets.products, y, scale)
        name = f"product {y:g} ± {scale:g}"
        yield Attack(name, "labels", model, exact, False, "exact")
        branch = drawing(partial(targets.product, y, scale, 0.0))
        yield Attack(f"{name}, one branch", "labels", model, branch, True, "exact within one of two curved branches")
    model = partial(targets.products, 1.0, 0.1)
    yield Attack("product, AutoMultivariateNormal", "labels", model, fitted("AutoMultivariateNormal"), True, "one mode")


def mode_between(
    likelihood: Callable[[], targets.Factor], scale: float, low: float, high: float, dim: int
) -> Distribution:
    """Return the distribution of :func:`tabulated`, truncated to an interval."""
    prior, factor = dist.Normal(0.0, scale), likelihood()
    return repeated(Tabulated(lambda x: prior.log_prob(x) + factor(x), low, high), dim)


def tabulated(likelihood: Callable[[], targets.Factor], scale: float, reach: float, dim: int) -> Target:
    """Return the target of independent numbers with a normal prior and the same likelihood."""
    return targets.tabulated(likelihood(), scale, reach, dim)


def two(first: Distribution, second: Distribution, share: float, scale: float) -> Target:
    """Return the mixture of two distributions as a target; the first has the given share of the mass."""
    return free(Mixture([share, 1 - share], [first, second]), scale)


def balls(first: tuple[float, float], second: tuple[float, float], share: float, dim: int, scale: float) -> Target:
    """Return the target of two isotropic normals, each given by its mean and sd per coordinate."""
    return two(normal(*first, dim), normal(*second, dim), share, scale)


def spike() -> Iterator[Attack]:
    """Yield a narrow and a broad mode: the highest density is not where most of the mass is."""
    for dim, width in ((1, 0.01), (2, 0.001), (3, 0.05), (5, 0.05), (10, 0.01), (20, 0.02)):
        model = partial(balls, (0.0, width), (3.0, 1.0), 0.3, dim, 3.0)
        name = f"spike of {width:g} and slab, {dim}-D"
        yield Attack(name, "spike", model, exact, False, "exact")
        yield Attack(f"{name}, the spike", "spike", model, component(0), True, "70 % missing, in the slab")
    for dim, share in ((1, 0.3), (2, 0.3), (5, 0.2), (10, 0.15), (20, 0.3)):
        model = partial(balls, (0.0, 0.2), (3.0, 1.0), share, dim, 3.0)
        how = f"{share:.0%} missing, in the spike"
        yield Attack(f"spike of .2 and slab, {dim}-D, the slab", "spike", model, component(1), True, how)
    for dim in (2, 10):
        model = partial(balls, (0.0, 0.05), (0.0, 1.0), 0.5, dim, 3.0)
        name = f"spike within a slab, {dim}-D"
        yield Attack(name, "spike", model, exact, False, "exact")
        yield Attack(f"{name}, the spike", "spike", model, component(0), True, "50 % missing around it")
        yield Attack(f"{name}, the slab", "spike", model, component(1), True, "50 % missing in a point of it")


def narrow() -> Iterator[Attack]:
    """Yield a broad normal that the guide keeps, and a far narrower one of random scale, share and place.

    The numbers of the targets are their seeds.  Parameters were chosen on even numbers; odd ones are only reported.
    """
    for number in range(NARROW):
        model, place = partial(targets.needle, number), targets.needle_place(number)
        how = f"{place.share:.0%} missing, of sd {place.scale:.3f} at distance {place.loc.norm():.1f}"
        name = f"needle {number}, {place.where}, {len(place.loc)}-D"
        kind = "narrow" if place.shown >= SHOWN else "beyond"
        yield Attack(name, kind, model, component(0), True, f"{how}, shown by {place.shown:.1f} draws")
        if number % 4 == 1:
            yield Attack(f"{name}, both", kind, model, exact, False, "exact")


def far() -> Iterator[Attack]:
    """Yield posteriors with little mass far away, which changes means and standard deviations."""
    cases = [(1, 0.96, 20.0, 1.0), (2, 0.96, 20.0, 1.0), (5, 0.96, 20.0, 1.0), (10, 0.96, 20.0, 1.0)]
    cases += [(20, 0.96, 20.0, 1.0), (1, 0.98, 40.0, 1.0), (3, 0.98, 40.0, 1.0), (2, 0.99, 100.0, 1.0)]
    cases += [(2, 0.93, 12.0, 0.2), (5, 0.93, 30.0, 6.0), (10, 0.92, 6.0, 1.0)]
    for dim, share, at, width in cases:
        model = partial(balls, (0.0, 1.0), (at, width), share, dim, at)
        name = f"{1 - share:.0%} of sd {width:g} at {at:g}, {dim}-D"
        yield Attack(name, "far", model, exact, False, "exact")
        yield Attack(f"{name}, the rest", "far", model, component(0), True, f"{1 - share:.0%} missing, far away")
    three = partial(several, ((0.0, 1.0), (15.0, 1.0), (-15.0, 1.0)), (0.94, 0.03, 0.03), 3, 15.0)
    yield Attack("3 % at either side, 3-D", "far", three, exact, False, "exact")
    yield Attack("3 % at either side, 3-D, the rest", "far", three, component(0), True, "6 % missing; sd 3.8 times")


def several(places: tuple[tuple[float, float], ...], weights: tuple[float, ...], dim: int, scale: float) -> Target:
    return free(Mixture(weights, [normal(loc, sd, dim) for loc, sd in places]), scale)


def edges() -> Iterator[Attack]:
    """Yield posteriors with log-densities of minus infinity and zero gradients."""
    for dim, share in ((1, 0.5), (2, 0.5), (5, 0.3), (10, 0.6)):
        model = partial(boxes, share, dim)
        yield Attack(f"two boxes, {dim}-D", "edges", model, exact, False, "exact")
        how = f"{1 - share:.0%} of the mass missing"
        yield Attack(f"two boxes, {dim}-D, one box", "edges", model, component(0), True, how)
    model = partial(boxes, 0.5, 2)
    uniform = drawing(lambda: dist.Uniform(-2 * torch.ones(2), torch.zeros(2)).to_event(1))
    yield Attack("two boxes, 2-D, Uniform guide", "edges", model, uniform, True, "half missing; support is one box")
    cut = partial(truncated_mode, 0.6, 2)
    yield Attack("normal and truncated mode", "edges", cut, exact, False, "exact")
    yield Attack("normal and truncated mode, the normal", "edges", cut, component(0), True, "40 % missing")
    yield Attack("normal and truncated mode, the other", "edges", cut, component(1), True, "60 % missing")
    half = partial(half_space, 3)
    yield Attack("half-space, 3-D", "edges", half, exact, False, "exact")
    whole = drawing(partial(normal, 0.0, 1.0, 3))
    yield Attack("half-space, 3-D, whole space", "edges", half, whole, True, "half of the draws lie outside")
    triangle = partial(triangle_of, 3.0)
    yield Attack("triangle", "edges", triangle, exact, False, "exact")
    yield Attack("triangle, a smaller one", "edges", triangle, drawing(partial(Triangle, 2.4)), True, "36 % missing")
    cube = partial(cube_of, 5)
    yield Attack("cube, 5-D", "edges", cube, exact, False, "exact")
    smaller = drawing(partial(box, -0.85, 0.85, 5))
    yield Attack("cube, 5-D, a smaller one", "edges", cube, smaller, True, "sds 15 % too small; half missing")
    part = drawing(lambda: Blocks(box(-1, 0.4, 1), box(-1, 1, 4)))
    yield Attack("cube, 5-D, a part", "edges", cube, part, True, "30 % missing behind a plane")


def boxes(share: float, dim: int) -> Target:
    return two(box(-2, 0, dim), box(3, 6, dim), share, 5.0)


def truncated_mode(share: float, dim: int) -> Target:
    half = repeated(Tabulated(dist.Normal(5.0, 1.0).log_prob, 5.0, 12.0), 1)
    second = Blocks(half, normal(4, 1, dim - 1))
    return two(normal(0, 1, dim), second, share, 5.0)


def half_space(dim: int) -> Target:
    return free(Blocks(Edged(repeated(dist.HalfNormal(1.0), 1)), normal(0, 1, dim - 1)), 3.0)


def triangle_of(side: float) -> Target:
    return free(Triangle(side), 3.0)


def cube_of(dim: int) -> Target:
    return free(box(-1, 1, dim), 2.0)


def shape() -> Iterator[Attack]:
    """Yield guides with correct means and covariances and a wrong shape."""
    laws: dict[str, tuple[Callable[[], Distribution], str]] = {
        "a ring": (partial(Shell, 2, 3.0, 0.3), "no hole"),
        "a thin ring": (partial(Shell, 2, 5.0, 0.05), "no hole"),
        "a shell in 5-D": (partial(Shell, 5, 4.0, 0.2), "no hole"),
        "two narrow modes, 1-D": (partial(twins, 1, 2.0, 0.3), "one wide mode over two"),
        "two narrow modes, 3-D": (partial(twins, 3, 2.0, 0.2), "one wide mode over two"),
        "two touching modes, 2-D": (partial(twins, 2, 1.8, 0.6), "one wide mode over two"),
        "exponential": (lambda: Edged(repeated(dist.Exponential(1.0), 1)), "a symmetric normal over an edge"),
        "exponential, 5-D": (lambda: Edged(repeated(dist.Exponential(1.0), 5)), "a symmetric normal over an edge"),
        "skewed": (lambda: Edged(repeated(dist.Gamma(0.7, 1.0), 2)), "no skewness"),
        "Gumbel of gamma": (lambda: repeated(Tabulated(log_gamma, -40.0, 6.0), 3), "no skewness"),
        "uniform, 10-D": (lambda: box(-1.0, 1.0, 10), "normal tails"),
        "one bimodal of 10": (partial(one_bimodal, 10), "one of ten marginals has one mode for two"),
        "Student t of 2.5 df": (lambda: student(2.5, 3), "short tails"),
        "Student t of 3 df, 10-D": (lambda: student(3.0, 10), "short tails"),
        "soft checkerboard": (soft_board, "no board"),
        "spiral arms": (arms, "no arms"),
    }
    for name, (law, how) in laws.items():
        model = partial(free_of, law)
        yield Attack(name, "shape", model, exact, False, "exact")
        yield Attack(f"{name}, matched normal", "shape", model, matched, True, how)
    board = partial(free_of, partial(Checkerboard, 4))
    yield Attack("checkerboard", "shape", board, exact, False, "exact")
    yield Attack("checkerboard, whole board", "shape", board, drawing(partial(box, -2, 2, 2)), True, "twice the board")
    cross = partial(free_of, crossed)
    yield Attack("a cross", "shape", cross, exact, False, "exact")
    yield Attack("a cross, normal", "shape", cross, matched, True, "right marginals, no cross")
    yield Attack("a cross, one arm", "shape", cross, component(0), True, "right marginals, one of two arms")


def free_of(law: Callable[[], Distribution], scale: float = 4.0) -> Target:
    return free(law(), scale)


def twins(dim: int, at: float, width: float) -> Law:
    return Mixture([0.5, 0.5], [normal(-at, width, dim), normal(at, width, dim)])


def one_bimodal(dim: int) -> Law:
    return Blocks(twins(1, 1.5, 0.3), normal(0, 1, dim - 1))


def log_gamma(x: Tensor) -> Tensor:
    """Return the log-density of log(g), up to a constant, where g has a gamma distribution of shape .3."""
    return 0.3 * x - x.exp()


def student(df: float, dim: int) -> Distribution:
    return dist.MultivariateStudentT(torch.tensor(df), torch.zeros(dim), torch.eye(dim))


def soft_board() -> Law:
    """Return separate normals on the black squares of a 4 × 4 board."""
    places = [(row, column) for row in range(4) for column in range(4) if (row + column) % 2 == 0]
    return Mixture(torch.ones(8) / 8, [normal(torch.tensor(p) * 2 - 3.0, 0.35, 2) for p in places])


def arms() -> Law:
    """Return three long normals that cross in the middle."""
    turns = torch.arange(3) * math.pi / 3
    ways = torch.stack((turns.cos(), turns.sin()), -1)
    covariances = [9 * way.outer(way) + 0.02 * torch.eye(2) for way in ways]
    return Mixture(torch.ones(3) / 3, [dist.MultivariateNormal(torch.zeros(2), c) for c in covariances])


def crossed() -> Law:
    """Return two normals of opposite correlations."""
    covariances = [torch.tensor([[1.0, r], [r, 1.0]]) for r in (0.97, -0.97)]
    return Mixture([0.5, 0.5], [dist.MultivariateNormal(torch.zeros(2), c) for c in covariances])


def part() -> Iterator[Attack]:
    """Yield guides with errors in few directions: correlations, tails, one latent of many."""
    for dim, correlation in ((2, 0.9), (10, 0.8), (50, 0.8)):
        model = partial(autoregressive, dim, correlation)
        yield Attack(f"correlated, {dim}-D", "part", model, exact, False, "exact")
        yield Attack(f"correlated, {dim}-D, none", "part", model, uncorrelated, True, "no correlations, right sds")
    sign = drawing(lambda: autoregressive(5, -0.6).law)
    yield Attack("correlated, 5-D, wrong signs", "part", partial(autoregressive, 5, 0.6), sign, True, "signs of half")
    pair = partial(free_of, correlated_pair)
    yield Attack("a pair of 50", "part", pair, exact, False, "exact")
    yield Attack("a pair of 50, apart", "part", pair, uncorrelated, True, "one correlation of .95 is missing")
    for shift, factor, dim, how in (
        (0.3, 1.0, 50, "one mean off by .3 sd"),
        (0.0, 0.7, 50, "one sd 30 % too small"),
        (0.0, 0.84, 20, "one sd 16 % too small"),
        (0.0, 1.3, 50, "one sd 30 % too large"),
        (0.2, 1.0, 20, "one mean off by .2 sd"),
    ):
        model = partial(autoregressive, dim, 0.5)
        yield Attack(f"normal, {dim}-D, {how}", "part", model, moved(shift, factor, 1), True, how)
    near = partial(autoregressive, 10, 0.5)
    yield Attack("normal, 10-D, nearly", "part", near, moved(0.02, 0.98), False, "means .02 sd, sds 2 % off")
    yield Attack("normal, 10-D, narrow", "part", near, moved(0.0, 0.85), True, "all sds 15 % too small")
    yield Attack("normal, 10-D, shifted", "part", near, moved(0.15, 1.0), True, "all means off by .15 sd")
    yield from curved()
    yield from mixed()


def curved() -> Iterator[Attack]:
    """Yield funnels, bananas and heavy tails, and guides without parts of them."""
    for dim, scale in ((2, 1.0), (5, 1.5), (10, 3.0)):
        model = partial(free_of, partial(funnel, dim, scale), 3.0 * scale)
        name = f"funnel of {scale:g}, {dim}-D"
        yield Attack(name, "part", model, exact, False, "exact")
        neck = drawing(partial(funnel, dim, scale, -0.5 * scale))
        yield Attack(f"{name}, no neck", "part", model, neck, True, "31 % missing in the neck")
        mouth = drawing(partial(funnel, dim, scale, -9 * scale, scale))
        yield Attack(f"{name}, no mouth", "part", model, mouth, True, "16 % missing in the mouth")
    for bend in (0.5, 3.0):
        model = partial(free_of, partial(banana, bend), 5.0)
        yield Attack(f"banana of {bend:g}", "part", model, exact, False, "exact")
        tips = drawing(partial(banana, bend, 1.4))
        yield Attack(f"banana of {bend:g}, no tips", "part", model, tips, True, "16 % missing at the tips")
        side = drawing(partial(banana, bend, 9.0, 0.0))
        yield Attack(f"banana of {bend:g}, one side", "part", model, side, True, "half missing")
    for dim in (1, 5):
        model = partial(free_of, lambda dim=dim: repeated(dist.StudentT(3.0), dim), 5.0)
        yield Attack(f"t of 3 df each, {dim}-D", "part", model, exact, False, "exact")
        cut = drawing(lambda dim=dim: repeated(Tabulated(dist.StudentT(3.0).log_prob, -4.0, 4.0), dim))
        yield Attack(f"t of 3 df each, {dim}-D, no tails", "part", model, cut, True, "sds 27 % too small")


def funnel(dim: int, scale: float, low: float = -math.inf, high: float = math.inf) -> Law:
    """Return v ~ Normal(0, scale), truncated, and normal numbers of scale exp(v / 2)."""
    first = dist.Normal(0.0, scale)
    if math.isfinite(low) or math.isfinite(high):
        first = Tabulated(dist.Normal(0.0, scale).log_prob, max(low, -9 * scale), min(high, 9 * scale))
    return Chain(
        first, lambda v: dist.Normal(0.0, (v / 2).exp().unsqueeze(-1).expand(*v.shape, dim - 1)).to_event(1), dim
    )


def banana(bend: float, high: float = 9.0, low: float | None = None) -> Law:
    first = Tabulated(dist.Normal(0.0, 1.0).log_prob, -high if low is None else low, high)
    return Chain(first, lambda v: dist.Normal(bend * (v.square() - 1).unsqueeze(-1), 0.5).to_event(1), 2)


def autoregressive(dim: int, correlation: float) -> Target:
    places = torch.arange(float(dim))
    return free(dist.MultivariateNormal(torch.ones(dim), correlation ** (places - places.unsqueeze(-1)).abs()), 3.0)


def correlated_pair() -> Law:
    pair = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.95], [0.95, 1.0]]))
    return Blocks(pair, normal(0, 1, 48))


def mixed() -> Iterator[Attack]:
    """Yield guides with wrong shares of modes, or with mass where the posterior has none."""
    for dim, share in ((1, 0.65), (5, 0.7)):
        model = partial(balls, (-4.0, 1.0), (4.0, 1.0), 0.5, dim, 4.0)
        law = drawing(lambda dim=dim, share=share: Mixture([share, 1 - share], [normal(-4, 1, dim), normal(4, 1, dim)]))
        yield Attack(f"two modes, {dim}-D", "part", model, exact, False, "exact")
        yield Attack(f"two modes, {dim}-D, {share:g}", "part", model, law, True, "wrong shares of two modes")
    spurious = drawing(lambda: Mixture([0.85, 0.15], [normal(1, 1, 2), normal(8, 0.5, 2)]))
    model = partial(autoregressive, 2, 0.001)
    yield Attack("normal, 2-D, another mode", "part", model, spurious, True, "15 % of the draws have no density")
    linear = partial(targets.regression, 10, 30, 1.0)
    yield Attack("collinear regression, 10-D", "part", linear, exact, False, "exact")
    yield Attack("collinear regression, 10-D, mean field", "part", linear, mean_field, True, "sds too small")
    yield Attack("precisions", "part", partial(targets.precisions, 30), exact, False, "exact")
    narrow = lambda target: target.law(0.8, 1.0)  # noqa: E731
    yield Attack("precisions, narrow", "part", partial(targets.precisions, 30), narrow, True, "one sd 20 % too small")
    short = lambda target: target.law(1.0, 0.85)  # noqa: E731
    yield Attack("precisions, short", "part", partial(targets.precisions, 30), short, True, "one sd 15 % too small")


def support() -> Iterator[Attack]:
    """Yield posteriors on circles, half-lines and simplices, and with enumerated discrete latents."""
    pairs: dict[str, tuple[Callable[[], Target], str]] = {
        "two angles": (partial(angles, 1, (-1.0, 2.0)), "half of the mass missing"),
        "opposite angles, 3-D": (partial(angles, 3, (-1.57, 1.57)), "half of the mass missing"),
        "two gammas": (
            partial(halves, lambda: (gamma(50, 50, 1), gamma(80, 10, 1)), lambda: gamma(1, 0.2, 1)),
            "half missing",
        ),
        "two gammas, 5-D": (
            partial(halves, lambda: (gamma(20, 20, 5), gamma(60, 10, 5)), lambda: gamma(1, 0.2, 5)),
            "half missing",
        ),
        "scales of 1e-3 and 10": (partial(gammas, (9, 9e3), (9, 0.9), 1), "half missing, 4 orders of magnitude away"),
        "two corners of a simplex": (
            partial(halves, lambda: (dirichlet(30, 3, 3), dirichlet(3, 3, 30)), lambda: dirichlet(1, 1, 1)),
            "half missing",
        ),
        "two ends of an interval": (
            partial(halves, lambda: (beta(2, 30), beta(30, 2)), lambda: beta(1, 1)),
            "half missing",
        ),
    }
    for name, (model, how) in pairs.items():
        yield Attack(name, "support", model, exact, False, "exact")
        yield Attack(f"{name}, one", "support", model, component(0), True, how)
    yield from fits()


def fits() -> Iterator[Attack]:
    """Yield guides with a wrong width or labelling, for angles, positive and discrete latents."""
    arc = drawing(partial(angle, -1.0, 8.0))
    wide = partial(
        posterior_of, lambda: repeated(dist.VonMises(-1.0, 4.0), 1), lambda: repeated(dist.VonMises(0.0, 0.5), 1)
    )
    yield Attack("an angle", "support", wide, exact, False, "exact")
    yield Attack("an angle, narrow", "support", wide, arc, True, "spread 30 % too small")
    discrete = partial(targets.enumerated, (-2.0, 2.0), 60)
    yield Attack("enumerated labels", "support", discrete, exact, False, "mixture over both labellings")
    yield Attack("enumerated labels, one", "support", discrete, component(0), True, "1 of 2 labellings")
    flow = fitted("AutoFlow")
    yield Attack("enumerated labels, AutoFlow", "support", discrete, flow, True, "1 of 2 labellings, by the ELBO")
    tail = partial(posterior_of, lambda: gamma(0.5, 1, 1), lambda: gamma(1, 0.2, 1))
    yield Attack("a gamma", "support", tail, exact, False, "exact")
    log_normal = drawing(lambda: repeated(dist.LogNormal(math.log(0.5) - 1, math.sqrt(2)), 1))
    yield Attack("a gamma, LogNormal", "support", tail, log_normal, True, "the optimum of the ELBO; sd 79 % too large")


def posterior_of(law: Callable[[], Distribution], prior: Callable[[], Distribution]) -> Target:
    return posterior(law(), prior())


def halves(laws: Callable[[], tuple[Distribution, ...]], prior: Callable[[], Distribution]) -> Target:
    return posterior(Mixture([0.5, 0.5], laws()), prior())


def angles(dim: int, at: tuple[float, float]) -> Target:
    laws = [repeated(dist.VonMises(loc, 20.0), dim) for loc in at]
    return posterior(Mixture([0.5, 0.5], laws), repeated(dist.VonMises(0.0, 0.1), dim))


def angle(at: float, concentration: float, dim: int = 1) -> Distribution:
    return repeated(dist.VonMises(at, concentration), dim)


def gammas(first: tuple[float, float], second: tuple[float, float], dim: int) -> Target:
    return halves(lambda: (gamma(*first, dim), gamma(*second, dim)), lambda: gamma(1, 0.1, dim))


def gamma(shape: float, rate: float, dim: int) -> Distribution:
    return repeated(dist.Gamma(shape, rate), dim)


def dirichlet(*counts: float) -> Distribution:
    return dist.Dirichlet(torch.tensor(counts, dtype=torch.float64))


def beta(a: float, b: float) -> Distribution:
    return repeated(dist.Beta(a, b), 1)


def plain() -> Iterator[Attack]:
    """Yield right guides on unimodal posteriors."""
    laws: dict[str, Callable[[], Distribution]] = {
        "standard normal, 1-D": lambda: normal(0, 1, 1),
        "standard normal, 50-D": lambda: normal(0, 1, 50),
        "scales from .001 to 1000": lambda: normal(0, torch.logspace(-3, 3, 7), 7),
        "condition number 1e4, 10-D": partial(stiff, 10, 1e4),
        "condition number 1e4, 50-D": partial(stiff, 50, 1e4),
        "t of 5 df, 5-D": lambda: student(5.0, 5),
        "Laplace, 3-D": lambda: repeated(dist.Laplace(0.0, 1.0), 3),
        "far from the prior": lambda: normal(30, 0.1, 5),
        "five modes on a line": lambda: Mixture(torch.ones(5) / 5, [normal(3.0 * i, 0.3, 2) for i in range(5)]),
    }
    for name, law in laws.items():
        yield Attack(name, "plain", partial(free_of, law), exact, False, "exact")
    for dim, rows in ((5, 50), (20, 100), (50, 200)):
        yield Attack(f"regression, {dim}-D", "plain", partial(targets.regression, dim, rows), exact, False, "exact")
    bounded: dict[str, tuple[Callable[[], Distribution], Callable[[], Distribution]]] = {
        "beta": (lambda: beta(2, 5), lambda: beta(1, 1)),
        "arcsine": (lambda: beta(0.5, 0.5), lambda: beta(1, 1)),
        "Dirichlet, 5-D": (lambda: dirichlet(1, 2, 3, 4, 5), lambda: dirichlet(1, 1, 1, 1, 1)),
        "sparse Dirichlet": (lambda: dirichlet(0.5, 0.5, 0.5), lambda: dirichlet(1, 1, 1)),
        "LKJ, 3-D": (partial(Correlations, 4.0), lambda: dist.LKJCholesky(3, 1.0)),
        "gammas, 10-D": (lambda: gamma(3, 2, 10), lambda: gamma(1, 1, 10)),
        "angles, 4-D": (lambda: repeated(dist.VonMises(3.0, 3.0), 4), lambda: repeated(dist.VonMises(0.0, 0.1), 4)),
    }
    for name, (law, prior) in bounded.items():
        yield Attack(name, "plain", partial(posterior_of, law, prior), exact, False, "exact")
    for (shape, rate), dim in itertools.product(((2.0, 2.0), (4.0, 2.0), (9.0, 3.0)), (1, 2, 4)):
        law, prior = partial(ExpGamma, shape, rate, dim), partial(gamma, 1, 0.1, dim)
        name = f"exponential of Gamma({shape:g}, {rate:g}), {dim}-D"
        yield Attack(name, "plain", partial(posterior_of, law, prior), exact, False, "exact")
    logistic = partial(targets.logistic, 3, 300)
    yield Attack("logistic regression, AutoFlow", "plain", logistic, fitted("AutoFlow"), False, "well fitted")
    linear = partial(targets.regression, 5, 50)
    yield Attack("regression, 5-D, AutoFlow", "plain", linear, fitted("AutoFlow"), False, "well fitted")
    full = fitted("AutoMultivariateNormal", 2000, 256)
    yield Attack("regression, 5-D, AutoMultivariateNormal", "plain", linear, full, False, "well fitted")


def stiff(dim: int, condition: float) -> Distribution:
    turn = torch.linalg.qr(targets.noise(dim, dim))[0]
    return dist.MultivariateNormal(torch.zeros(dim), turn * torch.logspace(-math.log10(condition), 0, dim) @ turn.T)


ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for family in (labels, spike, narrow, far, edges, shape, part, support, plain)
    for attack in family()
}


# Errors of a guide.


@dataclass(frozen=True)
class Errors:
    """Errors of a guide against exact draws.

    Attributes:
        mean: The largest error of a mean, in sd of the posterior.  Angles count as cosine and sine.
        low: The smallest ratio of an sd to the posterior's.
        high: The largest ratio of an sd to the posterior's.
        marginal: The largest total variation between marginals, by histograms of 40 bins of equal mass.
        low_along: The smallest ratio of sds along any direction.
        high_along: The largest ratio of sds along any direction.
        missing: The share of the mass where the guide's density is less than a twentieth of the posterior's.
        joint: The total variation between guide and posterior, estimated from their densities.
    """

    mean: float
    low: float
    high: float
    marginal: float
    low_along: float
    high_along: float
    missing: float
    joint: float

    @property
    def off(self) -> bool:
        """True if a mean, an sd or a marginal is wrong."""
        return self.mean > 0.12 or self.high > 1.12 or self.low < 0.88 or self.marginal > 0.2

    @property
    def wrong(self) -> bool:
        """True if some error is above the limit of a wrong guide."""
        along = self.high_along > 1.12 or self.low_along < 0.88
        return self.off or along or self.missing > 0.06 or self.joint > 0.4

    @property
    def right(self) -> bool:
        """True if the guide is exact or all errors are small; noisy ratios along directions have wider limits."""
        ratios = max(self.high, self.high_along - 0.02) < 1.03 and min(self.low, self.low_along + 0.02) > 0.97
        small = self.mean < 0.03 and ratios and self.marginal < 0.03 and self.missing < 0.01
        return small or self.joint < 0.005

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.3f}" for name, value in asdict(self).items())


@torch.no_grad()
def measure(target: Target, guide: Any, reweighted: bool = False, draws: int = DRAWS) -> Errors:
    """Compare a guide's draws, or its reweighted draws, with exact draws."""
    space = Density(Task(target.model, guide, (), {}).check())
    exact_draws = target.truth(draws)
    scored, truth = space.draw(draws), space.read.numbers(exact_draws)
    ours = scored.quantities
    if reweighted:
        ours = ours[torch.multinomial((scored.log_p - scored.log_q).softmax(0), draws, replacement=True)]
    varies = truth.std(0) > 1e-9
    ours, truth = ours[:, varies], truth[:, varies]
    ratios = ours.std(0) / truth.std(0)
    along = directions(ours, truth)
    missing, joint = densities(target, space, exact_draws)
    return Errors(
        float(((ours.mean(0) - truth.mean(0)) / truth.std(0)).abs().max()),
        float(ratios.min()),
        float(ratios.max()),
        max(variation(a, b) for a, b in zip(ours.T, truth.T, strict=True)),
        *(float(along.min()), float(along.max())),
        *(missing, joint),
    )


def directions(ours: Tensor, truth: Tensor) -> Tensor:
    """Return the ratios of sds along the principal directions of one covariance relative to the other."""
    scale = truth.std(0)
    values, vectors = torch.linalg.eigh(torch.cov((truth / scale).T).reshape(len(scale), len(scale)))
    kept = values > 1e-9 * values.max()
    whiten = vectors[:, kept] / values[kept].sqrt()
    white = torch.cov(((ours - ours.mean(0)) / scale @ whiten).T).reshape(int(kept.sum()), -1)
    return torch.linalg.eigvalsh(white).clamp_min(0).sqrt()


def variation(a: Tensor, b: Tensor) -> float:
    """Return the total variation between two samples of a number, by a histogram."""
    edges = torch.quantile(torch.cat((a, b))[:: max(1, len(a) // 50_000)], torch.linspace(0, 1, 41)[1:-1])
    shares = [torch.bincount(torch.bucketize(x.contiguous(), edges), minlength=40) / len(x) for x in (a, b)]
    return float((shares[0] - shares[1]).abs().sum() / 2)


def densities(target: Target, space: Density, exact_draws: dict[str, Tensor]) -> tuple[float, float]:
    """Return the missing share and the joint total variation, or NaN if the guide's coordinates are unknown."""
    z = space.located({name: exact_draws[name] for name in space.task.latents})
    if z is None:
        return math.nan, math.nan
    parts = z.split(1000)
    log_p = torch.cat([space.log_prob(part) for part in parts])
    log_q = torch.cat([space.log_q(part) for part in parts]).nan_to_num(-math.inf, -math.inf, -math.inf)
    log_ratio = (log_q - log_p).nan_to_num(-math.inf, math.inf, -math.inf)
    if not log_ratio.isfinite().any():
        return 1.0, 1.0
    # The mean of q / p over the posterior is the guide's mass on its support, divided by the evidence.
    known = target.log_evidence is not None
    log_ratio = log_ratio + (target.log_evidence if known else math.log(len(z)) - log_ratio.logsumexp(0))
    return float((log_ratio < -LOST).double().mean()), float((1 - log_ratio.exp()).clamp_min(0).mean())


def check_label(name: str, seed: int) -> Row:
    """Return the errors of a guide, and its label, marked if it is not true."""
    attack = ATTACKS[name]
    try:
        found = measure(*attack.build(seed))
    except Exception as error:
        return {"name": name, "label": "failed", "errors": f"{type(error).__name__}: {error}"[:300]}
    true = found.wrong if attack.wrong else found.right
    label = ("wrong" if attack.wrong else "right") + ("" if true else ", MISLABELLED")
    return {"name": name, "label": label, "errors": str(found)}


# Verdicts and results.


def attacked(name: str, seed: int) -> Row:
    """Run the check on a guide."""
    attack = ATTACKS[name]
    target, guide = attack.build(seed)
    row: dict[str, Any] = {"name": name, "kind": attack.kind, "wrong": attack.wrong, "how": attack.how}
    start = time.perf_counter()
    try:
        found = pf.check(target.model, guide)
        row["seconds"] = found.seconds
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        row |= {"verdict": "failed", "fooled": not attack.wrong, "reason": reason}
        row["seconds"] = time.perf_counter() - start
    else:
        row |= {"verdict": found.verdict, "khat": found.khat, "drift": found.drift, "missing": found.missing.share}
        row["reason"], row["fooled"] = found.reason, is_fooled(attack, target, guide, found.verdict)
    return {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in row.items()}


def is_fooled(attack: Attack, target: Target, guide: Any, verdict: str) -> bool:
    """True if the verdict accepts a wrong guide or rejects a right one."""
    if not attack.wrong:
        return verdict == "do not trust"
    return verdict == "trust" or (verdict == "reweight" and measure(target, guide, reweighted=True).off)


def confusion(rows: list[Row]) -> list[str]:
    """Return the table of verdicts by class."""
    lines = [
        "| class | guides | number | trust | reweight | do not trust | failed | misjudged |",
        "|---|---|" + "---:|" * 6,
    ]
    for wrong in ("True", "False"):
        groups = {f"{kind}: {words}": [r for r in rows if r["kind"] == kind] for kind, words in KINDS.items()}
        for label, group in {**groups, "**all**": rows}.items():
            mine = [row for row in group if row["wrong"] == wrong]
            counts = [sum(row["verdict"] == verdict for row in mine) for verdict in (*VERDICTS, "failed")]
            cells = [len(mine), *counts, sum(row["fooled"] == "True" for row in mine)]
            if mine:
                lines.append(f"| {label} | {'wrong' if wrong == 'True' else 'right'} | {' | '.join(map(str, cells))} |")
    return lines


def misjudged(rows: list[Row], wrong: str) -> str:
    """Return how many wrong or right guides are misjudged, in words."""
    mine = [row for row in rows if row["wrong"] == wrong]
    return f"{sum(row['fooled'] == 'True' for row in mine)} of {len(mine)}"


def table(rows: list[Row]) -> str:
    """Return the results as Markdown."""
    names = "; ".join(row["name"] for row in rows if row["fooled"] == "True")
    beyond = [row for row in rows if row["kind"] == "beyond"]
    others = [row for row in rows if row["kind"] != "beyond"]
    kept = [row for row in others if row["name"].startswith("needle") and int(row["name"].split()[1].strip(",")) % 2]
    lines = [
        "# Attacks on the check",
        "",
        "This page is for users who rely on the verdict of `check`. It runs `check` on wrong and right guides of known "
        f"posteriors that are chosen to mislead it. The check misjudges {misjudged(others, 'True')} wrong guides and "
        f"{misjudged(rows, 'False')} right guides. Of modes that too few draws can show, the class *beyond*, it misses "
        f"{misjudged(beyond, 'True')}. Reproduce with `python benchmarks/attacks.py`.",
        "",
        f"The class *beyond* lies past [the limit](../trust.md#narrow-modes) of any search of this size. The settings "
        f"were chosen on even-numbered needles. Of the odd-numbered ones within the limit, the check misjudges "
        f"{misjudged(kept, 'True')} wrong guides.",
        "",
        'A wrong guide is misjudged if the verdict is "trust". It is also misjudged if the verdict is "reweight" and '
        'its reweighted draws are wrong. A right guide is misjudged if the verdict is "do not trust". The first lines '
        "of the script define *wrong* and *right*.",
        "",
        "## Verdicts by class",
        "",
        *confusion(rows),
        "",
        "## Guides",
        "",
        f"Misjudged guides: {names or 'none'}. *s*: the time of the check, in seconds. *reason*: the reason that the "
        "check gives.",
        "",
        "| class | guide | quality | verdict | misjudged | k-hat | s | reason |",
        "|---|---|---|---|---|---:|---:|---|",
    ]
    for row in rows:
        what = f"{'wrong' if row['wrong'] == 'True' else 'right'}: {row['how']}"
        mark = "**yes**" if row["fooled"] == "True" else ""
        khat = f"{float(row['khat']):.2f}" if row.get("khat") else "–"
        reason = row["reason"].replace("|", "/")
        cells = [
            row["kind"],
            row["name"],
            what,
            row["verdict"],
            mark,
            khat,
            f"{float(row['seconds']):.1f}",
            reason,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save(rows: dict[str, Row], out: Path) -> None:
    """Write both files, each atomically."""
    ordered = [rows[name] for name in ATTACKS if name in rows]
    posteriors.write_csv(ordered, COLUMNS, out / "attacks.csv")
    posteriors.write(table(ordered), out / "attacks.md")


def results(do: Callable[[str, int], Row], names: list[str], seed: int, jobs: int) -> Iterator[Row]:
    """Yield the row of each name as soon as it is complete."""
    if jobs == 1:
        yield from (do(name, seed) for name in names)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(do, name, seed) for name in names]):
            yield future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="classes, or parts of the names of guides")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes, one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=posteriors.OUT, help="folder of the two files")
    parser.add_argument("--truth", action="store_true", help="compare guides with exact draws; write nothing")
    options = parser.parse_args()
    names = [n for n, a in ATTACKS.items() if any(part in n or part == a.kind for part in options.only)]
    if options.truth:
        faults = 0
        for row in results(check_label, names, options.seed, options.jobs):
            faults += row["label"] not in ("wrong", "right")
            print(f"{row['name']:45}  {row['label']:20}  {row['errors']}", flush=True)
        sys.exit(f"{faults} of {len(names)} labels are not true" if faults else 0)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = {row["name"]: row for row in posteriors.read(options.out / "attacks.csv")}
    for row in results(attacked, names, options.seed, options.jobs):
        rows[row["name"]] = row
        words = f"{'wrong' if row['wrong'] == 'True' else 'right'}  {row['verdict']:12}  {float(row['seconds']):5.1f} s"
        mark = "  MISJUDGED" if row["fooled"] == "True" else ""
        print(f"{row['name']:45}  {row['kind']:8}  {words}  {row['reason'][:80]}{mark}", flush=True)
        save(rows, options.out)


if __name__ == "__main__":
    main()
