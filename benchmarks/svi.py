"""Cost of an SVI step and of its parts, compared with Pyro's guides.

    python benchmarks/svi.py                    # about 5 minutes on one core
    python benchmarks/svi.py --quick --out DIR  # few repetitions: a smoke run

*Steps*: ``SVI(model, guide, pyro.optim.Adam, Trace_ELBO())`` with one draw, which is nearly all overhead.  The models
are eight schools (non-centred, 10 latents), a logistic regression (german credit, 25 latents) and a hierarchical model
(50 groups, 52 latents).  ``AutoFlow`` has its default flow, or ``flows.iaf`` with as many trained parameters as an
``AutoIAFNormal``.  There are two sizes of the latter: Pyro's default (one transform) and three transforms.  zuko's flow
(``ZukoToPyro``) has the larger size.

*Parts*: in the same turn each part is timed alone.  The model runs at fixed latents, is scored, and back-propagates to
them.  The network draws and scores without any distribution, and then back-propagates.  The optimiser includes zeroing
of the gradients.  The rest of the step is the guide: Pyro's handlers and traces, sites, constraints, distributions, and
the parameter store.  The page shows the median of the differences.

*fit_svi*: its own step, with its default number of vectorised draws: the difference of two fits of different length.

The contenders alternate in random order, so that a drift of the machine's speed affects all.  The ratios in one run are
the result.  Times are processor times, because other work on the machine interrupts long runs.  For the data see
``targets.py``.  Writes ``docs/benchmarks/svi.md`` and ``svi.csv``.
"""

import argparse
import csv
import functools
import importlib.metadata
import io
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import posteriors
import pyro
import pyro.distributions as dist
import targets
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, autoguide
from torch import Tensor

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.guides.base import plan_of

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
PARTS = "model", "forward", "backward", "optimiser"  # of a step; the rest is the guide
REFERENCE = "AutoIAFNormal"  # the unit of the ratios: Pyro's default size
LARGE = "AutoIAFNormal, 3 × 64"
PEERS = {  # the peer of equal size
    "AutoFlow(flows.iaf)": REFERENCE,
    "AutoFlow(flows.iaf), 3 transforms": LARGE,
    "zuko, 3 transforms": LARGE,
}
Model = Callable[[], None]
Guide = Any


def eight_schools() -> Model:
    """Return the non-centred eight schools."""
    return targets.load("eight_schools").model


def logistic() -> Model:
    """Return a logistic regression with 24 features and an intercept."""
    data = json.loads((targets.folder() / "german_credit_sparse.data.json").read_text())
    x, y = (torch.tensor(data[name], dtype=torch.float64) for name in ("features", "labels"))
    x = torch.cat(((x - x.mean(0)) / x.std(0), torch.ones_like(x[:, :1])), -1)

    def model() -> None:
        beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=beta @ x.T).to_event(1), obs=y)

    return model


def hierarchical() -> Model:
    """Return a model of varying intercepts on simulated data: 50 groups of six rows."""
    source = torch.Generator().manual_seed(0)
    level = 1 + 0.5 * torch.randn(50, generator=source)
    y = level + torch.randn(6, 50, generator=source)
    zero = torch.zeros(())

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(zero, 5.0))
        sd = pyro.sample("sd", dist.HalfNormal(zero + 2))
        with pyro.plate("group", 50, dim=-1):
            level = pyro.sample("level", dist.Normal(mean, sd))
            with pyro.plate("row", 6, dim=-2):
                pyro.sample("y", dist.Normal(level, 1.0), obs=y)

    return model


MODELS: dict[str, Callable[[], Model]] = {
    "eight schools": eight_schools,
    "logistic": logistic,
    "hierarchical": hierarchical,
}


class ZukoGuide(autoguide.AutoContinuous):
    """Guide with zuko's inverse autoregressive flow, wrapped by Pyro's ``ZukoToPyro``."""

    def __init__(self, model: Model, numbers: int) -> None:
        super().__init__(model)
        self._numbers = numbers

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        import zuko

        super()._setup_prototype(*args, **kwargs)

        def build(width: int) -> Any:
            flow = zuko.flows.MAF(self.latent_dim, transforms=3, hidden_features=[width])
            return zuko.flows.Flow(flow.transform.inv, flow.base)

        self.flow = nearest(build, self._numbers)

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        from pyro.contrib.zuko import ZukoToPyro

        return ZukoToPyro(self.flow())


def trained(module: torch.nn.Module) -> list[Tensor]:
    """Return the trained parameters: all but those of the fixed affine map of our guides."""
    fixed = {p for m in module.modules() if isinstance(m, pf.transforms.FixedAffine) for p in m.parameters()}
    return [p for p in module.parameters() if p not in fixed]


def size(module: torch.nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in trained(module))


def nearest(build: Callable[[int], Any], numbers: int) -> Any:
    """Return the module with the number of parameters nearest to ``numbers``, over all hidden widths."""
    widths = range(1, 400)
    low = next((w for w in widths if size(build(w)) >= numbers), widths[-1])
    return min((build(w) for w in (max(low - 1, 1), low)), key=lambda built: abs(size(built) - numbers))


def iaf_of(model: Model, peer: Guide, num_transforms: int) -> Guide:
    """Return ``AutoFlow`` with ``flows.iaf`` of the size of a peer."""

    def build(width: int) -> Guide:
        recipe = functools.partial(flows.iaf, num_transforms=num_transforms, hidden_dims=(width,))
        return pf.AutoFlow(model, recipe).setup()

    return nearest(build, size(peer))


def contenders(model: Model) -> dict[str, Guide]:
    """Return the guides after their setup.

    Every guide of Pyro has its own class, because Pyro names its parameters in the store after the class.
    """

    def own(number: int, name: str, *args: Any, **kwargs: Any) -> Guide:
        kind = getattr(autoguide, name)
        guide = type(f"{name}{number}", (kind,), {})(model, *args, **kwargs)
        with torch.no_grad():
            guide()
        return guide

    found = {name: own(0, name) for name in (REFERENCE, "AutoNormal", "AutoMultivariateNormal")}
    found["AutoLowRankMultivariateNormal"] = own(0, "AutoLowRankMultivariateNormal")
    found[LARGE] = own(1, "AutoIAFNormal", hidden_dim=[64], num_transforms=3)
    try:
        found["zuko, 3 transforms"] = ZukoGuide(model, size(found[LARGE]))
        with torch.no_grad():
            found["zuko, 3 transforms"]()
    except ImportError:
        del found["zuko, 3 transforms"]
    found["AutoFlow(flows.iaf)"] = iaf_of(model, found[REFERENCE], 1)
    found["AutoFlow(flows.iaf), 3 transforms"] = iaf_of(model, found[LARGE], 3)
    found["AutoFlow"] = pf.AutoFlow(model).setup()
    return found


def clock(function: Callable[[], object]) -> float:
    """Return the milliseconds of processor time of a call."""
    start = time.process_time()
    function()
    return 1e3 * (time.process_time() - start)


def draw_and_score(guide: Guide) -> tuple[Tensor, Tensor]:
    """Return a draw of the packed latents and its log-density, from the bare transforms."""
    if isinstance(guide, pf.AutoFlow):
        return guide.flow.rsample_and_log_prob()
    base = guide.get_base_dist()
    x = base.rsample()
    log_prob = base.log_prob(x)
    for part in guide.transform.parts:
        y = part(x)
        log_prob = log_prob - part.log_abs_det_jacobian(x, y).sum(-1)
        x = y
    return x, log_prob


def parts_of(svi: SVI, model: Model, guide: Guide) -> Callable[[], dict[str, float]]:
    """Return a function that times each part of a step alone, in milliseconds."""
    parameters = set(trained(guide))
    latents = {name: value.detach().clone().requires_grad_() for name, value in guide().items()}

    def run_model() -> None:
        trace = poutine.trace(poutine.condition(model, data=latents)).get_trace()
        trace.compute_log_prob()
        trace.log_prob_sum().backward()

    def back(draw: tuple[Tensor, Tensor]) -> None:
        (draw[0].sum() + draw[1]).backward()

    def step() -> None:
        svi.optim(parameters)
        pyro.infer.util.zero_grads(parameters)

    def measure() -> dict[str, float]:
        drawn: list[tuple[Tensor, Tensor]] = []
        found = {"model": clock(run_model), "forward": clock(lambda: drawn.append(draw_and_score(guide)))}
        return {**found, "backward": clock(lambda: back(drawn[0])), "optimiser": clock(step)}

    return measure


def measure(name: str, seconds: float) -> Iterator[dict[str, str]]:
    """Yield the rows of a model, one per guide."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model = MODELS[name]()
    guides = contenders(model)
    svis = {key: SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), Trace_ELBO()) for key, guide in guides.items()}
    for svi in svis.values():
        for _ in range(10):
            svi.step()
    split = {key: parts_of(svis[key], model, guides[key]) for key in guides if key.startswith(("AutoFlow", "AutoIAF"))}
    times: dict[str, list[dict[str, float]]] = {key: [] for key in guides}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times[REFERENCE]) < 3:
        for key in random.sample(
            list(svis),
            len(svis),
            # In random order, because the largest guide empties the caches for the next one.
        ):
            svi = svis[key]
            found = {"step": clock(svi.step)}
            if key in split:
                found |= split[key]()
                found["guide"] = found["step"] - sum(found[part] for part in PARTS)
            times[key].append(found)

    def ratio(key: str, other: str) -> str:
        pairs = zip(times[key], times[other], strict=True)
        return f"{statistics.median(own['step'] / its['step'] for own, its in pairs):.3f}"

    for key, rows in times.items():
        medians = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
        yield {
            "model": name,
            "guide": key,
            "numbers": str(size(guides[key])),
            "tensors": str(len(trained(guides[key]))),
            "ratio": ratio(key, REFERENCE),
            "to_peer": ratio(key, PEERS[key]) if key in PEERS else "",
            **{f"{part}_ms": f"{value:.4f}" for part, value in medians.items()},
        }


def measure_fits(name: str, steps: int, rounds: int) -> Iterator[dict[str, str]]:
    """Yield the rows of ``fit_svi``: with its own objective, with Pyro's, and with Pyro's guide."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model = MODELS[name]()
    guides = contenders(model)
    ours, peer = guides["AutoFlow"], guides[LARGE]
    draws = plan_of(ours).schedule().num_particles

    def fit(guide: Guide, own: bool, steps: int) -> None:
        objective = None if own else Trace_ELBO(draws, vectorize_particles=True, max_plate_nesting=2)
        pf.fit_svi(
            model, guide, steps=steps, objective=objective, num_particles=draws, warm_start=False, progress=False
        )

    def step(*case: Any) -> float:
        return (clock(lambda: fit(*case, 2 * steps)) - clock(lambda: fit(*case, steps))) / steps

    cases = {
        "AutoFlow, fit_svi's PathELBO": (ours, True),
        "AutoFlow, Trace_ELBO": (ours, False),
        f"{LARGE}, Trace_ELBO": (peer, False),
    }
    times: dict[str, list[float]] = {key: [] for key in cases}
    for _ in range(rounds):
        for key, case in cases.items():
            times[key].append(step(*case))
    for key, (guide, _) in cases.items():
        own = {"guide": f"fit_svi: {key}", "numbers": str(size(guide)), "tensors": str(len(trained(guide)))}
        ratio = statistics.median(a / b for a, b in zip(times[key], times[f"{LARGE}, Trace_ELBO"], strict=True))
        yield {"model": name, **own, "ratio": f"{ratio:.3f}", "step_ms": f"{statistics.median(times[key]):.4f}"}


def table(rows: list[dict[str, str]]) -> str:
    """Return the results as Markdown."""
    zuko = f", zuko {importlib.metadata.version('zuko')}" if any("zuko" in r["guide"] for r in rows) else ""
    lines = [
        "# A step of SVI",
        "",
        "This page is for users who train a guide in Pyro's `SVI`. It shows the time of a step, and its parts. "
        f"`AutoFlow` with its default flow takes {span(rows, ['AutoFlow'], 'ratio')} times as long as Pyro's "
        "`AutoIAFNormal`. With a flow of the same size as the peer it takes "
        f"{span(rows, ['AutoFlow(flows.iaf)', 'AutoFlow(flows.iaf), 3 transforms'], 'to_peer')} times as long.",
        "",
        "Reproduce with `python benchmarks/svi.py`. A step is one of `SVI` with `Trace_ELBO()`, one draw and "
        "`pyro.optim.Adam`, in float64 on one thread. The guides alternate; times are medians of processor time. "
        f"torch {torch.__version__.split('+')[0]}, Pyro {pyro.__version__}{zuko}, Python {platform.python_version()}.",
        "",
        "* *parameters*, *tensors*: those that are trained.",
        "* *ratio*: the time over that of `AutoIAFNormal` with its default size. *to peer*: the time over that of the "
        "guide of Pyro with as many parameters.",
        "* *model*, *network*, *optimiser*: parts timed alone, in ms and as a share of the step. The network draws "
        "and scores without any distribution; *back* is its back-propagation.",
        "* *guide*: the rest of the step. It includes Pyro's handlers, for Pyro's guides too.",
        "* `pyro.optim.Adam` has an optimiser per tensor, `fit_svi` has one for all.",
    ]
    steps = [row for row in rows if not row["guide"].startswith("fit_svi")]
    for name in dict.fromkeys(row["model"] for row in steps):
        lines += ["", f"## {name.capitalize()}", ""]
        columns = "guide", "parameters", "tensors", "steps / s", "ms", "ratio", "to peer"
        lines += [f"| {' | '.join((*columns, 'model', 'network', 'back', 'optimiser', 'guide'))} |"]
        lines += ["|---|" + "---:|" * 11]
        for row in (row for row in steps if row["model"] == name):
            step = float(row["step_ms"])
            cells = [row["guide"], f"{int(row['numbers']):,}", row["tensors"], f"{1e3 / step:.0f}", f"{step:.2f}"]
            cells += [f"{float(row['ratio']):.2f}", f"**{float(row['to_peer']):.2f}**" if row["to_peer"] else "–"]
            for part in (*PARTS, "guide"):
                value = row.get(f"{part}_ms")
                cells.append(f"{float(value):.2f} ({float(value) / step:.0%})" if value else "–")
            lines.append("| " + " | ".join(cells) + " |")
    fits = [row for row in rows if row["guide"].startswith("fit_svi")]
    if fits:
        lines += ["", "## `fit_svi`", ""]
        lines += ["A step of `fit_svi` with its default of 256 vectorised draws. *ratio*: to Pyro's guide.", ""]
        lines += ["| model | guide and objective | parameters | ms | ratio |", "|---|---|---:|---:|---:|"]
        for row in fits:
            cells = [row["model"], row["guide"].removeprefix("fit_svi: "), f"{int(row['numbers']):,}"]
            lines.append(
                "| " + " | ".join([*cells, f"{float(row['step_ms']):.1f}", f"{float(row['ratio']):.2f}"]) + " |"
            )
    return "\n".join(lines) + "\n"


def span(rows: list[dict[str, str]], guides: list[str], column: str) -> str:
    """Return in words the smallest and the largest ratio of some guides over the models."""
    found = [float(row[column]) for row in rows if row["guide"] in guides]
    return f"{min(found):.2f} to {max(found):.2f}"


def save(rows: list[dict[str, str]], out: Path) -> None:
    """Write the rows as CSV and as Markdown."""
    text = io.StringIO()
    names = "model", "guide", "numbers", "tensors", "ratio", "to_peer", *(f"{p}_ms" for p in ("step", *PARTS, "guide"))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    posteriors.write(text.getvalue(), out / "svi.csv")
    posteriors.write(table(rows), out / "svi.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=45.0, help="seconds of steps per model")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the two files")
    parser.add_argument("--no-fits", action="store_true", help="skip the steps of fit_svi")
    parser.add_argument("--quick", action="store_true", help="smoke run with few steps; needs --out")
    options = parser.parse_args()
    steps, rounds = 40, 5
    if options.quick:
        if options.out == OUT:
            parser.error("--quick needs --out, because its figures are not results. Add --out DIR.")
        options.seconds, steps, rounds = 2.0, 5, 1
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.models:
        rows += list(measure(name, options.seconds))
        print(table(rows), flush=True)
    for name in [] if options.no_fits else options.models:
        rows += list(measure_fits(name, steps, rounds))
    save(rows, options.out)
    print(table(rows))


if __name__ == "__main__":
    main()
