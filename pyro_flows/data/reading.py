"""Rows to train on and rows held out: tables, images or batches of a loader, read for one flow, surveyed and checked.

Uniform noise on discrete columns has known moments.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..arguments import check_kind
from ..encoders import Standardize
from ..encoders.base import at_rest
from ..flows import Dequantized, Flow
from ..flows.arguments import check_precision
from ..training import Training
from ..user_code import warn_user
from .batches import Batch, Rows, Source, Stream, divided, part_of, split
from .columns import Names, as_table, is_table, label, listed, places_of, spikes_of, warn_of_ties

FEWEST = 20  # rows that can be split
SAMPLE = 25_000  # the least number of rows in the sample, if there are as many
IMAGES = 4_000_000  # numbers in a sample of images
COARSE = 1e-3  # the largest rounding error of a number, in standard deviations
ROOM = 0.01  # the largest rounding error of noise from [0, 1)
FAR = 8  # standard deviations from the mean that no normal draw exceeds


class Reader:
    """Converter of users' data to rows ``(N, *event_shape)`` and contexts for the flow of ``fit_density``.

    Args:
        model: The flow, or the dequantised flow.

    Attributes:
        model: The flow, or the dequantised flow.
        flow: The flow over real numbers.
        levels: The number of integers that a row may hold, for a dequantised flow; else None.
        width: The number of columns of a table, or of channels of an image.
        like: A parameter with the flow's dtype and device.
        names: The names of the columns, once a table with names was read.
    """

    def __init__(self, model: Any) -> None:
        check_kind("fit_density", (Flow, Dequantized), "a Flow, such as flows.nsf(x.shape[1])", flow=model)
        self.model, self.event_shape, self.width = model, model.event_shape, model.event_shape[0]
        if len(self.event_shape) not in (1, 3):
            got = tuple(self.event_shape)
            raise ValueError(f"fit_density: flow must be over vectors or images (C, H, W), got events of {got}.")
        likes = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        if not any(parameter.requires_grad for parameter in likes):
            raise ValueError("fit_density: the flow has no parameters to train.")
        self.like = likes[0]
        check_precision("fit_density", self.like)
        if self.like.is_meta:
            raise ValueError("fit_density: the flow must hold numbers, but lies on the meta device; build it on 'cpu'.")
        self.flow: Flow = model.flow if isinstance(model, Dequantized) else model
        self.levels: int | None = model.levels if isinstance(model, Dequantized) else None
        self.names: Names = None
        self._is_new = True

    @property
    def is_table(self) -> bool:
        """True if the flow is over the real numbers in a table, not over images or integers."""
        return len(self.event_shape) == 1 and not self.levels

    def rows(self, x: Any, context: Any = None, argument: str = "x") -> Batch:
        """Return rows and contexts as tensors in the flow's dtype; a dequantised flow takes integers unchanged.

        Raises:
            ValueError: If they do not fit the flow or each other.
        """
        found, names = as_table("fit_density", argument, x)
        self.names = self.names or names
        if names and names != self.names:
            must = f"{argument} must have the columns of x in their order, {self.names}"
            raise ValueError(f"fit_density: {must}, got {names}.")
        found = found.unsqueeze(-1) if found.dim() == 1 and self.event_shape == (1,) else found
        self._check(found, argument)
        encoded = None if context is None else self._context(context, len(found))
        if self._is_new and len(found):
            with torch.no_grad(), at_rest(self.flow):
                q = self.flow(None if encoded is None else encoded[:1].to(self.like.device))  # raises the flow's errors
            if encoded is not None and q.batch_shape != (1,):
                got = f"rows of shape {tuple(encoded.shape[1:])}; labels of classes have the shape (N,)"
                raise ValueError(f"fit_density: context must hold one context per row of x, got {got}.")
            self._is_new = False
        return found if self.levels else self._rounded(found, argument), encoded

    def _check(self, found: Tensor, argument: str) -> None:
        """Raise ValueError unless a table has the flow's event shape and a dtype that the flow can model."""
        images = len(self.event_shape) == 3
        if found.shape[1:] != self.event_shape or not found.dim():
            sizes = ", ".join(map(str, self.event_shape))
            way = " Use x.permute(0, 3, 1, 2), or x[:, None], where channels are last or none." if images else ""
            must = f"{argument} must have shape (N, {sizes}), as the flow's events have"
            raise ValueError(f"fit_density: {must}, got {tuple(found.shape)}.{way}")
        if self.levels and found.is_floating_point():
            must = f"{argument} must hold integers from 0 to {self.levels - 1}, got {found.dtype}"
            raise ValueError(f"fit_density: {must}; use x.to(torch.uint8), after x * {self.levels - 1} if x <= 1.")
        if images and not self.levels and not found.is_floating_point():
            words = f"{argument} holds integers, {found.dtype}, whose densities grow without bound"
            raise ValueError(f"fit_density: {words}; use flows.Dequantized(flow), or x.float() for real numbers.")

    def _rounded(self, found: Tensor, argument: str) -> Tensor:
        """Return numbers in the flow's dtype; overflow raises ValueError."""
        rounded = found.to(self.like.dtype)
        is_narrower = found.is_floating_point() and found.dtype != rounded.dtype
        if is_narrower and bool((rounded.isinf() & ~found.isinf()).any()):
            most = found[found.isfinite()].abs().max().item()
            words = f"{argument} holds numbers of up to {most:.3g}, which overflow in the flow's dtype, {rounded.dtype}"
            raise ValueError(f"fit_density: {words}; divide them by their scale, or use flow.double().")
        return rounded

    def _context(self, context: Any, number: int) -> Tensor:
        """Return the contexts of ``number`` rows as a tensor."""
        found, _ = as_table("fit_density", "context", context)
        shape, encoder = tuple(found.shape), self.flow.encoder
        if not self.flow.context_dim:
            way = "Build it with context_dim > 0, or num_classes for labels"
            raise ValueError(f"fit_density: context of shape {shape} is unexpected: this flow takes none. {way}.")
        plain = encoder is None or isinstance(encoder, Standardize)
        found = found.unsqueeze(-1) if plain and found.dim() == 1 else found
        if not found.dim() or len(found) != number:
            raise ValueError(f"fit_density: context must have as many rows as x, {number}, got shape {shape}.")
        return self._rounded(found, "context") if plain or found.is_floating_point() else found

    def batch(self, item: Any) -> Batch:
        """Return an item of a loader as rows and contexts."""
        parts = tuple(item) if isinstance(item, list | tuple) else (item,)
        if len(parts) not in (1, 2) or not all(map(is_table, parts)):
            got = f"({', '.join(type(part).__name__ for part in parts)})" if len(parts) != 1 else type(item).__name__
            raise ValueError(f"fit_density: batches must be x or (x, context), got {got}.")
        return self.rows(parts[0], parts[1] if len(parts) == 2 else None, "a batch")


def sources(reader: Reader, x: Any, context: Any, training: Training, batch_size: int | None) -> tuple[Source, Source]:
    """Return the source of rows to train on, and the source of rows that validate.

    Raises:
        TypeError: If x or validation is neither a table nor batches.
        ValueError: If they do not fit the flow, or no rows can be held out.
    """
    judge: Source | None = None
    if training.share is None:
        given = (training.validation, None) if is_table(training.validation) else training.validation
        if not isinstance(given, tuple):
            judge = Stream(_repeatable("validation", given), reader.batch)
        elif len(given) != 2:
            raise ValueError(f"fit_density: validation must be x, (x, context) or a loader, got {len(given)}.")
        else:
            judge = Rows(*reader.rows(given[0], given[1], "validation"))
    if is_table(x):
        batch = reader.rows(x, context)
        if len(batch[0]) < FEWEST:
            raise ValueError(f"fit_density: x must hold at least {FEWEST} rows, got {len(batch[0])}.")
        return (Rows(*batch, batch_size), judge) if judge else divided(batch, training.share or 0.0, batch_size)
    if context is not None or batch_size is not None:
        what = "context" if context is not None else "batch_size"
        raise ValueError(f"fit_density: {what} is for a table x; a loader sets it in its batches.")
    loader = _repeatable("x", x)
    if judge is None:
        loader, held = split(loader, training.share or 0.0)
        judge = Stream(held, reader.batch)
    return Stream(loader, reader.batch), judge


def _repeatable(argument: str, value: Any) -> Iterable[Any]:
    """Return batches, or raise TypeError unless they can be iterated again and again."""
    got = type(value).__name__
    if isinstance(value, Dataset):
        got = "a dataset; give DataLoader(data, batch_size=256, shuffle=True)"
    elif not isinstance(value, str | dict) and hasattr(value, "__iter__"):
        if iter(value) is not value:
            return value
        got = f"a {got}, which cannot be gone through again"
    raise TypeError(f"fit_density: {argument} must be a tensor, an array, a data frame or a DataLoader, got {got}.")


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
            self._add(columns.to("cpu", torch.float64))
            self.rows += len(x)
            if context is not None and context.is_floating_point():
                self.broken_contexts += int((~context.isfinite()).flatten(1).any(1).sum())
            # Copies, since a view would keep all of a batch in memory.
            kept.append((x[::stride].clone(), None if context is None else context[::stride].clone()))
            most = SAMPLE if x.dim() == 2 else max(64, min(1000, IMAGES // x[0].numel()))
            if sum(len(x) for x, _ in kept) > 2 * most:
                kept, stride = [part_of(_joined(kept), slice(None, None, 2))], 2 * stride
        self.sample: Batch = _joined(kept) if kept else (torch.zeros(0, width), None)

    def _add(self, x: Tensor) -> None:
        """Add rows; the moments after Chan, Golub, LeVeque 1979 lose no digits to a mean far from zero."""
        number, mean = len(x), x.mean(0)
        total, gap = self.numbers + number, mean - self.loc
        self.loc = self.loc + gap * (number / total)
        self._squares = self._squares + (x - mean).square().sum(0) + gap.square() * (self.numbers * number / total)
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self.whole = self.whole & (x == x.round()).all(0)
        self.broken = self.broken + (~x.isfinite()).sum(0)
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


def check_rows(reader: Reader, seen: Survey, judged: Survey, discrete: Sequence[int | str] | None) -> list[int]:
    """Raise ValueError, by column and number, if rows cannot have a density, and warn if it would grow without bound.

    Args:
        reader: The reader of the rows.
        seen: The rows to train on.
        judged: The rows that validate.
        discrete: The columns that the user declared as integers, by index or name.

    Returns:
        The indices of the discrete columns.
    """
    if not reader.is_table and discrete:
        words = f"discrete is for tables, got {list(discrete)}"
        raise ValueError(f"fit_density: {words}; use flows.Dequantized(flow).")
    places = places_of("fit_density", "discrete", () if discrete is None else discrete, reader.names, reader.width)
    labels = [label(reader.names, p) if reader.is_table else f"channel {p}" for p in range(reader.width)]
    number, unit = seen.numbers + judged.numbers, "rows" if reader.is_table else "pixels"
    broken = zip(labels, (seen.broken + judged.broken).tolist(), strict=True)
    if found := [f"{name} ({count} of {number} {unit})" for name, count in broken if count]:
        words = f"fit_density: the data hold NaN or inf in {listed(found)}"
        raise ValueError(f"{words}. Leave those rows out, or fill the gaps.")
    if count := seen.broken_contexts + judged.broken_contexts:
        words = f"the contexts hold NaN or inf in {count} of {seen.rows + judged.rows} rows"
        raise ValueError(f"fit_density: {words}.")
    if not judged.rows or seen.rows < 2:
        must = "there must be some rows to train on and some to judge by"
        raise ValueError(f"fit_density: {must}, got {seen.rows} and {judged.rows}.")
    if reader.is_table:
        _check_columns(reader, seen, judged, places, labels)
    else:
        _check_images(reader, seen, judged)
    return places


def _check_columns(reader: Reader, seen: Survey, judged: Survey, places: list[int], labels: list[str]) -> None:
    """Raise ValueError if columns cannot have a density; warn if it would be unbounded or their numbers lose digits."""
    dtype = reader.like.dtype
    if found := [labels[place] for place in places if not (seen.whole & judged.whole)[place]]:
        words = f"fit_density: discrete columns must hold integers only, unlike {listed(found)}"
        raise ValueError(f"{words}. For other steps use dequantize(x, columns, step=...).")
    others = [place for place in range(reader.width) if place not in places]
    if found := [f"{labels[p]} ({seen.low[p].item():.6g})" for p in others if seen.high[p] == seen.low[p]]:
        raise ValueError(
            f"fit_density: x is constant in {listed(found)}, which has no density. Leave it out; if its numbers differ "
            f"by less than {dtype} can tell, subtract a constant such as the mean, or use flow.double()."
        )
    eps = torch.finfo(dtype).eps
    rounding = eps * torch.maximum(seen.low.abs(), seen.high.abs())
    if found := [f"{labels[p]} (up to {seen.high[p].item():.6g})" for p in places if rounding[p] > ROOM]:
        words = f"fit_density: {dtype} leaves no room for noise between the integers of {listed(found)}"
        raise ValueError(f"{words}; subtract a constant, or use flow.double().")
    step = eps * seen.loc.abs() / seen.scale
    if found := [f"{labels[p]} (to {step[p].item():.1g} sd)" for p in others if step[p] > COARSE]:
        words = f"{dtype} rounds {listed(found)}, so far from zero"
        warn_user(f"fit_density: {words}; subtract the mean, or use flow.double().")
    x = seen.sample[0].unique(dim=0) if seen.repeats else seen.sample[0]
    fine = [place for place in others if not step[place] > COARSE]
    warn_of_ties("fit_density", x[:, fine], [labels[place] for place in fine])
    if spikes := spikes_of(x, reader.names, fine):
        warn_user(
            f"fit_density: {listed([str(spike) for spike in spikes])}. Densities grow without bound there, and nats "
            "say how narrow the spikes are, not how good the density is. Give columns of integers as discrete=[...], "
            "use dequantize(x, columns, step=...) for those of other steps, or leave such columns and copies out."
        )


def _check_images(reader: Reader, seen: Survey, judged: Survey) -> None:
    """Raise ValueError if images or rows of integers cannot have a density; warn of integers and unused levels."""
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
