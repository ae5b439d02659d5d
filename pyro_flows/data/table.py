"""Reading of tables: tensors, arrays and data frames become tensors of numbers; errors name the column."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import is_integer
from ..flows.arguments import check_dense

Names = list[str] | None  # of the columns, if the table has names
NUMBER = (numbers.Real, np.bool_)


def is_table(value: Any) -> bool:
    """True if a value holds all rows at once: a tensor, an array or a data frame."""
    return isinstance(value, Tensor) or hasattr(value, "to_numpy") or hasattr(value, "__array__")


def as_table(caller: str, argument: str, value: Any) -> tuple[Tensor, Names]:
    """Return a table as a tensor, in its own dtype if torch computes with it, and the names of its columns.

    Raises:
        ValueError: If the table does not hold real numbers, or is in 16 bits; the error names argument and column.
    """
    names: Names = None
    if isinstance(value, Tensor):
        check_dense(caller, argument, value)
        if value.is_meta:
            raise ValueError(f"{caller}: {argument} must hold numbers, but lies on the meta device.")
        found = value.detach()
    else:
        columns = getattr(value, "columns", None)
        names = None if columns is None else [str(name) for name in columns]
        if isinstance(value, np.ma.MaskedArray):
            value = np.ma.filled(value.astype(float), np.nan)
        array = np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value)
        found = _as_tensor(caller, argument, array, names)
    if found.dtype in (torch.float16, torch.bfloat16) or found.is_complex():
        way = "" if found.is_complex() else f" Use {argument}.float(), or {argument}.astype('float32')."
        must = f"{argument} must hold real numbers of float32, float64 or an integer dtype"
        raise ValueError(f"{caller}: {must}, got {found.dtype}.{way}")
    if found.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch has few operations for these
        found = found.to(torch.int64)
    return found.to(torch.uint8) if found.dtype == torch.bool else found, names


def _as_tensor(caller: str, argument: str, array: np.ndarray, names: Names) -> Tensor:
    if array.dtype.names:
        must = f"{argument} must be a matrix of numbers, got a structured array with the fields {array.dtype.names}"
        raise ValueError(f"{caller}: {must}; use numpy.lib.recfunctions.structured_to_unstructured(x).")
    if array.dtype.kind not in "biufc":  # a data frame of several dtypes is an array of objects
        for place, cell in np.ndenumerate(array):
            if not isinstance(cell, NUMBER):
                holds = f"{label(names, place[1] if len(place) > 1 else 0)} holds {cell!r:.50} ({type(cell).__name__})"
                must = f"{argument} must hold real numbers, but {holds}"
                raise ValueError(f"{caller}: {must}. Leave it out, or encode it as numbers.")
        array = array.astype(np.float64)
    # torch has few operations for uint64, no float longer than 64 bits, and only the machine's byte order.
    if array.dtype == np.uint64 or (array.dtype.kind == "f" and array.dtype.itemsize > 8):
        array = array.astype(np.float64)
    return torch.tensor(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))


def label(names: Names, place: int) -> str:
    """Return the label of a column for error messages: its name, or its index."""
    return f"column {names[place]!r}" if names else f"column {place}"


def listed(words: Sequence[str], most: int = 5) -> str:
    """Return the first few of many words, separated by commas, and the number of the others."""
    return ", ".join([*words[:most], *([f"and {len(words) - most} more"] if len(words) > most else [])])


def listed_names(names: Iterable[str], most: int = 5) -> str:
    """Return the first few of many names, each in quotation marks."""
    return listed([repr(name) for name in names], most)


def places_of(caller: str, argument: str, columns: Sequence[int | str], names: Names, width: int) -> list[int]:
    """Return the indices of columns that are given by index or name.

    Raises:
        ValueError: If there is no such column.
    """
    found = []
    for column in columns if isinstance(columns, Iterable) and not isinstance(columns, str) else [columns]:
        if isinstance(column, str) and names and column in names:
            found.append(names.index(column))
        elif is_integer(column) and 0 <= column < width:  # type: ignore[operator]
            found.append(int(column))
        else:
            known = f"the names {listed_names(names)} or " if names else ""
            raise ValueError(f"{caller}: {argument} must hold {known}places from 0 to {width - 1}, got {column!r}.")
    return found
