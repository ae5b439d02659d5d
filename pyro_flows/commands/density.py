"""The command ``density``: a flow as the density of the user's table, in comparison with a Gaussian."""

from __future__ import annotations

import inspect
import textwrap
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from .. import flows, plots
from ..data import Spike, dequantize, find_spikes
from ..data.columns import tied_columns
from ..data.table import listed, listed_names
from ..distributions import StudentTBase
from ..fitting import fit_density
from ..flows import Flow
from ..persistence import save
from ..training import Fit, Training
from . import Refused
from .outputs import Outputs
from .table_file import MANY, read_table_file, split_names

if TYPE_CHECKING:
    import pandas as pd

# Densities may be slow to sample from, so that every recipe is here that requires only the number of features.
DENSITIES = {
    name: recipe
    for name, recipe in inspect.getmembers(flows, inspect.isfunction)
    if [p.name for p in inspect.signature(recipe).parameters.values() if p.default is p.empty] == ["input_dim"]
}
PARTS = "train", "validation", "test"
FEWEST = 50  # rows
SAMPLES = 5000  # for the picture
PART = 10_000  # rows that are scored together
CALLER = "fit_density: "  # the beginning of its warnings and errors
NOTES = {  # by the kinds of spikes
    ("integers",): "Integers: {}. Noise from [0, 1) is added to them; their mean log-density is a lower bound of the "
    "log-mass.",
    ("lattice", "value"): "Warning: {}. Densities grow without bound there, and nats say how narrow the spikes are, "
    "not how good the density is. Leave such columns out by --columns, or divide multiples of a step by it: they "
    "become integers and get noise.",
    ("rows",): "Warning: {}. Densities grow without bound there, and copies among the test rows are known from "
    "training. If rows were entered twice, keep one of each.",
}
GROWS = ".*Densities grow without bound"  # a warning of fit_density, which the notes replace


def run(wish: Namespace) -> bool:
    """Fit the density, print its nats, and write the model and a picture.

    Args:
        wish: The options of the command line.

    Returns:
        True unless the flow is worse than a Gaussian.

    Raises:
        Refused: Before any training, if the wish cannot be granted; and if training fails.
        Interrupted: After Ctrl-C; what was trained is written.
    """
    outputs = Outputs(wish.out, "model.pt")
    start = time.perf_counter()
    table, remarks = read_table_file(wish.table, None if wish.columns is None else split_names(wish.columns))
    spikes = find_spikes(table)
    integers = [table.columns.get_loc(str(spike.column)) for spike in spikes if spike.kind == "integers"]
    pyro.set_rng_seed(wish.seed)
    parts = _divided(table, double=wish.double)
    scored = [dequantize(torch.tensor(part.to_numpy()), integers) for part in parts]
    gaussian = gaussian_of(scored[0], list(table.columns))
    if not wish.quiet:
        print(*_beginning(wish.table, table, remarks, [len(part) for part in parts], spikes), sep="\n", flush=True)
    flow = DENSITIES[wish.flow](table.shape[1]).to(scored[0].dtype)
    with outputs.hold_ctrl_c():
        fit = _trained(flow, parts, integers, wish)
        if fit.stopped == "interrupted":
            if not fit.best_step:
                raise KeyboardInterrupt
            outputs.keep_old()
        outputs.write(partial(save, flow))
        nats, floor = ([_log_prob(density, x) for x in scored] for density in (flow, gaussian))
        samples = dequantize(flow.sample((SAMPLES,)), integers)
        gain = nats[2] - floor[2]
        usable = bool(gain.mean() >= -two_errors(gain))
        if not wish.quiet:
            note = (
                f"time  {time.perf_counter() - start:.1f} s, {0 if fit.held_out is None else len(fit.held_out)} epochs"
            )
            note += f", {fit.skipped} steps skipped" if fit.skipped else ""
            print(*report(nats, floor, wish.flow), note, sep="\n")
        titles = [f"{name} + noise" if place in integers else name for place, name in enumerate(table.columns)]
        draw = partial(plots.pairs, torch.cat(scored), samples, names=titles, labels=("data", "samples"))
        outputs.draw(draw)
        if not wish.quiet:
            print(*_ending(outputs, flow, scored[0].dtype, integers, usable=usable), sep="\n")
    return usable


def _divided(table: pd.DataFrame, *, double: bool) -> list[pd.DataFrame]:
    """Return the rows to train on, to validate and to test, in random order, in float32 or float64.

    Raises:
        Refused: If float32 would lose a column's values, or there are too few rows.
    """
    if not double and (lost := [name for name, column in table.items() if _loses(column.to_numpy())]):
        raise Refused(f"single precision cannot tell apart the values of {lost[0]!r}; use --double")
    rows, width = table.shape
    if rows < max(FEWEST, 4 * width):
        raise Refused(f"the table has {rows} rows, too few for a density of {width} columns")
    order, cuts = torch.randperm(rows).numpy(), [int(0.8 * rows), int(0.9 * rows)]
    table = table.astype(np.float64 if double else np.float32)
    return [table.iloc[index] for index in np.split(order, cuts)]


def _loses(column: np.ndarray) -> bool:
    """True if float32 cannot hold the numbers of a column, or rounds different ones to the same."""
    info = np.finfo(np.float32)
    largest, spread = np.abs(column).max(), column.std()
    step = 0.01 if spread < 1e4 and (column == column.round()).all() else spread  # integers get noise between them
    return bool(largest > info.max / 1e6 or largest < info.tiny * 1e6 or largest * info.eps > step)


def gaussian_of(x: Tensor, names: Sequence[str]) -> MultivariateNormal:
    """Return the Gaussian of maximum likelihood, in float64.

    Args:
        x: Rows, ``(N, D)``.
        names: The names of the columns.

    Raises:
        Refused: If a column is constant, or determined by others: then there is no density.
    """
    x = x.double()
    scale, loc = torch.std_mean(x, 0, correction=0)
    if same := [name for name, sd in zip(names, scale, strict=True) if not sd > 0]:
        raise Refused(f"the rows to train on are constant in {listed_names(same)}; choose other columns by --columns")
    if collinear := tied_columns(x):
        words = f"the columns {listed_names(names[place] for place in collinear)} determine one another"
        raise Refused(f"{words} (by a linear relation), so they have no joint density; leave one out by --columns")
    z = (x - loc) / scale
    return MultivariateNormal(loc, scale_tril=scale[:, None] * torch.linalg.cholesky(z.T @ z / len(z)))


def _trained(flow: Flow, parts: list[pd.DataFrame], integers: list[int], wish: Namespace) -> Fit:
    """Train a flow, and print the warnings of fit_density as plain lines."""
    show = warnings.showwarning

    def tell(message: Warning | str, *place: Any, **more: Any) -> None:
        words = str(message)
        if not words.startswith(CALLER):
            show(message, *place, **more)
        elif not wish.quiet:
            words = words.removeprefix(CALLER).replace("flow.double()", "--double")
            print(*_wrapped(f"Warning: {words}"), sep="\n")

    settings = {"discrete": integers, "max_epochs": wish.epochs, "progress": not wish.quiet}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=GROWS)
        warnings.showwarning = tell
        try:
            return fit_density(flow, parts[0], training=Training(validation=parts[1]), **settings)
        except (ValueError, FloatingPointError) as error:
            raise Refused(" ".join(str(error).removeprefix(CALLER).split())) from error


@torch.no_grad()
def _log_prob(density: Flow | MultivariateNormal, x: Tensor) -> Tensor:
    """Return log-densities of rows, ``(N,)``, in float64."""
    x = x if isinstance(density, Flow) else x.double()
    return torch.cat([density.log_prob(part).double() for part in x.split(PART)])


def _beginning(
    file: Path, table: pd.DataFrame, remarks: list[str], sizes: list[int], spikes: list[Spike]
) -> Iterator[str]:
    """Yield lines about the table, before the training."""
    columns = f"Columns: {listed_names(table.columns, MANY)}."
    rows = f"Rows: {sum(sizes)} ({sizes[0]} to train on, {sizes[1]} to validate, {sizes[2]} to test)."
    yield from _wrapped(f"Read {file}.", *remarks, columns, rows)
    for kinds, words in NOTES.items():
        if found := [repr(s.column) if s.kind == "integers" else str(s) for s in spikes if s.kind in kinds]:
            yield from _wrapped(words.format(listed(found, MANY)))


def _ending(outputs: Outputs, flow: Flow, dtype: torch.dtype, integers: list[int], *, usable: bool) -> list[str]:
    """Return lines about the nats, and about the use of the files."""
    said = ["Mean log-densities of the rows, in nats, of the data as given, ± 2 standard errors."]
    if isinstance(flow.base, StudentTBase):
        said.append("Some values lie far out: the base has a Student's t's tails.")
    if not usable:
        said.append("The flow is worse than a Gaussian. Try more --epochs or another --flow.")
    number = str(dtype).removeprefix("torch.")
    said.append(f"Wrote {outputs}. In Python, for rows x of {number} with the columns in the order above:")
    noise = f"x = pyro_flows.dequantize(x, {integers}); " if integers else ""
    code = f"flow = pyro_flows.load({str(outputs.paths[0])!r}); {noise}flow.log_prob(x); flow.sample((1000,))"
    return ["", *_wrapped(*said), f"    {code}"]


def report(flow: Sequence[Tensor], gaussian: Sequence[Tensor], name: str) -> list[str]:
    """Return a table of mean log-densities, and the gain over the Gaussian, in lines.

    The standard error of the gain is that of the differences by row, which vary far less than the log-densities.

    Args:
        flow: The flow's log-densities of the rows for training, for validation and for the test, ``(N_i,)`` each.
        gaussian: The Gaussian's log-densities of the same rows.
        name: The name of the flow.
    """
    table = [("", *PARTS)]
    for label, (train, validation, test) in (("Gaussian", gaussian), (name, flow)):
        table.append((label, f"{train.mean():.3f}", f"{validation.mean():.3f}", _with_error(test)))
    first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = [f"{row[0]:<{first + 2}}{'  '.join(map(str.rjust, row[1:], widths))}" for row in table]
    gain = f"gain  {_with_error(flow[2] - gaussian[2])} nats per row over the Gaussian, on the test rows one by one"
    return ["", *lines, "", gain]


def _with_error(x: Tensor) -> str:
    return f"{x.mean():.3f} ± {two_errors(x):.3f}"


def two_errors(x: Tensor) -> float:
    """Return two standard errors of a mean, 2 sd / √N."""
    return 2 * float(x.std()) / len(x) ** 0.5


def _wrapped(*said: str) -> list[str]:
    return [line for words in said for line in textwrap.wrap(words, 110, break_on_hyphens=False)]
