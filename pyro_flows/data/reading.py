"""Sources of rows to train on and of rows held out: tables, images or batches of a loader, read for one flow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..encoders import Standardize
from ..encoders.base import at_rest
from ..flows import Dequantized, Flow
from ..flows.arguments import check_precision
from ..training import Training
from .batches import Batch, Rows, Source, Stream, divided, split
from .table import Names, as_table, is_table

FEWEST = 20  # rows that can be split


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
        if not isinstance(model, Flow | Dequantized):
            got = f"the recipe {model.__name__}, uncalled" if hasattr(model, "__name__") else type(model).__name__
            raise TypeError(f"fit_density: flow must be a Flow, such as flows.nsf(x.shape[1]), got {got}.")
        shape = model.event_shape
        if len(shape) not in (1, 3):
            raise ValueError(
                f"fit_density: flow must be over vectors or images (C, H, W), got events of {tuple(shape)}."
            )
        likes = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        if not any(parameter.requires_grad for parameter in likes):
            raise ValueError("fit_density: the flow has no parameters to train.")
        self.model, self.event_shape, self.width, self.like = model, shape, shape[0], likes[0]
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
        if names and self.names and names != self.names:
            words = f"{argument} has the columns {names}, but x has {self.names}"
            raise ValueError(f"fit_density: {words}; give them in one order.")
        self.names = self.names or names
        found = found.unsqueeze(-1) if found.dim() == 1 and self.event_shape == (1,) else found
        self._check(found, argument)
        encoded = None if context is None else self._context(context, len(found))
        if self._is_new and len(found):
            with torch.no_grad(), at_rest(self.flow):
                q = self.flow(None if encoded is None else encoded[:1].to(self.like.device))  # raises the flow's errors
            if encoded is not None and q.batch_shape != (1,):
                got = f"a row of shape {tuple(encoded.shape[1:])} makes a batch of {tuple(q.batch_shape)}"
                must = f"context must hold one context per row of x, but {got}"
                raise ValueError(f"fit_density: {must}; labels of classes have the shape (N,).")
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
        if not self.flow.context_dim:
            words = f"context of shape {tuple(found.shape)} is unexpected: this flow takes none"
            raise ValueError(f"fit_density: {words}. Build it with context_dim > 0, or num_classes for labels.")
        plain = self.flow.encoder is None or isinstance(self.flow.encoder, Standardize)
        found = found.unsqueeze(-1) if plain and found.dim() == 1 else found
        if not found.dim() or len(found) != number:
            got = tuple(found.shape)
            raise ValueError(f"fit_density: context must have as many rows as x, {number}, got shape {got}.")
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
    judge = _validation(reader, training.validation) if training.share is None else None
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


def _validation(reader: Reader, validation: Any) -> Source:
    """Return the source of the rows that the user gave for validation."""
    given = (validation, None) if is_table(validation) else validation
    if not isinstance(given, tuple):
        return Stream(_repeatable("validation", given), reader.batch)
    if len(given) != 2:
        raise ValueError(f"fit_density: validation must be x, (x, context) or a loader, got {len(given)}.")
    return Rows(*reader.rows(given[0], given[1], "validation"))


def _repeatable(argument: str, value: Any) -> Iterable[Any]:
    """Return batches, or raise TypeError unless they can be iterated again and again."""
    must = f"fit_density: {argument} must be a tensor, an array, a data frame or a DataLoader"
    if isinstance(value, Dataset):
        raise TypeError(f"{must}, got a dataset; give DataLoader(data, batch_size=256, shuffle=True).")
    if isinstance(value, str | dict) or not hasattr(value, "__iter__"):
        raise TypeError(f"{must}, got {type(value).__name__}.")
    if iter(value) is value:
        raise TypeError(f"{must}, or batches that can be gone through again, got a {type(value).__name__}.")
    return value
