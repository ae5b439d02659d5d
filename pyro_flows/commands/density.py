"""The command ``density``: a flow as the density of the user's own table, beside a Gaussian."""

from __future__ import annotations

import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from .. import plots
from ..data import Spike, dequantize, find_spikes
from ..data.table import listed
from ..distributions import StudentTBase
from ..files import write_atomically
from ..fitting import fit_density
from ..flows import Flow
from ..persistence import save
from ..training import Fit
from . import Refused
from .files import why_not_writable
from .interrupts import NOTHING, Interrupted, beside, hold_ctrl_c, what_was_kept
from .nats import gaussian_of, report, two_errors
from .table import MANY, Table, read_table, split_names

FEWEST = 50  # rows
SAMPLES = 5000  # for the picture
PART = 10_000  # rows that are scored together
CALLER = "fit_density: "  # as its warnings and errors begin
GROWS = ".*Densities grow without bound"  # what fit_density warns of, and the command tells in its own words


def run(
    file: Path,
    out: Path,
    *,
    recipe: Callable[[int], Flow],
    columns: str | None,
    epochs: int,
    seed: int,
    double: bool,
    quiet: bool,
) -> bool:
    """Fit, print and write ``out`` and the picture beside it; return whether the flow is no worse than a Gaussian.

    Args:
        file: The table.
        out: The file of the model.
        recipe: The flow.
        columns: The names of the columns to use, parted by commas; by default all that can be used.
        epochs: How often to go through the rows, at most.
        seed: The seed of the random numbers, and of the division of the rows.
        double: Whether to calculate in float64.
        quiet: Whether to print nothing.

    Raises:
        Refused: Before any training, if what is asked for cannot be done; and where training fails.
        Interrupted: After Ctrl-C, when what was trained is written beside ``out``.
    """
    if out.suffix != ".pt":
        raise Refused(f"argument --out: {str(out)!r} must end with .pt")
    start = time.perf_counter()
    paths = out, out.with_suffix(".png")
    read = read_table(file, None if columns is None else split_names(columns))
    if not double and (lost := _lost(read)):
        raise Refused(f"single precision cannot tell apart the values of {lost}; use --double")
    table = replace(read, values=read.values.astype(np.float64 if double else np.float32))
    rows, width = table.values.shape
    if rows < max(FEWEST, 4 * width):
        raise Refused(f"the table has {rows} rows, too few for a density of {width} columns")
    spikes = find_spikes(read)
    integers = [table.columns.index(str(spike.column)) for spike in spikes if spike.kind == "integers"]
    pyro.set_rng_seed(seed)
    order = torch.randperm(rows).numpy()
    parts = [table.rows(index) for index in np.split(order, [int(0.8 * rows), int(0.9 * rows)])]
    scored = [dequantize(torch.from_numpy(part.values), integers) for part in parts]
    gaussian = gaussian_of(scored[0], table.columns)
    problem = why_not_writable(paths)
    if problem:
        raise Refused(f"argument --out: {problem}")
    if not quiet:
        print(*_beginning(file, table, [len(part) for part in scored], spikes), sep="\n", flush=True)
    flow = recipe(width).to(scored[0].dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=GROWS)
        warnings.showwarning = _told(warnings.showwarning, quiet=quiet)
        with hold_ctrl_c() as asked:
            fit = _fit(flow, parts, integers, epochs=epochs, progress=not quiet)
            kept = beside(paths) if fit.stopped == "interrupted" else paths
            save(flow, kept[0])  # before all else, as this is what was trained
    try:
        own, floor = ([_log_prob(density, x) for x in scored] for density in (flow, gaussian))
        gain = own[2] - floor[2]
        usable = bool(gain.mean() >= -two_errors(gain))
        samples = flow().sample((SAMPLES,))
        titles = [f"{name} + noise" if place in integers else name for place, name in enumerate(table.columns)]
        picture = plots.pairs(torch.cat(scored), samples, names=titles, labels=("data", "samples"))
        write_atomically(kept[1], lambda path: picture.savefig(path, dpi=150))
    except KeyboardInterrupt as error:
        raise Interrupted(what_was_kept(paths, kept[0])) from error
    if not quiet:
        assert fit.held_out is not None  # there are rows to validate
        note = f", {len(fit.held_out)} epoch{'' if len(fit.held_out) == 1 else 's'}"
        note += f", {fit.skipped} steps skipped" if fit.skipped else ""
        print(report(own, floor, recipe.__name__, seconds=time.perf_counter() - start, note=note))
        print(*_ending(kept, table, integers, heavy=isinstance(flow.base, StudentTBase), usable=usable), sep="\n")
    if asked() or fit.stopped == "interrupted":
        raise Interrupted(what_was_kept(paths, *kept))
    return usable


def _fit(flow: Flow, parts: list[Table], integers: list[int], *, epochs: int, progress: bool) -> Fit:
    """Train on the first part and judge by the second."""
    try:
        fit = fit_density(flow, parts[0], validation=parts[1], discrete=integers, max_epochs=epochs, progress=progress)
    except (ValueError, FloatingPointError) as error:
        raise Refused(" ".join(str(error).removeprefix(CALLER).split())) from error
    if fit.stopped == "interrupted" and not fit.best_step:
        raise Interrupted(NOTHING)
    return fit


def _told(show: Callable[..., None], *, quiet: bool) -> Callable[..., None]:
    """A way to show warnings that prints those of fit_density as plain lines."""

    def tell(message: Warning | str, *place: Any, **more: Any) -> None:
        words = str(message)
        if not words.startswith(CALLER):
            show(message, *place, **more)
        elif not quiet:
            print(*_wrapped([f"Warning: {words.removeprefix(CALLER).replace('flow.double()', '--double')}"]), sep="\n")

    return tell


@torch.no_grad()
def _log_prob(density: Flow | MultivariateNormal, x: Tensor) -> Tensor:
    """Log-densities of rows, ``(N,)``, in float64."""
    x = x if isinstance(density, Flow) else x.double()
    return torch.cat([density.log_prob(part).double() for part in x.split(PART)])


def _lost(table: Table) -> str:
    """The first column whose numbers float32 cannot hold, or not apart, by name; empty where there is none."""
    info = np.finfo(np.float32)
    for name, column in zip(table.columns, table.values.T, strict=True):
        largest, spread = np.abs(column).max(), column.std()
        step = 0.01 if spread < 1e4 and (column == column.round()).all() else spread  # integers get noise between them
        if largest > info.max / 1e6 or largest < info.tiny * 1e6 or largest * info.eps > step:
            return repr(name)
    return ""


def _beginning(file: Path, table: Table, sizes: list[int], spikes: list[Spike]) -> list[str]:
    """What was read, and what is to be known of it."""
    said = [
        f"Read {file}.",
        *table.remarks,
        f"Columns: {_names(table.columns)}.",
        f"Rows: {sum(sizes)}, of which {sizes[0]} to train on, {sizes[1]} to validate and {sizes[2]} to test.",
    ]
    if integers := [str(spike.column) for spike in spikes if spike.kind == "integers"]:
        said.append(
            f"Integers: {_names(integers)}. Noise from [0, 1) is added to them; on average the log-density is then a "
            "lower bound of the log-mass."
        )
    if others := [str(spike) for spike in spikes if spike.kind in ("lattice", "value")]:
        said.append(
            f"Warning: {listed(others)}. Densities grow without bound there, and nats say how narrow the spikes are, "
            "not how good the density is. Leave such columns out by --columns, or divide multiples of a step by it: "
            "they become integers, which get noise."
        )
    if copies := [str(spike) for spike in spikes if spike.kind == "rows"]:
        said.append(
            f"Warning: {copies[0]}. Densities grow without bound there, and copies among the test rows are known from "
            "training. If rows were entered twice, keep one of each."
        )
    return _wrapped(said)


def _ending(paths: tuple[Path, Path], table: Table, integers: list[int], *, heavy: bool, usable: bool) -> list[str]:
    """What the numbers are, and how to use what was written."""
    noise = f"x = pyro_flows.dequantize(x, {integers}); " if integers else ""
    said = [
        "Mean log-densities of the rows, in nats, of the data as given, ± 2 standard errors.",
        "Some values lie far out: the base has a Student's t's tails." if heavy else "",
        "" if usable else "The flow is worse than a Gaussian. Try more --epochs or another --flow.",
        f"Wrote {paths[0]} and {paths[1]}. In Python, for rows x of {table.values.dtype} with the columns in the order "
        "above:",
    ]
    code = f"flow = pyro_flows.load({str(paths[0])!r}); {noise}flow.log_prob(x); flow().sample((1000,))"
    return ["", *_wrapped(said), f"    {code}"]


def _wrapped(said: list[str]) -> list[str]:
    return [line for words in said for line in textwrap.wrap(words, 110, break_on_hyphens=False)]


def _names(names: list[str]) -> str:
    return listed([repr(name) for name in names], MANY)
