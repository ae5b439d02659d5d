"""The main job: ``python -m pyro_flows`` fits a flow guide to the eight schools and says how far to trust it.

The model is the centred one, whose posterior is a funnel that no Gaussian guide can follow.  Data: Rubin (1981),
"Estimation in parallel randomized experiments", Journal of Educational Statistics 6(4).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from . import flows, psis
from .diagnostics import Psis, to_arviz
from .diagnostics.plots import plot_funnel
from .fitting import fit_svi
from .guides import AutoFlow

SCHOOLS = "ABCDEFGH"
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
RECIPES = {name: getattr(flows, name) for name in ("iaf", "maf", "nice", "nsf", "nsf_ar", "realnvp")}


def eight_schools(effects: Tensor, standard_errors: Tensor) -> None:
    """The effect of coaching in each of eight schools, partially pooled."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, standard_errors), obs=effects)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m pyro_flows",
        description="Fit a flow guide to the eight-schools data (centred model), print the posterior and how far to "
        "trust it, and write eight_schools.nc (ArviZ) and eight_schools.png.",
    )
    made.add_argument("--flow", choices=sorted(RECIPES), help="the recipe of the flow (default: AutoFlow's own)")
    made.add_argument("--steps", type=_positive, default=2000, help="optimisation steps (default: 2000)")
    made.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: %(default)s)")
    made.add_argument("--out", type=Path, default=Path(), help="folder of the two files (default: the current one)")
    made.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    return made


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    command = parser()
    options = command.parse_args(argv)
    problem = _not_writable(options.out)
    if problem:
        command.error(f"argument --out: {problem}")  # now, and not after the training
    start = time.perf_counter()
    torch.set_num_threads(1)  # ten latents: more threads would only wait for each other
    pyro.set_rng_seed(options.seed)
    pyro.clear_param_store()
    guide = AutoFlow(eight_schools, RECIPES.get(options.flow))
    fit = fit_svi(eight_schools, guide, EFFECTS, STANDARD_ERRORS, steps=options.steps, progress=not options.quiet)
    checked = psis(eight_schools, guide, EFFECTS, STANDARD_ERRORS, num_samples=40_000)
    data = to_arviz(eight_schools, guide, EFFECTS, STANDARD_ERRORS, num_samples=4000)
    paths = options.out / "eight_schools.nc", options.out / "eight_schools.png"
    _write_atomically(paths[0], data.to_netcdf)
    draws = guide.sample(4000)
    figure = plot_funnel(
        draws["mu"], draws["tau"], {f"theta {s}": t for s, t in zip(SCHOOLS, draws["theta"].T, strict=True)}
    )
    _write_atomically(paths[1], lambda path: figure.savefig(path, dpi=150))
    if not options.quiet:
        print(report(guide.sample(100_000), checked, fit.skipped, time.perf_counter() - start))
        print(f"Wrote {paths[0]} and {paths[1]}.")
    return 0


def report(draws: dict[str, Tensor], checked: Psis, skipped: int, seconds: float) -> str:
    """The table, the diagnostics and the verdict, as a person reads them."""
    rows = {"mu": draws["mu"], "tau": draws["tau"]}
    rows |= {f"theta[{school}]": column for school, column in zip(SCHOOLS, draws["theta"].T, strict=True)}
    lines = ["", f"{'':<10}{'mean':>8}{'sd':>8}{'5 %':>8}{'95 %':>8}"]
    for name, values in rows.items():
        low, high = torch.quantile(values, torch.tensor([0.05, 0.95])).tolist()
        lines.append(f"{name:<10}{values.mean():8.2f}{values.std():8.2f}{low:8.2f}{high:8.2f}")
    lines += [
        "",
        f"k-hat         {checked.khat:.2f}  (reliable below {checked.threshold:.2f})",
        f"ESS           {checked.ess:.0f} of {len(checked.log_weights)} draws",
        f"log evidence  {checked.log_evidence:.3f} ± {checked.log_evidence_se:.3f} nats",
        f"time          {seconds:.1f} s" + (f", {skipped} steps skipped" if skipped else ""),
        "",
        verdict(checked),
    ]
    return "\n".join(lines)


def verdict(checked: Psis) -> str:
    """What k-hat allows to say, and what it cannot see."""
    if checked.khat < 0.5:
        words = "The guide can be trusted where it looks: the importance weights are stable (k-hat below 0.5)."
    elif checked.reliable:
        words = (
            "The guide can be trusted where it looks, with care in the tails: reweighted estimates are reliable "
            f"(k-hat below {checked.threshold:.2f})."
        )
    else:
        words = (
            "Do not trust this answer yet: the guide differs from the posterior too much for its draws to be "
            f"reweighted (k-hat above {checked.threshold:.2f}). Try more steps or another flow."
        )
    if abs(checked.khat - checked.threshold) < 0.1:
        words += "\nIt is a close call: k-hat varies by about 0.1 from one set of draws to the next."
    return words + "\nk-hat sees only where the guide puts its draws; it cannot see a region that the guide has missed."


def _not_writable(folder: Path) -> str:
    """Why files cannot be written into a folder, or an empty string; the folder is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".pyro_flows-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"cannot write into {str(folder)!r}: {error.strerror or error}"
    return ""


def _write_atomically(path: Path, write: Any) -> None:
    """Let ``write`` fill a file beside ``path`` that then takes its place: no half-written file is ever seen."""
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(str(draft))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
