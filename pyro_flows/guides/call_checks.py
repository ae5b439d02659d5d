"""Each call of a guide is held to the model that the guide was built for: its latents, their shapes, their masks.

A guide goes on drawing the latents that it was built for, whatever the model draws with other arguments.  Where the
model has one no more, or a mask removes it, the guide's entropy counts without the model's density, and grows for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..programs.masks import is_masked
from .guide_call import Call
from .masked import RowMasks, check_absent, check_unmasked, hides_outside, masks_of_rows, patterns_of
from .nonfinite import Watch
from .prototype import Found, Rows, look
from .refusals import check_no_more, check_shapes

PLAIN = bool | int | float | complex | str | bytes | None | torch.Size | torch.dtype | torch.device


class Calls:
    """The calls of one guide.  The very arguments that were seen last are not looked at again."""

    def __init__(self) -> None:
        self.observed: frozenset[str] = frozenset()
        self.masked = False
        self._absent: set[bytes] = set()  # ways in which rows are hidden that were found to leave the rest alone
        self._last: Arguments | None = None
        self.watch = Watch()

    def begin(self, call: Call) -> Found:
        """Look at all of a model with the arguments that a guide is built for."""
        with call.same_draws():
            found = look(call)
        self.observed = frozenset(found.observed)
        self._settle(call, found)
        if found.rows and found.rows.size == found.rows.full_size:
            self._checked(call, found, {})
        return found

    def rows(self, call: Call, *, needed: bool) -> Rows | None:
        """Check arguments that are new, and return the rows of the plate where they are needed.

        Raises:
            ValueError: Naming the site, if the model lacks a latent of the guide, has another one or another shape, or
                masks what the guide cannot leave out.
        """
        known = self._knows(call)
        if call.model is None or (known and not needed):  # a guide that was saved has no model
            return None
        with call.same_draws():
            found = look(call, until=() if known else call.latents)
        if not known:
            check_shapes(call, found)
            check_no_more(call, found, self.observed)
            self._settle(call, found)
        return found.rows

    def masks(self, call: Call, indices: Tensor) -> RowMasks:
        """Return what counts in the model of the plate's rows at some indices."""
        if not self.masked or call.model is None or call.plate is None:
            return RowMasks()
        with call.same_draws():
            found = look(call, indices=indices)
        return self._checked(call, found, {call.plate: indices})

    def _checked(self, call: Call, found: Found, rows: dict[str, Tensor]) -> RowMasks:
        """Return what counts, and refuse masks that hide what the model depends on, where a row is hidden in a new way.

        The rows of a plate that is subsampled are given by its name.
        """
        masks = masks_of_rows(call.plate, found)
        if new := patterns_of(call.plate, masks, found) - self._absent:
            with call.same_draws():
                check_absent(call, masks, found, rows)
            self._absent |= new
        return masks

    def _settle(self, call: Call, found: Found) -> None:
        """Refuse masks outside of the plate, and remember the arguments."""
        self.masked = any(map(is_masked, found.latents.values()))
        if self.masked and hides_outside(call.plate, found):
            with call.same_draws():  # it takes the data too to tell a flat prior from what is left out
                check_unmasked(call, look(call))
        self._last = Arguments(call)

    def _knows(self, call: Call) -> bool:
        """True if arguments need no look, or bear none.

        A traced program has one structure for ever, and iterators are for the model alone, since a second run would
        find them used up; a mask may change unseen.
        """
        leaves, _ = tree_flatten((call.args, call.kwargs))
        if any(isinstance(leaf, Iterator) for leaf in leaves):
            return True
        if self.masked and call.plate is not None:
            return False
        if not (call.args or call.kwargs) or torch._C._get_tracing_state():  # to draw again takes no data
            return True
        return self._last is not None and self._last.are(call)

    # What was seen is held to be compared, and is not part of the guide: copies and pickles look again.

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


class Arguments:
    """The arguments of a call, whose tensors are held so that no other can take their identity."""

    def __init__(self, call: Call) -> None:
        self.leaves, self.spec = tree_flatten((call.args, call.kwargs))
        self.versions = [_version(leaf) for leaf in self.leaves]

    def are(self, call: Call) -> bool:
        """True if another call's are the same objects, unchanged; never where an object could have changed unseen."""
        leaves, spec = tree_flatten((call.args, call.kwargs))
        return spec == self.spec and all(map(_same, self.leaves, self.versions, leaves))


def _version(leaf: Any) -> int | None:
    """The version of a tensor, which grows whenever it is written to; inference tensors have none."""
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else None


def _same(left: Any, version: int | None, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left is right and version is not None and version == _version(right)
    if isinstance(left, PLAIN):
        return type(left) is type(right) and left == right
    return left is right and callable(left)
