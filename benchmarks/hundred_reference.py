"""References of the posteriors of ``hundred.py``: moments and quantiles of every number, and how they were found.

Exact draws and those of posteriordb are taken as they are.  Otherwise NumPyro's NUTS runs until R-hat is at most 1.01
and every bulk ESS at least 4,000.  nutpie, a second sampler, then has to find the same means and standard deviations.

Numbers with heavy tails, whose standard deviation may be infinite, are judged as asinh((x - centre) / width).
"""

import functools
import importlib
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import hundred_registry
import numpy as np
import targets
import torch
from posteriors import read, write_csv
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.ops.stats import fit_generalized_pareto
from torch.distributions import biject_to

from pyro_flows.guides import init_to_center

FILES = "hundred_regressions", "hundred_hierarchies", "hundred_series", "hundred_shapes"
TABLE = Path(__file__).with_name("hundred_reference.csv")
FACTS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "hundred_reference.csv"
NUMBERS = "mean", "sd", "q5", "q95", "mcse_mean", "mcse_sd", "ess", "r_hat", "centre", "width"
FACT_NAMES = (
    *("posterior", "how", "latents", "numbers", "draws", "ess", "r_hat", "divergences", "seconds"),
    *("second", "largest_z", "agrees", "largest_mcse", "failed"),
)
KEPT, EXACT_DRAWS, CHAINS, WARMUP, DRAWS = 300, 40_000, 4, 1000, 1000
CONVERGED, ENOUGH, LIMIT = 1.01, 4000, 600.0
ONE_SAMPLER = "the second sampler did not end"
HEAVY, FLAT, DOUBT, DIVERGING = 0.3, 1e-9, 1e-3, 1e-3

Row = dict[str, str]
Samples = dict[str, np.ndarray]  # of a site: (chains, draws, *shape); of a number: (chains, draws)


class Reference(NamedTuple):
    """Reference of one number; a centre and a width are NaN unless it has heavy tails."""

    mean: float
    sd: float
    q5: float
    q95: float
    mcse_mean: float
    mcse_sd: float
    ess: float
    r_hat: float
    centre: float
    width: float

    def judged(self, values: np.ndarray) -> np.ndarray:
        """Return values as they are judged."""
        return values if math.isnan(self.centre) else np.arcsinh((values - self.centre) / self.width)


@functools.cache
def entries() -> dict[str, hundred_registry.Entry]:
    """Return all posteriors by name."""
    classic = {name: hundred_registry.Entry("classic", lambda: (lambda: None, ()), None, ()) for name in targets.NAMES}
    for file in FILES:
        importlib.import_module(file)
    return classic | hundred_registry.ENTRIES


def load(name: str) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Return a Pyro model by name, and its arguments, in double precision."""
    if name in targets.NAMES:
        return targets.load(name).model, ()
    model, args = entries()[name].build()
    return model, tuple(torch.as_tensor(value) if isinstance(value, np.ndarray) else value for value in args)


def latents(name: str) -> int:
    """Return the number of unconstrained latents of a posterior."""
    model, args = load(name)
    trace = poutine.trace(InitMessenger(init_to_center)(model)).get_trace(*args)
    sites = [site for _, site in trace.iter_stochastic_nodes() if type(site["fn"]).__name__ != "_Subsample"]
    return sum(biject_to(site["fn"].support).inverse_shape(site["fn"].shape()).numel() for site in sites)


def numbers_of(name: str, draws: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the draws of each number that is compared, ``(n,)``, from draws of all sites, ``(n, *shape)``.

    Of a site with many numbers, some are kept, evenly spread.
    """
    if name in targets.NAMES and targets.reference_draws(name):
        found = targets.load(name).quantities({key: torch.as_tensor(value) for key, value in draws.items()})
        return {key: value.numpy() for key, value in found.items() if key in targets.reference_draws(name)}
    numbers = {}
    for site, values in sorted(draws.items()):
        places = list(np.ndindex(*values.shape[1:]))
        for index in range(min(len(places), KEPT)):
            place = places[index * len(places) // min(len(places), KEPT)]
            numbers[f"{site}[{', '.join(map(str, place))}]" if place else site] = values[(slice(None),) + place]
    return numbers


def by_chain(name: str, samples: Samples) -> Samples:
    """Return the draws of each number by chain, from those of all sites."""
    chains = next(iter(samples.values())).shape[0]
    flat = {site: value.reshape(-1, *value.shape[2:]) for site, value in samples.items()}
    return {key: value.reshape(chains, -1) for key, value in numbers_of(name, flat).items()}


def has_heavy_tails(values: np.ndarray) -> bool:
    """True if a tail of draws is so heavy that estimates of the standard deviation are unreliable."""
    for side in (1, -1):
        ranked = np.sort(side * values.reshape(-1))
        tail = ranked[-max(20, math.ceil(3 * math.sqrt(len(ranked)))) :]
        if tail[-1] > tail[0] and fit_generalized_pareto(torch.as_tensor(tail[1:] - tail[0]))[0] > HEAVY:
            return True
    return False


def statistics(numbers: Samples, method: str) -> np.ndarray:
    """Return a diagnostic of ArviZ for each number."""
    import arviz
    import xarray

    data = xarray.Dataset({"all": (("chain", "draw", "number"), np.stack(list(numbers.values()), -1).astype(float))})
    if method == "rhat":
        return arviz.rhat(data)["all"].values
    of = arviz.mcse if method in ("mean", "sd") else arviz.ess
    return of(data, method=method)["all"].values


def summarised(numbers: Samples, known: dict[str, Reference] | None = None) -> dict[str, Reference]:
    """Return the reference of each number that varies; numbers are transformed as known ones are."""
    shapes = {}
    for key, values in numbers.items():
        if key in (known or {}):
            shapes[key] = known[key].centre, known[key].width  # type: ignore[index]
        elif has_heavy_tails(values):
            low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
            shapes[key] = float(middle), float(high - low)
    seen = {
        key: np.arcsinh((v - shapes[key][0]) / shapes[key][1]) if not math.isnan(shapes.get(key, (math.nan,))[0]) else v
        for key, v in numbers.items()
        if v.std() > FLAT * max(1.0, float(abs(v.mean())))
    }
    columns = [statistics(seen, method) for method in ("mean", "sd", "bulk", "rhat")]
    found = {}
    for i, (key, values) in enumerate(seen.items()):
        mcse_mean, mcse_sd, ess, r_hat = (float(column[i]) for column in columns)
        low, high = map(float, np.quantile(numbers[key], [0.05, 0.95]))
        mean, sd, shape = float(values.mean()), float(values.std()), shapes.get(key, (math.nan, math.nan))
        found[key] = Reference(mean, sd, low, high, mcse_mean, mcse_sd, ess, r_hat, *shape)
    return found


def decentred(name: str, prior: Any, observed: Any) -> tuple[None, Any]:
    """Replace a site of NumPyro by its location plus its scale, or its Cholesky factor, times a standard draw."""
    import numpyro
    from numpyro.distributions import MultivariateNormal, Normal
    from numpyro.infer.reparam import LocScaleReparam

    inner = prior
    while hasattr(inner, "base_dist"):
        inner = inner.base_dist
    if not isinstance(inner, MultivariateNormal):
        return LocScaleReparam(0)(name, prior, observed)
    draw = numpyro.sample(f"{name}_decentered", Normal(0.0, 1.0).expand(prior.event_shape).to_event(1))
    return None, inner.loc + (inner.scale_tril @ draw[..., None])[..., 0]


def numpyro_model(name: str) -> Callable[[], None]:
    """Return the NumPyro model of a posterior without arguments, with its eased sites decentred."""
    import hundred_numpyro
    from numpyro.handlers import reparam

    model, args = hundred_numpyro.load(name)
    bound = functools.partial(model, *args)
    eased = entries()[name].eased
    return reparam(bound, config=dict.fromkeys(eased, decentred)) if eased else bound


def sites_of(samples: dict[str, Any]) -> Samples:
    """Return the draws of the sites of the model, without those of a reparametrisation."""
    return {key: np.asarray(value) for key, value in samples.items() if not key.endswith("_decentered")}


def nuts(name: str, target: float, limit: float) -> tuple[Samples, dict[str, Any]]:
    """Run NumPyro's NUTS until it has converged with enough draws, or the time is up."""
    import jax
    import sample
    from numpyro.infer import MCMC, NUTS

    began, parts, diverging = time.perf_counter(), [], 0
    kernel = NUTS(numpyro_model(name), target_accept_prob=target)
    settings = {"num_chains": CHAINS, "chain_method": sample.one_program, "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=WARMUP, num_samples=DRAWS, **settings)
    mcmc.run(jax.random.PRNGKey(0))
    while True:
        parts.append(sites_of(mcmc.get_samples(group_by_chain=True)))
        diverging += int(mcmc.get_extra_fields()["diverging"].sum())
        samples = {key: np.concatenate([part[key] for part in parts], 1) for key in parts[0]}
        total, seconds = next(iter(samples.values())).shape[1], time.perf_counter() - began
        numbers = by_chain(name, samples)
        varied = {key: value for key, value in numbers.items() if value.std() > FLAT}
        is_done = statistics(varied, "rhat").max() <= CONVERGED and statistics(varied, "bulk").min() >= ENOUGH
        if is_done or 2 * seconds > limit:
            return numbers, {"draws": CHAINS * total, "divergences": diverging}
        mcmc.post_warmup_state, mcmc.num_samples = mcmc.last_state, total
        mcmc.run(mcmc.post_warmup_state.rng_key)


def differing(one: dict[str, Reference], other: dict[str, Reference]) -> float:
    """Return the largest difference of a mean or a standard deviation, in standard errors."""
    pairs = [(one[key], other[key]) for key in one if key in other]
    means = [abs(a.mean - b.mean) / math.hypot(a.mcse_mean, b.mcse_mean) for a, b in pairs]
    return max(*means, *(abs(a.sd - b.sd) / math.hypot(a.mcse_sd, b.mcse_sd) for a, b in pairs))


def compared(name: str, target: float, found: dict[str, Reference]) -> dict[str, Any]:
    """Return how far nutpie agrees: the largest difference must be likely among so many of equal samplers."""
    from nuts import with_nutpie

    samples, _ = with_nutpie(numpyro_model(name), 1, WARMUP, 2 * DRAWS, target_accept=target, cores=1)
    other = summarised(by_chain(name, sites_of(samples)), found)
    worst = differing(found, other)
    bound = NormalDist().inv_cdf(1 - DOUBT / (4 * len(found)))  # Bonferroni: two sides of means and sds
    mcse = max(math.hypot(found[key].mcse_mean, it.mcse_mean) / found[key].sd for key, it in other.items())
    return {"second": "nutpie", "largest_z": worst, "agrees": str(worst <= bound), "largest_mcse": mcse}


def find(name: str, limit: float, tell: Callable[[Any], None]) -> None:
    """Find the reference of a posterior, and tell the facts with all numbers, first without a second sampler."""
    began = time.perf_counter()
    facts: dict[str, Any] = {"posterior": name, "latents": latents(name), "how": "NUTS"}
    target = 0.9
    if exact := entries()[name].exact:
        draws = exact(np.random.default_rng(0), EXACT_DRAWS)
        numbers = by_chain(name, {key: value[None] for key, value in draws.items()})
        numbers = {key: value.reshape(CHAINS, -1) for key, value in numbers.items()}
        facts |= {"how": "exact", "draws": EXACT_DRAWS}
    elif name in targets.NAMES and (known := targets.reference_draws(name)):
        numbers = {key: value.astype(float).reshape(10, -1) for key, value in known.items()}
        facts |= {"how": "posteriordb", "draws": next(iter(numbers.values())).size}
    else:
        numbers, more = nuts(name, target, limit)
        if more["divergences"] > DIVERGING * more["draws"]:
            target = 0.99
            numbers, more = nuts(name, target, limit)
        facts |= more
    found = summarised(numbers)
    facts |= {"numbers": len(found), "seconds": time.perf_counter() - began}
    facts |= {"ess": min(one.ess for one in found.values()), "r_hat": max(one.r_hat for one in found.values())}
    if facts["how"] == "NUTS" and (facts["r_hat"] > CONVERGED or facts["ess"] < ENOUGH):
        tell((facts | {"failed": "NUTS has not converged"}, found))
    elif facts["how"] != "NUTS":
        tell((facts, found))
    else:
        tell((facts | {"failed": ONE_SAMPLER}, found))
        facts |= compared(name, target, found)
        tell((facts | {"seconds": time.perf_counter() - began}, found))


def rounded(key: str, one: Reference) -> Row:
    """Return a row of numbers, with means to a ten-thousandth of a standard deviation."""
    digits = dict.fromkeys(NUMBERS, 3) | {"mean": 4, "q5": 4, "q95": 4, "sd": 5, "ess": 5, "r_hat": 5, "centre": 6}
    row = {}
    for field, value in one._asdict().items():
        more = math.ceil(max(0.0, math.log10(abs(value) / one.sd))) if field in ("mean", "q5", "q95") and value else 0
        row[field] = "" if math.isnan(value) else f"{value:.{digits[field] + more}g}"
    return {"number": key, **row}


def save(facts: Row, found: dict[str, Reference], table: Path = TABLE, facts_table: Path = FACTS) -> None:
    """Put the reference of a posterior into the two tables."""
    name = facts["posterior"]
    rows = [row for row in read(table) if row["posterior"] != name]
    rows += [{"posterior": name, **rounded(key, one)} for key, one in found.items()]
    write_csv(rows, ["posterior", "number", *NUMBERS], table)
    write_csv([row for row in read(facts_table) if row["posterior"] != name] + [facts], FACT_NAMES, facts_table)


def references(name: str) -> dict[str, Reference]:
    """Return the reference of each number of a posterior; empty if there is none that can be relied on."""
    if not any(is_sound(row) for row in read(FACTS) if row["posterior"] == name):
        return {}
    rows = [row for row in read(TABLE) if row["posterior"] == name]
    return {row["number"]: Reference(*(float(row[key] or "nan") for key in NUMBERS)) for row in rows}


def is_sound(facts: Row) -> bool:
    """True if a reference can be relied on: it is exact or published, or has converged without a contradiction."""
    has_one = facts.get("failed") == ONE_SAMPLER
    return facts.get("how") in ("exact", "posteriordb") or facts.get("agrees") == "True" or has_one


def prepare(threads: int, chains: int = 1) -> None:
    """Set double precision and the threads of torch and JAX, whose modules must not be imported yet."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if threads == 1 else ""
    os.environ["XLA_FLAGS"] = flags if chains == 1 else f"--xla_force_host_platform_device_count={chains}"
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
