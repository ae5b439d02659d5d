"""Profile of a training step: the shares of matrix products, other kernels, copies and Python, a row per flow.

    python benchmarks/profile_steps.py            # under a minute
    python benchmarks/profile_steps.py --quick    # one step each, into a temporary folder: a smoke run

A step of a flow scores a batch and back-propagates to the parameters.  A step of ``AutoFlow`` runs guide, model and
gradients, and updates the parameters: by Adam in Pyro's ``SVI``, or by SOAP with path gradients in ``fit_svi``.  All
run on one thread in float32, without compilation.  ``torch.profiler`` measures the time of each kernel without the
kernels that it calls.  *Python and dispatch* is the rest of the wall time of a step without the profiler.  Writes
``docs/benchmarks/profile.md`` and ``profile.csv``.
"""

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
from pyro_flows.fitting.elbo_loss import ELBOLoss
from pyro_flows.fitting.optimizers import optimizers
from pyro_flows.fitting.svi import ELBOFit
from pyro_flows.programs.model_and_guide import Task

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
DIM, BATCH, LATENTS, IMAGES = 32, 512, 20, 32
SIZES = {"num_transforms": 5, "hidden_dims": (128, 128)}
Step = Callable[[], object]

# A kernel is of the first kind with a matching part of its name, and elementwise if no kind matches.
KINDS = {
    "matrix products": ("mm", "mkldnn_convolution", "convolution_backward", "thnn_conv", "triangular", "dot"),
    "softmax, cumsum, gather, scatter": ("softmax", "cumsum", "gather", "scatter", "index", "searchsorted", "sort"),
    "copies and cat": ("copy", "cat", "fill", "zero", "flip", "roll"),
}
# Operators that compute nothing themselves: they make views, allocate memory, or call other operators.
DISPATCH = (
    *("empty", "view", "reshape", "expand", "slice", "select", "transpose", "permute", "squeeze", "as_strided"),
    *("detach", "unbind", "split", "narrow", "chunk", "alias", "resize", "result_type", "numpy_T", "item", "scalar"),
    *("linear", "matmul", "einsum", "conv2d", "clone", "contiguous", "stack", "zeros", "ones", "full", "_to_copy"),
)
PYTHON = "Python and dispatch"
BY_FIT_SVI = "the same by fit_svi"
SHOWN = ["matrix products", "elementwise", "softmax, cumsum, gather, scatter", "copies and cat", PYTHON]


def kind(event: str) -> str:
    """Return the kind of an event of the profiler.

    Nodes of autograd and of the optimiser count as dispatch, because their kernels are events too.
    """
    library, _, name = event.rpartition("::")
    if library != "aten" or name in ("t", "to", "convolution", "_convolution"):
        return PYTHON
    kinds = [label for label, parts in KINDS.items() if any(part in name for part in parts)]
    if any(part in name for part in DISPATCH) and not (name.startswith("index") or "backward" in name):
        return PYTHON
    return kinds[0] if kinds else "elementwise"


def scoring(flow: torch.nn.Module, x: torch.Tensor) -> Step:
    """Return a step that scores a batch and back-propagates."""

    def step() -> None:
        flow.zero_grad(set_to_none=True)
        (-flow().log_prob(x).mean()).backward()

    return step


def model() -> None:
    """Sample normal latents."""
    scale = torch.linspace(0.5, 2.0, LATENTS)
    pyro.sample("z", dist.Normal(torch.ones(LATENTS), scale).to_event(1))


def svi() -> Step:
    """Return a step of Pyro's ``SVI`` with ``AutoFlow``."""
    guide = pf.AutoFlow(model)
    guide.setup()
    return SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(64, vectorize_particles=True)).step


def fit() -> Step:
    """Return a step of ``fit_svi`` with ``AutoFlow``."""
    guide = pf.AutoFlow(model).setup()
    task, parameters = Task(model, guide, (), {}), list(guide.parameters())
    loss = ELBOLoss(task, ELBOFit(task, num_particles=64).elbo, None)
    (optimizer,) = optimizers(parameters, 1e-6, by_soap=guide.by_soap(), by_muon=[])

    def step() -> None:
        guide.zero_grad()
        loss.joint().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 100.0)
        optimizer.step()

    return step


def steps() -> dict[str, Step]:
    """Return all steps by their labels."""
    x, images = torch.randn(BATCH, DIM), torch.randn(IMAGES, 1, 28, 28)
    named = {name: getattr(flows, name)(DIM, **SIZES) for name in ("nsf", "nsf_ar", "maf", "realnvp")}
    made = {f"{name}, D = {DIM}, batch {BATCH}": scoring(flow, x) for name, flow in named.items()}
    glow = flows.glow((1, 28, 28), num_steps=4, hidden_dim=32)
    glow.initialize(images)
    made[f"glow, 1 × 28 × 28, batch {IMAGES}"] = scoring(glow, images)
    made[f"AutoFlow, {LATENTS} latents, 64 particles"] = svi()
    made[BY_FIT_SVI] = fit()
    return made


def shares(step: Step, repetitions: int) -> tuple[float, int, dict[str, float]]:
    """Return the milliseconds of a step, its number of kernels, and the share of each kind."""
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
    # The cost of the profiler itself counts for the kernels, so with many small kernels the rest is a lower bound.
    spent[PYTHON] = max(wall - sum(spent.values()), 0.0)
    total = sum(spent.values())
    return wall / 1e3, count // repetitions, {label: value / total for label, value in spent.items()}


def page(results: dict[str, tuple[float, int, dict[str, float]]]) -> str:
    """Return the page of the results."""
    by_fit_svi = " The other one is a step of `fit_svi`, with path gradients and SOAP." if BY_FIT_SVI in results else ""
    lines = [
        "# Profile of a training step",
        "",
        "This page is for users who want to speed up training. It splits the wall time of a step into kinds of work. "
        "Matrix products take the largest share in flows. Python and dispatch take the largest share in `AutoFlow`.",
        "",
        "Reproduce with `python benchmarks/profile_steps.py`. All steps run on one thread in float32, without "
        f"compilation. torch {torch.__version__.split('+')[0]}. Flows of vectors have 5 layers, hidden 128 × 128. "
        "`glow` has 4 steps per scale and 32 channels. A step scores a batch and back-propagates. A step of `AutoFlow` "
        f"is one of Pyro's `SVI` with Adam.{by_fit_svi}",
        "",
        "* *kernels*: the number of kernels that a step runs.",
        "* *Python and dispatch*: the time that is left after the kernels, as measured by torch.profiler. It is a "
        "lower bound, because the time of a kernel includes the call.",
        "",
        "| step | ms | kernels | " + " | ".join(SHOWN) + " |",
        "|---|---:|---:|" + "---:|" * len(SHOWN),
    ]
    for name, (ms, count, parts) in results.items():
        lines.append(f"| {name} | {ms:.1f} | {count} | " + " | ".join(f"{parts[k]:.0%}" for k in SHOWN) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20, help="timed steps of each kind")
    parser.add_argument("--kernels", action="store_true", help="print the ten slowest kernels of each step")
    parser.add_argument("--quick", action="store_true", help="smoke run: one step each")
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
