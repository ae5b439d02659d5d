"""Simulation-based calibration of ``pf.sample``, with a guide that is wrong on purpose.

    python benchmarks/sbc.py

The test draws latents from the prior, data given the latents, and posterior draws given the data.  If the posterior
draws are exact, the ranks of the latents among them are uniform (Talts, Betancourt, Simpson, Vehtari, Gelman 2018,
arXiv:1804.06788).  The model is a Poisson regression whose coefficients have a latent scale.  The guide is a Gaussian
that does not depend on the data.

Writes ``docs/benchmarks/sbc.md``, in about half an hour on one free core.  ``--datasets`` sets the number of datasets.
"""

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

This page is for users who ask whether the draws of `pf.sample` are exact. Latents are drawn from the prior, data given
the latents, and posterior draws by `pf.sample`. If these are exact, the rank of each latent among {draws} draws is
uniform. The smallest p-value of {tests} tests of uniform ranks is {smallest:.2f}.

Reproduce with `python benchmarks/sbc.py`, on one core. The model is a Poisson regression of {rows} counts, with a
latent intercept, slope and scale. The fourth quantity is the log-likelihood, which detects errors of the joint
distribution. The guide is a Gaussian that does not depend on the data, so the chains must correct it.

| quantity | mean rank | share of ranks in the outer tenths | chi-square of {bins} bins | p-value |
|---|---|---|---|---|
{table}

Exact draws have a mean rank of {middle}, and a share of .20 in the outer tenths.

There are {datasets} datasets with {chains} chains each; {converged} of them converged. On average a dataset took
{seconds:.1f} seconds and {sweeps:.0f} sweeps. The mean acceptance probability of a draw of the guide was {chance:.2f}.
"""


def model(y: Tensor | None = None) -> Tensor:
    """Sample counts whose log rate is linear in x; a latent scale is that of intercept and slope."""
    scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    intercept = pyro.sample("intercept", dist.Normal(1.0, scale))
    slope = pyro.sample("slope", dist.Normal(0.0, scale))
    rate = (intercept.unsqueeze(-1) + slope.unsqueeze(-1) * X).clamp(-8, 8).exp()
    return pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)


def guide(y: Tensor | None = None) -> None:
    """Sample latents independently of the data."""
    pyro.sample("scale", dist.LogNormal(-0.3, 0.4))
    pyro.sample("intercept", dist.Normal(0.8, 0.6))
    pyro.sample("slope", dist.Normal(0.2, 0.6))


def log_likelihood(latents: dict[str, Tensor], y: Tensor) -> Tensor:
    """Return the log-likelihood of counts at draws, (N,)."""
    rate = (latents["intercept"].unsqueeze(-1) + latents["slope"].unsqueeze(-1) * X).clamp(-8, 8).exp()
    return dist.Poisson(rate).log_prob(y).sum(-1)


def ranks_of(seed: int) -> tuple[dict[str, int], pf.sampling.Samples]:
    """Return the ranks of one prior draw among posterior draws given its data, and the result of ``pf.sample``."""
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
    parser.add_argument("--datasets", type=int, default=500, help="number of datasets")
    number = parser.parse_args().datasets
    torch.set_num_threads(1)
    start, results = time.perf_counter(), []
    for seed in range(number):
        results.append(ranks_of(seed))
        if seed % 20 == 19 or seed == number - 1:
            (ROOT / "docs" / "benchmarks" / "sbc.md").write_text(page_of(results))
            print(f"{seed + 1} datasets in {time.perf_counter() - start:.0f} s", flush=True)


def page_of(results: list[tuple[dict[str, int], pf.sampling.Samples]]) -> str:
    """Return the page for the datasets so far."""
    table, samples, number = [], [found for _, found in results], len(results)
    p_values = []
    for name in results[0][0]:
        ranks = torch.tensor([ranks[name] for ranks, _ in results])
        tenth = (DRAWS + 1) // 10
        outer = ((ranks < tenth) | (ranks > DRAWS - tenth)).double().mean()
        test = chisquare(torch.bincount(ranks * BINS // (DRAWS + 1), minlength=BINS).numpy())
        p_values.append(test.pvalue)
        table.append(
            f"| {name} | {ranks.double().mean():.1f} | {outer:.2f} | {test.statistic:.1f} | {test.pvalue:.2f} |"
        )
    return PAGE.format(
        draws=DRAWS,
        tests=len(p_values),
        smallest=min(p_values),
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
