"""Columns of tables: their reading, and those without a density, of discrete values or values that many rows share.

Tensors, arrays and data frames become tensors of numbers; errors name the column.

A density can grow without bound at a value that many rows share, and the likelihood grows with it.  Training then only
makes a spike narrower.  Uniform noise turns integers into real numbers with a density,

    log P(k) = log ∫ p(k + u) du ≥ E log p(k + u),   u ~ U[0, 1).

A Note on the Evaluation of Generative Models (Theis, van den Oord, Bethge 2015, arXiv:1511.01844).
"""

import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_kind, check_numbers, is_integer
from ..flows.arguments import check_dense
from ..user_code import warn_user

Names = list[str] | None  # of the columns, if the table has names
FINE = {"integers": 1e-4, "lattice": 1e-3}  # steps in standard deviations below which flows hardly see a step
SHARED = 0.1  # the share of rows with a repeated value from which a lattice matters
LEAST = 5  # occurrences of a value that count as repeated; continuous values occur once
SINGULAR = 1e-10  # the variance of a combination of standardised columns below which they are collinear


@dataclass(frozen=True)
class Spike:
    """Values that repeat so often that a density diverges there, as :func:`find_spikes` finds them.

    ``str(spike)`` is a sentence for people.

    Attributes:
        column: The index of the column, or its name if the table has names; None for whole rows.
        kind: ``"integers"``, ``"lattice"`` (multiples of one step, plus an offset), ``"value"`` (a single value among
            others that differ) or ``"rows"`` (copies of whole rows).
        share: The share of the rows, between 0 and 1, that hold the commonest value, or are copies of a row before.
        value: The commonest value, in the column's unit; None for whole rows.
        step: The step of the lattice, in the column's unit; None for single values and rows.

    Example::

        >>> import torch
        >>> spike = find_spikes(torch.arange(1000) % 4)[0]
        >>> spike.column, spike.kind, spike.share, spike.step
        (0, 'integers', 0.25, 1.0)
        >>> print(spike)
        column 0 holds integers (0 in 25 % of the rows)
    """

    column: int | str | None
    kind: str
    share: float
    value: float | None = None
    step: float | None = None

    def __str__(self) -> str:
        share = f"{100 * self.share:.2g} % of the rows"
        if self.kind == "rows":
            return f"{share} are copies of others"
        multiples = f"holds multiples of {self.step or 1.0:.4g}"
        holds = {"integers": "holds integers", "lattice": multiples, "value": "repeats a value"}[self.kind]
        return f"column {self.column!r} {holds} ({self.value:.6g} in {share})"


def find_spikes(x: Any, *, share: float = 0.01) -> list[Spike]:
    """Find where a density of a table diverges: integers, rounded values, and values and rows that repeat.

    Integers count if the standard deviation is below 1e4.  Multiples of another step count if the standard deviation is
    below a thousand steps and a tenth of the rows share their values with others.

    Args:
        x: A table of shape ``(N, D)`` or ``(N,)``: a tensor, an array or a data frame.
        share: The share of the rows, between 0 and 1, from which a single value or copies of rows are a spike.

    Returns:
        At most one :class:`~pyro_flows.Spike` per column, and one for whole rows if rows repeat although some column
        has no spike; an empty list if there are no spikes.

    Raises:
        ValueError: If ``x`` is not a table of finite real numbers, or ``share`` is not between 0 and 1.

    Example::

        >>> import torch
        >>> x = torch.stack((torch.randn(1000), torch.arange(1000) % 4, torch.randn(1000).clamp_min(0)), 1)
        >>> for spike in find_spikes(x):
        ...     print(spike)
        column 1 holds integers (0 in 25 % of the rows)
        column 2 repeats a value (0 in ... % of the rows)
    """
    check_numbers("find_spikes", above=0, below=1, share=share)
    table, names = _read("find_spikes", x)
    return spikes_of(table, names, list(range(table.shape[1])), share)


def spikes_of(table: Tensor, names: Names, places: list[int], share: float = 0.01) -> list[Spike]:
    """Return the spikes of some columns of a table ``(N, D)``."""
    eps = _eps(table)
    values = table.to("cpu", torch.float64)
    least = max(LEAST, share * len(values))
    columns: Sequence[int | str] = names or range(table.shape[1])
    ordered = ((place, torch.from_numpy(np.sort(values[:, place].numpy()))) for place in places)  # faster than torch
    spikes = (_spike_of(columns[place], x, eps, least) for place, x in ordered)
    found = [spike for spike in spikes if spike]
    if len(found) < len(places) > 1:  # otherwise the columns' own spikes explain copies
        rows = (values[:, places] + 0.0).contiguous().numpy()  # the sum turns -0 into 0
        whole = rows.view(np.dtype((np.void, rows.itemsize * len(places))))  # faster than torch.unique(dim=0)
        copies = len(values) - len(np.unique(whole))
        if copies >= least:
            found.append(Spike(None, "rows", copies / len(values)))
    return found


def _spike_of(column: int | str, x: Tensor, eps: float, least: float) -> Spike | None:
    """Return the spike of one sorted column ``(N,)``; values that differ by rounding errors count as equal."""
    first = torch.cat((torch.ones(1, dtype=torch.bool), x.diff() > 2 * eps * x[1:].abs()))
    distinct, counts = x[first], torch.bincount(first.cumsum(0) - 1)
    top, value = int(counts.max()), float(distinct[counts.argmax()])
    shared = int(counts[counts > 1].sum()) / len(x)
    resolved = 16 * eps * float(x.abs().max())  # finer steps may be the grid of the floats themselves
    finest = {kind: max(resolved, fine * float(x.std())) for kind, fine in FINE.items()}
    if len(distinct) > 1 and finest["integers"] < 1 and (x == x.round()).all():
        return Spike(column, "integers", top / len(x), value, 1.0)
    if shared >= SHARED and (step := _step(distinct, eps)) and step > finest["lattice"]:
        return Spike(column, "lattice", top / len(x), value, step)
    return Spike(column, "value", top / len(x), value) if top >= least else None


def _step(distinct: Tensor, eps: float) -> float | None:
    """Return the step of the lattice of sorted, distinct values, or None if they form no lattice."""
    gaps = distinct.diff()
    if not len(gaps):
        return None
    step = gaps[gaps < 1.5 * gaps.min()].mean()
    step = gaps.sum() / (gaps / step).round().sum()  # rounding errors average out over all gaps
    off = (gaps / step - (gaps / step).round()).abs()
    return float(step) if (off < 0.05 + 4 * eps * distinct[1:].abs() / step).all() else None


def tied_columns(x: Tensor) -> list[int]:
    """Return the indices of the collinear columns of ``(N, D)``, which have no joint density.

    As few rows as columns are always collinear, and show nothing.
    """
    if len(x) <= x.shape[1]:
        return []
    x = x.double()
    scale, loc = torch.std_mean(x, 0, correction=0)
    z = (x - loc) / torch.where(scale > 0, scale, 1.0)
    variances, directions = torch.linalg.eigh(z.T @ z / len(z))
    if not variances[0] < SINGULAR:
        return []
    weights = directions[:, 0].abs()
    return (weights > 0.05 * weights.max()).nonzero().flatten().tolist()


def warn_of_ties(caller: str, x: Tensor, labels: Sequence[str]) -> None:
    """Warn of collinear columns of ``(N, D)``."""
    if tied := tied_columns(x) if x.shape[1] > 1 else []:
        words = f"{listed([labels[place] for place in tied])} determine one another"
        warn_user(f"{caller}: {words} (by a linear relation): densities grow without bound. Leave one of them out.")


def dequantize(
    x: Any, columns: Sequence[int | str] | None = None, *, step: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Add uniform noise to discrete values: x + step · u, u ~ U[0, 1).

    With a step of 1 the mean log-density of the result is a lower bound on the log-mass of the integers, in nats.
    With another step, add log(step) for each column::

        log P(k) ≥ E log p(k + u)

    ``fit_density(..., discrete=columns)`` draws fresh noise in each step, so that a flow cannot memorise the noise.

    Args:
        x: A table of shape ``(N, D)`` or ``(N,)``: a tensor, an array or a data frame.
        columns: The columns, by index or name; by default those that hold only multiples of ``step``.
        step: The distance between neighbouring values, in the unit of the columns.
        generator: The random generator of the noise; by default torch's own.

    Returns:
        A new tensor of the shape of ``x``; integers become floats of torch's default dtype.

    Raises:
        ValueError: If ``x`` is not a table of finite real numbers, ``step`` is not positive, or a column does not
            exist.  Also if a chosen column holds values that are not multiples of ``step`` apart, or values too large
            for noise in its dtype.

    Example::

        >>> import torch
        >>> x = torch.tensor([[1.0, 0.3], [2.0, 0.6]])
        >>> noisy = dequantize(x)
        >>> noisy.floor()[:, 0].tolist(), noisy[:, 1].equal(x[:, 1])
        ([1.0, 2.0], True)
    """
    check_numbers("dequantize", above=0, step=step)
    if generator is not None:
        check_kind("dequantize", torch.Generator, "a torch.Generator", generator=generator)
    table, names = _read("dequantize", x)
    if columns is None:
        places = [place for place in range(table.shape[1]) if _on_grid(table[:, place], step)]
    else:
        places = places_of("dequantize", "columns", columns, names, table.shape[1])
        for place in places:
            if not _on_grid(table[:, place] - table[:1, place], step):
                raise ValueError(f"dequantize: {label(names, place)} holds values that are no multiples of {step:g}.")
    table = table if table.is_floating_point() else table.to(torch.get_default_dtype())
    for place in places:
        largest = float(table[:, place].abs().max())
        if largest * _eps(table) > 0.01 * step:
            values = f"the values of {label(names, place)} (up to {largest:.6g})"
            words = f"dequantize: {table.dtype} leaves no room for noise between {values}"
            raise ValueError(f"{words}; subtract a constant, or use x.double().")
    device = generator.device if generator else table.device
    noise = torch.rand(len(table), len(places), generator=generator, dtype=table.dtype, device=device)
    noisy = table.clone()
    noisy[:, places] += step * noise.to(table.device)
    return noisy.reshape(x.shape)


def _on_grid(x: Tensor, step: float) -> bool:
    """True if a column holds only multiples of a step."""
    multiples = x.double() / step
    slack = 1e-6 + 4 * _eps(x) * multiples.abs()
    return bool(((multiples - multiples.round()).abs() <= slack.clamp_max(0.25)).all())


def _eps(x: Tensor) -> float:
    """Return the relative rounding error of the numbers in a tensor; integers count as float64."""
    return torch.finfo(x.dtype if x.is_floating_point() else torch.float64).eps


def _read(caller: str, x: Any) -> tuple[Tensor, Names]:
    """Return a table of at least one row as a matrix ``(N, D)``, and the names of its columns."""
    if not is_table(x):
        raise TypeError(f"{caller}: x must be a tensor, an array or a data frame, got {type(x).__name__}.")
    table, names = as_table(caller, "x", x)
    if table.dim() not in (1, 2) or not table.numel():
        raise ValueError(f"{caller}: x must have shape (N, D) or (N,), got {tuple(table.shape)}.")
    if table.is_floating_point() and (bad := int((~table.isfinite()).sum())):
        raise ValueError(f"{caller}: x holds NaN or inf ({bad} of {table.numel()} numbers); leave those rows out.")
    return table.reshape(len(table), -1), names


def is_table(value: Any) -> bool:
    """True if a value holds all rows at once: a tensor, an array or a data frame."""
    return isinstance(value, Tensor) or hasattr(value, "to_numpy") or hasattr(value, "__array__")


def as_table(caller: str, argument: str, value: Any) -> tuple[Tensor, Names]:
    """Return a table as a tensor, in its own dtype if torch computes with it, and the names of its columns.

    Raises:
        ValueError: If the table does not hold real numbers, or is in 16 bits; the error names argument and column.
    """
    names: Names = None
    if isinstance(value, Tensor):
        check_dense(caller, argument, value)
        if value.is_meta:
            raise ValueError(f"{caller}: {argument} must hold numbers, but lies on the meta device.")
        found = value.detach()
    else:
        columns = getattr(value, "columns", None)
        names = None if columns is None else [str(name) for name in columns]
        if isinstance(value, np.ma.MaskedArray):
            value = np.ma.filled(value.astype(float), np.nan)
        array = np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value)
        if array.dtype.kind not in "biufc":  # a data frame of several dtypes is an array of objects
            for place, cell in np.ndenumerate(array):
                if not isinstance(cell, numbers.Real | np.bool_):
                    holds = f"{label(names, place[1] if len(place) > 1 else 0)} holds {cell!r:.50}"
                    must = f"{argument} must hold real numbers, but {holds} ({type(cell).__name__})"
                    raise ValueError(f"{caller}: {must}. Leave it out, or encode it as numbers.")
        # torch has few operations for uint64, no float longer than 64 bits, and only the machine's byte order.
        if array.dtype.kind not in "biufc" or array.dtype == np.uint64 or array.dtype.itemsize > 8:
            array = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
        found = torch.tensor(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))
    if found.dtype in (torch.float16, torch.bfloat16) or found.is_complex():
        way = "" if found.is_complex() else f" Use {argument}.float(), or {argument}.astype('float32')."
        must = f"{argument} must hold real numbers of float32, float64 or an integer dtype"
        raise ValueError(f"{caller}: {must}, got {found.dtype}.{way}")
    wider = {torch.bool: torch.uint8} | dict.fromkeys((torch.uint16, torch.uint32, torch.uint64), torch.int64)
    return found.to(wider.get(found.dtype, found.dtype)), names  # torch has few operations for the others


def label(names: Names, place: int) -> str:
    """Return the label of a column for error messages: its name, or its index."""
    return f"column {names[place]!r}" if names else f"column {place}"


def listed(words: Sequence[str], most: int = 5) -> str:
    """Return the first few of many words, separated by commas, and the number of the others."""
    return ", ".join([*words[:most], *([f"and {len(words) - most} more"] if len(words) > most else [])])


def listed_names(names: Iterable[str], most: int = 5) -> str:
    """Return the first few of many names, each in quotation marks."""
    return listed([repr(name) for name in names], most)


def places_of(caller: str, argument: str, columns: Sequence[int | str], names: Names, width: int) -> list[int]:
    """Return the indices of columns that are given by index or name.

    Raises:
        ValueError: If there is no such column.
    """
    found = []
    for column in columns if isinstance(columns, Iterable) and not isinstance(columns, str) else [columns]:
        if isinstance(column, str) and names and column in names:
            found.append(names.index(column))
        elif is_integer(column) and 0 <= column < width:  # type: ignore[operator]
            found.append(int(column))
        else:
            known = f"the names {listed_names(names)} or " if names else ""
            raise ValueError(f"{caller}: {argument} must hold {known}places from 0 to {width - 1}, got {column!r}.")
    return found
