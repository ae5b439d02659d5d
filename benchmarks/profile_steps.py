"""Where does a step of training spend its time?  Shares of matrix products, kernels, copies and Python, one row a flow.

    python benchmarks/profile_steps.py            # under a minute
    python benchmarks/profile_steps.py --quick    # one step each, into a temporary folder: a smoke run

A step scores a batch and back-propagates to the parameters, or is one step with ``AutoFlow``: guide, model, gradients,
and an update by Adam in Pyro's ``SVI``, or by SOAP, with path gradients, in ``fit_svi``.  One thread, float32, nothing
compiled.  Kernels' times are their own, without what they call, by ``torch.profiler``; *Python and dispatch* is what is
left of the wall time of a step that is not profiled.
Writes ``docs/benchmarks/profile.md`` and ``profile.csv``.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.profiler import ProfilerActivity, profile

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.fitting.elbo import ELBOFit
from pyro_flows.fitting.optimizers import optimizers
from pyro_flows.programs.task import Task

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
DIM, BATCH, LATENTS, IMAGES = 32, 512, 20, 32
SIZES = {"num_transforms": 5, "hidden_dims": (128, 128)}
Step = Callable[[], object]

# The first kind that has a part of a kernel's name is its own; a kernel that fits none is elementwise.
KINDS = {
    "matrix products": ("mm", "mkldnn_convolution", "convolution_backward", "thnn_conv", "triangular", "dot"),
    "softmax, cumsum, gather, scatter": ("softmax", "cumsum", "gather", "scatter", "index", "searchsorted", "sort"),
    "copies and cat": ("copy", "cat", "fill", "zero", "flip", "roll"),
}
# Operators that compute nothing themselves: they make views or memory, or call others.
DISPATCH = (
    *("empty", "view", "reshape", "expand", "slice", "select", "transpose", "permute", "squeeze", "as_strided"),
    *("detach", "unbind", "split", "narrow", "chunk", "alias", "resize", "result_type", "numpy_T", "item", "scalar"),
    *("linear", "matmul", "einsum", "conv2d", "clone", "contiguous", "stack", "zeros", "ones", "full", "_to_copy"),
)
PYTHON = "Python and dispatch"
SHOWN = ["matrix products", "elementwise", "softmax, cumsum, gather, scatter", "copies and cat", PYTHON]


def kind(event: str) -> str:
    """What an event of the profiler is.  Nodes of autograd and the optimiser are dispatch: kernels are events too."""
    library, _, name = event.rpartition("::")
    if library != "aten" or name in ("t", "to", "convolution", "_convolution"):
        return PYTHON
    kinds = [label for label, parts in KINDS.items() if any(part in name for part in parts)]
    if any(part in name for part in DISPATCH) and not (name.startswith("index") or "backward" in name):
        return PYTHON
    return kinds[0] if kinds else "elementwise"


def scoring(flow: torch.nn.Module, x: torch.Tensor) -> Step:
    def step() -> None:
        flow.zero_grad(set_to_none=True)
        (-flow().log_prob(x).mean()).backward()

    return step


def model() -> None:
    scale = torch.linspace(0.5, 2.0, LATENTS)
    pyro.sample("z", dist.Normal(torch.ones(LATENTS), scale).to_event(1))


def svi() -> Step:
    guide = pf.AutoFlow(model)
    guide.setup()
    return SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(64, vectorize_particles=True)).step


def fit() -> Step:
    guide = pf.AutoFlow(model).setup()
    elbo, parameters = ELBOFit(Task(model, guide, (), {}), None, 64), list(guide.parameters())
    (optimizer,) = optimizers(parameters, 1e-6, by_soap=guide.by_soap(), by_muon=[])

    def step() -> None:
        guide.zero_grad()
        elbo.joint_loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 100.0)
        optimizer.step()

    return step


def steps() -> dict[str, Step]:
    x, images = torch.randn(BATCH, DIM), torch.randn(IMAGES, 1, 28, 28)
    named = {name: getattr(flows, name)(DIM, **SIZES) for name in ("nsf", "nsf_ar", "maf", "realnvp")}
    made = {f"{name}, D = {DIM}, batch {BATCH}": scoring(flow, x) for name, flow in named.items()}
    glow = flows.glow((1, 28, 28), num_steps=4, hidden_dim=32)
    glow.initialize(images)
    made[f"glow, 1 × 28 × 28, batch {IMAGES}"] = scoring(glow, images)
    made[f"AutoFlow, {LATENTS} latents, 64 particles"] = svi()
    made["the same by fit_svi"] = fit()
    return made


def shares(step: Step, repetitions: int) -> tuple[float, int, dict[str, float]]:
    """Milliseconds of a step, its number of kernels, and the share of each kind."""
    walls = []
    for _ in range(3 + repetitions):  # three to warm up
        start = time.perf_counter()
        step()
        walls.append(time.perf_counter() - start)
    wall = 1e6 * statistics.median(walls[3:])
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(repetitions):
            step()
    spent, count = dict.fromkeys(SHOWN, 0.0), 0
    for event in record.key_averages():
        label = kind(event.key)
        if label != PYTHON:
            spent[label] += event.self_cpu_time_total / repetitions
            count += event.count
    # The profiler's own cost stays in the kernels: where there are many small ones, the rest is a lower bound.
    spent[PYTHON] = max(wall - sum(spent.values()), 0.0)
    total = sum(spent.values())
    return wall / 1e3, count // repetitions, {label: value / total for label, value in spent.items()}


def page(results: dict[str, tuple[float, int, dict[str, float]]]) -> str:
    lines = [
        "# Where a step of training spends its time",
        "",
        f"One thread, float32, nothing compiled; torch {torch.__version__.split('+')[0]}. Flows of vectors have 5 "
        "layers, hidden 128 × 128; `glow` has 4 steps a scale, 32 channels wide. A step scores a batch and "
        "back-propagates; those of `AutoFlow` are one of Pyro's `SVI` with Adam, and one of `fit_svi` with path "
        "gradients and SOAP.",
        "",
        "Shares of the wall time. *Python and dispatch* is what the kernels' own times, by torch.profiler, leave: "
        "a lower bound, as each kernel's time has the call into it. *Kernels*: how many a step runs. "
        "Reproduce with `python benchmarks/profile_steps.py`.",
        "",
        "| step | ms | kernels | " + " | ".join(SHOWN) + " |",
        "|---|---:|---:|" + "---:|" * len(SHOWN),
    ]
    for name, (ms, count, parts) in results.items():
        lines.append(f"| {name} | {ms:.1f} | {count} | " + " | ".join(f"{parts[k]:.0%}" for k in SHOWN) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--kernels", action="store_true", help="print the ten kernels of each step that take longest")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args()
    out = options.out or (Path(tempfile.mkdtemp(prefix="profile-")) if options.quick else OUT)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    results = {}
    for name, step in steps().items():
        results[name] = shares(step, 1 if options.quick else options.repetitions)
        ms, _, parts = results[name]
        print(f"{name}: {ms:.1f} ms  " + "  ".join(f"{label} {part:.0%}" for label, part in parts.items()), flush=True)
        if options.kernels:
            with profile(activities=[ProfilerActivity.CPU]) as record:
                step()
            events = sorted(record.key_averages(), key=lambda e: -e.self_cpu_time_total)[:10]
            for event in events:
                print(
                    f"    {event.self_cpu_time_total / 1e3:8.2f} ms  {event.count:5} × {event.key}  ({kind(event.key)})"
                )
    with (out / "profile.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "ms", "kernels", *SHOWN])
        for name, (ms, count, parts) in results.items():
            writer.writerow([name, f"{ms:.4g}", count, *(f"{parts[label]:.4f}" for label in SHOWN)])
    (out / "profile.md").write_text(page(results))
    print(f"wrote {out / 'profile.md'} and {out / 'profile.csv'}")


if __name__ == "__main__":
    main()
