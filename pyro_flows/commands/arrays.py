"""NumPy files as tables: one matrix, or vectors of one length, each a column."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from ..data.table import listed
from . import Refused
from .numpy_files import Unreadable, read_numpy


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The columns of a ``.npz`` or ``.npy`` file, by name, and remarks on what else it holds.

    A matrix ``x``, or the only matrix, is the table, with the names in ``columns``; without a matrix each vector is a
    column.

    Raises:
        OSError: If there is no such file.
        Refused: If it is no file of plain arrays, or what it holds is no table.
    """
    try:
        arrays = read_numpy(path)
    except Unreadable as error:
        raise Refused(f"the table {str(path)!r} is not a NumPy file of plain arrays: {error}") from error
    if isinstance(arrays, np.ndarray):
        arrays = {name: arrays[name] for name in arrays.dtype.names} if arrays.dtype.names else {"x": arrays}
    if empty := [repr(name) for name, array in arrays.items() if not array.size]:
        raise Refused(f"the table {str(path)!r} holds no values in {listed(empty)}")
    matrices = [name for name, array in arrays.items() if array.ndim == 2]
    chosen = "x" if "x" in matrices else matrices[0] if len(matrices) == 1 else None
    if chosen is None:
        return _vectors(path, arrays), []
    x = arrays.pop(chosen)
    names = _names(path, arrays.pop("columns", None), x.shape[1])
    remarks = [f"Used the array {chosen!r} alone, without {listed([*map(repr, arrays)])}."] if arrays else []
    return dict(zip(names, x.T, strict=True)), remarks


def _names(path: Path, given: np.ndarray | None, width: int) -> list[str]:
    if given is None:
        return [f"column {place + 1}" for place in range(width)]
    names = [str(name) for name in given.ravel()]
    if len(names) != width:
        raise Refused(f"{str(path)!r} holds {len(names)} names in 'columns', and its table has {width} columns")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise Refused(f"the table {str(path)!r} has several columns named {listed([*map(repr, twice)])}; rename them")
    return names


def _vectors(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Vectors of one length."""
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1 or len(min(shapes)) != 1:
        held = listed([f"{name!r} of shape {array.shape}" for name, array in arrays.items()]) or "nothing"
        raise Refused(f"{str(path)!r} must hold a matrix 'x', or vectors of one length, a column each; it holds {held}")
    return arrays
