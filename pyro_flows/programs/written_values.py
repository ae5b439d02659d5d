"""Programs that write into the values of their latents, such as ``epsilon[..., 0] = 0`` under ``torch.no_grad``.

Such a program gets a copy to write into.  The density counts the value that was drawn, and draws stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .traces import Function


class Writes(Messenger):
    """Finds the latents into whose values a program writes, in a run of it."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn: dict[str, tuple[Tensor, Tensor]] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg) and isinstance(msg["value"], Tensor):
            self._drawn[msg["name"]] = msg["value"], msg["value"].clone()

    def writable(self, program: Function) -> Function:
        """Return a program that gets copies of these latents: the program itself if there are none."""
        names = [name for name, (now, before) in self._drawn.items() if not torch.equal(now, before)]
        return _Copies(names)(program) if names else program


class _Copies(Messenger):
    """Gives a program copies of some values, while handlers outside of it keep the values."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._names:
            msg["value"] = msg["value"].clone()
