"""The only module that depends on the version of ArviZ, 0.2x or 1.x; it recognises them by their features."""

import importlib
import warnings
from types import ModuleType
from typing import Any

import numpy as np

Variable = tuple[tuple[str, ...], np.ndarray]  # the names of an array's dimensions, and the array
Groups = dict[str, dict[str, Variable]]


def import_arviz() -> ModuleType:
    """Return ArviZ, imported when it is first needed: the import is slow, and 0.2x announces 1.x each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def kde(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a grid over the range of values ``(N,)``, and a density estimate on it that is also right at hard ends."""
    functions: Any = import_arviz()
    if not hasattr(functions, "psislw"):
        functions = importlib.import_module("arviz_stats.base").array_stats
    grid, density, *_ = functions.kde(values)  # ArviZ 1.x returns the bandwidth, too
    return np.asarray(grid), np.asarray(density)


def container(groups: Groups, attrs: dict[str, Any]) -> Any:
    """Return an ``InferenceData`` (0.2x) or ``DataTree`` (1.x) of groups of variables.

    Args:
        groups: For each group its variables, each by the names of its dimensions and an array.  A variable with the
            name of its only dimension holds the coordinates of that dimension; other dimensions are numbered from 0.
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
