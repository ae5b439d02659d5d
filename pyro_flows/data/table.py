"""Tables as they come: tensors, arrays and data frames become tensors of numbers; what cannot is refused by column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_dense, is_integer

Names = list[str] | None  # of the columns, where the table has some


def is_table(value: Any) -> bool:
    """Whether a value is all rows at once: a tensor, an array, a data frame."""
    return isinstance(value, Tensor) or hasattr(value, "to_numpy") or hasattr(value, "__array__")


def read_table(caller: str, argument: str, value: Any) -> tuple[Tensor, Names]:
    """A table as a tensor, in its own dtype where torch has it, and the names of its columns.

    Raises:
        ValueError: If it does not hold real numbers, or fewer digits than densities take; the error names argument and
            column.
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
    if found.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch counts with few of these
        found = found.to(torch.int64)
    return found.to(torch.uint8) if found.dtype == torch.bool else found, names


def _as_tensor(caller: str, argument: str, array: np.ndarray, names: Names) -> Tensor:
    if array.dtype.names:
        must = f"{argument} must be a matrix of numbers, got a structured array with the fields {array.dtype.names}"
        raise ValueError(f"{caller}: {must}; use numpy.lib.recfunctions.structured_to_unstructured(x).")
    if array.dtype.kind not in "biufc":
        array = _numbers(caller, argument, array, names)
    # torch counts with few of the unsigned integers, has no longer floats, and wants the machine's order of bytes.
    if array.dtype == np.uint64 or (array.dtype.kind == "f" and array.dtype.itemsize > 8):
        array = array.astype(np.float64)
    return torch.tensor(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))


def _numbers(caller: str, argument: str, array: np.ndarray, names: Names) -> np.ndarray:
    """An array of objects as one of numbers, which a data frame of several dtypes can be."""
    columns = array.reshape(len(array), -1).T if array.ndim else array.reshape(1, 1)
    for place, column in enumerate(columns):
        for cell in column:
            if not isinstance(cell, bool | int | float | np.number | np.bool_):
                holds = f"{label(names, place)} holds {cell!r:.50} ({type(cell).__name__})"
                must = f"{argument} must hold real numbers, but {holds}"
                raise ValueError(f"{caller}: {must}. Leave it out, or encode it as numbers.")
    return array.astype(np.float64)


def label(names: Names, place: int) -> str:
    """Return the label of a column for error messages: its name, or its place."""
    return f"column {names[place]!r}" if names else f"column {place}"


def listed(words: Sequence[str], most: int = 5) -> str:
    """Return the first few of many words."""
    return ", ".join([*words[:most], *([f"and {len(words) - most} more"] if len(words) > most else [])])


def listed_names(names: Iterable[str], most: int = 5) -> str:
    """Return the first few of many names, each in quotation marks."""
    return listed([repr(name) for name in names], most)


def places_of(caller: str, argument: str, columns: Sequence[int | str], names: Names, width: int) -> list[int]:
    """The places of columns that are given by place or name.

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
