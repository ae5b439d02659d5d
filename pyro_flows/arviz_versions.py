"""The one place that knows ArviZ 0.2x from ArviZ 1.x, by their features."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import numpy as np

Variable = tuple[tuple[str, ...], np.ndarray]  # the names of an array's dimensions, and the array
Groups = dict[str, dict[str, Variable]]


def import_arviz() -> ModuleType:
    """ArviZ, imported when it is first needed: it is slow to import, and 0.2x announces 1.x each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def _array_stats() -> Any:
    """Return the functions of arrays of ArviZ 1.x, None for ArviZ 0.2x, which has them at its top."""
    if hasattr(import_arviz(), "psislw"):
        return None
    from arviz_stats.base import array_stats

    return array_stats


def kde(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A grid over the range of values ``(N,)``, and an estimate of their density on it, right at hard ends too."""
    grid, density, *_ = (_array_stats() or import_arviz()).kde(values)  # and the bandwidth, of ArviZ 1.x
    return np.asarray(grid), np.asarray(density)


def container(groups: Groups, attrs: dict[str, Any]) -> Any:
    """An ``InferenceData`` (0.2x) or ``DataTree`` (1.x) of groups of variables.

    Args:
        groups: For each group its variables, each by the names of its dimensions and an array.  One named like its only
            dimension holds that dimension's coordinates; other dimensions are numbered from 0.
        attrs: The attributes of each group.
    """
    import xarray

    datasets = {}
    for group, variables in groups.items():
        sizes = {dim: size for dims, array in variables.values() for dim, size in zip(dims, array.shape, strict=True)}
        coords = {dim: np.arange(size) for dim, size in sizes.items() if dim not in variables}
        datasets[group] = xarray.Dataset(variables, coords, attrs)
    arviz = import_arviz()
    return arviz.InferenceData(**datasets) if hasattr(arviz, "psislw") else xarray.DataTree.from_dict(datasets)
