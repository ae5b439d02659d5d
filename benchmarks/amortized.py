"""How accurate are amortised posteriors?  ``fit_amortized`` compared with sbi's neural posterior estimation (NPE).

    python benchmarks/amortized.py                         # all of it, about five hours on one core
    python benchmarks/amortized.py --parts speed           # one part; rows in the CSV file are not measured again
    python benchmarks/amortized.py --quick --out DIR       # few simulations and draws: a smoke run

*posteriors*: three tasks of sbibm.  Our guides, the density of a point of data (``fit_likelihood``) and sbi's NPE are
trained one after the other on the same simulations.  Other guides are trained on draws from that density, and guides in
rounds simulate anew for each observation.  *more simulations* is slcp with three times as many.
NPE is a neural spline flow with default settings.  For each of five observations, a classifier compares 10,000 draws
with 10,000 reference draws (C2ST: .5 is perfect, 1 is worst).

*speed*: the time of simulations and of a training step.

*calibration*: ``calibrate`` on a trained guide, and on the same guide with its scale reduced by 20 %.

*hierarchy*: 2,000 groups in minibatches of 100, compared with the exact posterior.

*two levels*: one guide for datasets of 5 to 100 groups of 1 to 50 rows, compared with exact posteriors.

*likelihood*: the same model with a learned density of a row.  It is learned from 10,000 simulations of single rows.

Needs the extra ``bench`` (sbi and scikit-learn).  Writes ``amortized.csv``, ``amortized.md`` and figures of the
calibration into ``docs/benchmarks``.
"""

import argparse
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import tasks
import torch
import two_levels as two
from amortized_table import METHODS, Results, page
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows import encoders, plots
from pyro_flows.distributions import FixedBase
from pyro_flows.fitting import Observed

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
PARTS = "posteriors", "more simulations", "speed", "calibration", "hierarchy", "two levels", "likelihood"
OURS, SBI, SETS, EMULATED, LEARNED, ROUNDS = METHODS[:3], *METHODS[3:]
GROUPS, TESTED, DATASETS = (5, 7, 13, 20, 33, 50, 77, 100), (5, 20, 100), 20
DRAWS, WEIGHED, SVI_STEPS, BATCH, REPEATS = 10_000, 100_000, 300, 256, 200

WIDE = dist.Uniform(torch.full((1,), -10.0), 10.0)  # of the mean of a row

Answer = Callable[[Tensor], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Trained:
    """Trained estimator of posteriors.

    Attributes:
        answers: For each method, the function from data to draws and measures.
        log_q: The log-density of latents given data.
        took: The cost of training.
    """

    answers: dict[str, Answer]
    log_q: Callable[[Tensor, Tensor], Tensor]
    took: dict[str, float]


def timed(train: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return the result of a call, with its wall time and its CPU time in seconds."""
    wall, work = time.perf_counter(), time.process_time()
    result = train()
    return result, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - work}


def simulate(model: Callable[..., Any], number: int, seed: int) -> Any:
    """Return simulations of a model, after setting the seed."""
    pyro.set_rng_seed(seed)
    return pf.simulate(model, num_simulations=number)


# The two methods.


def ours(task: tasks.Task, simulations: Any, seed: int) -> Trained:
    """Train ``AutoFlow`` by ``fit_amortized``."""
    pyro.set_rng_seed(seed)
    guide = pf.AutoFlow(task.model, encoder=task.encoder())
    fit, took = timed(lambda: pf.fit_amortized(task.model, guide, simulations=simulations, progress=False))

    def amortised(x: Tensor) -> tuple[Tensor, dict[str, float]]:
        return guide.sample(DRAWS, x)["theta"], {}

    def resampled(x: Tensor) -> tuple[Tensor, dict[str, float]]:
        khat = pf.psis(task.model, guide, x, num_samples=WEIGHED).khat
        kept = pf.resample(task.model, guide, x, num_samples=DRAWS, num_weighed=WEIGHED)
        return kept["theta"], {"khat": khat}

    def refined(x: Tensor) -> tuple[Tensor, dict[str, float]]:
        own = guide.bind(x)
        fit = pf.fit_svi(task.model, own, x, steps=SVI_STEPS, progress=False)
        return own.sample(DRAWS, x)["theta"], {"skipped": fit.skipped}

    answers = dict(zip(OURS, (amortised, resampled, refined), strict=True))
    took["epochs"] = len(fit.held_out)
    return Trained(answers, lambda theta, x: guide.log_prob({"theta": theta}, x), took)


def learned(task: tasks.Task, simulations: Any, seed: int) -> Trained:
    """Learn the density of a point by ``fit_likelihood``, and train a guide on draws from it.

    The guide is judged by itself, and as the start of the chains of ``sample``.
    """
    pyro.set_rng_seed(seed)
    theta, x = simulations.latents["theta"], simulations.data["x"]
    points = theta.repeat_interleave(task.points, 0), x.reshape(len(x) * task.points, -1)
    guide = pf.AutoFlow(task.model, encoder=task.encoder())

    def train() -> Callable[..., Tensor]:
        model = task.with_likelihood(pf.fit_likelihood(*points, progress=False))
        drawn = pf.simulate(model, num_simulations=6 * len(simulations))
        emulated = pf.Simulations(drawn.latents, {"x": drawn.data["x"].reshape(len(drawn), *task.shape)})
        pf.fit_amortized(task.model, guide, simulations=emulated, max_epochs=20, progress=False)
        return model

    model, took = timed(train)

    def emulated(x: Tensor) -> tuple[Tensor, dict[str, float]]:
        return guide.sample(DRAWS, x)["theta"], {}

    def chains(x: Tensor) -> tuple[Tensor, dict[str, float]]:
        found = pf.sample(model, guide.bind(x), x.reshape(task.points, -1), num_draws=DRAWS, progress=False)
        draws = found.flat["theta"]
        return draws[torch.randperm(len(draws))[:DRAWS]], {"converged": float(found.converged)}

    return Trained({EMULATED: emulated, LEARNED: chains}, lambda theta, x: guide.log_prob({"theta": theta}, x), took)


def in_rounds(task: tasks.Task, simulations: Any, seed: int) -> Trained:
    """Train a guide for each observation, in five rounds that draw simulations of their own, as many in all."""

    def answer(x: Tensor) -> tuple[Tensor, dict[str, float]]:
        guide = pf.AutoFlow(task.model, encoder=task.encoder())
        settings: dict[str, Any] = {"simulations": len(simulations), "datasets": Observed({"x": x}, 5)}
        _, took = timed(lambda: pf.fit_amortized(task.model, guide, progress=False, **settings))
        return guide.sample(DRAWS, x)["theta"], took

    return Trained({ROUNDS: answer}, lambda theta, x: torch.tensor(math.nan), {})


def theirs(task: tasks.Task, simulations: Any, seed: int, *, sets: bool = False) -> Trained:
    """Train sbi's NPE; with ``sets``, behind its permutation-invariant network."""
    from sbi.inference import NPE
    from sbi.utils import BoxUniform

    torch.manual_seed(seed)
    flat = (lambda x: x) if sets else (lambda x: x.flatten(-len(task.shape)))
    prior = BoxUniform(torch.full((task.dim,), -task.limit), torch.full((task.dim,), task.limit))

    def train() -> tuple[NPE, nn.Module]:
        inference = NPE(prior, density_estimator=builder(sets), show_progress_bars=False)
        inference.append_simulations(simulations.latents["theta"], flat(simulations.data["x"]))
        return inference, inference.train()

    (inference, estimator), took = timed(train)
    posterior = inference.build_posterior(estimator)

    def answer(x: Tensor) -> tuple[Tensor, dict[str, float]]:
        return posterior.sample((DRAWS,), x=flat(x)[None], show_progress_bars=False), {}

    took["epochs"] = inference.summary["epochs_trained"][-1]
    return Trained({SETS if sets else SBI: answer}, lambda theta, x: estimator.log_prob(theta[None], flat(x))[0], took)


def builder(sets: bool) -> Any:
    """Return sbi's neural spline flow, for sets behind its permutation-invariant network."""
    from sbi.neural_nets import posterior_nn
    from sbi.neural_nets.embedding_nets import FCEmbedding, PermutationInvariantEmbedding

    if not sets:
        return "nsf"
    network = PermutationInvariantEmbedding(FCEmbedding(input_dim=2, output_dim=64), trial_net_output_dim=64)
    return posterior_nn("nsf", embedding_net=network)


# The parts of the benchmark.


def posteriors(results: Results, options: argparse.Namespace, name: str, seed: int, label: str = "") -> None:
    """Train all methods on the same simulations, and compare their draws with the reference."""
    task, label = tasks.TASKS[name], label or name
    known = simulate(task.model, options.simulations, seed)
    fresh = simulate(task.model, DRAWS, 1000 + seed)
    trained: dict[str, Trained] = {}
    for method in options.methods:
        todo = [k for k in tasks.OBSERVATIONS if not results.has("posteriors", label, method, seed, f"c2st_{k}")]
        if not todo or (method == SETS and len(task.shape) == 1):
            continue
        if method not in trained:
            if method in (SBI, SETS):
                found = theirs(task, known, seed, sets=method == SETS)
            else:
                found = {LEARNED: learned, EMULATED: learned, ROUNDS: in_rounds}.get(method, ours)(task, known, seed)
            trained |= dict.fromkeys(found.answers, found)
            key = "posteriors", label, next(iter(found.answers)), seed
            if method != ROUNDS and not results.has(*key, "seconds"):
                with torch.no_grad():
                    log_q = float(found.log_q(fresh.latents["theta"], fresh.data["x"]).mean())
                results.add(*key, **found.took, log_q=log_q)
        for k in todo:
            x, reference = tasks.load(name, k)
            pyro.set_rng_seed(100 * seed + k)
            try:
                draws, notes = trained[method].answers[method](x)
            except FloatingPointError as error:
                print(name, method, k, error, flush=True)
                results.add("posteriors", label, method, seed, **{f"c2st_{k}": float("nan")})
                continue
            value = tasks.c2st(draws.numpy(), reference[: len(draws)])
            results.add("posteriors", label, method, seed, **{f"c2st_{k}": value})
            results.add("posteriors", label, method, seed, **{f"{key}_{k}": note for key, note in notes.items()})


def more_simulations(results: Results, options: argparse.Namespace, seed: int) -> None:
    """Train on three times as many simulations of slcp."""
    number, methods = 3 * options.simulations, [m for m in options.methods if m in (SBI, EMULATED)]
    more = argparse.Namespace(**{**vars(options), "simulations": number, "methods": methods})
    posteriors(results, more, "slcp", seed, f"slcp, {number:,}")


def speed(results: Results, options: argparse.Namespace, name: str, seed: int) -> None:
    """Time simulations and training steps with a batch of 256; the steps of both methods alternate."""
    from sbi.neural_nets import posterior_nn

    task = tasks.TASKS[name]
    if results.has("speed", name, "ratio", seed, "step"):
        return
    _, took = timed(lambda: simulate(task.model, 100_000, seed))
    results.add("speed", name, "100,000 simulations", seed, seconds=took["seconds"])
    simulations = simulate(task.model, 2000, seed)
    theta, x = simulations.latents["theta"], simulations.data["x"]
    guide = pf.AutoFlow(task.model, encoder=task.encoder())
    pf.fit_amortized(task.model, guide, simulations=simulations, max_epochs=1, progress=False)
    guide.train()
    z, _ = guide.pack({"theta": theta})
    flat = x.flatten(-len(task.shape))
    estimator = posterior_nn("nsf")(theta, flat)

    def stepper(network: nn.Module, loss: Callable[[Tensor], Tensor]) -> Iterator[float]:
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=1e-4)
        while True:
            rows = torch.randint(len(x), (BATCH,))
            start = time.process_time()
            optimizer.zero_grad()
            loss(rows).backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            yield time.process_time() - start

    steppers = {
        OURS[0]: stepper(guide, lambda rows: -guide.flow.log_prob(z[rows], guide.context(x[rows])).mean()),
        SBI: stepper(estimator, lambda rows: estimator.loss(theta[rows], flat[rows]).mean()),
    }
    times: dict[str, list[float]] = {method: [] for method in steppers}
    for _ in range(options.repeats):
        for method, steps in steppers.items():
            times[method].append(1000 * next(steps))
    medians = {method: statistics.median(values) for method, values in times.items()}
    for method, median in medians.items():
        results.add("speed", name, method, seed, step=median)
    results.add("speed", name, "ratio", seed, step=medians[OURS[0]] / medians[SBI])


def calibration(results: Results, options: argparse.Namespace, seed: int) -> None:
    """Train a guide for a model with a known posterior.  Test it as trained, and with its scale reduced by 20 %."""
    key = "calibration", "conjugate"
    if results.has(*key, "shrunk", seed, "sbc_p"):
        return
    pyro.set_rng_seed(seed)
    guide = pf.AutoFlow(tasks.conjugate, encoder=encoders.Standardize((2,)))
    fit = pf.fit_amortized(tasks.conjugate, guide, simulations=options.simulations, progress=False)
    shrunk = copy.deepcopy(guide)
    shrunk.flow = pf.Flow(guide.flow.transforms, FixedBase(dist.Normal(torch.zeros(2), 0.8).to_event(1)))
    for kind, tested in {"trained": guide, "shrunk": shrunk}.items():
        found = pf.calibrate(tasks.conjugate, tested)
        inside = float((found.coverage <= 0.9).double().mean())
        measures = {"sbc_p": found.sbc_p, "coverage_p": found.coverage_p, "tarp_p": found.tarp_p, "in_90": inside}
        results.add(*key, kind, seed, seconds=fit.seconds, **measures)
        if seed == options.seeds[0]:
            plots.calibration(found).savefig(options.out / f"calibration_{kind}.png", dpi=110)


def hierarchy(results: Results, options: argparse.Namespace, seed: int) -> None:
    """Fit a plate of 2,000 groups in minibatches of 100, and compare each group with the exact posterior."""
    for method in ("encoder", "learned rows"):
        if results.has("hierarchy", "groups", method, seed, "theta_error"):
            continue
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        y = tasks.make_groups()
        encoder = encoders.MLPEncoder(y.shape[1], context_dim=8) if method == "encoder" else None
        guide = pf.AutoPlateFlow(tasks.groups, "group", encoder=encoder)
        fit, took = timed(lambda: pf.fit_svi(tasks.groups, guide, y, progress=False))  # noqa: B023
        parts = [guide.sample(500, y) for _ in range(8)]
        found: dict[str, float] = {**took, "steps": fit.steps}
        for site, (mean, sd) in tasks.exact_groups(y).items():
            values = torch.cat([part[site] for part in parts]).double()
            error, ratio = (values.mean(0) - mean) / sd, values.std(0) / sd
            found |= {f"{site}_error": float(error.abs().max()), f"{site}_typical": float(error.square().mean().sqrt())}
            found |= {f"{site}_low_sd": float(ratio.min()), f"{site}_high_sd": float(ratio.max())}
        results.add("hierarchy", "groups", method, seed, **found)


def two_levels(results: Results, options: argparse.Namespace, seed: int) -> None:
    """Train one guide for all numbers of groups, and compare posteriors with exact ones; test its calibration."""
    if results.has("two levels", str(TESTED[-1]), "AutoPlateFlow", seed, "tarp_p"):  # the last to be measured
        return
    pyro.set_rng_seed(seed)
    guide, epochs, number = two.guide(), 1 if options.quick else 24, 4 * options.simulations
    settings: dict[str, Any] = {"simulations": number, "datasets": (4, 128), "max_epochs": epochs}
    _, took = timed(lambda: pf.fit_amortized(two.two_levels, guide, groups=128, progress=False, **settings))
    results.add("two levels", "training", "AutoPlateFlow", seed, **took)
    for groups in GROUPS:
        known = pf.simulate(two.two_levels, groups=groups, num_simulations=DATASETS)
        rows = list(zip(known.data["y"], known.data["size"], strict=True))
        found = [two.errors(guide.sample(4000, y, size, groups=groups), y, size) for y, size in rows]
        results.add("two levels", groups, "AutoPlateFlow", seed, **summarised(found))
        drawn = [two.resampled(guide, y, size, groups) for y, size in rows]
        found = [two.errors(draws, *data) for (draws, _), data in zip(drawn, rows, strict=True)]
        khats = [khat for _, khat in drawn]
        measures = {"khat": max(khats), "good": sum(khat < 0.7 for khat in khats)}
        results.add("two levels", groups, "AutoPlateFlow, resampled", seed, **summarised(found), **measures)
    for groups in TESTED:
        tested = pf.calibrate(two.two_levels, guide, groups=groups)
        measures = {"sbc_p": tested.sbc_p, "coverage_p": tested.coverage_p, "tarp_p": tested.tarp_p}
        results.add("two levels", groups, "AutoPlateFlow", seed, **measures)


def least_squares(results: Results, options: argparse.Namespace, seed: int) -> None:
    """Measure the error of the best estimate of the density of a row, in a family that holds it."""
    pyro.set_rng_seed(seed)
    theta = WIDE.sample((options.simulations,))
    posterior = two.by_least_squares(theta, two.one_row(theta))
    for groups in (5, 20):
        known = pf.simulate(two.two_levels, groups=groups, num_simulations=DATASETS)
        found = []
        for y, size in zip(known.data["y"], known.data["size"], strict=True):
            estimate, pairs = posterior(y, size), two.exact(y, size)
            found.append({s: ((estimate[s][0] - m) / sd, estimate[s][1] / sd) for s, (m, sd) in pairs.items()})
        results.add("likelihood", groups, "least squares", seed, **summarised(found))


def likelihood(results: Results, options: argparse.Namespace, seed: int) -> None:
    """Fit the two-level model with a density of a row that was learned from single rows."""
    least_squares(results, options, seed)
    if results.has("likelihood", "20", "fit_likelihood", seed, "mu_worst"):
        return
    pyro.set_rng_seed(seed)

    def learn() -> Any:
        theta = WIDE.sample((options.simulations,))
        return pf.fit_likelihood(theta, two.one_row(theta), progress=False)

    learned, took = timed(learn)
    results.add("likelihood", "training", "fit_likelihood", seed, **took)
    model = two.with_likelihood(learned)
    for groups in (5, 20):
        known = pf.simulate(two.two_levels, groups=groups, num_simulations=3)
        found = []
        for y, size in zip(known.data["y"], known.data["size"], strict=True):
            guide = pf.AutoFlow(model)
            pf.fit_svi(model, guide, y, size, progress=False)
            found.append(two.errors(guide.sample(DRAWS, y, size), y, size))
        results.add("likelihood", groups, "fit_likelihood", seed, **summarised(found))


def summarised(found: list[dict[str, tuple[Tensor, Tensor]]]) -> dict[str, float]:
    """Return for each site the errors of means, typical and worst, and the range of ratios of standard deviations."""
    measures = {}
    for site in found[0]:
        errors, ratios = (torch.cat([one[site][part].flatten() for one in found]) for part in (0, 1))
        measures |= {
            f"{site}_typical": float(errors.square().mean().sqrt()),
            f"{site}_worst": float(errors.abs().max()),
        }
        measures |= {f"{site}_low_sd": float(ratios.quantile(0.05)), f"{site}_sd": float(ratios.median())}
        measures |= {f"{site}_high_sd": float(ratios.quantile(0.95))}
    return measures


SINGLE = {
    "more simulations": more_simulations,
    "calibration": calibration,
    "hierarchy": hierarchy,
    "two levels": two_levels,
    "likelihood": likelihood,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--tasks", nargs="+", default=list(tasks.TASKS), choices=list(tasks.TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the files")
    parser.add_argument("--quick", action="store_true", help="500 simulations, one task: needs --out")
    options = parser.parse_args()
    options.repeats = REPEATS
    if options.quick:
        if options.out == OUT:
            parser.error("--quick needs --out, so that its figures do not replace the results")
        options.tasks, options.simulations, options.repeats = options.tasks[:1], 500, 5
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tasks.folder()
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "amortized.csv")
    for part in options.parts:
        for seed in options.seeds:
            if part in ("posteriors", "speed"):
                for name in options.tasks:
                    (posteriors if part == "posteriors" else speed)(results, options, name, seed)
            else:
                SINGLE[part](results, options, seed)
            (options.out / "amortized.md").write_text(page(results, options.simulations))


if __name__ == "__main__":
    main()
