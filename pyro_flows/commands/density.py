"""The command ``density``: a flow as the density of the user's table, in comparison with a Gaussian."""

from __future__ import annotations

import inspect
import textwrap
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from .. import flows, plots
from ..data import dequantize, find_spikes
from ..data.columns import listed, listed_names, tied_columns
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
FEWEST = 50  # rows
SAMPLES = 5000  # for the picture
PART = 10_000  # rows that are scored together
COARSE = 1e-3  # the largest rounding error of a number, in standard deviations, as of fit_density
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
WORSE = "The flow is worse than a Gaussian. Try more --epochs or another --flow. "
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

    def say(*said: str) -> None:
        if not wish.quiet:
            whole = (
                words if words[:1] in ("", " ") else textwrap.fill(words, 110, break_on_hyphens=False) for words in said
            )
            print(*whole, sep="\n", flush=True)  # code and tables begin with a space

    outputs, start = Outputs(wish.out, "model.pt"), time.perf_counter()
    table, remarks = read_table_file(wish.table, None if wish.columns is None else split_names(wish.columns))
    names, spikes = list(table.columns), find_spikes(table)
    integers = [names.index(spike.column) for spike in spikes if spike.kind == "integers"]
    pyro.set_rng_seed(wish.seed)
    parts = _divided(table, wish.double, remarks)
    scored = [dequantize(torch.tensor(part.to_numpy()), integers) for part in parts]
    gaussian = gaussian_of(scored[0], names)
    say(f"Read {wish.table}.", *remarks, f"Columns: {listed_names(names, MANY)}.")
    say("Rows: {} ({} to train on, {} to validate, {} to test).".format(len(table), *map(len, parts)))
    for kinds, words in NOTES.items():
        if found := [repr(s.column) if s.kind == "integers" else str(s) for s in spikes if s.kind in kinds]:
            say(words.format(listed(found, MANY)))
    flow = DENSITIES[wish.flow](len(names)).to(scored[0].dtype)
    with outputs.hold_ctrl_c():
        fit, told = _trained(flow, parts, integers, wish)
        if fit.stopped == "interrupted":
            if not fit.best_step:
                raise KeyboardInterrupt
            outputs.keep_old()
        outputs.write(partial(save, flow))
        nats, floor = ([_log_prob(density, x) for x in scored] for density in (flow, gaussian))
        lines, usable = report(nats, floor, wish.flow)
        skipped = f", {fit.skipped} steps skipped" if fit.skipped else ""
        epochs = 0 if fit.held_out is None else len(fit.held_out)
        say(*told, "", *lines, f"time  {time.perf_counter() - start:.1f} s, {epochs} epochs{skipped}", "")
        titles = [f"{name} + noise" if place in integers else name for place, name in enumerate(names)]
        samples = dequantize(flow.sample((SAMPLES,)), integers)
        outputs.draw(partial(plots.pairs, torch.cat(scored), samples, names=titles, labels=("data", "samples")))
        print(f"{'' if usable else WORSE}Wrote {outputs}.")
        say(*_use(flow, str(outputs.file), integers, scored[0].dtype))
    return usable


def _use(flow: Flow, file: str, integers: list[int], dtype: torch.dtype) -> Iterator[str]:
    """Yield what the numbers mean, and how to use the flow, in words and in Python."""
    yield "Mean log-densities of the rows, in nats, of the data as given, ± 2 standard errors."
    if isinstance(flow.base, StudentTBase):
        yield "Some values lie far out: the base has a Student's t's tails."
    yield f"In Python, for rows x of {str(dtype).removeprefix('torch.')} with the columns in the order above:"
    noise = f"x = pyro_flows.dequantize(x, {integers}); " if integers else ""
    yield f"    flow = pyro_flows.load({file!r}); {noise}flow.log_prob(x); flow.sample((1000,))"


def _divided(table: pd.DataFrame, double: bool, remarks: list[str]) -> list[pd.DataFrame]:
    """Return the rows to train on, to validate and to test, in random order; in float64 if float32 loses digits.

    Raises:
        Refused: If there are too few rows.
    """
    if not double and (lost := [name for name, column in table.items() if _loses(column.to_numpy())]):
        double = True
        remarks.append(f"Calculated in float64, since float32 rounds {listed_names(lost, MANY)}.")
    rows, width = table.shape
    if rows < max(FEWEST, 4 * width):
        raise Refused(f"the table has {rows} rows, too few for a density of {width} columns")
    order, cuts = torch.randperm(rows).numpy(), [int(0.8 * rows), int(0.9 * rows)]
    table = table.astype(np.float64 if double else np.float32)
    return [table.iloc[index] for index in np.split(order, cuts)]


def _loses(column: np.ndarray) -> bool:
    """True if float32 cannot hold the numbers of a column, or rounds them to what matters."""
    info, largest, spread = np.finfo(np.float32), np.abs(column).max(), column.std()
    is_integer = spread < 1e4 and (column == column.round()).all()  # such columns get noise between the integers
    step = 0.01 if is_integer else COARSE * spread
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


def _trained(flow: Flow, parts: list[pd.DataFrame], integers: list[int], wish: Namespace) -> tuple[Fit, list[str]]:
    """Train a flow; return the record and the warnings, in the words of the command."""
    settings = {"discrete": integers, "max_epochs": wish.epochs, "progress": not wish.quiet}
    with warnings.catch_warnings(record=True) as found:
        warnings.filterwarnings("ignore", message=GROWS)
        try:
            fit = fit_density(flow, parts[0], training=Training(validation=parts[1]), **settings)
        except (ValueError, FloatingPointError) as error:
            raise Refused(" ".join(str(error).removeprefix(CALLER).split())) from error
    said = []
    for one in found:
        if (words := str(one.message)).startswith(CALLER):
            said.append(f"Warning: {words.removeprefix(CALLER).replace('flow.double()', '--double')}")
        else:
            warnings.showwarning(one.message, one.category, one.filename, one.lineno)
    return fit, said


@torch.no_grad()
def _log_prob(density: Flow | MultivariateNormal, x: Tensor) -> Tensor:
    """Return log-densities of rows, ``(N,)``, in float64."""
    x = x if isinstance(density, Flow) else x.double()
    return torch.cat([density.log_prob(part).double() for part in x.split(PART)])


def report(flow: Sequence[Tensor], gaussian: Sequence[Tensor], name: str) -> tuple[list[str], bool]:
    """Return a table of mean log-densities and the gain over the Gaussian, in lines, and False if the flow is worse.

    The standard error of the gain is that of the differences by row, which vary far less than the log-densities.

    Args:
        flow: The flow's log-densities of the rows for training, for validation and for the test, ``(N_i,)`` each.
        gaussian: The Gaussian's log-densities of the same rows.
        name: The name of the flow.
    """
    table = [("", "train", "validation", "test")]
    for label, (train, validation, test) in (("Gaussian", gaussian), (name, flow)):
        table.append((label, f"{train.mean():.3f}", f"{validation.mean():.3f}", _with_error(test)))
    first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = [f"{row[0]:<{first + 2}}{'  '.join(map(str.rjust, row[1:], widths))}" for row in table]
    gain = flow[2] - gaussian[2]
    words = f"gain  {_with_error(gain)} nats per row over the Gaussian, on the test rows one by one"
    return [*lines, "", words], bool(gain.mean() >= -two_errors(gain))


def _with_error(x: Tensor) -> str:
    return f"{x.mean():.3f} ± {two_errors(x):.3f}"


def two_errors(x: Tensor) -> float:
    """Return two standard errors of a mean, 2 sd / √N."""
    return 2 * float(x.std()) / len(x) ** 0.5
