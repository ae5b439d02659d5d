"""How much longer do a fit and a check take on a busy machine?

    python benchmarks/busy.py    # three minutes

Quiet and busy runs alternate.  Each run has a fresh process with the number of threads that torch chooses.  During a
busy run, one other process per core is active.  Reports medians of wall times.  Writes ``docs/benchmarks/busy.md``.
"""

import argparse
import contextlib
import multiprocessing
import os
import platform
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nuts
import pyro
import torch
from posteriors import write

TARGETS = "eight_schools", "wells", "german_credit_sparse"
STEPS = {"german_credit_sparse": 100}  # instead of the default
MOST = 2.2  # target for busy / quiet: on a busy machine a fit gets half of each core
CALLS = "fit_svi", "check"


def burn() -> None:
    """Keep a core busy for ever."""
    while True:
        sum(range(100_000))


@contextlib.contextmanager
def others(number: int) -> Iterator[None]:
    """Keep other processes busy inside the context."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=burn, daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def seconds(name: str) -> tuple[float, float]:
    """Return the seconds of a fit and of a check.  Call it in a fresh process."""
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(False)
    _, known = nuts.flows(name, 0, STEPS.get(name))
    return known["fit_seconds"], known["seconds"] - known["fit_seconds"]


def measure(name: str) -> tuple[float, float]:
    """Run :func:`seconds` in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(seconds, name).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=nuts.OUT, help="folder of the file")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    versions = f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}"
    lines, ratios = ["| target | call | quiet, s | busy, s | ratio |", "|---|---|---:|---:|---:|"], []
    for name in TARGETS:
        quiet, busy = [], []
        for _ in range(options.rounds):
            quiet.append(measure(name))
            with others(cores):
                busy.append(measure(name))
        steps = f", {STEPS[name]} steps" if name in STEPS else ""
        for call, alone, beside in zip(CALLS, zip(*quiet, strict=True), zip(*busy, strict=True), strict=True):
            first, second = statistics.median(alone), statistics.median(beside)
            shown = call + (steps if call == CALLS[0] else "")
            lines.append(f"| {name} | {shown} | {first:.1f} | {second:.1f} | {second / first:.1f} |")
            ratios.append(second / first)
            print(lines[-1], flush=True)
    least, most = min(ratios), max(ratios)
    text = f"""# A busy machine

This page is for users who share a machine. It compares wall times of `fit_svi` and `check` on a quiet machine, and
while {cores} other processes keep its {cores} cores busy. Busy runs take {least:.1f} to {most:.1f} times as long.
The target is at most {MOST}. Reproduce with `python benchmarks/busy.py`.

Each time is the median of {options.rounds} alternating rounds; {versions}.

"""
    options.out.mkdir(parents=True, exist_ok=True)
    write(text + "\n".join(lines) + "\n", options.out / "busy.md")


if __name__ == "__main__":
    main()
