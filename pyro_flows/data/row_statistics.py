"""Statistics of all rows before training: moments, ranges, and faults that leave rows without a density.

Uniform noise on discrete columns has known moments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..user_code import warn_user
from .batches import Batch, Source, Stream, part_of
from .columns import spikes_of, tied_columns
from .reading import Reader
from .table import label, listed, places_of

SAMPLE = 25_000  # the least number of rows in the sample, if there are as many
IMAGES = 4_000_000  # numbers in a sample of images
COARSE = 1e-3  # the largest rounding error of a number, in standard deviations
ROOM = 0.01  # the largest rounding error of noise from [0, 1)
FAR = 8  # standard deviations from the mean that no normal draw exceeds


class Survey:
    """Statistics of rows ``(N, D)`` and their contexts, or of images ``(N, C, H, W)``, whose columns are channels.

    Attributes:
        rows: The number N of rows.
        numbers: The number of values per column: one per row, or per pixel.
        loc: The mean of each column, ``(D,)``, in float64.
        low: The minimum of each column.
        high: The maximum of each column.
        whole: True for a column that holds integers only.
        broken: The number of NaN or inf in each column.
        broken_contexts: The number of contexts that hold NaN or inf.
        sample: Rows at regular distances, in their order, and their contexts.
        repeats: True if the user samples rows with replacement.
    """

    def __init__(self, batches: Source, width: int) -> None:
        self.repeats = isinstance(batches, Stream) and batches.again
        self.rows, self.numbers, self.broken_contexts = 0, 0, 0
        self.loc, self._squares, zero = torch.zeros(3, width, dtype=torch.float64)
        self.low, self.high = zero + torch.inf, zero - torch.inf
        self.whole, self.broken = zero == 0, zero.long()
        kept: list[Batch] = []
        stride = 1
        for x, context in batches:
            if not len(x):
                continue
            columns = x if x.dim() == 2 else x.movedim(1, -1).flatten(0, -2)
            self._add(columns.to("cpu", torch.float64), context)
            self.rows += len(x)
            # Copies, since a view would keep all of a batch in memory.
            kept.append((x[::stride].clone(), None if context is None else context[::stride].clone()))
            most = SAMPLE if x.dim() == 2 else max(64, min(1000, IMAGES // x[0].numel()))
            if sum(len(x) for x, _ in kept) > 2 * most:
                kept, stride = [part_of(_joined(kept), slice(None, None, 2))], 2 * stride
        self.sample: Batch = _joined(kept) if kept else (torch.zeros(0, width), None)

    def _add(self, x: Tensor, context: Tensor | None) -> None:
        """Add rows; the moments after Chan, Golub, LeVeque 1979 lose no digits to a mean far from zero."""
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
        """True if a number lies more than 8 standard deviations from the mean of its column."""
        return bool((torch.maximum(self.high - self.loc, self.loc - self.low) > FAR * self.scale).any())


class CellNoise:
    """Uniform noise from [0, 1) on the discrete columns of batches, which it moves to a flow's device.

    A Note on the Evaluation of Generative Models (Theis, van den Oord, Bethge 2015, arXiv:1511.01844).
    """

    def __init__(self, places: list[int], device: torch.device) -> None:
        self.places, self.device = torch.tensor(places, dtype=torch.long), device

    def __call__(self, batch: Batch) -> Batch:
        x, context = batch[0].to(self.device), None if batch[1] is None else batch[1].to(self.device)
        if len(self.places):
            noise = torch.rand(len(x), len(self.places), dtype=x.dtype)
            x = x.index_add(1, self.places.to(x.device), noise.to(x.device))
        return x, context

    def moments(self, survey: Survey) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of each column with its noise, ``(D,)``."""
        discrete = torch.zeros_like(survey.loc).index_fill(0, self.places, 1.0)
        return survey.loc + discrete / 2, (survey.scale.square() + discrete / 12).sqrt()


def _joined(batches: list[Batch]) -> Batch:
    contexts = [context for _, context in batches if context is not None]
    return torch.cat([x for x, _ in batches]), torch.cat(contexts) if contexts else None


def check_rows(
    reader: Reader, seen: Survey, judged: Survey, discrete: Sequence[int | str] | None, *, apart: bool
) -> list[int]:
    """Raise ValueError, by column and number, if rows cannot have a density, and warn if it would grow without bound.

    Args:
        reader: The reader of the rows.
        seen: The rows to train on.
        judged: The rows that validate.
        discrete: The columns that the user declared as integers, by index or name.
        apart: True if the user gave the rows that validate.

    Returns:
        The indices of the discrete columns.
    """
    if not reader.is_table:
        if discrete:
            words = f"discrete is for tables, got {list(discrete)}"
            raise ValueError(f"fit_density: {words}; use flows.Dequantized(flow).")
        _check_images(reader, seen, judged)
        return []
    discrete = () if discrete is None else discrete
    places = places_of("fit_density", "discrete", discrete, reader.names, reader.width)
    labels, dtype = [label(reader.names, place) for place in range(reader.width)], reader.like.dtype
    _check_usable({"x": [seen], "validation": [judged]} if apart else {"x": [seen, judged]}, labels, "rows")
    if found := [labels[place] for place in places if not (seen.whole & judged.whole)[place]]:
        words = f"fit_density: discrete columns must hold integers only, unlike {listed(found)}"
        raise ValueError(f"{words}. For other steps use dequantize(x, columns, step=...).")
    same = [place for place in (seen.high == seen.low).nonzero().flatten().tolist() if place not in places]
    if found := [f"{labels[place]} ({seen.low[place].item():.6g})" for place in same]:
        raise ValueError(
            f"fit_density: x is constant in {listed(found)}, which has no density. Leave it out; if its numbers differ "
            f"by less than {dtype} can tell, subtract a constant such as the mean, or use flow.double()."
        )
    rounding = torch.maximum(seen.low.abs(), seen.high.abs()) * torch.finfo(dtype).eps
    if found := [f"{labels[p]} (up to {seen.high[p].item():.6g})" for p in places if rounding[p] > ROOM]:
        words = f"fit_density: {dtype} leaves no room for noise between the integers of {listed(found)}"
        raise ValueError(f"{words}; subtract a constant, or use flow.double().")
    _warn_of_columns(reader, seen, [place for place in range(reader.width) if place not in places])
    return places


def _check_images(reader: Reader, seen: Survey, judged: Survey) -> None:
    """Raise ValueError if images or rows of integers cannot have a density; warn of integers and unused levels."""
    _check_usable({"x": [seen, judged]}, [f"channel {place}" for place in range(reader.width)], "pixels")
    if (levels := reader.levels) is None:
        if bool((seen.high == seen.low).any()):
            raise ValueError("fit_density: x is constant in a channel, which has no density. Leave it out.")
        if bool(seen.whole.all()):
            words = "fit_density: the images hold integers only, where densities grow without bound"
            warn_user(f"{words}. Use flows.Dequantized(flow) and x.to(torch.uint8).")
        return
    low, high = min(seen.low.min(), judged.low.min()).item(), max(seen.high.max(), judged.high.max()).item()
    if not 0 <= low <= high < levels:
        got = f"got some from {low:g} to {high:g}"
        raise ValueError(f"fit_density: x must hold integers from 0 to {levels - 1}, {got}.")
    if 2 * (high + 1) <= levels:
        words = f"the greatest integer in x is {high:g}, but the flow has levels={levels}: most would stay empty"
        warn_user(f"fit_density: {words}. Use Dequantized(flow, levels={high + 1:g}) if there are no others.")


def _check_usable(parts: dict[str, list[Survey]], labels: list[str], unit: str) -> None:
    """Raise ValueError if rows or contexts hold NaN or inf, or if no rows are left to train on or to validate."""
    for argument, surveys in parts.items():
        rows, numbers = sum(survey.rows for survey in surveys), sum(survey.numbers for survey in surveys)
        broken = torch.stack([survey.broken for survey in surveys]).sum(0).tolist()
        if found := [f"{name} ({n} of {numbers} {unit})" for name, n in zip(labels, broken, strict=True) if n]:
            words = f"fit_density: {argument} holds NaN or inf in {listed(found)}"
            raise ValueError(f"{words}. Leave those rows out, or fill the gaps.")
        if number := sum(survey.broken_contexts for survey in surveys):
            raise ValueError(f"fit_density: the contexts of {argument} hold NaN or inf in {number} of {rows} rows.")
    seen, judged = (survey.rows for surveys in parts.values() for survey in surveys)
    if not judged or seen < 2:
        must = "there must be some rows to train on and some to judge by"
        raise ValueError(f"fit_density: {must}, got {seen} and {judged}.")


def _warn_of_columns(reader: Reader, seen: Survey, places: Sequence[int]) -> None:
    """Warn of columns without noise in which densities grow without bound, or whose numbers lose digits."""
    dtype = reader.like.dtype
    step = torch.finfo(dtype).eps * seen.loc.abs() / seen.scale
    coarse = [place for place in places if step[place] > COARSE]
    if found := [f"{label(reader.names, place)} (to {step[place].item():.1g} sd)" for place in coarse]:
        words = f"{dtype} rounds {listed(found)}, so far from zero"
        warn_user(f"fit_density: {words}; subtract the mean, or use flow.double().")
    x = seen.sample[0].unique(dim=0) if seen.repeats else seen.sample[0]
    fine = [place for place in places if place not in coarse]
    warn_of_ties("fit_density", x[:, fine], [label(reader.names, place) for place in fine])
    if spikes := spikes_of(x, reader.names, fine):
        warn_user(
            f"fit_density: {listed([str(spike) for spike in spikes])}. Densities grow without bound there, and nats "
            "say how narrow the spikes are, not how good the density is. Give columns of integers as discrete=[...], "
            "use dequantize(x, columns, step=...) for those of other steps, or leave such columns and copies out."
        )


def warn_of_ties(caller: str, x: Tensor, labels: Sequence[str]) -> None:
    """Warn of collinear columns of ``(N, D)``."""
    if tied := tied_columns(x) if x.shape[1] > 1 else []:
        words = f"{listed([labels[place] for place in tied])} determine one another"
        warn_user(f"{caller}: {words} (by a linear relation): densities grow without bound. Leave one of them out.")
