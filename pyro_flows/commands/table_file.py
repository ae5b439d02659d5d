"""The user's table: complete columns of real numbers from delimited text or NumPy files, and remarks on omissions."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.table import listed, listed_names
from . import Refused
from .inputs import read_file, read_numpy, repeated

if TYPE_CHECKING:
    import pandas as pd

Cells = tuple[dict[str, np.ndarray], list[str]]  # the columns by name, and remarks on the file
MISSING = {"", "?", "-", ".", "na", "n/a", "#n/a", "<na>", "null", "none", "missing"}  # in lower case
DECIMAL_COMMA = re.compile(r"[+-]?[\d.]*,\d+(e[+-]?\d+)?", re.IGNORECASE)
JOINED = re.compile(r'[-+\d.e\s,;"]*\n[-+\d.e\s,;"]*', re.IGNORECASE)  # numbers of several rows
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
    import pandas as pd  # here, since it is slow to import

    cells, remarks = read_file("table", path, READERS)
    if unknown := [name for name in chosen or () if name not in cells]:
        raise Refused(
            f"argument --columns: there is no {listed_names(unknown)}; the table has {listed_names(cells, MANY)}"
        )
    words = dict[str, str]()
    table = pd.DataFrame({name: _numbers(name, cells[name], words) for name in chosen or cells})

    def leave_out(kind: str, faults: Mapping[str, str]) -> None:
        """Drop the columns with a fault; ``faults`` holds a detail for each, which may be empty."""
        nonlocal table
        if not faults:
            return
        found = listed([f"{name!r} ({detail})" if detail else repr(name) for name, detail in faults.items()], MANY)
        if chosen is not None:
            raise Refused(f"argument --columns: {kind} have no density: {found}")
        remarks.append(f"Left out {kind}: {found}.")
        table = table.drop(columns=list(faults))
        if table.columns.empty:
            raise Refused(" ".join(["the table has no column that has a density.", *remarks]))

    leave_out("columns that are not numbers", words)
    first = table.iloc[:, 0]
    if first.name == FIRST and len(first) > 1 and (np.diff(first) == 1).all():
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


def _numbers(name: str, cells: np.ndarray, words: dict[str, str]) -> np.ndarray:
    """Return the numbers of a column, NaN for missing values; add an example of its other cells to ``words``."""
    if cells.dtype.kind in "biuf":
        return cells.astype(np.float64)
    with contextlib.suppress(ValueError, TypeError):
        if "_" not in "".join(cells):  # only Python reads 1_000 as a number
            return cells.astype(np.float64)
    numbers = np.array([_number(cell) for cell in cells], object)
    wrong = [text for text in numbers if isinstance(text, str)]
    if wrong and all(map(DECIMAL_COMMA.fullmatch, wrong)):
        holds = f"column {name!r} holds numbers with commas, such as {wrong[0]!r}"
        raise Refused(f"{holds}; write them with a decimal point and without separators of thousands")
    if wrong:
        words[name] = f"{wrong[0]!r:.40}" + ("" if len(wrong) == len(cells) else f" in {_rows(len(wrong))}")
    return np.full(len(cells), np.nan) if wrong else numbers.astype(np.float64)


def _number(cell: Any) -> float | str:
    """Return the number in a cell, NaN if it is missing, and other cells as they are."""
    text = str(cell).strip()
    try:
        return float(text.replace("_", "?"))
    except ValueError:
        return float("nan") if text.lower() in MISSING else text


def _columns(path: Path, names: list[str], columns: Any) -> dict[str, np.ndarray]:
    """Return columns by their names.

    Raises:
        Refused: If there are too many to be read in seconds, or two of one name.
    """
    _check_width(path, len(names))
    if twice := repeated(names):
        raise Refused(f"the table {str(path)!r} has several columns named {twice}; rename them")
    return dict(zip(names, columns, strict=True))


def _check_width(path: Path, width: int) -> None:
    if width > WIDEST:
        must = f"the table {str(path)!r} must have at most {WIDEST} columns, and its first row has {width}"
        raise Refused(f"{must}; leave some out, or transpose the table if its lines are columns")


def read_delimited(path: Path) -> Cells:
    """Return the cells of the columns of a text file by name, and remarks on how the file was read.

    A first line without words is data, and then the columns are numbered, as are columns without a name.  Blank lines
    are skipped.

    Raises:
        OSError: If there is no such file.
        Refused: If it is not text in UTF-8, is empty or too wide, has lines of different lengths, or has rows that a
            quotation mark joins to one cell.
    """
    import pandas as pd

    try:
        text = path.read_text(encoding="utf-8-sig").removeprefix("#")  # NumPy's savetxt begins its header with "#"
    except UnicodeDecodeError as error:
        raise Refused(f"the table {str(path)!r} is not UTF-8 text; save it as CSV in UTF-8") from error
    unreadable = f"the table {str(path)!r} cannot be read"
    lines = [line.strip() for line in re.sub('"[^"]*"', '""', text.lstrip()[: 2**20]).splitlines()[:20]]
    found = [part for part in ("\t", ";", ",", " ") if all(part in line for line in lines if line)]
    delimiter = found[0] if found and lines else ","
    first = text.lstrip().partition("\n")[0]
    _check_width(path, len(first.split()) if delimiter == " " else first.count(delimiter) + 1)
    settings = {"header": None, "dtype": str, "keep_default_na": False, "skipinitialspace": True, "engine": "python"}
    try:
        cells = pd.read_csv(io.StringIO(text), sep=delimiter.replace(" ", r"\s+"), **settings)
    except (ValueError, csv.Error) as error:
        raise Refused(f"{unreadable}: {error}" if text.strip() else f"the table {str(path)!r} is empty") from error
    if (short := cells.isna().sum(axis=1)).any():
        row, width = int(short.argmax()), cells.shape[1]
        raise Refused(
            f"{unreadable}: row {row + 1} has {width - short[row]} of {width} values; is it damaged, or cut off?"
        )
    if '"' in text and len(joined := cells.stack()[lambda cell: cell.str.fullmatch(JOINED)]):
        where = f"row {joined.index[0][0] + 1} holds {joined.iloc[0][:30]!r}"
        raise Refused(f"{unreadable}: {where}; is a quotation mark missing, or one too many?")
    header = [cell.strip() for cell in cells.iloc[0]]
    names, remarks = [f"column {place + 1}" for place in range(len(header))], []
    kinds = [_number(cell) for cell in header]
    if any(isinstance(kind, str) for kind in kinds):
        cells = cells[1:]
        names = [cell or name for cell, name in zip(header, names, strict=True)]
        if any(isinstance(kind, float) and kind == kind for kind in kinds):
            remarks.append(f"The first line ({listed(header, 4)}) was taken for names.")
    if cells.empty:
        raise Refused(f"the table {str(path)!r} holds names and no rows")
    return _columns(path, names, cells.to_numpy().T), remarks


def read_arrays(path: Path) -> Cells:
    """Return the columns of a ``.npz`` or ``.npy`` file by name, and remarks on its other content.

    A matrix ``x``, or the only matrix, is the table, with the names in ``columns``; without a matrix each vector is a
    column.

    Raises:
        OSError: If there is no such file.
        Refused: If it is not a file of plain arrays, or its arrays are no table.
    """
    arrays = read_numpy("table", path)
    if isinstance(arrays, np.ndarray):
        arrays = {name: arrays[name] for name in arrays.dtype.names} if arrays.dtype.names else {"x": arrays}
    if empty := [name for name, array in arrays.items() if not array.size]:
        raise Refused(f"the table {str(path)!r} holds no values in {listed_names(empty)}")
    matrices = [name for name, array in arrays.items() if array.ndim == 2]
    chosen = "x" if "x" in matrices else matrices[0] if len(matrices) == 1 else None
    if chosen is None:
        shapes = {array.shape for array in arrays.values()}
        if len(shapes) == 1 and len(min(shapes)) == 1:
            return arrays, []
        held = listed([f"{name!r} of shape {array.shape}" for name, array in arrays.items()]) or "nothing"
        raise Refused(f"{str(path)!r} must hold a matrix 'x', or vectors of one length, a column each; it holds {held}")
    x, titles = arrays.pop(chosen), arrays.pop("columns", None)
    names = [f"column {place + 1}" for place in range(x.shape[1])] if titles is None else [*map(str, titles.ravel())]
    if len(names) != x.shape[1]:
        raise Refused(f"{str(path)!r} holds {len(names)} names in 'columns', and its table has {x.shape[1]} columns")
    remarks = [f"Used the array {chosen!r} alone, without {listed_names(arrays)}."] if arrays else []
    return _columns(path, names, x.T), remarks


READERS: dict[str, Callable[[Path], Cells]] = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), read_delimited),
    **dict.fromkeys((".npz", ".npy"), read_arrays),
}
