"""Files that a user hands over: read by the suffix of their names, or refused in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..data.table import listed_names
from . import Refused

T = TypeVar("T")


def read_file(what: str, path: Path, readers: Mapping[str, Callable[[Path], T]]) -> T:
    """Read a file by the reader of its suffix.

    Raises:
        Refused: If there is no reader, or the file cannot be opened.
    """
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise Refused(f"the {what} {str(path)!r} must end with {' or '.join(readers)}")
    try:
        return reader(path)
    except OSError as error:
        raise Refused(f"cannot read the {what} {str(path)!r}: {error.strerror or error}") from error


def as_columns(path: Path, names: list[str], columns: Iterable[Any]) -> dict[str, Any]:
    """Return the columns of a table by their names.

    Raises:
        Refused: If several have the same name.
    """
    if twice := repeated(names):
        raise Refused(f"the table {str(path)!r} has several columns named {twice}; rename them")
    return dict(zip(names, columns, strict=True))


def repeated(names: Iterable[str]) -> str:
    """Return the names that stand more than once in a list of names, in words."""
    return listed_names(name for name, times in Counter(names).items() if times > 1)
