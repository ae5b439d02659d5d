"""Each call of a guide is held to the model that the guide was built for: its latents, their shapes, their masks.

A guide goes on drawing the latents that it was built for, whatever the model draws with other arguments.  Where the
model has one no more, or a mask removes it, the guide's entropy counts without the model's density, and grows for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..programs.masks import is_masked
from .arguments import Arguments, are_used_up
from .checks import check_no_more, check_shapes
from .faults import Watch
from .look import Found, Rows, look, same_draws
from .masked import RowMasks, check_absent, check_unmasked, hides_outside, masks_of_rows, patterns_of

Model = Callable[..., Any]


class Calls:
    """The calls of one guide.  The very arguments that were seen last are not looked at again.

    Args:
        owner: The class of the guide, for errors.
        plate: The plate whose rows have a flow of their own, if there is one.
    """

    def __init__(self, owner: str, plate: str | None = None) -> None:
        self.owner, self.plate = owner, plate
        self.observed: frozenset[str] = frozenset()
        self.masked = False
        self._absent: set[bytes] = set()  # ways in which rows are hidden that were found to leave the rest alone
        self._last: Arguments | None = None
        self.watch = Watch(owner, plate)

    def begin(self, model: Model, prototype: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
        """Look at all of a model with the arguments that a guide is built for."""
        with self._aside(prototype):
            found = look(model, args, kwargs, plate=self.plate)
        self.observed = frozenset(found.observed)
        self._settle(model, prototype, found, args, kwargs)
        if self.plate is not None and found.rows and found.rows.size == found.rows.full_size:
            self._checked(model, prototype, found, {}, args, kwargs)
        return found

    def rows(
        self, model: Model | None, prototype: Trace, args: tuple[Any, ...], kwargs: dict[str, Any], *, needed: bool
    ) -> Rows | None:
        """Check arguments that are new, and return the rows of the plate where they are needed.

        Raises:
            ValueError: Naming the site, if the model lacks a latent of the guide, has another one or another shape, or
                masks what the guide cannot leave out.
        """
        known = self._knows(args, kwargs)
        if model is None or (known and not needed):  # a guide that was saved has no model
            return None
        names = () if known else [name for name, _ in prototype.iter_stochastic_nodes()]
        with self._aside(prototype):
            found = look(model, args, kwargs, plate=self.plate, until=names)
        if not known:
            check_shapes(self.owner, prototype, found, self.plate)
            check_no_more(self.owner, prototype, found, self.observed)
            self._settle(model, prototype, found, args, kwargs)
        return found.rows

    def whole(
        self, model: Model | None, prototype: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Found | None:
        """Look at all of a model, its latents' supports included; None where a guide was saved without a model."""
        if model is None:
            return None
        found = look(model, args, kwargs, plate=self.plate)
        check_shapes(self.owner, prototype, found, self.plate)
        check_unmasked(self.owner, self.plate, found)
        return found

    def masks(
        self, model: Model | None, prototype: Trace, indices: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RowMasks:
        """Return what counts in the model of the plate's rows at some indices."""
        if not self.masked or model is None or self.plate is None:
            return RowMasks()
        with self._aside(prototype):
            found = look(model, args, kwargs, plate=self.plate, indices=indices)
        return self._checked(model, prototype, found, {self.plate: indices}, args, kwargs)

    def _checked(
        self,
        model: Model,
        prototype: Trace,
        found: Found,
        rows: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> RowMasks:
        """Return what counts, and refuse masks that hide what the model depends on, where a row is hidden in a new way.

        The rows of a plate that is subsampled are given by its name.
        """
        assert self.plate is not None
        masks = masks_of_rows(self.plate, found)
        if new := patterns_of(self.plate, masks, found) - self._absent:
            with self._aside(prototype):
                check_absent(model, masks, found, rows, args, kwargs)
            self._absent |= new
        return masks

    def _settle(
        self, model: Model, prototype: Trace, found: Found, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Refuse masks outside of the plate, and remember the arguments."""
        self.masked = any(map(is_masked, found.latents.values()))
        if self.masked and hides_outside(self.plate, found):
            with self._aside(prototype):  # it takes the data too to tell a flat prior from what is left out
                check_unmasked(self.owner, self.plate, look(model, args, kwargs, plate=self.plate))
        self._last = Arguments(args, kwargs)

    def _knows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True if arguments need no look, or bear none.

        A traced program has one structure for ever, and iterators are for the model alone; a mask may change unseen.
        """
        if are_used_up(args, kwargs):
            return True
        if self.masked and self.plate is not None:
            return False
        if not (args or kwargs) or torch._C._get_tracing_state():  # to draw again takes no data
            return True
        return self._last is not None and self._last.are(args, kwargs)

    def _aside(self, prototype: Trace) -> Any:
        return same_draws([site for _, site in prototype.iter_stochastic_nodes()])

    # What was seen is held to be compared, and is not part of the guide: copies and pickles look again.

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}
