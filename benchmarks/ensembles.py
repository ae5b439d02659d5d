"""Coverage and log-density of single amortised guides and of their ensemble, trained on few simulations.

The members are trained on the same simulations, and all are compared on the same new datasets.  It writes the page
``docs/benchmarks/ensembles.md``.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import pyro
import tasks
import torch

import pyro_flows as pf

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "ensembles.md"
TASKS = "two_moons", "gaussian_linear_uniform"
PAGE = """# Ensembles

This page is for users who ask what an ensemble of amortised guides gains. For each task {members} guides are trained on
the same {simulations:,} simulations, with the defaults of `fit_amortized`. Then they and their `pf.ensemble` are
compared on {datasets:,} new datasets. Reproduce with `python benchmarks/ensembles.py`, on one core.

{table}

*Coverage* is the share of true latents in the highest-density regions of 90 %. *Log q* is the mean log-density of the
true latents, in nats. *Calibrated* counts the guides in which `pf.calibrate` finds no error. *Seconds* are CPU seconds
of training. The rows of single guides have the mean, and the least and the largest value.

The log-density of the ensemble is at least the mean of those of its members, on any data. Its coverage shows that it is
wider than they are. That helps guides that are too narrow. Guides that are too wide become wider.
"""


def trained(task: tasks.Task, simulations: pf.Simulations, number: int) -> list[pf.AutoFlow]:
    """Train guides on the same simulations."""
    guides = [pf.AutoFlow(task.model, encoder=task.encoder()) for _ in range(number)]
    for guide in guides:
        pf.fit_amortized(task.model, guide, simulations=simulations, progress=False)
    return guides


def judged(model: Any, guide: pf.AutoFlow, new: pf.Simulations) -> list[float]:
    """Return the coverage of regions of 90 % in percent, the mean log q of true latents, and 1 if it is calibrated."""
    pyro.set_rng_seed(1)
    found = pf.calibrate(model, guide, num_simulations=len(new), num_samples=200)
    with torch.no_grad():
        log_q = guide.log_prob(new.latents, new.data["x"])
    return [100 * float((found.coverage <= 0.9).double().mean()), float(log_q.double().mean()), float(found.calibrated)]


def rows(name: str, simulations: int, members: int, datasets: int) -> list[str]:
    """Train guides on a task, and return its rows of the table."""
    task = tasks.TASKS[name]
    pyro.set_rng_seed(0)
    known, new = (pf.simulate(task.model, num_simulations=number) for number in (simulations, datasets))
    start = time.process_time()
    guides = trained(task, known, members)
    seconds = time.process_time() - start
    single = torch.tensor([judged(task.model, guide, new) for guide in guides])
    cover, log_q, calibrated = judged(task.model, pf.ensemble(guides), new)
    spread = zip(single.mean(0).tolist(), single.amin(0).tolist(), single.amax(0).tolist(), strict=True)
    covers, log_qs, _ = (f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in spread)
    found = [
        f"| {name} | single | {covers} | {log_qs} | {int(single[:, 2].sum())} of {members} | {seconds / members:.0f} |",
        f"| {name} | ensemble of {members} | {cover:.2f} | {log_q:.2f} | {int(calibrated)} of 1 | {seconds:.0f} |",
    ]
    print(*found, sep="\n", flush=True)
    return found


def main() -> None:
    """Run the tasks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=list(tasks.TASKS))
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--datasets", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=OUT, help="the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"simulations": options.simulations, "members": options.members, "datasets": options.datasets}
    columns = ["task", "guide", "coverage, %", "log q", "calibrated", "seconds"]
    table = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for name in options.tasks:
        table += rows(name, **sizes)
    options.out.write_text(PAGE.format(**sizes, table="\n".join(table)))


if __name__ == "__main__":
    main()
