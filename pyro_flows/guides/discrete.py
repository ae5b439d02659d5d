"""Latents that a guide leaves alone: discrete ones of finite support, which are summed out, and points."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger

from ..programs.latents import is_point, is_summable
from ..programs.nesting import nesting_of
from ..programs.program import Program
from ..programs.traces import trace_at


class HideDiscrete(BlockMessenger):
    """Hides the discrete latents of a model that can be summed out, and points, from the guide that looks at it.

    Attributes:
        names: The names of the discrete ones that were met so far.
    """

    def __init__(self) -> None:
        super().__init__(hide_fn=self._hides)
        self.names: dict[str, None] = {}

    def _hides(self, msg: dict[str, Any]) -> bool:
        hidden = msg["type"] == "sample" and not msg["is_observed"] and (is_summable(msg["fn"]) or is_point(msg["fn"]))
        if hidden and not is_point(msg["fn"]):
            self.names[msg["name"]] = None
        return hidden


def hide_discrete(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model without its discrete latents of finite support, which are drawn unseen."""
    return HideDiscrete()(model)


def summed(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program | None:
    """Return a program with the density of a model whose discrete latents are hidden; None where it has none."""
    program: Any = model
    while isinstance(program, functools.partial) and isinstance(next(iter(program.args), None), Messenger):
        messenger, inner = program.args[:2]  # one of Pyro's handlers, and what it is around
        if isinstance(messenger, HideDiscrete) and messenger.names:
            single = trace_at(inner, {}, args, kwargs)
            return Program(inner, args, kwargs, single, nesting_of(single), tuple(messenger.names))
        program = inner
    return None
