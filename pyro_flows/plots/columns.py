"""Draws as named columns of numbers, from the forms in which samplers and guides give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..programs.quantities import labels_of

Draws: TypeAlias = Mapping[str, Tensor | np.ndarray] | Tensor | np.ndarray


def columns_of(caller: str, argument: str, draws: Draws, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Columns ``(N,)`` by their names, from draws of sites ``(N, *shape)`` or a table ``(N, D)``.

    Raises:
        ValueError: If there are no draws, sites differ in their number, or names in that of the columns.
    """
    if isinstance(draws, Mapping):
        sites = {name: as_array(values) for name, values in draws.items()}
    else:
        table = as_array(draws)
        if table.ndim != 2:
            raise ValueError(f"{caller}: {argument} must be a dict of sites or of shape (N, D), got {table.shape}.")
        width = table.shape[1]
        labels = [f"x[{i}]" for i in range(width)] if names is None else [str(name) for name in names]
        if len(labels) != width or len(set(labels)) != width:
            raise ValueError(f"{caller}: names must be {width} different ones, got {labels}.")
        sites = dict(zip(labels, table.T, strict=True))
    sites = {name: values for name, values in sites.items() if 0 not in values.shape[1:]}
    lengths = {name: len(values) if values.ndim else 0 for name, values in sites.items()}
    if len(set(lengths.values())) != 1 or min(lengths.values()) < 2:
        raise ValueError(f"{caller}: {argument} must hold two draws or more, as many of each site; it holds {lengths}.")
    columns: dict[str, np.ndarray] = {}
    for name, values in sites.items():
        flat = values.reshape(len(values), -1).astype(float)
        shape = torch.Size(values.shape[1:] if flat.shape[1] > 1 else ())  # Pyro's (N, 1) is one number too
        columns.update(zip(labels_of(name, shape), flat.T, strict=True))
    return columns


def beside(
    caller: str, draws: Draws, reference: Draws | None, names: Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The columns of draws, and those of what they are compared with, none where there is no reference.

    Raises:
        ValueError: As for :func:`columns_of`, or if the two have no column in common.
    """
    columns = columns_of(caller, "draws", draws, names)
    if reference is None:
        return columns, {}
    others = columns_of(caller, "reference", reference, names)
    if not columns.keys() & others.keys():
        raise ValueError(f"{caller}: the reference holds {list(others)}, and none of {list(columns)}.")
    return columns, others


def as_array(values: Any) -> np.ndarray:
    """Numbers on the CPU without a gradient; numpy has no bfloat16."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype is torch.bfloat16 else values).numpy()


def plain(text: str) -> str:
    """A text in which dollars begin no formula, which might be none that can be drawn."""
    return text.replace("$", r"\$")


def shortened(name: str, most: int = 20) -> str:
    """A name that fits beside an axis."""
    short = name if len(name) <= most else f"{name[: most // 2]}…{name[most // 2 + 1 - most :]}"
    return plain(short)
