"""The one place that knows ArviZ 0.2x from ArviZ 1.x, by their features."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import numpy as np


def import_arviz() -> ModuleType:
    """ArviZ, imported when it is first needed: it is slow to import, and 0.2x announces 1.x each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def psislw(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed, normalised log-weights and k-hat of raw log-weights ``(S,)``."""
    arviz = import_arviz()
    if hasattr(arviz, "psislw"):
        smoothed, khat = arviz.psislw(log_weights)
    else:
        from arviz_stats.base import array_stats

        smoothed, khat = array_stats.psislw(-log_weights)  # ArviZ 1.x takes the negative of the log-ratios
    return np.asarray(smoothed), float(khat)


def from_groups(
    groups: dict[str, dict[str, np.ndarray]],
    coords: dict[str, Any],
    dims: dict[str, list[str]],
    attrs: dict[str, Any],
) -> Any:
    """An ``InferenceData`` (0.2x) or ``DataTree`` (1.x) of groups of variables.

    Variables of all groups but ``observed_data`` have shape ``(chain, draw, *shape)``.
    """
    arviz = import_arviz()
    if hasattr(arviz, "psislw"):
        data = arviz.from_dict(**groups, coords=coords, dims=dims)
        for group in groups:
            getattr(data, group).attrs.update(attrs)
        return data
    tree = arviz.from_dict(groups, coords=coords, dims=dims)
    for group in groups:
        tree[group].attrs.update(attrs)
    return tree
