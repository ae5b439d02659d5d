"""Arrays in files of NumPy, and files of NumPy as tables: one matrix, or vectors of one length, each a column.

Files are read without trust in their headers: none takes more memory than its file can mean.
"""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from ..data.table import listed, listed_names
from . import Refused
from .inputs import as_columns

ROOM, RATIO = 2**28, 100  # what an archive may unpack to: so many bytes, or so many times its own size
LONGEST = 2**31  # dimension of an array without numbers


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns of a ``.npz`` or ``.npy`` file, by name, and remarks on what else it holds.

    A matrix ``x``, or the only matrix, is the table, with the names in ``columns``; without a matrix each vector is a
    column.

    Raises:
        OSError: If there is no such file.
        Refused: If it is no file of plain arrays, or what it holds is no table.
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
    x = arrays.pop(chosen)
    width = x.shape[1]
    names = [f"column {place + 1}" for place in range(width)]
    if "columns" in arrays:
        names = [str(name) for name in arrays.pop("columns").ravel()]
    if len(names) != width:
        raise Refused(f"{str(path)!r} holds {len(names)} names in 'columns', and its table has {width} columns")
    remarks = [f"Used the array {chosen!r} alone, without {listed_names(arrays)}."] if arrays else []
    return as_columns(path, names, x.T), remarks


def read_numpy(what: str, path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """The array in a ``.npy`` file, or the arrays in a ``.npz`` file by name, whatever the file is called.

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
        except OSError:
            raise
        except Exception as error:  # a damaged file fails in many ways
            raise Refused(f"the {what} {str(path)!r} is not a NumPy file of plain arrays: {_words(error)}") from error


def _words(error: Exception) -> str:
    """Say what is wrong with a file, in one line."""
    if isinstance(error, zipfile.BadZipFile):
        return f"it is neither .npy nor .npz, or was cut off ({error!s:.80})"
    return " ".join(f"{error!s:.250}".split()) or "its header cannot be read"


def _arrays(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    parts = archive.infolist()
    unpacked = sum(part.file_size for part in parts)
    if unpacked > max(ROOM, RATIO * size):
        raise ValueError(f"it would unpack from {size} to {unpacked} bytes. If that is right, write it by numpy.savez")
    names = [part.filename.removesuffix(".npy") for part in parts]
    if len(set(names)) < len(names):
        raise ValueError("it holds several arrays of one name")
    found = {}
    for name, part in zip(names, parts, strict=True):
        with archive.open(part) as file:
            found[name] = _array(file, part.file_size, f"array {name!r:.40}")
    return found


def _array(file: IO[bytes], size: int, what: str) -> np.ndarray:
    """An array from a stream of some bytes, if these are as many as its header claims."""
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)  # that of version 3 differs in the names of fields
    if dtype.hasobject:
        raise ValueError(f"{what} holds Python objects, and would run code when it is read")
    number, held = math.prod(map(int, shape)), size - file.tell()
    endless = max((1, *shape)) > LONGEST if not number else dtype.itemsize == 0
    if number * dtype.itemsize > held or endless or min((0, *shape)) < 0:
        words = f"claims {number} values of {dtype.itemsize} bytes, in shape {shape!s:.60}"
        raise ValueError(f"{what} {words}, and holds {held} bytes")
    file.seek(0)
    return np.asarray(npy.read_array(file, allow_pickle=False))
