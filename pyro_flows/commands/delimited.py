"""Text files of delimited values: which character parts them, whether names come first, and the cells of each column.

RFC 4180 (Shafranovich 2005), with semicolons and tabs as well, and columns parted by spaces.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..data.table import listed
from . import Refused
from .inputs import as_columns

DELIMITERS = ",;\t "
MISSING = {"", "?", "-", ".", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "null", "none", "missing"}  # in lower case
LOOKED_AT = 100  # lines, by which the delimiter is told
HEAD = 100_000  # characters that these lines may take


def number_of(cell: str) -> float | None:
    """The number in a cell, NaN where one is missing, and None where there is something else."""
    cell = cell.strip()
    if cell.lower() in MISSING:
        return math.nan
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def decimal_comma(cell: str) -> bool:
    """Whether a cell holds a number if its comma is read as a point."""
    whole, comma, rest = cell.strip().partition(",")
    return bool(comma) and "," not in rest and number_of(f"{whole.replace('.', '')}.{rest}") is not None


def read_delimited(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The cells of each column, by name, and remarks on how the file was read.

    A first line of nothing but numbers is data, and the columns are numbered; so are those without a name.  Blank lines
    are passed over.

    Raises:
        OSError: If there is no such file.
        Refused: If it is no text of UTF-8, is empty, or has lines of unequal lengths or columns of the same name.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"the table {str(path)!r} is not UTF-8 text; save it as CSV in UTF-8") from error
    text = text.removeprefix("#")  # as NumPy's savetxt begins its header
    rows = list(_rows(path, text, _delimiter(text)))
    if not rows:
        raise Refused(f"the table {str(path)!r} is empty")
    first = [number_of(cell) for cell in rows[0]]
    names, remarks = [f"column {place + 1}" for place in range(len(first))], []
    if None in first:
        header, *rows = rows
        names = [cell.strip() or name for cell, name in zip(header, names, strict=True)]
        if any(number is not None and not math.isnan(number) for number in first):
            remarks.append(f"The first line ({listed(header, 4)}) was taken for names.")
    if not rows:
        raise Refused(f"the table {str(path)!r} holds names and no rows")
    return as_columns(path, names, map(list, zip(*rows, strict=True))), remarks


def _rows(path: Path, text: str, delimiter: str) -> Iterator[list[str]]:
    """The cells of each line that is not blank."""
    width = number = 0
    try:
        for number, row in _lines(text, delimiter):
            if not row or (width != 1 and len(row) == 1 and not row[0].strip()):
                continue
            width = width or len(row)
            if len(row) != width:
                raise Refused(f"line {number} of the table {str(path)!r} has {len(row)} values, the first line {width}")
            yield row
    except csv.Error as error:
        raise Refused(f"line {number + 1} of the table {str(path)!r} cannot be read: {error}") from error


def _lines(text: str, delimiter: str, strict: bool = True) -> Iterator[tuple[int, list[str]]]:
    """The number of the line where each row ends, and the cells of the row."""
    if delimiter == " ":  # any number of them
        return enumerate(map(str.split, text.splitlines()), 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=strict)
    return ((reader.line_num, row) for row in reader)


def _delimiter(text: str) -> str:
    """The character that parts the first lines into equally many cells, and most of these into numbers."""

    def score(delimiter: str) -> float:
        rows = [row for _, row in islice(_lines(text[:HEAD], delimiter, strict=False), LOOKED_AT) if row]
        width, times = Counter(map(len, rows)).most_common(1)[0] if rows else (0, 0)
        cells = [cell for row in rows[1:] or rows for cell in row]
        if width < 2:
            return 0.0
        numbers = sum(number_of(cell) is not None or decimal_comma(cell) for cell in cells)
        return times / len(rows) * (0.1 + numbers / len(cells))

    return max(DELIMITERS, key=score)
