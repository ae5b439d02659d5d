"""One look at all rows before training: where they lie, how far they spread, and what no density can be of.

Noise with known moments spreads the integers in discrete columns over their cells.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .batches import Batch, part_of
from .columns import spikes_of, tied_columns
from .table import Names, label, listed

SAMPLE = 25_000  # rows to look at more closely, at least, where there are as many
IMAGES = 4_000_000  # numbers in the images to look at more closely
COARSE = 1e-3  # standard deviations that a number may be rounded by
ROOM = 0.01  # that noise from [0, 1) may be rounded by
Span = tuple[Tensor, Tensor]  # the least and the greatest number in each column
FAR = 8  # standard deviations from the mean where normals never are


class Survey:
    """What was seen of rows ``(N, D)`` and their contexts, or of images ``(N, C, H, W)``, whose columns are channels.

    Attributes:
        rows: Their number.
        numbers: How many numbers a column has: one for each row, or pixel.
        loc: The mean of each column, ``(D,)``, in float64.
        low: The least number in each column.
        high: The greatest.
        whole: Whether a column holds integers only.
        broken: How many rows hold NaN or inf, for each column.
        broken_contexts: How many contexts do.
        sample: Rows from all over, in their order, and their contexts.
    """

    def __init__(self, batches: Iterable[Batch], width: int) -> None:
        self.rows, self.numbers, self.broken_contexts = 0, 0, 0
        self.loc, self._squares = torch.zeros(2, width, dtype=torch.float64)
        self.low, self.high = torch.full((width,), torch.inf).double(), torch.full((width,), -torch.inf).double()
        self.whole, self.broken = torch.ones(width, dtype=torch.bool), torch.zeros(width, dtype=torch.long)
        kept: list[Batch] = []
        stride = 1
        for x, context in batches:
            if not len(x):
                continue
            columns = x if x.dim() == 2 else x.movedim(1, -1).flatten(0, -2)
            self._add(columns.to("cpu", torch.float64), context)
            self.rows += len(x)
            # Copies, since a view would keep all of a batch.
            kept.append((x[::stride].clone(), None if context is None else context[::stride].clone()))
            most = SAMPLE if x.dim() == 2 else max(64, min(1000, IMAGES // x[0].numel()))
            if sum(len(x) for x, _ in kept) > 2 * most:
                kept, stride = [part_of(_joined(kept), slice(None, None, 2))], 2 * stride
        self.sample: Batch = _joined(kept) if kept else (torch.zeros(0, width), None)

    def _add(self, x: Tensor, context: Tensor | None) -> None:
        """Take rows in; moments after Chan, Golub, LeVeque 1979, which loses no digits to a mean far from zero."""
        number, mean = len(x), x.mean(0)
        total, gap = self.numbers + number, mean - self.loc
        self.loc = self.loc + gap * (number / total)
        self._squares = self._squares + (x - mean).square().sum(0) + gap.square() * (self.numbers * number / total)
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self.whole = self.whole & (x == x.round()).all(0)
        self.broken = self.broken + (~x.isfinite()).sum(0)
        if context is not None and context.is_floating_point():
            self.broken_contexts += int((~context.isfinite()).flatten(1).any(1).sum())
        self.numbers = total

    @property
    def scale(self) -> Tensor:
        """The standard deviation of each column, ``(D,)``, in float64."""
        return (self._squares / max(1, self.numbers)).sqrt()

    @property
    def has_outliers(self) -> bool:
        """Whether some number lies far from the others of its column."""
        return bool((torch.maximum(self.high - self.loc, self.loc - self.low) > FAR * self.scale).any())


class Spread:
    """Puts batches on a flow's device and spreads the integers in discrete columns over their cells by noise.

    A Note on the Evaluation of Generative Models (Theis, van den Oord, Bethge 2015, arXiv:1511.01844).
    """

    def __init__(self, places: list[int], device: torch.device) -> None:
        self.places, self.device = torch.tensor(places, dtype=torch.long), device

    def __call__(self, batch: Batch) -> Batch:
        x, context = (None if part is None else part.to(self.device) for part in batch)
        assert x is not None
        if len(self.places):
            noise = torch.rand(len(x), len(self.places), dtype=x.dtype)
            x = x.index_add(1, self.places.to(x.device), noise.to(x.device))
        return x, context

    def moments(self, survey: Survey) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each column with its noise, ``(D,)``."""
        discrete = torch.zeros_like(survey.loc).index_fill(0, self.places, 1.0)
        return survey.loc + discrete / 2, (survey.scale.square() + discrete / 12).sqrt()


def _joined(batches: list[Batch]) -> Batch:
    contexts = [context for _, context in batches if context is not None]
    return torch.cat([x for x, _ in batches]), torch.cat(contexts) if contexts else None


def check_rows(
    caller: str, names: Names, seen: Survey, judged: Survey, discrete: Sequence[int], *, apart: bool, span: Span | None
) -> None:
    """Refuse rows that no density can be learned from, by column and number.

    Args:
        caller: The public function that asks.
        names: Those of the columns.
        seen: The rows to train on.
        judged: Those that judge.
        discrete: The places of columns that are said to hold integers.
        apart: Whether the latter were given apart from the others.
        span: That of the numbers before they were rounded to the flow's dtype, where they were.
    """
    labels, dtype = [label(names, place) for place in range(len(seen.loc))], seen.sample[0].dtype
    parts = {"x": [seen], "validation": [judged]} if apart else {"x": [seen, judged]}
    _check_usable(caller, parts, labels, "rows")
    if found := [labels[place] for place in discrete if not (seen.whole & judged.whole)[place]]:
        words = f"{caller}: discrete columns must hold integers only, unlike {listed(found)}"
        raise ValueError(f"{words}. For other steps use dequantize(x, columns, step=...).")
    same = [place for place in (seen.high == seen.low).nonzero().flatten().tolist() if place not in discrete]
    low, high = span or (seen.low, seen.high)
    if found := [f"{labels[p]} (from {low[p].item()} to {high[p].item()})" for p in same if low[p] < high[p]]:
        words = f"the flow's dtype, {dtype}, has too few digits for {listed(found)}, whose numbers it rounds to one"
        raise ValueError(f"{caller}: {words}. Subtract a constant such as the mean, or use flow.double().")
    if found := [f"{labels[place]} ({seen.low[place].item():.6g})" for place in same]:
        raise ValueError(f"{caller}: x is constant in {listed(found)}, which has no density. Leave it out.")
    rounding = torch.maximum(seen.low.abs(), seen.high.abs()) * torch.finfo(dtype).eps
    if found := [f"{labels[p]} (up to {seen.high[p].item():.6g})" for p in discrete if rounding[p] > ROOM]:
        words = f"{caller}: {dtype} leaves no room for noise between the integers of {listed(found)}"
        raise ValueError(f"{words}; subtract a constant, or use flow.double().")


def check_images(caller: str, seen: Survey, judged: Survey, levels: int | None) -> None:
    """Refuse images, or rows of integers, that no density can be learned from.

    Args:
        caller: The public function that asks.
        seen: Those to train on.
        judged: Those that judge.
        levels: The number of integers that a model of such is over, else None.
    """
    _check_usable(caller, {"x": [seen, judged]}, [f"channel {place}" for place in range(len(seen.loc))], "pixels")
    low = min(survey.low.min().item() for survey in (seen, judged))
    high = max(survey.high.max().item() for survey in (seen, judged))
    if not levels and bool((seen.high == seen.low).any()):
        raise ValueError(f"{caller}: x is constant in a channel, which has no density. Leave it out.")
    if not levels and bool(seen.whole.all()):
        _warn(
            f"{caller}: the images hold integers only, where densities grow without bound. Use flows.Dequantized(flow) "
            "and x.to(torch.uint8)."
        )
    if levels and not 0 <= low <= high < levels:
        raise ValueError(f"{caller}: x must hold integers from 0 to {levels - 1}, got some from {low:g} to {high:g}.")
    if levels and 2 * (high + 1) <= levels:
        _warn(
            f"{caller}: the greatest integer in x is {high:g}, but the flow has levels={levels}: most would "
            f"stay empty. Use Dequantized(flow, levels={high + 1:g}) where there are no others."
        )


def _check_usable(caller: str, parts: dict[str, list[Survey]], labels: list[str], unit: str) -> None:
    """Raise ValueError if rows or contexts hold NaN or inf, or if there are none to train on or to judge by."""
    for argument, surveys in parts.items():
        rows, numbers = sum(survey.rows for survey in surveys), sum(survey.numbers for survey in surveys)
        broken = torch.stack([survey.broken for survey in surveys]).sum(0).tolist()
        if found := [f"{name} ({n} of {numbers} {unit})" for name, n in zip(labels, broken, strict=True) if n]:
            words = f"{caller}: {argument} holds NaN or inf in {listed(found)}"
            raise ValueError(f"{words}. Leave those rows out, or fill the gaps.")
        if number := sum(survey.broken_contexts for survey in surveys):
            raise ValueError(f"{caller}: the contexts of {argument} hold NaN or inf in {number} of {rows} rows.")
    seen, judged = (survey.rows for surveys in parts.values() for survey in surveys)
    if not judged or seen < 2:
        must = "there must be some rows to train on and some to judge by"
        raise ValueError(f"{caller}: {must}, got {seen} and {judged}.")


def _warn(words: str) -> None:
    warnings.warn(words, stacklevel=6)  # the user's call of fit_density


def warn(caller: str, names: Names, seen: Survey, places: Sequence[int], dtype: torch.dtype, *, again: bool) -> None:
    """Tell of columns that densities grow without bound in, alone or together, and of those whose digits are lost.

    Args:
        caller: The public function that asks.
        names: Those of the columns.
        seen: The rows to train on.
        places: The columns that are taken as they are.
        dtype: That of the flow.
        again: Whether rows are drawn again and again on purpose.
    """
    step = torch.finfo(dtype).eps * seen.loc.abs() / seen.scale
    coarse = [place for place in places if step[place] > COARSE]
    if found := [f"{label(names, place)} (to {step[place].item():.1g} sd)" for place in coarse]:
        _warn(f"{caller}: {dtype} rounds {listed(found)}, so far from zero; subtract the mean, or use flow.double().")
    x = seen.sample[0].unique(dim=0) if again else seen.sample[0]
    fine = [place for place in places if place not in coarse]
    if tied := tied_columns(x[:, fine]) if len(fine) > 1 else []:
        words = f"{listed([label(names, fine[place]) for place in tied])} determine one another"
        _warn(f"{caller}: {words} (by a linear relation): densities grow without bound. Leave one of them out.")
    if spikes := spikes_of(x, names, fine):
        _warn(
            f"{caller}: {listed([str(spike) for spike in spikes])}. Densities grow without bound there, and nats say "
            "how narrow the spikes are, not how good the density is. Give columns of integers as discrete=[...], use "
            "dequantize(x, columns, step=...) for those of other steps, or leave such columns and copies out."
        )
