"""Are the draws of ``pf.sample`` exact?  Simulation-based calibration, with a guide that is wrong on purpose.

Latents are drawn from the prior, data given them, and the latents' ranks among draws of the posterior are uniform if
these are exact (Talts, Betancourt, Simpson, Vehtari, Gelman 2018, arXiv:1804.06788).  The model is a Poisson regression
whose rows scatter by a latent scale.  The guide is a Gaussian that no data have moved.

    python benchmarks/sbc.py

writes docs/benchmarks/sbc.md, in about half an hour of one core that is free.  ``--datasets`` sets their number.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from scipy.stats import chisquare
from torch import Tensor

import pyro_flows as pf

ROOT = Path(__file__).resolve().parents[1]
ROWS, DRAWS, BINS, CHAINS = 8, 99, 20, 64
X = torch.linspace(-1, 1, ROWS)
PAGE = """# Simulation-based calibration of `pf.sample`

Are the draws exact? Latents are drawn from the prior, data given them, and `pf.sample` draws from the posterior. The
rank of each latent among {draws} draws is uniform if they are exact. `python benchmarks/sbc.py` makes this page, on one
core.

The model is a Poisson regression of {rows} counts, with a latent intercept, slope and scale; the fourth quantity is the
log-likelihood, which sees errors of their joint distribution. The guide is a Gaussian that no data have moved, so the
chains have to mend its errors.

| quantity | mean rank | share of ranks in the outer tenths | chi-square of {bins} bins | p-value |
|---|---|---|---|---|
{table}

Exact draws have a mean rank of {middle}, and a share of .20 in the outer tenths.

{datasets} datasets, {chains} chains each; {converged} of them converged. A dataset took {seconds:.1f} seconds and
{sweeps:.0f} sweeps on average; a draw of the guide was accepted with a mean chance of {chance:.2f}.
"""


def model(y: Tensor | None = None) -> Tensor:
    """Counts whose rate depends on x, over a scale in which their intercept and slope are measured."""
    scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    intercept = pyro.sample("intercept", dist.Normal(1.0, scale))
    slope = pyro.sample("slope", dist.Normal(0.0, scale))
    rate = (intercept.unsqueeze(-1) + slope.unsqueeze(-1) * X).clamp(-8, 8).exp()
    return pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)


def guide(y: Tensor | None = None) -> None:
    """A Gaussian that is independent of the data."""
    pyro.sample("scale", dist.LogNormal(-0.3, 0.4))
    pyro.sample("intercept", dist.Normal(0.8, 0.6))
    pyro.sample("slope", dist.Normal(0.2, 0.6))


def log_likelihood(latents: dict[str, Tensor], y: Tensor) -> Tensor:
    """The log-likelihood of counts at draws, (N,)."""
    rate = (latents["intercept"].unsqueeze(-1) + latents["slope"].unsqueeze(-1) * X).clamp(-8, 8).exp()
    return dist.Poisson(rate).log_prob(y).sum(-1)


def ranks_of(seed: int) -> tuple[dict[str, int], pf.Samples]:
    """The ranks of one prior draw among draws of the posterior, given data of this draw."""
    pyro.set_rng_seed(seed)
    trace = pyro.poutine.trace(model).get_trace()
    truth = {name: trace.nodes[name]["value"] for name in ("scale", "intercept", "slope")}
    y = trace.nodes["y"]["value"]
    found = pf.sample(model, guide, y, num_chains=CHAINS, num_draws=400, progress=False)
    flat = found.flat
    kept = torch.randperm(len(flat["slope"]))[:DRAWS]
    draws = {name: value[kept] for name, value in flat.items()}
    ranks = {name: int((draws[name] < truth[name]).sum()) for name in truth}
    return {**ranks, "log-likelihood": int((log_likelihood(draws, y) < log_likelihood(truth, y)).sum())}, found


def main() -> None:
    """Run all datasets and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", type=int, default=500)
    number = parser.parse_args().datasets
    torch.set_num_threads(1)
    start, results = time.perf_counter(), []
    for seed in range(number):
        results.append(ranks_of(seed))
        if seed % 20 == 19 or seed == number - 1:
            (ROOT / "docs" / "benchmarks" / "sbc.md").write_text(page_of(results))
            print(f"{seed + 1} datasets in {time.perf_counter() - start:.0f} s", flush=True)


def page_of(results: list[tuple[dict[str, int], pf.Samples]]) -> str:
    """The page of the datasets so far."""
    table, samples, number = [], [found for _, found in results], len(results)
    for name in results[0][0]:
        ranks = torch.tensor([ranks[name] for ranks, _ in results])
        tenth = (DRAWS + 1) // 10
        outer = ((ranks < tenth) | (ranks > DRAWS - tenth)).double().mean()
        test = chisquare(torch.bincount(ranks * BINS // (DRAWS + 1), minlength=BINS).numpy())
        table.append(
            f"| {name} | {ranks.double().mean():.1f} | {outer:.2f} | {test.statistic:.1f} | {test.pvalue:.2f} |"
        )
    return PAGE.format(
        draws=DRAWS,
        rows=ROWS,
        bins=BINS,
        table="\n".join(table),
        middle=DRAWS / 2,
        datasets=number,
        chains=CHAINS,
        converged=sum(found.converged for found in samples),
        seconds=sum(found.seconds for found in samples) / number,
        sweeps=sum(found.sweeps for found in samples) / number,
        chance=sum(found.chance for found in samples) / number,
    )


if __name__ == "__main__":
    main()
