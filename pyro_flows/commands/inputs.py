"""Files that a user hands over, read by the suffix of their names; the headers of NumPy files are not trusted.

A NumPy file takes at most as much memory as its size can justify.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from numpy.lib import format as npy

from ..data.table import listed_names
from . import Refused

T = TypeVar("T")
ROOM, RATIO = 2**28, 100  # bytes that any archive may unpack to, and how many times its own size
LONGEST = 2**31  # dimension of an array without numbers


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
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(6)
        file.seek(0)
        try:
            if magic == npy.MAGIC_PREFIX:
                return _array(file, size, "it")
            with zipfile.ZipFile(file) as archive:
                return _arrays(archive, size)
        except Exception as error:  # damaged files raise errors of many kinds
            words = " ".join(f"{error!s:.250}".split()) or "its header cannot be read"
            if isinstance(error, zipfile.BadZipFile):
                words = f"it is neither .npy nor .npz, or was cut off ({words:.80})"
            raise Refused(f"the {what} {str(path)!r} is not a NumPy file of plain arrays: {words}") from error


def _arrays(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    parts = archive.infolist()
    unpacked = sum(part.file_size for part in parts)
    if unpacked > max(ROOM, RATIO * size):
        raise ValueError(f"it would unpack from {size} to {unpacked} bytes. If that is right, write it by numpy.savez")
    found = {}
    for part in parts:
        name = part.filename.removesuffix(".npy")
        if name in found:
            raise ValueError("it holds several arrays of one name")
        with archive.open(part) as file:
            found[name] = _array(file, part.file_size, f"array {name!r:.40}")
    return found


def _array(file: IO[bytes], size: int, what: str) -> np.ndarray:
    """Read an array from a stream of ``size`` bytes, unless its header claims more."""
    version = npy.read_magic(file)
    # The header of version 3 differs from that of version 2 only in the names of fields.
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError(f"{what} holds Python objects, and would run code when it is read")
    number, held = math.prod(map(int, shape)), size - file.tell()
    endless = max((1, *shape)) > LONGEST if not number else dtype.itemsize == 0
    if number * dtype.itemsize > held or endless or min((0, *shape)) < 0:
        words = f"claims {number} values of {dtype.itemsize} bytes, in shape {shape!s:.60}"
        raise ValueError(f"{what} {words}, and holds {held} bytes")
    file.seek(0)
    return np.asarray(npy.read_array(file, allow_pickle=False))
