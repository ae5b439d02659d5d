"""Power and false alarms of the checks of one observation: ``pf.local_c2st`` and ``pf.misspecification``.

    python benchmarks/observation_checks.py

The guides are exact posteriors in closed form, or wrong in a known way.  Seeds vary latents, data and simulations.

*local_c2st*: the conjugate model of ``tasks.py``.  The scale of the exact posterior is reduced by 20 %, everywhere or
near one dataset only.  The reduction falls off like a Gaussian with a third of the data's standard deviation.  A second
model has a posterior with two modes, and its guide is the Gaussian with the same means and standard deviations.

*misspecification*: a linear regression with known noise, and four points of two numbers.  Data come from the model, or
from another program.

Writes ``docs/benchmarks/observation_checks.md``, in about a quarter of an hour on one free core.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import tasks
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows.bijectors import Affine
from pyro_flows.conditioners import Conditioner
from pyro_flows.transforms import Elementwise

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "observation_checks.md"
REACH = math.sqrt(1.25) / 3  # a third of the standard deviation of the data of ``conjugate``
INPUTS, NOISE = torch.linspace(-1, 1, 20), 0.5
NARROW = 0.1  # the noise of the model with two modes
Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
PAGE = """# Checks of one observation

This page is for users who ask how reliable `pf.local_c2st` and `pf.misspecification` are. Each row has {number}
repetitions with other latents, data and simulations. The first row of the first table has three times as many, and
that of the second table ten times. The guides are exact posteriors in closed form, or wrong in a known way. Reproduce
with `python benchmarks/observation_checks.py`, on one core.

## The posterior of one observation

`pf.local_c2st` fails a guide if its p-value is at most 0.01. The model has two latents and two data, with the prior
N(0, I) and the noise N(0, 0.5² I). A local error multiplies the posterior's scale by 1 - 0.2 exp(-d² / (2 h²)). Here d
is the distance of the data from a point, and h is a third of the standard deviation of the data.

| guide | failed, of 100 | asked | p-value at most .05 | CPU seconds |
|---|---|---|---|---|
{local}

An exact guide fails in 1 of 100 cases on average. With 300 repetitions the standard error of this number is 0.6. The
last row shows an error of shape. Its model observes the absolute value of a latent. The posterior has two modes, and
the guide is the Gaussian with the exact means and standard deviations. For small data the modes merge, and the guide
is nearly right.

## The model of one observation

`pf.misspecification` fails an observation if its p-value is at most 0.05. The regression has an intercept, a slope, 20
observations and a known noise of {noise}. Its guide is the exact posterior.

| data | failed, of 100 | asked | CPU seconds |
|---|---|---|---|
{model}

The test is exact by construction. With 1,000 repetitions the standard error of its rate in the first row is 0.7. Four
points of two numbers tell little about the noise, so their power is only reported.
"""


class Case(NamedTuple):
    """Case of a benchmark: its name, what is asked, one repetition given a seed, and the number of repetitions."""

    name: str
    asked: str
    run: Callable[[int], Any]
    times: int = 1


class Formula(Conditioner):
    """Affine parameters from a context that holds means and standard deviations."""

    def __init__(self, dim: int) -> None:
        super().__init__(2 * dim, dim, 2, (1,), 0)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        loc, scale = x.chunk(2, -1)
        return torch.stack((12 * torch.atanh(scale.log() / 3), loc), -1)  # a, b of z = b + u exp(3 tanh(a / 12))


def gaussian(model: Callable[..., Any], moments: Moments) -> pf.AutoFlow:
    """Return a guide of independent normals, given a function from data to their means and standard deviations."""

    def recipe(size: int, context_dim: int) -> pf.Flow:
        return pf.Flow([Elementwise(Affine(), size, Formula(size))])

    guide = pf.AutoFlow(model, recipe, encoder=lambda x: torch.cat(moments(x), -1), init_scale=1.0)
    return guide.setup(model())


def conjugate(width: float = 1.0, near: Tensor | None = None) -> pf.AutoFlow:
    """Return the posterior of ``tasks.conjugate``, with its scale times ``width``, everywhere or near a dataset."""

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.ones_like(x)
        if near is not None:
            share = share * (-(x - near).square().sum(-1, keepdim=True) / (2 * REACH**2)).exp()
        return x / 1.25, math.sqrt(0.2) * (1 - (1 - width) * share)

    return gaussian(tasks.conjugate, moments)


def ten(x: Tensor | None = None) -> Tensor:
    """Sample a Gaussian in ten dimensions, with a Gaussian posterior."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(10), 1.0).to_event(1))
    return pyro.sample("x", dist.Normal(theta, 0.5).to_event(1), obs=x)


def conjugate_ten(width: float = 1.0) -> pf.AutoFlow:
    """Return the posterior of ``ten``, with its scale times ``width``."""
    return gaussian(ten, lambda x: (x / 1.25, torch.full_like(x, width * math.sqrt(0.2))))


def folded(x: Tensor | None = None) -> Tensor:
    """Sample the absolute value of one latent, and another latent, with noise."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    mean = torch.stack((theta[..., 0].abs(), theta[..., 1]), -1)
    return pyro.sample("x", dist.Normal(mean, NARROW).to_event(1), obs=x)


def one_mode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exact means and standard deviations of the posterior of ``folded``."""
    loc, scale = x / (1 + NARROW**2), NARROW / math.sqrt(1 + NARROW**2)
    m = loc[..., 0]
    normal = torch.distributions.Normal(0.0, 1.0)
    tail = (normal.log_prob(m / scale) - torch.special.log_ndtr(m / scale)).exp()
    sd = (m**2 + scale**2 + m * scale * tail).clamp(min=1e-4).sqrt()
    return torch.stack((0 * m, loc[..., 1]), -1), torch.stack((sd, torch.full_like(sd, scale)), -1)


def line(x: Tensor | None = None, noise: float = NOISE) -> Tensor:
    """Sample a linear regression with 20 observations."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    mean = beta[..., :1] + beta[..., 1:] * INPUTS
    return pyro.sample("x", dist.Normal(mean, noise).to_event(1), obs=x)


def on_the_line(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means and standard deviations of the posterior of ``line``, whose columns are orthogonal."""
    design = torch.stack((torch.ones_like(INPUTS), INPUTS), -1)
    precision = 1 + design.square().sum(0) / NOISE**2
    mean = x @ design / NOISE**2 / precision
    return mean, (1 / precision.sqrt()).expand_as(mean)


def points(x: Tensor | None = None, noise: float = NOISE) -> Tensor:
    """Sample four points of two numbers around a latent mean."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    spread = dist.Normal(theta.unsqueeze(-2), noise).expand((*theta.shape[:-1], 4, 2))
    return pyro.sample("x", spread.to_event(2), obs=x)


def among_points(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means and standard deviations of the posterior of ``points``."""
    precision = 1 + 4 / NOISE**2
    mean = x.sum(-2) / NOISE**2 / precision
    return mean, torch.full_like(mean, 1 / math.sqrt(precision))


def local_cases() -> list[Case]:
    """Return the cases of ``pf.local_c2st``."""

    def run(build: Callable[[Tensor], pf.AutoFlow], model: Callable[..., Any] = tasks.conjugate) -> Any:
        def repetition(seed: int) -> pf.diagnostics.LocalC2ST:
            pyro.set_rng_seed(seed)
            x = model()
            return pf.local_c2st(model, build(x), observed={"x": x})

        return repetition

    away = torch.tensor([4 * REACH, 0.0])
    return [
        Case("exact", "at most 5", run(lambda x: conjugate()), 3),
        Case("20 % too narrow near the observation", "at least 95", run(lambda x: conjugate(0.8, x))),
        Case("20 % too narrow everywhere", "at least 95", run(lambda x: conjugate(0.8))),
        Case("20 % too narrow at a distance of 4 h", "", run(lambda x: conjugate(0.8, x + away))),
        Case(
            "the prior, whatever the data", "", run(lambda x: gaussian(tasks.conjugate, lambda x: (0 * x, 0 * x + 1)))
        ),
        Case("ten latents: exact", "at most 5", run(lambda x: conjugate_ten(), ten)),
        Case("ten latents: 20 % too narrow everywhere", "", run(lambda x: conjugate_ten(0.8), ten)),
        Case("one mode in place of two", "", run(lambda x: gaussian(folded, one_mode), folded)),
    ]


def model_cases() -> list[Case]:
    """Return the cases of ``pf.misspecification``."""
    exact = {line: gaussian(line, on_the_line), points: gaussian(points, among_points)}

    def run(model: Callable[..., Tensor], change: Callable[[Tensor], Tensor] = lambda x: x, **settings: float) -> Any:
        def repetition(seed: int) -> pf.diagnostics.Misspecification:
            pyro.set_rng_seed(seed)
            x = change(model(**settings))
            return pf.misspecification(model, exact[model], observed={"x": x})

        return repetition

    outlier, middle = 5 * NOISE * (INPUTS[7] == INPUTS), 2 * NOISE * (INPUTS.abs() < 0.25)
    return [
        Case("regression: data of the model", "about 5", run(line), 10),
        Case("regression: noise doubled", "at least 90", run(line, noise=2 * NOISE)),
        Case("regression: noise halved", "", run(line, noise=NOISE / 2)),
        Case("regression: one observation off by 5 standard deviations", "", run(line, lambda x: x + outlier)),
        Case("regression: four neighbours off by 2 standard deviations", "", run(line, lambda x: x + middle)),
        Case("four points: data of the model", "about 5", run(points)),
        Case("four points: noise doubled", "", run(points, noise=2 * NOISE)),
    ]


def rows_of(cases: list[Case], number: int, *, with_tail: bool) -> list[str]:
    """Run cases and return the rows of their table."""
    rows = []
    for case in cases:
        start, times = time.process_time(), case.times * number
        found = [case.run(seed) for seed in range(times)]
        seconds = (time.process_time() - start) / times
        failed = 100 * sum(not one.passed for one in found) / times
        tail = f" {100 * sum(one.p_value <= 0.05 for one in found) / times:.1f} |" if with_tail else ""
        rows.append(f"| {case.name} | {failed:.1f} | {case.asked} |{tail} {seconds:.1f} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run all cases and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=100, help="repetitions per row; exact guides have more")
    parser.add_argument("--out", type=Path, default=OUT, help="the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    local = rows_of(local_cases(), options.repetitions, with_tail=True)
    model = rows_of(model_cases(), options.repetitions, with_tail=False)
    words = {"number": options.repetitions, "noise": NOISE, "local": "\n".join(local), "model": "\n".join(model)}
    options.out.write_text(PAGE.format(**words))


if __name__ == "__main__":
    main()
