"""The command ``fit``: a posterior of the user's own model, and how far to trust it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..diagnostics import check, to_arviz
from ..files import write_atomically
from ..fitting import fit_svi
from ..flows import Flow
from ..guides import AutoFlow
from ..programs.task import Task
from . import Refused
from .data import Data, read_data
from .files import why_not_writable
from .interrupts import NOTHING, Interrupted, beside, hold_ctrl_c, what_was_kept
from .model import check_arguments, in_one_line, load_model
from .report import draws_of, report

DRAWS = 4000
MOST_OBSERVED = 5000  # numbers, whose log-likelihoods are kept draw by draw


def run(
    spec: str,
    data_file: Path | None,
    out: Path,
    *,
    recipe: Callable[[int], Flow] | None,
    steps: int | None,
    seed: int,
    escalate: bool,
    double: bool,
    quiet: bool,
) -> bool:
    """Fit, print and write ``out`` and the picture beside it; return whether the answer can be used.

    Args:
        spec: The model, ``FILE.py:NAME``.
        data_file: Its arguments by name, JSON or NumPy's .npz.
        out: The netCDF file.
        recipe: The flow; by default that of ``AutoFlow``.
        steps: The number of steps; by default that of ``fit_svi``.
        seed: The seed of the random numbers.
        escalate: Whether to go on to costlier fits until one can be trusted.
        double: Whether to calculate in float64.
        quiet: Whether to print nothing.

    Raises:
        Refused: Before any training, if what is asked for cannot be done; and where training fails.
        Interrupted: After Ctrl-C, when what was fitted is written beside ``out``.
    """
    if out.suffix != ".nc":
        raise Refused(f"argument --out: {str(out)!r} must end with .nc")
    start = time.perf_counter()
    paths = out, out.with_suffix(".png")
    with _default_dtype(torch.float64 if double else torch.float32):
        pyro.set_rng_seed(seed)
        model = load_model(spec)
        file = Path(spec.rpartition(":")[0])
        data = read_data(data_file)
        check_arguments(model, list(data.values))
        guide, trace, arguments = _set_up(model, recipe, data, file)
        if all(trace.nodes[name]["infer"].get("_deterministic") for name in trace.observation_nodes):
            print("Nothing is observed, so the posterior is the prior: is an obs= missing?", file=sys.stderr)
        problem = why_not_writable(paths)
        if problem:
            raise Refused(f"argument --out: {problem}")
        given: dict[str, Any] = {"model_kwargs": arguments}
        with hold_ctrl_c() as asked:
            with _refusing(file):
                fit = fit_svi(model, guide, steps=steps, escalate=escalate, progress=not quiet, **given)
                if fit.stopped == "interrupted" and not fit.best_step:
                    raise Interrupted(NOTHING)
                checked = fit.check or check(model, fit.guide, **given)
            container = to_arviz(
                model,
                fit.guide,
                num_samples=DRAWS,
                importance=checked.verdict == "reweight",
                log_likelihood=_observed(trace) <= MOST_OBSERVED,
                **given,
            )
            kept = beside(paths) if fit.stopped == "interrupted" else paths
            write_atomically(kept[0], container.to_netcdf)
    if not quiet:
        advice = (
            "Try more --steps or another --flow." if escalate else "Try --escalate, more --steps or another --flow."
        )
        seconds = time.perf_counter() - start
        print(report(draws_of(container), checked, seconds=seconds, skipped=fit.skipped, advice=advice))
    figure = checked.plot()
    write_atomically(kept[1], lambda path: figure.savefig(path, dpi=150))
    if not quiet:
        print(f"Wrote {kept[0]} and {kept[1]}.")
    if asked() or fit.stopped == "interrupted":
        raise Interrupted(what_was_kept(paths, *kept))
    return checked.verdict != "do not trust"


def _set_up(
    model: Callable[..., Any], recipe: Callable[[int], Flow] | None, data: Data, file: Path
) -> tuple[AutoFlow, Trace, dict[str, Any]]:
    """A guide for the model, the model's trace, and the first reading of the data with which the model runs."""
    first: Exception | None = None
    for arguments in data.readings():
        pyro.clear_param_store()
        guide = AutoFlow(model, recipe)
        try:
            guide.setup(**arguments)
            trace = Task(model, guide, (), arguments).check(whole=False).traces[0]
            for name in trace.observation_nodes:
                if not isinstance(trace.nodes[name]["value"], Tensor):
                    raise TypeError(f"site {name!r} observes {trace.nodes[name]['value']!r:.40}, which is not a tensor")
        except Exception as error:
            bare = error.__cause__ if isinstance(error, TypeError) and not arguments else None
            first = first or (bare if isinstance(bare, TypeError) else error)  # AutoFlow's words are for its callers
        else:
            return guide, trace, arguments
    assert first is not None  # there is at least one reading
    if "no latent variables" in str(first):
        raise Refused("the model has no continuous latent sites; there is no posterior to fit") from first
    raise Refused(in_one_line(first, file)) from first


def _observed(trace: Trace) -> int:
    """How many numbers a model observes."""
    sites = [trace.nodes[name] for name in trace.observation_nodes]
    return sum(s["value"].numel() for s in sites if not s["infer"].get("_deterministic"))


@contextlib.contextmanager
def _refusing(file: Path) -> Iterator[None]:
    """Turn errors into one line each."""
    try:
        yield
    except (ValueError, TypeError, FloatingPointError) as error:
        raise Refused(in_one_line(error, file)) from error


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
