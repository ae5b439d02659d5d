"""Arrays in files of NumPy, read without trust in their headers: none takes more memory than its file can mean."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np
from numpy.lib import format as npy

ROOM, RATIO = 2**28, 100  # what an archive may unpack to: so many bytes, or so many times its own size
LONGEST = 2**31  # dimension of an array without numbers


class Unreadable(ValueError):
    """A file that is not one of NumPy with plain arrays, or claims to hold more than it does."""


def read_numpy(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """The array in a ``.npy`` file, or the arrays in a ``.npz`` file by name, whatever the file is called.

    Raises:
        OSError: If there is no such file.
        Unreadable: If it is not a file of plain arrays, or its headers claim more than it holds.
    """
    with path.open("rb") as file:
        magic = file.read(6)
        file.seek(0)
        try:
            if magic == npy.MAGIC_PREFIX:
                return _array(file, os.fstat(file.fileno()).st_size, "it")
            with zipfile.ZipFile(file) as archive:
                return _arrays(archive, os.fstat(file.fileno()).st_size)
        except Unreadable:
            raise
        except zipfile.BadZipFile as error:
            raise Unreadable(f"it is neither .npy nor .npz, or was cut off ({error!s:.80})") from error
        except (SyntaxError, TokenError) as error:
            raise Unreadable("its header is no description of an array") from error
        except (ValueError, EOFError, RuntimeError, MemoryError, zlib.error) as error:
            raise Unreadable(" ".join(f"{error!s:.150}".split()) or "its header cannot be read") from error


def _arrays(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    parts = archive.infolist()
    unpacked = sum(part.file_size for part in parts)
    if unpacked > max(ROOM, RATIO * size):
        raise Unreadable(
            f"it would unpack from {size} to {unpacked} bytes. If that is right, write it by numpy.savez, uncompressed"
        )
    names = [part.filename.removesuffix(".npy") for part in parts]
    if len(set(names)) < len(names):
        raise Unreadable("it holds several arrays of one name")
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
        raise Unreadable(f"{what} holds Python objects, and would run code when it is read")
    number, held = math.prod(map(int, shape)), size - file.tell()
    endless = max((1, *shape)) > LONGEST if not number else dtype.itemsize == 0
    if number * dtype.itemsize > held or endless or min((0, *shape)) < 0:
        words = f"claims {number} values of {dtype.itemsize} bytes, in shape {shape!s:.60}"
        raise Unreadable(f"{what} {words}, and holds {held} bytes")
    file.seek(0)
    return np.asarray(npy.read_array(file, allow_pickle=False))
