"""Guides of thousands of latents, beside Pyro's own and exact answers.

    python benchmarks/scale_guides.py                        # all programs, two hours of one core
    python benchmarks/scale_guides.py --programs states cox  # some of them
    python benchmarks/scale_guides.py --quick --out F        # small programs: a smoke run

The programs, with data drawn from each:

* *states*: a linear-Gaussian state space of 10,000 steps, with the Kalman smoother as answer;
* *volatility*: stochastic volatility of 2,500 days, with sums over grids as answer;
* *hierarchy*: 100,000 groups of 5 rows with three shared latents, with exact integrals as answer;
* *multilevel*: 50,000 visits to 10,000 doctors in 2,000 hospitals, all by indices, with exact integrals as answer;
* *crossed*: 10,000 users and 1,000 items with 100,000 ratings, both plates subsampled, with the exact Gaussian;
* *regression*: a logistic regression of 5,000 coefficients on 200 rows, without answer;
* *cox*: a log-Gaussian Cox process on a grid of 40 x 40 cells, without answer.  ``--pines FILE`` replaces its points by
  those of a file, such as the 126 Finnish pines of Moller, Syversveen, Waagepetersen (1998).

``AutoStructuredFlow``, and ``AutoFlow`` for *regression* and *cox*, which have no plate and no sequence, have the
defaults of ``fit_svi``.  Pyro's guides have Adam with a step size that falls from 0.01 to 0.0001, and as much time.
Errors are in posterior standard deviations.

Writes ``docs/benchmarks/scale_guides.csv`` and ``.md``.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import posteriors
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import Tensor

import pyro_flows as pf
from pyro_flows.guides import init_to_center

OUT = posteriors.OUT / "scale_guides.md"
COLUMNS = (
    *("program", "data", "guide", "seconds", "step_ms", "elbo", "elbo_se", "evidence"),
    *("shared", "sd_ratios", "local", "within"),
)
ANSWERS = {"shared": "shared", "sd ratio": "sd_ratios", "local": "local", "within": "within"}  # columns by title
OURS = {  # by name, with the steps of a fit
    "AutoStructuredFlow": (pf.AutoStructuredFlow, None),
    "AutoFlow": (pf.AutoFlow, None),
    "AutoFlow, start alone": (pf.AutoFlow, 1),
}
PYROS = {  # with our start, since Pyro's draws from priors, and some are flat
    "AutoNormal": lambda p: AutoNormal(p.model, init_loc_fn=init_to_center, create_plates=p.plates),
    "AutoDiagonalNormal": lambda p: AutoDiagonalNormal(p.model, init_loc_fn=init_to_center),
    "AutoLowRankMultivariateNormal": lambda p: AutoLowRankMultivariateNormal(p.model, init_to_center, rank=20),
    "AutoMultivariateNormal": lambda p: AutoMultivariateNormal(p.model, init_loc_fn=init_to_center),
}
USUAL = "AutoStructuredFlow", "AutoNormal", "AutoDiagonalNormal", "AutoLowRankMultivariateNormal"
GUIDES = {  # of programs that do not have all the usual ones
    "crossed": ("AutoStructuredFlow", "AutoNormal"),  # the ones that take subsampled plates
    "regression": ("AutoFlow", "AutoFlow, start alone", *USUAL[1:]),
    "cox": ("AutoFlow", "AutoFlow, start alone", *PYROS),
}
TOGETHER = 100  # draws at once
Row = dict[str, Any]


class Program(NamedTuple):
    """A program with data and answers.

    Attributes:
        model: The program.
        train: The arguments of a fit.
        whole: The arguments with all rows.
        shared: The latents outside of rows and sequences, by name.
        answer: Returns the mean and the standard deviation of each latent.
        particles: Draws per step of Pyro's guides, and of ours if they are given.
        evidence: The log evidence, or NaN.
        plates: Makes the plates of Pyro's guides, if they are subsampled in training alone.
    """

    model: Callable[..., Any]
    train: tuple[Any, ...]
    whole: tuple[Any, ...]
    shared: tuple[str, ...]
    answer: Callable[[], dict[str, tuple[Tensor, Tensor]]]
    particles: int | None
    evidence: float
    plates: Callable[..., Any] | None = None


def states(steps: int) -> Program:
    """Return a linear-Gaussian state space of known parameters, and the Kalman smoother's answer."""
    share, drift, noise = 0.95, 0.3, 0.5
    x, y = torch.zeros(()), []
    for _ in range(steps):
        x = share * x + drift * torch.randn(())
        y.append(x + noise * torch.randn(()))
    data = torch.stack(y)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), (len(y),)))
        before = torch.nn.functional.pad(x, (1, 0))[..., :-1]
        pyro.factor("states", dist.Normal(share * before, drift).log_prob(x).sum(-1))
        pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    evidence, means, deviations = kalman(data.double().tolist(), share, drift, noise)
    return Program(model, (data,), (data,), (), lambda: {"x": (means, deviations)}, 8, evidence)


def kalman(y: list[float], share: float, drift: float, noise: float) -> tuple[float, Tensor, Tensor]:
    """Return the log evidence, and the smoothed means and standard deviations."""
    mean, variance, evidence = 0.0, 0.0, 0.0
    filtered, predicted = [], []
    for value in y:
        ahead, spread = share * mean, share**2 * variance + drift**2
        total = spread + noise**2
        evidence -= math.log(2 * math.pi * total) / 2 + (value - ahead) ** 2 / total / 2
        mean, variance = ahead + spread / total * (value - ahead), spread * noise**2 / total
        filtered.append((mean, variance))
        predicted.append((ahead, spread))
    found = [filtered[-1]]
    for (mean, variance), (ahead, spread) in zip(filtered[-2::-1], predicted[:0:-1], strict=True):
        gain, (later, wide) = variance * share / spread, found[-1]
        found.append((mean + gain * (later - ahead), variance + gain**2 * (wide - spread)))
    means, variances = torch.tensor(found[::-1], dtype=torch.float64).T
    return evidence, means, variances.sqrt()


def volatility(days: int) -> Program:
    """Return stochastic volatility with centred log-variances, and sums over grids of its parameters."""
    level, share, jump = -9.0, 0.98, 0.18
    h, path = torch.tensor(level), []
    for _ in range(days):
        h = level + share * (h - level) + jump * torch.randn(())
        path.append(h)
    data = torch.randn(days) * (torch.stack(path) / 2).exp()

    def model(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(-8.0, 5.0)).unsqueeze(-1)
        share = pyro.sample("share", dist.Beta(20.0, 1.5)).unsqueeze(-1)
        jump = pyro.sample("jump", dist.LogNormal(-2.0, 1.0)).unsqueeze(-1)
        h = pyro.sample("h", dist.ImproperUniform(dist.constraints.real, (), (len(y),)))
        start = dist.Normal(level, jump / (1 - share**2).sqrt()).log_prob(h[..., :1])
        steps = dist.Normal(level + share * (h[..., :-1] - level), jump).log_prob(h[..., 1:])
        pyro.factor("path", torch.cat((start, steps), -1).sum(-1))
        pyro.sample("y", dist.Normal(0.0, (h / 2).exp()).to_event(1), obs=y)

    guide = pf.AutoStructuredFlow(model)  # it says where to put the grid, whose ends must hold no mass
    pf.fit_svi(model, guide, data, steps=1, progress=False)
    answers, evidence = filtered(data.double(), guide.sample(1000, data))
    return Program(model, (data,), (data,), tuple(answers), lambda: answers, 8, evidence)


def filtered(y: Tensor, draws: dict[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Return moments of level, share and jump, and the log evidence, by sums over grids.

    Given these three, log-variances are a hidden Markov chain, on a grid of 120 values around the level.  The three
    have a grid of 11 x 11 x 11, along the axes of some draws.
    """
    names, unit = ("level", "share", "jump"), torch.linspace(-1, 1, 120, dtype=torch.float64)
    priors = dist.Normal(-8.0, 5.0), dist.Beta(20.0, 1.5), dist.LogNormal(-2.0, 1.0)
    supports = [torch.distributions.biject_to(prior.support) for prior in priors]

    def log_density(free: Tensor) -> Tensor:  # (N, 3)
        values = [support(part) for support, part in zip(supports, free.unbind(-1), strict=True)]
        total = sum(
            prior.log_prob(value) + support.log_abs_det_jacobian(part, value)
            for prior, support, part, value in zip(priors, supports, free.unbind(-1), values, strict=True)
        )
        level, share, jump = (value[:, None] for value in values)
        wide = jump / (1 - share**2).sqrt()
        grid = 6 * wide * unit  # (N, 120), around the level
        spacing = grid[:, 1:2] - grid[:, :1]
        moves = dist.Normal(share[..., None] * grid[..., None], jump[..., None]).log_prob(grid[:, None]).exp()
        moves = moves / moves.sum(-1, keepdim=True)  # a jump may be shorter than the spacing
        weight = dist.Normal(0.0, wide).log_prob(grid).exp() * spacing
        scale = ((level + grid) / 2).exp()
        for value in y:
            weight = weight * dist.Normal(0.0, scale).log_prob(value).exp()
            size = weight.sum(-1, keepdim=True)
            total = total + size.log()[:, 0]
            weight = ((weight / size).unsqueeze(1) @ moves).squeeze(1)
        return total

    located = [support.inv(draws[name].double()) for support, name in zip(supports, names, strict=True)]
    points = torch.stack(located, -1)
    place, step = points.mean(0), torch.linalg.cholesky(torch.cov(points.T)).T
    axis = torch.linspace(-5, 5, 11, dtype=torch.float64)
    free = place + torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3) @ step
    height = torch.cat([log_density(part) for part in free.split(100)])
    ends = torch.softmax(height, 0).reshape(11, 11, 11)
    if max(ends[0].sum(), ends[-1].sum(), ends[:, 0].sum(), ends[:, -1].sum()) > 1e-3:
        raise RuntimeError("volatility: the grid ends within the posterior.")
    weight, cell = torch.softmax(height, 0), (axis[1] - axis[0]) ** 3 * torch.linalg.det(step).abs()
    values = [support(part) for support, part in zip(supports, free.unbind(-1), strict=True)]
    means = [(weight * value).sum() for value in values]
    spreads = [(weight * (v - m) ** 2).sum().sqrt() for v, m in zip(values, means, strict=True)]
    pairs_of = zip(names, zip(means, spreads, strict=True), strict=True)
    return dict(pairs_of), float(height.logsumexp(0) + cell.log())


def hierarchy(groups: int) -> Program:
    """Return a two-level normal hierarchy, and exact integrals over its three shared latents."""
    rows = 5
    level = 1 + 0.7 * torch.randn(groups)
    data = level[:, None] + 1.5 * torch.randn(groups, rows)

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        between = pyro.sample("between", dist.LogNormal(0.0, 1.0))
        within = pyro.sample("within", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", len(y), dim=-2):
            level = pyro.sample("level", dist.Normal(mean, between))
            with pyro.plate("rows", rows, dim=-1):
                pyro.sample("y", dist.Normal(level, within), obs=y)

    exact = integrals(data.double())
    shared = ("mean", "between", "within")
    answers = {name: exact[name] for name in (*shared, "level")}
    return Program(model, (data,), (data,), shared, lambda: answers, None, math.nan)


def integrals(y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return exact moments of the hierarchy, on a grid of its shared latents around the maximum of their density."""
    number, rows = y.shape
    means = y.mean(1)
    inside, first, second = (y - means[:, None]).square().sum(), means.sum(), means.square().sum()

    def log_density(mean: Tensor, b: Tensor, w: Tensor) -> Tensor:  # logarithms of the standard deviations
        variance = (2 * b).exp() + (2 * w).exp() / rows
        spread = second - 2 * mean * first + number * mean**2
        likelihood = -number / 2 * variance.log() - spread / variance / 2
        likelihood = likelihood - number * (rows - 1) * w - inside / (2 * w).exp() / 2
        return likelihood - mean**2 / 50 - b**2 / 2 - w**2 / 2

    place = torch.tensor([float(means.mean()), -0.35, 0.4], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([place], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = -log_density(*place)
        value.backward()
        return value

    optimiser.step(loss)
    hessian = torch.autograd.functional.hessian(lambda p: -log_density(*p), place.detach())
    axis = torch.linspace(-5, 5, 61, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1) @ torch.linalg.cholesky(hessian.inverse()).T
    mean, b, w = (place.detach() + grid).unbind(-1)
    weight = torch.softmax(log_density(mean, b, w).flatten(), 0).reshape(mean.shape)

    def expected(value: Tensor) -> Tensor:
        return (weight * value).sum()

    found = {}
    for name, value in (("mean", mean), ("between", b.exp()), ("within", w.exp())):
        found[name] = expected(value), expected((value - expected(value)) ** 2).sqrt()
    shrink = (2 * b).exp() / ((2 * b).exp() + (2 * w).exp() / rows)
    centre = expected(shrink) * means + expected((1 - shrink) * mean)
    own = expected(shrink * (2 * w).exp() / rows)
    second_moment = expected(shrink**2) * means**2 + 2 * expected(shrink * (1 - shrink) * mean) * means
    variance = own + second_moment + expected(((1 - shrink) * mean) ** 2) - centre**2
    found["level"] = centre[:, None], variance.sqrt()[:, None]
    return found


def multilevel(hospitals: int, doctors: int, visits: int) -> Program:
    """Return visits to doctors in hospitals, each level by an index, and exact integrals over the shared latents."""
    of_doctor, of_visit = torch.randint(hospitals, (doctors,)), torch.randint(doctors, (visits,))
    level = 1 + 0.5 * torch.randn(hospitals)
    effect = level[of_doctor] + 0.3 * torch.randn(doctors)
    data = effect[of_visit] + torch.randn(visits)

    def model(y: Tensor, of_doctor: Tensor, of_visit: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        between = pyro.sample("between", dist.LogNormal(0.0, 1.0))
        within = pyro.sample("within", dist.LogNormal(0.0, 1.0))
        with pyro.plate("hospitals", hospitals):
            hospital = pyro.sample("hospital", dist.Normal(mean, between))
        with pyro.plate("doctors", len(of_doctor)):
            doctor = pyro.sample("doctor", dist.Normal(hospital[..., of_doctor], within))
        with pyro.plate("visits", len(y)):
            pyro.sample("y", dist.Normal(doctor[..., of_visit], 1.0), obs=y)

    levels = Levels(data.double(), of_doctor, of_visit, hospitals)
    answers, evidence = levels.integrals()
    args = data, of_doctor, of_visit
    return Program(model, args, args, ("mean", "between", "within"), lambda: answers, None, evidence)


class Levels:
    """Exact integrals of *multilevel*, for standard deviations exp(b) of hospitals and exp(w) of doctors within them.

    Args:
        y: The visits.
        of_doctor: The hospital of each doctor.
        of_visit: The doctor of each visit.
        hospitals: The number of hospitals.
    """

    def __init__(self, y: Tensor, of_doctor: Tensor, of_visit: Tensor, hospitals: int) -> None:
        self._of_doctor, self._none = of_doctor, y.new_zeros(hospitals)
        self._number = torch.bincount(of_visit, minlength=len(of_doctor)).double()
        self._sum = y.new_zeros(len(of_doctor)).index_add(0, of_visit, y)
        seen = self._number.clamp_min(1)
        rest = y.square().sum() - (self._sum.square() / seen).sum()  # within doctors
        self._constant = -rest / 2 - len(y) / 2 * math.log(2 * math.pi)

    def _given(self, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the log-density of the data, the mean's place and precision, and the hospitals' s and precision."""
        share = 1 / (1 + self._number * (2 * w).exp())  # of the noise in the variance of a doctor's visits
        precision = self._none.index_add(0, self._of_doctor, self._number * share)
        score = self._none.index_add(0, self._of_doctor, self._sum * share)
        own = (-2 * b).exp()
        total = precision + own
        spread = (self._sum.square() * share / self._number.clamp_min(1)).sum()
        for_mean = (own - own**2 / total).sum() + 1 / 25
        pull = (own * score / total).sum()
        log_p = (share.log().sum() - spread - (total / own).log().sum() + (score**2 / total).sum()) / 2
        log_p = log_p + (pull**2 / for_mean - for_mean.log() - math.log(25)) / 2
        log_p = log_p + self._constant - (b**2 + w**2) / 2 - math.log(2 * math.pi)
        return log_p, pull / for_mean, for_mean, score, total

    def integrals(self) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
        """Return moments of all latents and the log evidence, by sums over a grid of b and w."""
        place = torch.tensor([-0.7, -1.2], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([place], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = -self._given(*place)[0]
            value.backward()
            return value

        optimiser.step(loss)
        hessian = torch.autograd.functional.hessian(lambda p: -self._given(*p)[0], place.detach())
        step, factor = 0.4, torch.linalg.cholesky(hessian.inverse())
        axis = step * torch.arange(-15, 16, dtype=torch.float64)
        grid = place.detach() + torch.cartesian_prod(axis, axis) @ factor.T
        heights = torch.stack([self._given(b, w)[0] for b, w in grid])
        evidence = heights.logsumexp(0) + factor.diagonal().log().sum() + 2 * math.log(step)
        first: dict[str, Any] = dict.fromkeys(("mean", "between", "within", "hospital", "doctor"), 0.0)
        second = dict(first)
        for (b, w), weight in zip(grid, heights.softmax(0), strict=True):
            for name, (mean, variance) in self._moments(b, w).items():
                first[name] = first[name] + weight * mean
                second[name] = second[name] + weight * (variance + mean**2)
        return {name: (mean, (second[name] - mean**2).sqrt()) for name, mean in first.items()}, float(evidence)

    def _moments(self, b: Tensor, w: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the mean and the variance of each latent."""
        _, mean, for_mean, score, total = self._given(b, w)
        gain = (-2 * b).exp() / total
        hospital, of_hospital = (score / total + gain * mean), 1 / total + gain**2 / for_mean
        own = (-2 * w).exp()
        gain = own / (own + self._number)
        doctor = self._sum / (own + self._number) + gain * hospital[self._of_doctor]
        of_doctor = 1 / (own + self._number) + gain**2 * of_hospital[self._of_doctor]
        zero = torch.zeros_like(b)
        return {
            "mean": (mean, 1 / for_mean),
            "between": (b.exp(), zero),
            "within": (w.exp(), zero),
            "hospital": (hospital, of_hospital),
            "doctor": (doctor, of_doctor),
        }


def crossed(users: int, items: int, ratings: int) -> Program:
    """Return effects of users and items with few ratings, both subsampled, and the exact Gaussian."""
    kind, good, noise = 0.6, 0.8, 1.0
    pairs = torch.randperm(users * items)[:ratings]
    u, i = pairs // items, pairs % items
    values = 0.5 + kind * torch.randn(users)[u] + good * torch.randn(items)[i] + noise * torch.randn(ratings)
    y, seen = torch.zeros(users, items), torch.zeros(users, items, dtype=torch.bool)
    y[u, i], seen[u, i] = values, True

    def model(y: Tensor, seen: Tensor, some_users: int | None, some_items: int | None) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        rows = pyro.plate("users", len(y), some_users, dim=-2)
        columns = pyro.plate("items", y.shape[1], some_items, dim=-1)
        with rows:
            a = pyro.sample("kind", dist.Normal(0.0, kind))
        with columns:
            b = pyro.sample("good", dist.Normal(0.0, good))
        with rows as u, columns as i, poutine.mask(mask=seen[u][:, i]):
            pyro.sample("y", dist.Normal(mean + a + b, noise), obs=y[u][:, i])

    def plates(y: Tensor, seen: Tensor, some_users: int | None, some_items: int | None) -> tuple[Any, Any]:
        users, items = y.shape
        return pyro.plate("users", users, some_users, dim=-2), pyro.plate("items", items, some_items, dim=-1)

    design = torch.zeros(users, items + 1, dtype=torch.float64)  # of each user's ratings, items and the mean
    design[u, i], design[:, items] = 1 / noise**2, torch.bincount(u, minlength=users) / noise**2
    own = design[:, items] + kind**-2
    ratings_of = torch.bincount(i, minlength=items).double() / noise**2
    rest = torch.diag(torch.cat((ratings_of + good**-2, torch.tensor([ratings / noise**2 + 0.04]).double())))
    rest[items, :items] = rest[:items, items] = ratings_of
    of_users = torch.zeros(users).double().index_add(0, u, values.double()) / noise**2
    of_items = torch.zeros(items).double().index_add(0, i, values.double()) / noise**2
    right = torch.cat((of_items, of_items.sum().unsqueeze(0)))
    covariance = torch.linalg.inv(rest - design.T @ (design / own[:, None]))
    found = covariance @ (right - design.T @ (of_users / own))
    deviation, gain = covariance.diagonal().sqrt(), design / own[:, None]
    spread = (1 / own + ((gain @ covariance) * gain).sum(1)).sqrt()
    answers = {
        "mean": (found[-1], deviation[-1]),
        "kind": (((of_users - design @ found) / own)[:, None], spread[:, None]),
        "good": (found[:-1], deviation[:-1]),
    }
    sizes = max(2, users // 10), max(2, items // 2)
    return Program(model, (y, seen, *sizes), (y, seen, None, None), ("mean",), lambda: answers, 1, math.nan, plates)


def regression(coefficients: int, rows: int) -> Program:
    """Return a logistic regression with more coefficients than rows: most directions have the prior."""
    x = torch.randn(rows, coefficients)
    weights = torch.randn(coefficients) * (torch.rand(coefficients) < 0.01)
    y = torch.bernoulli(torch.sigmoid(0.3 * x @ weights))

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=0.3 * w @ x.T).to_event(1), obs=y)

    return Program(model, (x, y), (x, y), (), dict, 8, math.nan)


def cox(side: int, points: Tensor | None = None) -> Program:
    """Return a log-Gaussian Cox process in the unit square, on a grid, with its log-rates as latents.

    Covariances are those of Moller, Syversveen, Waagepetersen (1998) for 126 pines; the log-density of the data lacks
    the factorials, as in the literature.
    """
    place = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 2)
    distance = (place[:, None] - place).norm(dim=-1)
    factor = torch.linalg.cholesky(1.91 * torch.exp(-33 * distance / side)).float()
    mean, cells = math.log(126) - 1.91 / 2, side**2
    if points is None:
        data = torch.poisson((mean + factor @ torch.randn(cells)).exp() / cells)
    else:
        column, row = (points * side).long().clamp_max(side - 1).T
        data = torch.bincount(column * side + row, minlength=cells).float()

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.MultivariateNormal(torch.full((cells,), mean), scale_tril=factor))
        pyro.factor("points", (y * x - x.exp() / cells).sum(-1))

    return Program(model, (data,), (data,), (), dict, 8, math.nan)


def read_points(file: Path) -> Tensor:
    """Return the points in a file, ``(N, 2)``."""
    return torch.tensor([[float(cell) for cell in line.split(",")] for line in file.read_text().split()])


PROGRAMS: dict[str, tuple[Callable[..., Program], tuple[int, ...], tuple[int, ...]]] = {
    "states": (states, (10_000,), (100,)),
    "volatility": (volatility, (2_500,), (2_500,)),
    "hierarchy": (hierarchy, (100_000,), (100,)),
    "multilevel": (multilevel, (2_000, 10_000, 50_000), (70, 90, 300)),
    "crossed": (crossed, (10_000, 1_000, 100_000), (90, 80, 3_000)),
    "regression": (regression, (5_000, 200), (50, 10)),
    "cox": (cox, (40,), (8,)),
}


def moments_of(guide: Any, program: Program, number: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return means and standard deviations of draws of a guide, for all rows, found a few draws at a time."""
    sums: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for _ in range(number // TOGETHER):
            if isinstance(guide, pf.AutoStructuredFlow | pf.AutoFlow):
                draws = guide.sample(TOGETHER, *program.whole)
            else:
                found = [guide(*program.whole) for _ in range(TOGETHER)]
                draws = {name: torch.stack([draw[name] for draw in found]) for name in found[0]}
            for name, value in draws.items():
                part = torch.stack((value.double().sum(0), value.double().square().sum(0)))
                sums[name] = [*sums.get(name, []), part]
    means = {name: torch.stack(parts).sum(0) / number for name, parts in sums.items()}
    return {name: (first, (second - first**2).clamp_min(0).sqrt()) for name, (first, second) in means.items()}


def elbo_of(guide: Any, program: Program, number: int) -> tuple[float, float]:
    """Return the mean of log p - log q over single draws of a guide for all rows, and its standard error."""
    values = []
    with torch.no_grad():
        for _ in range(number):
            drawn = poutine.trace(guide).get_trace(*program.whole)
            ran = poutine.trace(poutine.replay(program.model, trace=drawn)).get_trace(*program.whole)
            values.append(float(ran.log_prob_sum()) - float(drawn.log_prob_sum()))
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std() / number**0.5)


def fit_pyro(guide: Any, program: Program, seconds: float, steps: int | None) -> int:
    """Train one of Pyro's guides for some time, with a step size that falls by a factor of 100; return the steps."""
    elbo = Trace_ELBO(program.particles or 1, vectorize_particles=(program.particles or 1) > 1, max_plate_nesting=2)
    optimiser = pyro.optim.ClippedAdam({"lr": 0.01})
    svi, start, done = SVI(program.model, guide, optimiser, elbo), time.perf_counter(), 0
    while (share := (done / steps if steps else (time.perf_counter() - start) / seconds)) < 1:
        for inner in optimiser.optim_objs.values():
            for group in inner.param_groups:
                group["lr"] = 0.01 * 0.01**share
        svi.step(*program.train)
        done += 1
    return done


def measure(name: str, guide_name: str, program: Program, answer: dict[str, Any], seconds: float, quick: bool) -> Row:
    """Fit a guide and compare it with the answer."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    start = time.perf_counter()
    if guide_name in OURS:
        kind, steps = OURS[guide_name]
        guide: Any = kind(program.model)
        subsampled = any(a is not b for a, b in zip(program.train, program.whole, strict=True))
        particles = program.particles if subsampled else None
        steps = 10 if quick else steps
        fit = pf.fit_svi(program.model, guide, *program.train, steps=steps, num_particles=particles, progress=False)
        done = fit.steps
    else:
        guide = PYROS[guide_name](program)
        done = fit_pyro(guide, program, seconds, 10 if quick else None)
    spent = time.perf_counter() - start
    found = {}
    if answer:
        numbers = sum(mean.numel() for mean, _ in answer.values())
        number = TOGETHER if quick else TOGETHER * max(20, min(200, 200_000_000 // numbers // TOGETHER))
        found = moments_of(guide, program, number)
    elbo, elbo_se = elbo_of(guide, program, 20 if quick else 200)
    errors = {key: ((found[key][0] - mean) / sd).abs().flatten() for key, (mean, sd) in answer.items()}
    ratios = [float(found[key][1] / answer[key][1]) for key in program.shared]
    local = torch.cat([torch.zeros(0), *(errors[key] for key in answer if key not in program.shared)])
    row = {
        "program": name,
        "guide": guide_name,
        "seconds": f"{spent:.0f}",
        "step_ms": f"{1000 * spent / done:.0f}",
        "elbo": f"{elbo:.2f}",
        "elbo_se": f"{elbo_se:.2f}",
        "evidence": f"{program.evidence:.2f}" if math.isfinite(program.evidence) else "",
        "shared": f"{max(float(errors[key].max()) for key in program.shared):.3f}" if program.shared else "",
        "sd_ratios": f"{min(ratios):.2f}–{max(ratios):.2f}" if ratios else "",
        "local": f"{float(local.max()):.3f}" if len(local) else "",
        "within": f"{float((local < 0.15).double().mean()):.4f}" if len(local) else "",
    }
    print(" ".join(str(value) for value in row.values()), flush=True)
    return row


def page(rows: list[Row]) -> str:
    """Return the page."""
    lines = [
        "# Guides of thousands of latents\n",
        "This page is for users whose models have thousands of latents. It compares `AutoStructuredFlow` and "
        "`AutoFlow` with exact answers, and with Pyro's guides in equal time.\n",
        "Reproduce with `python benchmarks/scale_guides.py`. Data are drawn from each program; with `--pines FILE`, "
        f"*cox* has the points in that file. All runs are in float32, with `--threads {torch.get_num_threads()}`. "
        f"torch {torch.__version__}, Pyro {pyro.__version__}.\n",
        "Errors are those of posterior means, in posterior standard deviations. *shared* is the largest error of a "
        "latent outside of rows and sequences, *sd ratio* the range of their standard deviations over the exact ones. "
        "*local* is the largest error of all other latents, and *within* the share with an error below 0.15. Means are "
        "those of 2,000 to 20,000 draws, with a standard error of 0.007 to 0.02.\n",
    ]
    evidence, source = ({row["program"]: row[column] for row in rows} for column in ("evidence", "data"))
    for name in evidence:
        build, sizes, _ = PROGRAMS[name]
        what = (build.__doc__ or "").splitlines()[0].removeprefix("Return ")
        lines += [
            f"## {name.capitalize()}\n",
            f"{what[0].upper()}{what[1:]} Size: {', '.join(map(str, sizes))}.",
        ]
        if source[name] != "drawn":
            lines.append(f"The data are those of `{source[name]}`.")
        if evidence[name]:
            lines.append(f"The log evidence is {evidence[name]} nats.")
        own = [row for row in rows if row["program"] == name]
        shown = {title: column for title, column in ANSWERS.items() if any(row[column] for row in own)}
        lines += ["", f"| {' | '.join(('guide', 'ELBO, nats', *shown, 's'))} |", f"|---|{'---:|' * (len(shown) + 2)}"]
        for row in own:
            cells = row["guide"], f"{row['elbo']} ± {row['elbo_se']}", *(row[column] for column in shown.values())
            lines.append(f"| {' | '.join((*cells, row['seconds']))} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="the programs to run")
    parser.add_argument("--pines", type=Path, help="a CSV file of points in the unit square for cox, without a header")
    parser.add_argument("--threads", type=int, default=2, help="the number of threads")
    parser.add_argument("--quick", action="store_true", help="smoke run of small programs; needs --out")
    parser.add_argument("--out", type=Path, default=OUT, help="the page to write, next to a CSV file")
    options = parser.parse_args()
    if options.quick and options.out == OUT:
        parser.error("--quick needs --out, because its figures are not results. Add --out FILE.")
    torch.set_num_threads(options.threads)
    file = options.out.with_suffix(".csv")
    kept = posteriors.read(file) if file.exists() else []
    rows = [row for row in kept if row["program"] not in options.programs]
    for name in options.programs:
        build, sizes, small = PROGRAMS[name]
        pyro.set_rng_seed(0)
        sizes = small if options.quick else sizes
        program = cox(*sizes, read_points(options.pines)) if name == "cox" and options.pines else build(*sizes)
        answer, seconds = program.answer(), 1.0
        for guide_name in GUIDES.get(name, USUAL):
            source = {"data": options.pines.name if name == "cox" and options.pines else "drawn"}
            rows.append(source | measure(name, guide_name, program, answer, seconds, options.quick))
            seconds = max(seconds, float(rows[-1]["seconds"])) if guide_name in OURS else seconds
            posteriors.write_csv(rows, COLUMNS, file)
    order = {name: place for place, name in enumerate(PROGRAMS)}
    rows.sort(key=lambda row: order[row["program"]])
    posteriors.write(page(rows), options.out)


if __name__ == "__main__":
    main()
