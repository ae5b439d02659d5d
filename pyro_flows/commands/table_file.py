"""The user's table: complete columns of real numbers from delimited text or NumPy files, and remarks on omissions."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.columns import listed, listed_names
from . import Refused
from .inputs import read_file, read_numpy, repeated

if TYPE_CHECKING:
    import pandas as pd

MISSING = {"", "?", "-", ".", "na", "n/a", "#n/a", "<na>", "null", "none", "missing"}  # in lower case
DECIMAL_COMMA = re.compile(r"[+-]?[\d.]*,\d+(e[+-]?\d+)?", re.IGNORECASE)
FIRST = "column 1"  # the name of a first column without a name
MANY = 50  # names in a line
WIDEST = 20_000  # columns; one takes half a millisecond to read


def read_table_file(path: Path, chosen: list[str] | None = None) -> tuple[pd.DataFrame, list[str]]:
    """Return a table in float64, and a remark on each kind of omission.

    Columns of text, empty ones and constant ones are left out, unless they are chosen: then they are an error.  Rows
    with missing values in the other columns are left out.

    Args:
        path: A file of delimited values or of NumPy.
        chosen: The names of the columns; by default all that can be used.

    Raises:
        Refused: If the file cannot be read, a chosen column cannot be used, or nothing is left.
    """
    table, remarks = read_file("table", path, READERS)
    _check_width(path, table.shape[1])
    table.columns = [f"column {name + 1}" if isinstance(name, int) else name for name in table.columns]
    if table.empty:
        raise Refused(f"the table {str(path)!r} holds no values")
    if twice := repeated(table.columns):
        raise Refused(f"the table {str(path)!r} has several columns named {twice}; rename them")
    if unknown := [name for name in chosen or () if name not in table]:
        held = listed_names(table.columns, MANY)
        raise Refused(f"argument --columns: there is no {listed_names(unknown)}; the table has {held}")

    def leave_out(kind: str, faults: Mapping[str, str]) -> None:
        """Drop the columns with a fault; ``faults`` holds a detail for each, which may be empty."""
        nonlocal table
        found = listed([f"{name!r} ({detail})" if detail else repr(name) for name, detail in faults.items()], MANY)
        if faults and chosen is not None:
            raise Refused(f"argument --columns: {kind} have no density: {found}")
        remarks.extend([f"Left out {kind}: {found}."] if faults else [])
        table = table.drop(columns=list(faults))
        if table.columns.empty:
            raise Refused(" ".join(["the table has no column that has a density.", *remarks]))

    words = dict[str, str]()
    table = (table[chosen] if chosen else table).apply(_numbers, words=words)
    leave_out("columns that are not numbers", words)
    if table.columns[0] == FIRST and len(table) > 1 and (table[FIRST].diff()[1:] == 1).all():
        leave_out("row numbers", {FIRST: ""})
    leave_out("empty columns", dict.fromkeys(table.columns[table.isna().all()], ""))
    leave_out("constant columns", _constants(table))
    if infinite := _counted(np.isinf(table)):
        raise Refused(f"the table holds inf in {infinite}; leave these rows out")
    gaps = table.isna()
    if missing := int(gaps.any(axis=1).sum()):
        where = f"{missing} of {len(gaps)} rows"
        if missing > len(gaps) / 2:
            raise Refused(f"values are missing in {where}: in {_counted(gaps)}; choose other columns by --columns")
        remarks.append(f"Left out {where}, where values are missing: in {_counted(gaps)}.")
        table = table.dropna()
        leave_out("constant columns", _constants(table))
    return table, remarks


def split_names(text: str) -> list[str]:
    """Return names that are separated by commas; names that contain commas stand in quotes.

    Raises:
        Refused: If there is no name, or one is repeated.
    """
    names = [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]
    if not all(names) or not names or repeated(names):
        raise Refused(f"argument --columns: names must be parted by commas, each there once, got {text!r}")
    return names


def _constants(table: pd.DataFrame) -> dict[str, str]:
    """Return the columns that hold one value, and these values."""
    lowest = table.min()
    return {name: f"{value:.6g}" for name, value in lowest[lowest == table.max()].items()}


def _counted(faults: pd.DataFrame) -> str:
    """Return the columns with faults, and the number of their rows, in decreasing order."""
    numbers = faults.sum().sort_values(ascending=False, kind="stable")
    return listed([f"{name!r} ({_rows(number)})" for name, number in numbers.items() if number], MANY)


def _rows(number: int) -> str:
    return f"{number} row{'' if number == 1 else 's'}"


def _numbers(cells: pd.Series, words: dict[str, str]) -> pd.Series:
    """Return the numbers of a column, NaN for other cells; add an example of cells that are words to ``words``.

    Raises:
        Refused: If the words are numbers with commas, or rows that a quotation mark joins to one cell.
    """
    with contextlib.suppress(ValueError, TypeError, AttributeError):  # of words, dates and complex numbers
        if cells.dtype.kind in "biuf" or not cells.str.contains("_").any():  # only Python reads 1_000 as a number
            return cells.astype(np.float64)
    numbers = cells.map(_number)
    if wrong := [text for text in numbers if isinstance(text, str)]:
        words[str(cells.name)] = f"{wrong[0]!r:.40}" + ("" if len(wrong) == len(cells) else f" in {_rows(len(wrong))}")
        if all(map(DECIMAL_COMMA.fullmatch, wrong)):
            holds = f"column {cells.name!r} holds numbers with commas, such as {wrong[0]!r}"
            raise Refused(f"{holds}; write them with a decimal point and without separators of thousands")
        if joined := [text for text in wrong if "\n" in text and not re.search(r"[^\W\d]{2}", text)]:
            row = 1 + list(numbers).index(joined[0])
            raise Refused(f"row {row} holds {joined[0][:30]!r}; is a quotation mark missing, or one too many?")
    return numbers.mask(numbers.isin(wrong)).astype(np.float64)


def _number(cell: object) -> float | str:
    """Return the number in a cell, NaN if it is missing, and other cells as they are."""
    text = str(cell).strip()
    try:
        return float(text.replace("_", "?"))
    except ValueError:
        return float("nan") if text.lower() in MISSING else text


def _check_width(path: Path, width: int) -> None:
    if width > WIDEST:
        must = f"the table {str(path)!r} must have at most {WIDEST} columns, and its first row has {width}"
        raise Refused(f"{must}; leave some out, or transpose the table if its lines are columns")


def read_delimited(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return a text file's columns, and remarks on how it was read.

    A first line without words is data, and then the columns are numbered, as are columns without a name.  Blank lines
    are skipped, and a short row lacks its last values.

    Raises:
        OSError: If there is no such file.
        Refused: If it is not text in UTF-8, is empty or too wide, or has a line longer than the first.
    """
    import pandas as pd  # here, since it is slow to import

    try:
        text = path.read_text(encoding="utf-8-sig").removeprefix("#")  # NumPy's savetxt begins its header with "#"
    except UnicodeDecodeError as error:
        raise Refused(f"the table {str(path)!r} is not UTF-8 text; save it as CSV in UTF-8") from error
    lines = [line.strip() for line in re.sub('"[^"]*"', '""', text.lstrip()[: 2**20]).splitlines()[:20]]
    found = [part for part in ("\t", ";", ",", " ") if all(part in line for line in lines if line)]
    delimiter = found[0].replace(" ", r"\s+") if found and lines else ","
    first_line = text.lstrip().partition("\n")[0]
    _check_width(path, len(first_line.split(None if delimiter == r"\s+" else delimiter)))
    settings = {"header": None, "dtype": str, "keep_default_na": False, "skipinitialspace": True}
    try:
        table = pd.read_csv(io.StringIO(text), sep=delimiter, **settings)
    except ValueError as error:
        fault = " ".join(str(error).removeprefix("Error tokenizing data. C error: ").split())
        words = f"cannot be read: {fault}" if text.strip() else "is empty"
        raise Refused(f"the table {str(path)!r} {words}") from error
    header, remarks = [cell.strip() for cell in table.iloc[0]], []
    kinds = [_number(cell) for cell in header]
    if any(isinstance(kind, str) for kind in kinds):
        table = table[1:].rename(columns={place: cell for place, cell in enumerate(header) if cell})
        if any(isinstance(kind, float) and kind == kind for kind in kinds):
            remarks.append(f"The first line ({listed(header, 4)}) was taken for names.")
    return table, remarks


def read_arrays(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return the columns of a ``.npz`` or ``.npy`` file, and remarks on its other content.

    A matrix ``x``, or the only matrix, is the table, with the names in ``columns``; without a matrix each vector is a
    column.

    Raises:
        OSError: If there is no such file.
        Refused: If it is not a file of plain arrays, or its arrays are no table.
    """
    import pandas as pd

    arrays, titles = read_numpy("table", path), None
    remarks = list[str]()
    if not isinstance(arrays, np.ndarray):
        matrices = [name for name, array in arrays.items() if array.ndim == 2]
        if "x" in matrices or len(matrices) == 1:
            chosen = "x" if "x" in matrices else matrices[0]
            x, titles = arrays.pop(chosen), arrays.pop("columns", None)
            remarks = [f"Used the array {chosen!r} alone, without {listed_names(arrays)}."] if arrays else []
            arrays = x
    try:
        table = pd.DataFrame(arrays, columns=None if titles is None else [*map(str, titles.ravel())])
    except ValueError as error:
        words = "must hold a matrix 'x' with as many names in 'columns', or vectors of one length"
        raise Refused(f"the table {str(path)!r} {words}: {error}") from error
    return table, remarks


READERS: dict[str, Callable[[Path], tuple[pd.DataFrame, list[str]]]] = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), read_delimited),
    **dict.fromkeys((".npz", ".npy"), read_arrays),
}
