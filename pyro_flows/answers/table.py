"""Table of a posterior: mean, standard deviation and quantiles of each number."""

from collections.abc import Iterator, Mapping, Sequence
from math import floor, log10

import numpy as np
import torch
from torch import Tensor

Arrays = Mapping[str, np.ndarray]
Cells = Mapping[str, tuple[str, ...]]

MANY = 40  # rows, beyond which long sites are cut short
NONE: Cells = {}
HEADINGS = "mean", "sd", "5 %", "95 %"


def arrays_of(draws: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return draws for a table: complex numbers are two sites, and bfloat16, which NumPy lacks, becomes single."""
    real: dict[str, Tensor] = {}
    for name, value in draws.items():
        real |= {f"re {name}": value.real, f"im {name}": value.imag} if value.is_complex() else {name: value}
    return {n: (v.float() if v.dtype is torch.bfloat16 else v).numpy(force=True) for n, v in real.items()}


def table_of(
    draws: Arrays, labels: dict[str, list[str]], more: Sequence[str] = (), cells: Cells = NONE
) -> Iterator[str]:
    """Yield a line for each number of each site; long sites among many rows show only their first and last numbers.

    Args:
        draws: For each site, values of shape ``(N, *site_shape)``.
        labels: Names for the numbers of a site, in place of their indices.
        more: The headings of further columns.
        cells: The entries of these columns, by the name of the number, such as ``x[0, 1]``.

    Raises:
        ValueError: If a site has other labels than numbers.
    """
    columns = {name: values.reshape(len(values), -1).astype(float) for name, values in draws.items()}
    total = sum(values.shape[1] for values in columns.values())
    room = total if total <= MANY else max(5, MANY // len(columns))
    rows: list[tuple[str, ...]] = [("", *HEADINGS, *(more if cells else ()))]
    for name, values in columns.items():
        places = [", ".join(map(str, place)) for place in np.ndindex(*draws[name].shape[1:])]
        numbers = [_named(name, place) for place in places]
        if (own_labels := labels.get(name)) and len(own_labels) != len(places):
            raise ValueError(f"summary: {name!r} has {len(places)} numbers and got {len(own_labels)} labels.")
        shown = [_named(name, label) for label in labels.get(name) or places]
        entries = [(*own, *cells.get(key, ())) for own, key in zip(_summary(values), numbers, strict=True)]
        lines = [(label, *own) for label, own in zip(shown, entries, strict=True)]
        if len(lines) > room:
            lines[room - 2 : -1] = [(f"({len(lines) - room + 1} more of {name})",)]
        rows += lines
    first = max(8, *(len(row[0]) for row in rows)) + 2
    width = max(6, *(len(cell) for row in rows for cell in row[1:])) + 2
    for label, *numbers in rows:
        yield f"{label:<{first}}{''.join(f'{number:>{width}}' for number in numbers)}".rstrip()


def _named(name: str, place: str) -> str:
    return f"{name}[{place}]" if place else name


def _summary(values: np.ndarray) -> list[list[str]]:
    """Return mean, sd and two quantiles of each column, ``(N, K)``, with three digits of the smallest sd."""
    sds = values.std(0, ddof=1)
    numbers = np.stack((values.mean(0), sds, *np.quantile(values, [0.05, 0.95], axis=0)), -1)  # (K, 4)
    least = sds.min(initial=np.inf)
    style = f".{max(0, 2 - floor(log10(least)))}f" if 1e-4 < least < 1e7 else ".4g"
    return [[f"{number:{style}}" for number in row] for row in numbers]
