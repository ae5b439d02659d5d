"""Table of a posterior: mean, standard deviation and quantiles of each number."""

from __future__ import annotations

from collections.abc import Iterator
from math import floor, log10

import numpy as np

MANY = 40  # rows, beyond which long sites are cut short
HEADINGS = "mean", "sd", "5 %", "95 %"


def table_of(draws: dict[str, np.ndarray], labels: dict[str, list[str]]) -> Iterator[str]:
    """Yield a line for each number of each site; long sites among many rows show only their first and last numbers."""
    columns = {name: values.reshape(len(values), -1).astype(float) for name, values in draws.items()}
    total = sum(values.shape[1] for values in columns.values())
    room = total if total <= MANY else max(5, MANY // len(columns))
    rows: list[tuple[str, ...]] = [("", *HEADINGS)]
    for name, values in columns.items():
        own = labels.get(name) or [", ".join(map(str, place)) for place in np.ndindex(*draws[name].shape[1:])]
        numbers = zip(own, _summary(values), strict=True)
        lines: list[tuple[str, ...]] = [(f"{name}[{place}]" if place else name, *cells) for place, cells in numbers]
        if len(lines) > room:
            lines[room - 2 : -1] = [(f"({len(lines) - room + 1} more of {name})",)]
        rows += lines
    first = max(8, *(len(row[0]) for row in rows)) + 2
    width = max(6, *(len(cell) for row in rows for cell in row[1:])) + 2
    for label, *cells in rows:
        yield f"{label:<{first}}{''.join(f'{cell:>{width}}' for cell in cells)}".rstrip()


def _summary(values: np.ndarray) -> list[list[str]]:
    """Return mean, sd and two quantiles of each column, ``(N, K)``, with three digits of the smallest sd."""
    sds = values.std(0, ddof=1)
    numbers = np.stack((values.mean(0), sds, *np.quantile(values, [0.05, 0.95], axis=0)), -1)  # (K, 4)
    least = sds.min(initial=np.inf)
    style = f".{max(0, 2 - floor(log10(least)))}f" if 1e-4 < least < 1e7 else ".4g"
    return [[f"{number:{style}}" for number in row] for row in numbers]
