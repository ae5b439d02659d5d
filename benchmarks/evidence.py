"""What is the evidence of the benchmark posteriors?  Reference values of log Z by methods without flows.

    python benchmarks/evidence.py                        # every target, about an hour on one core
    python benchmarks/evidence.py --targets garch wells
    python benchmarks/evidence.py --quick --out quick.csv

Z is the integral of the joint density over the latents, as Pyro scores it in a trace.  ``ImproperUniform`` counts as 1.
A sequential Monte Carlo sampler (Del Moral, Doucet and Jasra 2006, doi:10.1111/j.1467-9868.2006.00553.x) computes Z in
unconstrained space.  Particles start from q, which is a product of Student t's after whitening.  They pass through the
densities

    p_b(x) ~ q(x)^(1-b) p(x)^b,    0 = b_0 < b_1 < ... < b_T = 1,    Z = prod_t E_{x ~ p_b_t} (p/q)(x)^(b_{t+1} - b_t)

Each step is as long as the effective sample size allows.  The particles are then resampled and moved by Hamiltonian
Monte Carlo, whose metric is their covariance (Buchholz, Chopin and Jacob 2021, arXiv:1808.07730).

A pilot run from a standard q gives mean and covariance of the q of all other runs, which are independent.  log Z is the
logarithm of the mean of their Z, and their variation gives the standard error.

Two cases differ.  Some models are linear and Gaussian in many of their latents.  These latents are integrated out,
because particles do not find the neck of a funnel.  If one or two latents are left, a grid replaces sampling.  If
weighted draws of q have a high effective sample size, importance sampling gives log Z.  SMC adapts to its particles, so
its values are a few thousandths too low.

Writes ``docs/benchmarks/evidence.csv``.
"""

import argparse
import csv
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import targets
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Transform, biject_to

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "evidence.csv"
COLUMNS = "target", "log_evidence", "standard_error", "method", "seconds"
SAME = {"eight_schools_centered": "eight_schools"}  # equal evidence, easier to compute
GAUSSIAN = {  # latents to integrate out: given the others, the model is linear and Gaussian in them
    "eight_schools": ("mu", "theta_raw"),
    "kidiq": ("beta",),
    "diamonds": ("b",),
    "earnings": ("beta",),
    "sblrc": ("beta",),
    "brownian_unknown_scales": ("locs",),
    "hepatitis": ("alpha0", "beta0", "gamma", "alpha", "beta"),
}
ESS = 0.5  # effective sample size after a step along the path, as a share of the particles
ACCEPTANCE, MAX_MOVES = 0.9, 24  # target rate, moves per step; with 12 moves, log Z of gp_pois_regr is .03 low
LENGTH, MAX_LEAPS = 4.0, 128  # of a trajectory: length in standard deviations, number of leapfrog steps
REACH, POINTS = 24.0, 145  # of a grid: half-width in standard deviations, points per dimension
EVEN, DRAWS = 0.5, 100_000  # effective share of draws from which importance sampling is used, number of draws
ROWS = 10_000  # points per batch of gradients, for Hessians

Density = Callable[[Tensor], Tensor]  # from (N, D) to (N,)


class Site(NamedTuple):
    """Latent, with its bijection and its unconstrained shape, padded to the model's plates."""

    name: str
    transform: Transform
    shape: tuple[int, ...]


class Scores(NamedTuple):
    """log p_b, its gradient and log p/q of each particle."""

    log_density: Tensor
    gradient: Tensor
    log_ratio: Tensor


def latent_sites(model: Callable[[], None]) -> tuple[list[Site], int]:
    """Return the latents of a model in its order, and the number of dimensions of its plates."""

    def origin(site: dict[str, Any]) -> Tensor:  # flat priors cannot be sampled
        transform = biject_to(site["fn"].support)
        return transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))

    with poutine.block(), InitMessenger(origin):
        trace = prune_subsample_sites(poutine.trace(model).get_trace())
    functions = {name: node["fn"] for name, node in trace.iter_stochastic_nodes()}
    plates, sites = max(len(fn.batch_shape) for fn in functions.values()), []
    for name, fn in functions.items():
        transform = biject_to(fn.support)
        padding = (1,) * (plates - len(fn.batch_shape))
        sites.append(Site(name, transform, (*padding, *transform.inverse_shape(fn.shape()))))
    return sites, plates


def log_joint(model: Callable[[], None], sites: list[Site], plates: int, position: Tensor) -> Tensor:
    """Return the model's log-density at unconstrained positions, with the Jacobian, vectorised by a plate."""
    number, total, values = len(position), position.new_zeros(len(position)), {}
    for site, part in zip(sites, position.split([math.prod(s.shape) for s in sites], -1), strict=True):
        free = part.reshape(number, *site.shape)
        values[site.name] = value = site.transform(free)
        total = total + site.transform.log_abs_det_jacobian(free, value).reshape(number, -1).sum(-1)
    try:
        with pyro.plate("particles", number, dim=-1 - plates):
            trace = prune_subsample_sites(poutine.trace(poutine.condition(model, data=values)).get_trace())
    except torch.linalg.LinAlgError:  # the matrix of some particle has no Cholesky factor
        if number == 1:
            return torch.full((1,), -math.inf)
        return torch.cat([log_joint(model, sites, plates, half) for half in position.chunk(2)])
    trace.compute_log_prob()
    parts = [node["log_prob"] for node in trace.nodes.values() if node["type"] == "sample"]
    return total + sum(part.reshape(number, -1).sum(-1) for part in parts)


def integrated(log_p: Density, inner: Tensor, outer: Tensor) -> Density:
    """Return the marginal log-density of the outer coordinates; log p must be quadratic in the inner ones.

    The log-integral of exp(log p) is log p(mode) + (log det(2 pi) - log det H) / 2, with H = slope(0) - slope(e_i).
    """
    size, dim = len(inner), len(inner) + len(outer)
    corners = torch.cat((torch.zeros(1, size), torch.eye(size)))

    def log_marginal(position: Tensor) -> Tensor:
        def joint(values: Tensor) -> Tensor:
            rows = position.repeat(len(values) // len(position), 1)
            return log_p(torch.zeros(len(rows), dim).index_copy(1, outer, rows).index_copy(1, inner, values))

        points = corners.repeat_interleave(len(position), 0).requires_grad_()
        (slopes,) = torch.autograd.grad(joint(points).sum(), points, create_graph=True)
        slopes = slopes.reshape(1 + size, len(position), size).transpose(0, 1)
        factor, failed = torch.linalg.cholesky_ex(slopes[:, :1] - slopes[:, 1:])
        mode = torch.cholesky_solve(slopes[:, 0, :, None], factor)[..., 0]
        volume = size / 2 * math.log(2 * math.pi) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return torch.where(failed == 0, joint(mode) + volume, -math.inf)

    return log_marginal


def moved(
    z: Tensor, now: Scores, score: Callable[[Tensor], Scores], metric: Tensor, step: float
) -> tuple[Tensor, Scores, float]:
    """Return the particles after a trajectory of Hamiltonian Monte Carlo, their scores, and the rate of acceptance."""
    steps = step * (0.5 + 0.5 * torch.rand(len(z), 1))
    momentum = torch.randn_like(z)
    energy = now.log_density - momentum.square().sum(-1) / 2
    there, new = z, now
    for _ in range(min(MAX_LEAPS, math.ceil(LENGTH / step))):
        momentum = momentum + steps / 2 * (new.gradient @ metric)
        there = there + steps * (momentum @ metric.T)
        new = score(there)
        momentum = momentum + steps / 2 * (new.gradient @ metric)
    chance = (new.log_density - momentum.square().sum(-1) / 2 - energy).exp().clamp(max=1).nan_to_num()
    accept = torch.rand(len(z)) < chance
    pairs = zip((there, *new), (z, *now), strict=True)
    z, *scores = (torch.where(accept.reshape(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs)
    return z, Scores(*scores), float(chance.mean())


def increment(log_ratio: Tensor, left: float) -> float:
    """Return the longest step along the path, at most ``left``, that keeps the effective sample size high enough."""

    def enough(log_step: float) -> bool:
        return float(torch.softmax(math.exp(log_step) * log_ratio, 0).square().sum()) * ESS * len(log_ratio) <= 1

    low, high = math.log(left) - 80, math.log(left)
    if enough(high):
        return left
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return math.exp(low)


def remembered(a: Tensor, b: Tensor) -> bool:
    """True if a coordinate's values before and after are correlated by more than the noise of the particles."""
    a, b = ((c - c.mean(0)) / c.std(0, correction=0) for c in (a, b))
    return bool(((a * b).mean(0).abs() > 2 / math.sqrt(len(a))).any())


def anneal(log_p: Density, mean: Tensor, scale: Tensor, number: int, batch: int) -> tuple[float, Tensor]:
    """Move particles from q = mean + scale z to p, scored in batches, and return log Z and the particles."""
    base = dist.StudentT(torch.tensor(10.0))  # heavier tails than any posterior in unconstrained space

    def score(z: Tensor, b: float) -> Scores:
        return Scores(*map(torch.cat, zip(*(score_batch(part, b) for part in z.split(batch)), strict=True)))

    def score_batch(z: Tensor, b: float) -> Scores:
        z = z.detach().requires_grad_()
        log_q = base.log_prob(z).sum(-1) - scale.diagonal().log().sum()
        log_ratio = log_p(mean + z @ scale.T) - log_q
        log_density = log_q + b * log_ratio
        (gradient,) = torch.autograd.grad(log_density.sum(), z)
        finite = [torch.where(t.isfinite(), t, -1e300).detach() for t in (log_density, log_ratio)]
        return Scores(finite[0], gradient.nan_to_num(0.0, 0.0, 0.0), finite[1])

    z = base.sample((number, len(mean)))
    log_z, b, step, now = 0.0, 0.0, 0.5, score(z, 0.0)
    while True:
        rise = increment(now.log_ratio, 1 - b)
        log_weights = rise * now.log_ratio
        log_z += float(log_weights.logsumexp(0)) - math.log(number)
        grid = (torch.arange(number) + torch.rand(())) / number  # systematic resampling
        z = z[torch.searchsorted(torch.softmax(log_weights, 0).cumsum(0), grid).clamp(max=number - 1)]
        if rise == 1 - b:
            return log_z, mean + z @ scale.T
        b += rise
        covariance, shrinkage = z.T.cov().reshape(len(mean), -1), len(mean) / (len(mean) + number)
        metric = torch.linalg.cholesky(covariance.lerp(covariance.diagonal().diag(), shrinkage))
        before, now = z, score(z, b)
        for _ in range(MAX_MOVES):
            z, now, acceptance = moved(z, now, partial(score, b=b), metric, step)
            step *= math.exp(acceptance - ACCEPTANCE)
            if not remembered(before, z):
                break


def evidence(target: targets.Target, number: int, runs: int) -> tuple[float, float, str]:
    """Return log Z of a target, its standard error, and the method in words."""
    sites, plates = latent_sites(target.model)
    names = [site.name for site in sites for _ in range(math.prod(site.shape))]
    gaussian = torch.tensor([name in GAUSSIAN.get(target.name, ()) for name in names])
    inner, outer = gaussian.nonzero().flatten(), (~gaussian).nonzero().flatten()
    without = f"; {' '.join(GAUSSIAN[target.name])} integrated out" if len(inner) else ""
    log_p, batch = partial(log_joint, target.model, sites, plates), number
    if len(inner):
        log_p, batch = integrated(log_p, inner, outer), ROWS // len(inner)
    if len(outer) <= 2:
        return *quadrature(log_p, len(outer), batch), f"grid of {POINTS ** len(outer)} points{without}"

    _, pilot = anneal(log_p, torch.zeros(len(outer)), torch.eye(len(outer)), min(number, batch), batch)
    mean, scale = pilot.mean(0), torch.linalg.cholesky(pilot.T.cov().reshape(len(outer), -1))
    *_, share = importance(log_p, mean, scale, batch, number)
    if share > EVEN:
        value, error, _ = importance(log_p, mean, scale, batch, DRAWS)
        return value, error, f"importance sampling: {DRAWS} draws of a Student t{without}"
    log_z = torch.tensor([anneal(log_p, mean, scale, number, batch)[0] for _ in range(runs)])
    relative = (log_z - log_z.max()).exp()
    value = log_z.max() + relative.mean().log()
    error = float(relative.std() / relative.mean() / math.sqrt(runs))
    return float(value), error, f"SMC: {runs} runs of {number} particles{without}"


def importance(log_p: Density, mean: Tensor, scale: Tensor, batch: int, number: int) -> tuple[float, float, float]:
    """Return log Z by draws of a Student t, its standard error, and the effective share of the draws."""
    law = dist.MultivariateStudentT(torch.tensor(10.0), mean, scale)
    log_weights = torch.cat([(log_p(z) - law.log_prob(z)).detach() for z in law.sample((number,)).split(batch)])
    value = float(log_weights.logsumexp(0)) - math.log(len(log_weights))
    relative = (log_weights - value).exp()
    error = float(relative.std()) / math.sqrt(len(relative))
    return value, error, float(1 / relative.square().mean())


def quadrature(log_p: Density, dim: int, batch: int) -> tuple[float, float]:
    """Return log Z by the trapezoidal rule on a grid around the mode, and its change with half as many points."""
    mode = torch.zeros(1, dim, requires_grad=True)
    optimizer = torch.optim.LBFGS([mode], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -log_p(mode).sum()
        value.backward()
        return value

    optimizer.step(loss)
    centre = mode.detach()
    curvature = torch.autograd.functional.hessian(lambda x: -log_p(x).sum(), centre).reshape(dim, dim)
    scale = torch.linalg.cholesky(curvature.inverse())
    line = torch.linspace(-REACH, REACH, POINTS)
    grid = torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
    values = torch.cat([log_p(centre + z @ scale.T).detach() for z in grid.split(batch)]).reshape([POINTS] * dim)
    volume = scale.diagonal().log().sum() + dim * (line[1] - line[0]).log()
    fine = values.logsumexp(tuple(range(dim))) + volume
    coarse = values[(slice(None, None, 2),) * dim].logsumexp(tuple(range(dim))) + volume + dim * math.log(2)
    return float(fine), float((fine - coarse).abs())


def write(path: Path, rows: dict[str, dict[str, str]]) -> None:
    """Write the table atomically."""
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in targets.NAMES if name in rows)
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(targets.NAMES), choices=targets.NAMES)
    parser.add_argument(
        "--particles", type=int, default=1000, help="number of particles; a quarter if latents are integrated out"
    )
    parser.add_argument("--runs", type=int, default=8, help="independent runs, which give the standard error")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the table; rows of other targets are kept")
    options = parser.parse_args()
    if options.quick:
        options.particles, options.runs = 200, 2
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.enable_validation(False)

    rows: dict[str, dict[str, str]] = {}
    if options.out.exists():
        with options.out.open(newline="") as file:
            rows = {row["target"]: row for row in csv.DictReader(file)}
    for name in options.targets:
        pyro.set_rng_seed(options.seed)
        start, target = time.perf_counter(), targets.load(SAME.get(name, name))
        number = options.particles // (4 if target.name in GAUSSIAN else 1)
        value, error, method = evidence(target, number, options.runs)
        seconds = time.perf_counter() - start
        row = name, f"{value:.3f}", f"{error:.3f}", method, f"{seconds:.0f}"
        rows[name] = dict(zip(COLUMNS, row, strict=True))
        write(options.out, rows)
        print(f"{name:24} log Z = {value:.3f} ± {error:.3f}  ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
