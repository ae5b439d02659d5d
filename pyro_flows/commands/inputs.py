"""Files that a user hands over, read by the suffix of their names; the headers of NumPy files are not trusted."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..data.columns import listed_names
from . import Refused

T = TypeVar("T")
ROOM, RATIO = 2**28, 100  # bytes that any archive may unpack to, and how many times its own size
LONGEST = 2**31  # dimension; an array without bytes can claim any


def read_file(what: str, path: Path, readers: Mapping[str, Callable[[Path], T]]) -> T:
    """Read a file with the reader of its suffix.

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


def repeated(names: Iterable[str]) -> str:
    """Return the names that a list contains more than once, for error messages."""
    return listed_names(name for name, times in Counter(names).items() if times > 1)


def read_numpy(what: str, path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """Return the array in a ``.npy`` file, or the arrays in a ``.npz`` file by name; the suffix does not matter.

    Raises:
        OSError: If there is no such file.
        Refused: If it is not a file of plain arrays, or its headers claim more than it holds.
    """
    size = path.stat().st_size
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return _checked(found)
        with found:
            if repeated(found.files):
                raise ValueError("it holds several arrays of one name")
            unpacked = sum(part.file_size for part in found.zip.infolist())
            if unpacked > max(ROOM, RATIO * size):
                raise ValueError(f"it would unpack from {size} to {unpacked} bytes; if right, write it by numpy.savez")
            return {name: _checked(found[name]) for name in found.files}
    except Exception as error:  # damaged files raise errors of many kinds
        words = " ".join(f"{error!s:.250}".split()) or "its header cannot be read"
        raise Refused(f"the {what} {str(path)!r} is not a NumPy file of plain arrays: {words}") from error


def _checked(array: np.ndarray) -> np.ndarray:
    if not array.nbytes and max((0, *array.shape)) > LONGEST:
        raise ValueError(f"it claims an array of shape {array.shape!s:.60}, and holds no numbers")
    return array
