"""The command ``density``: a flow as the density of the user's own table, beside a Gaussian."""

from __future__ import annotations

import textwrap
import time
import warnings
from argparse import Namespace
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
from ..atomic_files import write_atomically
from ..data import Spike, dequantize, find_spikes
from ..data.table import listed, listed_names
from ..distributions import StudentTBase
from ..fitting import fit_density
from ..flows import Flow
from ..persistence import save
from . import DENSITIES, Refused
from .nats import gaussian_of, report, two_errors
from .outputs import Interrupted, check_writable, hold_ctrl_c, places_for, what_was_kept, with_picture
from .table import MANY, Table, read_table, split_names

FEWEST = 50  # rows
SAMPLES = 5000  # for the picture
PART = 10_000  # rows that are scored together
CALLER = "fit_density: "  # as its warnings and errors begin
INTEGERS = "Integers: {}. Noise from [0, 1) is added to them; their mean log-density is a lower bound of the log-mass."
REPEATED = (
    "Warning: {}. Densities grow without bound there, and nats say how narrow the spikes are, not how good the density "
    "is. Leave such columns out by --columns, or divide multiples of a step by it: they become integers and get noise."
)
COPIES = (
    "Warning: {}. Densities grow without bound there, and copies among the test rows are known from training. If rows "
    "were entered twice, keep one of each."
)
TOLD = {("integers",): INTEGERS, ("lattice", "value"): REPEATED, ("rows",): COPIES}  # by the kinds of spikes
GROWS = ".*Densities grow without bound"  # what fit_density warns of, and the command tells in its own words


def run(wish: Namespace) -> bool:
    """Fit, print and write the model and a picture beside it; return whether the flow is no worse than a Gaussian.

    Args:
        wish: What ``density_parser`` has read.

    Raises:
        Refused: Before any training, if what is asked for cannot be done; and where training fails.
        Interrupted: After Ctrl-C, when what was trained is written beside these files.
    """
    paths = with_picture(wish.out, ".pt")
    start = time.perf_counter()
    table = read_table(wish.table, None if wish.columns is None else split_names(wish.columns))
    if not wish.double and (lost := _lost(table)):
        raise Refused(f"single precision cannot tell apart the values of {lost}; use --double")
    values = table.values.astype(np.float64 if wish.double else np.float32)
    rows, width = values.shape
    if rows < max(FEWEST, 4 * width):
        raise Refused(f"the table has {rows} rows, too few for a density of {width} columns")
    spikes = find_spikes(table)
    integers = [table.columns.index(str(spike.column)) for spike in spikes if spike.kind == "integers"]
    pyro.set_rng_seed(wish.seed)
    order = torch.randperm(rows).numpy()
    parts = [replace(table, values=values[index]) for index in np.split(order, [int(0.8 * rows), int(0.9 * rows)])]
    scored = [dequantize(torch.from_numpy(part.values), integers) for part in parts]
    gaussian = gaussian_of(scored[0], table.columns)
    check_writable(paths)
    if not wish.quiet:
        print(*_beginning(wish.table, table, [len(part) for part in scored], spikes), sep="\n", flush=True)
    flow = DENSITIES[wish.flow](width).to(scored[0].dtype)
    train, judge, _ = parts
    with warnings.catch_warnings(), hold_ctrl_c() as asked:
        warnings.filterwarnings("ignore", message=GROWS)
        warnings.showwarning = _told(warnings.showwarning, quiet=wish.quiet)
        try:
            settings = {"discrete": integers, "max_epochs": wish.epochs, "progress": not wish.quiet}
            fit = fit_density(flow, train, validation=judge, **settings)
        except (ValueError, FloatingPointError) as error:
            raise Refused(" ".join(str(error).removeprefix(CALLER).split())) from error
        kept = places_for(fit, paths)
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
    if not wish.quiet:
        assert fit.held_out is not None  # there are rows to validate
        note = f", {len(fit.held_out)} epoch{'' if len(fit.held_out) == 1 else 's'}"
        note += f", {fit.skipped} steps skipped" if fit.skipped else ""
        print(report(own, floor, wish.flow, seconds=time.perf_counter() - start, note=note))
        heavy = isinstance(flow.base, StudentTBase)
        print(*_ending(kept, values.dtype, integers, heavy=heavy, usable=usable), sep="\n")
    if asked() or fit.stopped == "interrupted":
        raise Interrupted(what_was_kept(paths, *kept))
    return usable


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
        f"Columns: {listed_names(table.columns, MANY)}.",
        f"Rows: {sum(sizes)}, of which {sizes[0]} to train on, {sizes[1]} to validate and {sizes[2]} to test.",
    ]
    for kinds, words in TOLD.items():
        if found := [repr(s.column) if s.kind == "integers" else str(s) for s in spikes if s.kind in kinds]:
            said.append(words.format(listed(found, MANY)))
    return _wrapped(said)


def _ending(paths: tuple[Path, Path], dtype: np.dtype, integers: list[int], *, heavy: bool, usable: bool) -> list[str]:
    """What the numbers are, and how to use what was written."""
    noise = f"x = pyro_flows.dequantize(x, {integers}); " if integers else ""
    said = [
        "Mean log-densities of the rows, in nats, of the data as given, ± 2 standard errors.",
        "Some values lie far out: the base has a Student's t's tails." if heavy else "",
        "" if usable else "The flow is worse than a Gaussian. Try more --epochs or another --flow.",
        f"Wrote {paths[0]} and {paths[1]}. In Python, for rows x of {dtype} with the columns in the order above:",
    ]
    code = f"flow = pyro_flows.load({str(paths[0])!r}); {noise}flow.log_prob(x); flow().sample((1000,))"
    return ["", *_wrapped(said), f"    {code}"]


def _wrapped(said: list[str]) -> list[str]:
    return [line for words in said for line in textwrap.wrap(words, 110, break_on_hyphens=False)]
