"""How fast are the flows, beside Pyro's own, zuko, nflows and flowjax, in one run?

    python benchmarks/speed.py            # the full table, about 10 minutes on 2 cores
    python benchmarks/speed.py --quick    # D = 8 and few repetitions: a smoke run

Same architecture for all: 5 layers, two hidden layers of 128, 8 bins, batch 512, 2 threads, eager.  Four tasks:

    log-prob   score a batch, no gradient
    step       score a batch, back-propagate to the parameters
    sample     draw a batch, no gradient
    slow step  the same training step through the other direction: draw, score what was drawn, back-propagate
               (for iaf, whose fast direction draws: score a batch, back-propagate)

The libraries take turns inside each repetition, so a machine whose speed drifts treats them alike; what counts is the
ratio in one run.  Peers that are not installed are left out (``pip install -e '.[bench]'``; flowjax is optional).
Writes ``docs/benchmarks/speed.md`` and ``docs/benchmarks/speed.png``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LAYERS, HIDDEN, BINS, BATCH, BOUND = 5, [128, 128], 8, 512, 5.0
LONG = 5.0  # seconds after which a task is run once
# A peer that inverts by D passes keeps D graphs: for splines at D = 128 some 40 GB, so this case is left out.
TOO_LARGE = {("nsf_ar", 128, "slow step")}
FLOWS = ["maf", "iaf", "nsf_ar", "nsf", "realnvp"]
TASKS = ["log-prob", "step", "sample", "slow step"]
OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"

# A contender is a dictionary from task to a function of no arguments.
Contender = dict[str, Callable[[], object]]


def contender(
    x: Tensor,
    log_prob: Callable[[Tensor], Tensor],
    sample: Callable[[], Tensor],
    sample_and_log_prob: Callable[[], Tensor],
    parameters: list[Tensor],
    scores_fast: bool,
) -> Contender:
    """The four tasks of a torch library, from its three functions."""

    def descend(loss: Tensor) -> None:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()

    def score() -> None:
        with torch.no_grad():
            log_prob(x.clone())

    def draw() -> None:
        with torch.no_grad():
            sample()

    def score_step() -> None:
        descend(-log_prob(x.clone()).mean())

    def draw_step() -> None:
        descend(sample_and_log_prob().mean())

    fast, slow = (score_step, draw_step) if scores_fast else (draw_step, score_step)
    return {"log-prob": score, "step": fast, "sample": draw, "slow step": slow}


def ours(name: str, dim: int, x: Tensor) -> Contender:
    from pyro_flows import flows

    sizes = {"bins": BINS, "bound": BOUND} if name.startswith("nsf") else {}
    flow = getattr(flows, name)(dim, num_transforms=LAYERS, hidden_dims=HIDDEN, **sizes)
    return contender(
        x,
        lambda value: flow().log_prob(value),
        lambda: flow().sample((BATCH,)),
        lambda: flow.rsample_and_log_prob((BATCH,))[1],
        list(flow.parameters()),
        scores_fast=name != "iaf",
    )


def pyro_own(name: str, dim: int, x: Tensor) -> Contender:
    import pyro.distributions as dist
    import pyro.distributions.transforms as T
    from pyro.nn import AutoRegressiveNN, DenseNN

    half = dim // 2
    spline = [BINS, BINS, BINS - 1]
    layers, parts = [], []
    for _ in range(LAYERS):
        if name in ("maf", "iaf"):
            layer = T.AffineAutoregressive(AutoRegressiveNN(dim, HIDDEN))
            parts.append(layer.inv if name == "maf" else layer)
        elif name == "nsf_ar":
            net = AutoRegressiveNN(dim, HIDDEN, param_dims=spline)
            layer = T.SplineAutoregressive(dim, net, count_bins=BINS, bound=BOUND, order="quadratic")
            parts.append(layer.inv)
        elif name == "nsf":
            net = DenseNN(half, HIDDEN, [n * (dim - half) for n in spline])
            layer = T.SplineCoupling(dim, half, net, count_bins=BINS, bound=BOUND, order="quadratic")
            parts += [layer, T.Permute(torch.arange(dim - 1, -1, -1))]
        else:
            layer = T.AffineCoupling(half, DenseNN(half, HIDDEN, [dim - half, dim - half]))
            parts += [layer, T.Permute(torch.arange(dim - 1, -1, -1))]
        layers.append(layer)
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1), parts)

    def sample_and_log_prob() -> Tensor:
        return flow.log_prob(flow.rsample((BATCH,)))

    def clean(task: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            flow.clear_cache()
            task()

        return run

    tasks = contender(
        x,
        flow.log_prob,
        lambda: flow.sample((BATCH,)),
        sample_and_log_prob,
        [p for layer in layers for p in layer.parameters()],
        scores_fast=name != "iaf",
    )
    return {task: clean(function) for task, function in tasks.items()}


def zuko(name: str, dim: int, x: Tensor) -> Contender | None:
    import zuko

    if name == "nsf":
        return None
    kind = {"maf": "MAF", "iaf": "MAF", "nsf_ar": "NSF", "realnvp": "RealNVP"}[name]
    sizes = {"bins": BINS} if name == "nsf_ar" else {}
    flow = getattr(zuko.flows, kind)(dim, transforms=LAYERS, hidden_features=HIDDEN, **sizes)
    if name == "iaf":
        flow = zuko.flows.Flow(flow.transform.inv, flow.base)
    return contender(
        x,
        lambda value: flow().log_prob(value),
        lambda: flow().sample((BATCH,)),
        lambda: flow().rsample_and_log_prob((BATCH,))[1],
        list(flow.parameters()),
        scores_fast=name != "iaf",
    )


def nflows(name: str, dim: int, x: Tensor) -> Contender:
    from nflows import distributions, flows, transforms
    from nflows.nn.nets import MLP

    class Net(torch.nn.Module):
        def __init__(self, n: int, m: int) -> None:
            super().__init__()
            self.net = MLP([n], [m], HIDDEN)

        def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
            return self.net(inputs)

    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    made = {"features": dim, "hidden_features": HIDDEN[0], "num_blocks": 1, "use_residual_blocks": False}
    parts = []
    for layer in range(LAYERS):
        mask = (torch.arange(dim) < dim // 2).int() * 2 - 1
        mask = mask if layer % 2 else -mask
        if name in ("maf", "iaf"):
            part = transforms.MaskedAffineAutoregressiveTransform(**made)
            parts.append(part if name == "maf" else transforms.InverseTransform(part))
        elif name == "nsf_ar":
            parts.append(transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(**made, **spline))
        elif name == "nsf":
            parts.append(transforms.PiecewiseRationalQuadraticCouplingTransform(mask, Net, **spline))
        else:
            parts.append(transforms.AffineCouplingTransform(mask, Net))
    flow = flows.Flow(transforms.CompositeTransform(parts), distributions.StandardNormal([dim]))
    return contender(
        x,
        flow.log_prob,
        lambda: flow.sample(BATCH),
        lambda: flow.sample_and_log_prob(BATCH)[1],
        list(flow.parameters()),
        scores_fast=name != "iaf",
    )


def flowjax(name: str, dim: int, x: Tensor) -> Contender | None:
    import equinox as eqx
    import flowjax.flows
    import jax
    import jax.numpy as jnp
    from flowjax.bijections import Affine, RationalQuadraticSpline
    from flowjax.distributions import Normal

    key = jax.random.key(0)
    bijector = RationalQuadraticSpline(knots=BINS, interval=BOUND) if name.startswith("nsf") else Affine()
    build = flowjax.flows.coupling_flow if name in ("nsf", "realnvp") else flowjax.flows.masked_autoregressive_flow
    flow = build(
        key,
        base_dist=Normal(jnp.zeros(dim)),
        transformer=bijector,
        flow_layers=LAYERS,
        nn_width=HIDDEN[0],
        nn_depth=len(HIDDEN),
        invert=name != "iaf",
    )
    data = jnp.asarray(x.numpy())
    score = eqx.filter_jit(lambda f: f.log_prob(data))
    draw = eqx.filter_jit(lambda f: f.sample(key, (BATCH,)))
    score_step = eqx.filter_jit(eqx.filter_grad(lambda f: -f.log_prob(data).mean()))
    draw_step = eqx.filter_jit(eqx.filter_grad(lambda f: f.sample_and_log_prob(key, (BATCH,))[1].mean()))
    fast, slow = (score_step, draw_step) if name != "iaf" else (draw_step, score_step)
    functions = {"log-prob": score, "step": fast, "sample": draw, "slow step": slow}
    return {task: (lambda f=function: jax.block_until_ready(f(flow))) for task, function in functions.items()}


LIBRARIES: dict[str, Callable[[str, int, Tensor], Contender | None]] = {
    "pyro_flows": ours,
    "Pyro": pyro_own,
    "zuko": zuko,
    "nflows": nflows,
    "flowjax (jit)": flowjax,
}
PACKAGES = {
    "pyro_flows": "pyro-flows",
    "Pyro": "pyro-ppl",
    "zuko": "zuko",
    "nflows": "nflows",
    "flowjax (jit)": "flowjax",
}


def clock(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(contenders: dict[str, Contender], task: str, seconds: float) -> dict[str, float]:
    """Median milliseconds of each contender at one task; they take turns until the time is up."""
    times: dict[str, list[float]] = {library: [] for library in contenders}
    gc.collect()
    gc.disable()
    first = {library: clock(tasks[task]) for library, tasks in contenders.items()}  # warm up
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or min(map(len, times.values())) < 3:
        for library, tasks in contenders.items():
            # What takes long is not slow for want of a warm-up: one run is enough.
            times[library].append(first[library] if first[library] > LONG else clock(tasks[task]))
    gc.enable()
    return {library: 1e3 * statistics.median(values) for library, values in times.items()}


def version(library: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{library} {importlib.metadata.version(PACKAGES[library])}"
    return library


def cell(milliseconds: float | None, ours_ms: float, own: bool) -> str:
    if milliseconds is None:
        return "–"
    text = f"{milliseconds:.1f}" if milliseconds < 100 else f"{milliseconds:.0f}"
    return f"**{text}**" if own else f"{text} ({ours_ms / milliseconds:.2f})"


def table(results: dict[tuple[str, int, str], dict[str, float]], libraries: list[str]) -> str:
    lines = [
        "# Speed",
        "",
        f"{LAYERS} layers, hidden {' × '.join(map(str, HIDDEN))}, {BINS} bins, batch {BATCH}, "
        f"{torch.get_num_threads()} threads, eager; torch {torch.__version__.split('+')[0]}, "
        f"Python {platform.python_version()}, {', '.join(version(name) for name in libraries)}.",
        "Medians in milliseconds; in parentheses our time divided by theirs (below 1: we are faster).",
        "A dash: the library lacks the flow, or its graph would not fit into memory (D passes of a spline at D = 128).",
        "Reproduce with `python benchmarks/speed.py`.",
    ]
    for dim in sorted({dim for _, dim, _ in results}):
        lines += ["", f"## D = {dim}", "", "| flow | task | " + " | ".join(libraries) + " |"]
        lines.append("|---|---|" + "---:|" * len(libraries))
        for name in FLOWS:
            for task in TASKS:
                times = results.get((name, dim, task))
                if times is None:
                    continue
                mine = times["pyro_flows"]
                row = [cell(times.get(library), mine, library == "pyro_flows") for library in libraries]
                lines.append(f"| {name} | {task} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[tuple[str, int, str], dict[str, float]], libraries: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    dims = sorted({dim for _, dim, _ in results})
    names = [name for name in FLOWS if any(key[0] == name for key in results)]
    figure, axes = plt.subplots(len(TASKS), len(names), figsize=(2.6 * len(names), 8.5), sharex=True, squeeze=False)
    for row, task in zip(axes, TASKS, strict=True):
        for axis, name in zip(row, names, strict=True):
            for number, library in enumerate(libraries):
                points = [(d, results[name, d, task].get(library, np.nan)) for d in dims if (name, d, task) in results]
                style = (
                    {"lw": 2.5, "color": "C3", "zorder": 3} if library == "pyro_flows" else {"lw": 1.2, "alpha": 0.8}
                )
                if library != "pyro_flows":
                    style["color"] = ["C0", "C2", "C1", "C4"][number - 1]
                axis.loglog(*zip(*points, strict=True), marker="o", ms=3, label=library, **style)
            axis.set_xticks(dims, [str(d) for d in dims])
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            if task == TASKS[0]:
                axis.set_title(name)
            if task == TASKS[-1]:
                axis.set_xlabel("D")
        row[0].set_ylabel(f"{task}  [ms]")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(libraries), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.965))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 32, 128], help="numbers of features")
    parser.add_argument("--flows", nargs="+", default=FLOWS, choices=FLOWS, help="which flows")
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--seconds", type=float, default=4.0, help="least time for each task and flow")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the table and the plot")
    options = parser.parse_args()
    if options.quick:
        options.dims, options.seconds = [8], 0.2
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    modules = {
        "pyro_flows": "pyro_flows",
        "Pyro": "pyro",
        "zuko": "zuko",
        "nflows": "nflows",
        "flowjax (jit)": "flowjax",
    }
    libraries = ["pyro_flows", *(n for n in options.libraries if n != "pyro_flows")]
    libraries = [name for name in libraries if importlib.util.find_spec(modules[name])]
    results: dict[tuple[str, int, str], dict[str, float]] = {}
    for dim in options.dims:
        for name in options.flows:
            x = torch.randn(BATCH, dim)
            built = {library: LIBRARIES[library](name, dim, x) for library in libraries}
            contenders = {library: tasks for library, tasks in built.items() if tasks is not None}
            for task in TASKS:
                able = contenders
                if (name, dim, task) in TOO_LARGE:
                    able = {"pyro_flows": contenders["pyro_flows"]}
                results[name, dim, task] = times = measure(able, task, options.seconds)
                mine = times["pyro_flows"]
                shown = "  ".join(f"{library} {ms:.1f} ({mine / ms:.2f})" for library, ms in times.items())
                print(f"D={dim:<4} {name:8} {task:10} {shown}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "speed.md").write_text(table(results, libraries))
    plot(results, libraries, options.out / "speed.png")
    print(f"wrote {options.out / 'speed.md'} and {options.out / 'speed.png'}")


if __name__ == "__main__":
    main()
