"""The user's table: columns of real numbers without gaps, and remarks on what was left out on the way to them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.table import listed, listed_names
from . import Refused
from .arrays import read_arrays
from .delimited import decimal_comma, number_of, read_delimited
from .inputs import read_file

READERS: dict[str, Callable[[Path], tuple[dict[str, Any], list[str]]]] = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), read_delimited),
    **dict.fromkeys((".npz", ".npy"), read_arrays),
}
FIRST = "column 1"  # where it has no name
MANY = 50  # names in a line


@dataclass(frozen=True)
class Table:
    """Rows of numbers and the names of their columns, as functions for data frames take them.

    Attributes:
        columns: The names, D of them.
        values: The numbers, ``(N, D)``.
        remarks: What was left out, a line each.
    """

    columns: list[str]
    values: np.ndarray
    remarks: list[str]

    def to_numpy(self) -> np.ndarray:
        return self.values


def read_table(path: Path, chosen: list[str] | None = None) -> Table:
    """Read a table, in float64.

    Columns of text, empty ones and constant ones are left out, and so are the rows in which a value of the others is
    missing, unless the columns are chosen.

    Args:
        path: A file of delimited values or of NumPy.
        chosen: The names of the columns; by default all that can be used.

    Raises:
        Refused: If the file cannot be read, a chosen column cannot be used, or nothing is left.
    """
    cells, remarks = read_file("table", path, READERS)
    if chosen is not None:
        if unknown := [name for name in chosen if name not in cells]:
            has = listed_names(cells, MANY)
            raise Refused(f"argument --columns: there is no {listed_names(unknown)}; the table has {has}")
        cells = {name: cells[name] for name in chosen}
    picked = _Picked(cells, strict=chosen is not None)
    values = picked.matrix()  # which may leave out more
    return Table(list(picked.columns), values, [*remarks, *picked.remarks])


def split_names(text: str) -> list[str]:
    """Names that are parted by commas; those with commas of their own stand in quotes.

    Raises:
        Refused: If there is none, or one is there twice.
    """
    names = [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]
    if not all(names) or not names or len(set(names)) < len(names):
        raise Refused(f"argument --columns: names must be parted by commas, each there once, got {text!r}")
    return names


class _Picked:
    """The columns that can be used, and why others cannot.

    Args:
        cells: For each column its cells, ``(N,)``, numbers or text.
        strict: Whether to refuse columns that cannot be used.
    """

    def __init__(self, cells: dict[str, Sequence[str] | np.ndarray], *, strict: bool) -> None:
        self.strict, self.remarks = strict, list[str]()
        self.columns: dict[str, np.ndarray] = {}
        faults: dict[str, str] = {}
        for name, column in cells.items():
            self.columns[name], wrong = _numbers(column)
            if wrong and all(map(decimal_comma, wrong)):
                words = f"column {name!r} holds numbers with commas, such as {wrong[0]!r}"
                raise Refused(f"{words}; write them with a decimal point and without separators of thousands")
            if wrong:
                faults[name] = f"{wrong[0]!r:.40}" + ("" if len(wrong) == len(column) else f" in {_rows(len(wrong))}")
        self._leave_out("columns that are not numbers", faults)
        self._leave_out("row numbers", {n: "" for n, x in list(self.columns.items())[:1] if n == FIRST and _counts(x)})
        self._leave_out("empty columns", {n: "" for n, x in self.columns.items() if np.isnan(x).all()})
        self._leave_out_constant()
        if infinite := _counted(self.columns, np.isinf):
            raise Refused(f"the table holds inf in {infinite}; leave these rows out")

    def _leave_out(self, kind: str, faults: dict[str, str]) -> None:
        """Go on without some columns, for which there may be more words each."""
        found = listed([f"{name!r} ({words})" if words else repr(name) for name, words in faults.items()], MANY)
        if faults and self.strict:
            raise Refused(f"argument --columns: {kind} have no density: {found}")
        if faults:
            self.remarks.append(f"Left out {kind}: {found}.")
        self.columns = {name: column for name, column in self.columns.items() if name not in faults}
        if not self.columns:
            raise Refused(" ".join(["the table has no column that has a density.", *self.remarks]))

    def _leave_out_constant(self) -> None:
        same = {n: x for n, x in self.columns.items() if np.nanmin(x) == np.nanmax(x)}
        self._leave_out("constant columns", {name: f"{np.nanmin(x):.6g}" for name, x in same.items()})

    def matrix(self) -> np.ndarray:
        """The rows in which nothing is missing, ``(N, D)``."""
        counted = _counted(self.columns, np.isnan)
        whole = ~np.isnan(np.stack(list(self.columns.values()), 1)).any(1)
        missing, number = int((~whole).sum()), len(whole)
        if missing > number / 2:
            words = f"values are missing in {missing} of {number} rows: in {counted}"
            raise Refused(f"{words}; choose other columns by --columns")
        if missing:
            self.remarks.append(f"Left out {missing} of {number} rows, where values are missing: in {counted}.")
            self.columns = {name: x[whole] for name, x in self.columns.items()}
            self._leave_out_constant()
        return np.stack(list(self.columns.values()), 1)


def _numbers(cells: Sequence[str] | np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The numbers in cells, NaN where there is none, and what else was there."""
    if isinstance(cells, np.ndarray) and cells.dtype.kind in "biuf":
        return cells.astype(np.float64), []
    texts = [str(cell) for cell in cells]
    found = [number_of(text) for text in texts]
    wrong = [text for text, number in zip(texts, found, strict=True) if number is None]
    return np.array([np.nan if number is None else number for number in found]), wrong


def _counts(x: np.ndarray) -> bool:
    """Whether each number is the one after that before."""
    return len(x) > 1 and bool((np.diff(x) == 1).all())


def _rows(number: int) -> str:
    return f"{number} row{'' if number == 1 else 's'}"


def _counted(columns: dict[str, np.ndarray], fault: Callable[[np.ndarray], np.ndarray]) -> str:
    """Return the columns with a fault, and in how many of their rows, most first."""
    numbers = {name: int(fault(column).sum()) for name, column in columns.items()}
    ordered = sorted(numbers.items(), key=lambda item: -item[1])
    return listed([f"{name!r} ({_rows(number)})" for name, number in ordered if number], MANY)
