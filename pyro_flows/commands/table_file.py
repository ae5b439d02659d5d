"""The user's table: complete columns of real numbers from delimited text or NumPy files, and remarks on omissions."""

from __future__ import annotations

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

Columns = tuple[list[str], list[np.ndarray], list[str]]  # names, cells, and remarks on the file
DELIMITERS = ",", ";", "\t", r"\s+"
MISSING = {"", "?", "-", ".", "na", "n/a", "#n/a", "<na>", "null", "none", "missing"}  # in lower case
DECIMAL_COMMA = re.compile(r"[+-]?[\d.]*,\d+(e[+-]?\d+)?", re.IGNORECASE)
LOOKED_AT = 100  # rows that decide on the delimiter
TOKENIZER = "Error tokenizing data. C error: "  # the beginning of pandas' errors
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

    names, columns, remarks = read_file("table", path, READERS)
    _check_width(path, len(names))
    if twice := repeated(names):
        raise Refused(f"the table {str(path)!r} has several columns named {twice}; rename them")
    cells = dict(zip(names, columns, strict=True))
    if chosen is not None:
        if unknown := [name for name in chosen if name not in cells]:
            has = listed_names(cells, MANY)
            raise Refused(f"argument --columns: there is no {listed_names(unknown)}; the table has {has}")
        cells = {name: cells[name] for name in chosen}
    numbers, words = _columns(cells)
    table = pd.DataFrame(numbers)

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
    table = _complete(table, remarks)
    leave_out("constant columns", _constants(table))
    return table, remarks


def _check_width(path: Path, width: int) -> None:
    """Raise Refused if a table is too wide to be read in seconds."""
    if width > WIDEST:
        way = "leave some out, or transpose the table if its lines are columns"
        raise Refused(
            f"the table {str(path)!r} must have at most {WIDEST} columns, and its first row has {width}; {way}"
        )


def split_names(text: str) -> list[str]:
    """Return names that are separated by commas; names that contain commas stand in quotes.

    Raises:
        Refused: If there is no name, or one is repeated.
    """
    names = [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]
    if not all(names) or not names or repeated(names):
        raise Refused(f"argument --columns: names must be parted by commas, each there once, got {text!r}")
    return names


def _complete(table: pd.DataFrame, remarks: list[str]) -> pd.DataFrame:
    """Return the rows without missing values, and add a remark on the others."""
    gaps = table.isna()
    missing, rows = int(gaps.any(axis=1).sum()), len(gaps)
    where = f"{missing} of {rows} rows"
    if missing > rows / 2:
        raise Refused(f"values are missing in {where}: in {_counted(gaps)}; choose other columns by --columns")
    if missing:
        remarks.append(f"Left out {where}, where values are missing: in {_counted(gaps)}.")
    return table.dropna()


def _constants(table: pd.DataFrame) -> dict[str, str]:
    """Return the columns that hold one value, and these values."""
    lowest = table.min()
    return {name: f"{value:.6g}" for name, value in lowest[lowest == table.max()].items()}


def _columns(cells: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the numbers of each column, and for columns with other cells an example."""
    columns, words = {}, {}
    for name, column in cells.items():
        columns[name], wrong = _numbers(column)
        if wrong and all(map(DECIMAL_COMMA.fullmatch, wrong)):
            holds = f"column {name!r} holds numbers with commas, such as {wrong[0]!r}"
            raise Refused(f"{holds}; write them with a decimal point and without separators of thousands")
        if wrong:
            words[name] = f"{wrong[0]!r:.40}" + ("" if len(wrong) == len(column) else f" in {_rows(len(wrong))}")
    return columns, words


def _numbers(cells: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the numbers in cells, NaN for missing values, and the cells that hold something else."""
    if cells.dtype.kind in "biuf":
        return cells.astype(np.float64), []
    numbers, wrong = np.full(len(cells), np.nan), []
    for place, cell in enumerate(cells):
        text = str(cell).strip()
        try:
            numbers[place] = float(text.replace("_", "?"))  # only Python reads 1_000 as a number
        except ValueError:
            if text.lower() not in MISSING:
                wrong.append(text)
    return numbers, wrong


def _rows(number: int) -> str:
    return f"{number} row{'' if number == 1 else 's'}"


def _counted(faults: pd.DataFrame) -> str:
    """Return the columns with faults, and the number of their rows, in decreasing order."""
    numbers = faults.sum().sort_values(ascending=False, kind="stable")
    return listed([f"{name!r} ({_rows(number)})" for name, number in numbers.items() if number], MANY)


def read_delimited(path: Path) -> Columns:
    """Return the names and the cells of the columns of a text file, and remarks on how the file was read.

    A first line without words is data, and then the columns are numbered, as are columns without a name.  Blank lines
    are skipped.

    Raises:
        OSError: If there is no such file.
        Refused: If it is not text in UTF-8, is empty or too wide, has lines of different lengths, or has rows that a
            quotation mark joins to one cell.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"the table {str(path)!r} is not UTF-8 text; save it as CSV in UTF-8") from error
    file = io.StringIO(text.removeprefix("#"))  # NumPy's savetxt begins its header with "#"
    first = text.lstrip().partition("\n")[0]
    _check_width(path, max(len(first.split()), *(first.count(delimiter) + 1 for delimiter in ",;\t")))
    delimiter = max(DELIMITERS, key=lambda delimiter: _score(file, delimiter))
    try:
        cells = _cells(file, delimiter)
        short = _first_short_row(file, delimiter, cells.shape[1])
    except (ValueError, csv.Error) as error:
        words = "is empty" if not text.strip() else f"cannot be read: {str(error).removeprefix(TOKENIZER).strip()}"
        raise Refused(f"the table {str(path)!r} {words}") from error
    if short:
        raise Refused(f"the table {str(path)!r} cannot be read: {short}; is it damaged, or cut off?")
    if damaged := _first_joined_rows(cells) if '"' in text else "":
        raise Refused(
            f"the table {str(path)!r} cannot be read: {damaged}; is a quotation mark missing, or one too many?"
        )
    header = cells.iloc[0]
    numbers, titles = _numbers(header.to_numpy())
    names, remarks = [f"column {place + 1}" for place in range(len(header))], []
    if titles:
        cells = cells[1:]
        names = [cell.strip() or name for cell, name in zip(header, names, strict=True)]
        if not np.isnan(numbers).all():
            remarks.append(f"The first line ({listed(list(header), 4)}) was taken for names.")
    if cells.empty:
        raise Refused(f"the table {str(path)!r} holds names and no rows")
    return names, list(cells.to_numpy().T), remarks


def _cells(file: io.StringIO, delimiter: str, **options: Any) -> pd.DataFrame:
    """Return the cells of a file as text."""
    import pandas as pd

    file.seek(0)
    settings = {"header": None, "dtype": str, "keep_default_na": False, "skipinitialspace": True}
    return pd.read_csv(file, sep=delimiter, **settings, **options)


def _first_short_row(file: io.StringIO, delimiter: str, width: int) -> str:
    """Return a description of the first row with too few values, which pandas fills up, or an empty string."""
    file.seek(0)
    plain = len(delimiter) == 1
    rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True) if plain else (line.split() for line in file)
    for number, row in enumerate((row for row in rows if any(row)), 1):
        if len(row) < width:
            return f"row {number} has {len(row)} of {width} values"
    return ""


def _first_joined_rows(cells: pd.DataFrame) -> str:
    """Return a description of the first row with a cell of several lines of numbers, or an empty string.

    A quotation mark without a partner joins rows so.
    """
    for number, row in enumerate(cells.to_numpy(), 1):
        for cell in row:
            if "\n" in cell and not _numbers(np.array(re.split(r'[\s,;"]+', cell)))[1]:
                return f"row {number} holds {cell[:30]!r}"
    return ""


def _score(file: io.StringIO, delimiter: str) -> float:
    """Return how well a delimiter separates the first lines into numbers."""
    try:
        cells = _cells(file, delimiter, nrows=LOOKED_AT, on_bad_lines="skip")
    except ValueError:
        return 0.0
    if cells.shape[1] < 2:
        return 0.0
    texts = (cells[1:] if len(cells) > 1 else cells).to_numpy().ravel()
    wrong = [text for text in _numbers(texts)[1] if not DECIMAL_COMMA.fullmatch(text)]
    return 1.1 - len(wrong) / len(texts)


def read_arrays(path: Path) -> Columns:
    """Return the names and the columns of a ``.npz`` or ``.npy`` file, and remarks on its other content.

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
            return list(arrays), list(arrays.values()), []
        held = listed([f"{name!r} of shape {array.shape}" for name, array in arrays.items()]) or "nothing"
        raise Refused(f"{str(path)!r} must hold a matrix 'x', or vectors of one length, a column each; it holds {held}")
    x = arrays.pop(chosen)
    names = [f"column {place + 1}" for place in range(x.shape[1])]
    if "columns" in arrays:
        names = [str(name) for name in arrays.pop("columns").ravel()]
    if len(names) != x.shape[1]:
        raise Refused(f"{str(path)!r} holds {len(names)} names in 'columns', and its table has {x.shape[1]} columns")
    remarks = [f"Used the array {chosen!r} alone, without {listed_names(arrays)}."] if arrays else []
    return names, list(x.T), remarks


READERS: dict[str, Callable[[Path], Columns]] = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), read_delimited),
    **dict.fromkeys((".npz", ".npy"), read_arrays),
}
