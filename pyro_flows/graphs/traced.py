"""Functions of tensors that are replaced by their graphs.

A function that is called again and again with tensors of the same shapes is recorded once (:mod:`.recording`).  At the
next call its graph must give the same numbers as the function, at other inputs.  From then on the graph runs, without
Python, Pyro's handlers and autograd in between.  The two are compared again at the 16th, 64th, 256th ... call, in case
the function depends on what changes elsewhere.

A function that cannot be recorded, or differs from its graph, runs as it is.  So does one whose graph raises an error.
In a call in which the function reads other truth values than in the recording, it runs as it is, on the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compiler_state import is_mapped, is_recording
from . import setting
from .code import agree
from .graph import Graph, Unlike
from .recording import Function, Recording, Results, Unrecordable, call_inner, record

SECOND = 2  # the call that is recorded, since a function that is called once needs no graph
LATER = 20  # the factor of rounding errors that later comparisons allow, at places where these may grow
EARLY = 8  # calls that may need the function in any case, such as those of a fit from a poor start
OFTEN = 4  # the calls per further one that needs the function, below which there is no graph
FAILURES = 3  # errors of recorded runs, after which no more are tried


class Traced:
    """A function of tensors, replaced by its graph where that is possible.

    The function returns tensors without gradients, or None for some.  Whatever it reads elsewhere must stay the same
    while this object lives, except the numbers of parameters that require gradients.

    Args:
        function: The function.
        draws: True if the function draws random numbers, new ones in each call.
        first: The call with tensors of given shapes that is recorded: the first if more are sure to follow.

    Attributes:
        refusal: The reason why the function is not replaced, or an empty string.

    Example::

        >>> squares = Traced(lambda x: (x.square(),))
        >>> [squares(torch.tensor(float(number)))[0].item() for number in range(5)]
        [0.0, 1.0, 4.0, 9.0, 16.0]
    """

    def __init__(self, function: Function, *, draws: bool = False, first: int = SECOND) -> None:
        self.function, self.draws, self.first, self.refusal = function, draws, first, ""
        self._known: dict[Any, _OfShapes] = {}

    @property
    def is_traced(self) -> bool:
        """True if graphs may replace the function."""
        return not (setting.COMPILE == "off" or self.refusal or is_mapped())

    def __call__(self, *inputs: Tensor) -> Results:
        if not self.is_traced:
            return tuple(self.function(*inputs))
        if is_recording():
            return call_inner(self, inputs)
        signature = tuple((one.shape, one.dtype, one.device) for one in inputs)
        if (known := self._known.get(signature)) is None:
            known = self._known[signature] = _OfShapes(self)
        return known([one.detach().contiguous() for one in inputs])


class _OfShapes:
    """A traced function at inputs of given shapes."""

    def __init__(self, traced: Traced) -> None:
        self._traced, self._calls, self._failures, self._unlike = traced, 0, 0, 0
        self._graph: Graph | None = None
        self._is_verified = False

    def __call__(self, inputs: Sequence[Tensor]) -> Results:
        self._calls += 1
        if self._graph is not None and self._graph.is_current:
            with torch.no_grad():
                if not self._is_verified or _is_power_of_four(self._calls):
                    return self._verified(self._graph, inputs)
                before = torch.get_rng_state() if self._graph.is_random else None
                try:
                    return self._graph.run(inputs)
                except Exception as error:
                    self._count(error)
                if before is not None:
                    torch.set_rng_state(before)
        elif self._calls >= self._traced.first:
            return self._recorded(inputs)
        return tuple(self._traced.function(*inputs))

    def _refuse(self, reason: str) -> None:
        self._traced.refusal, self._graph = reason, None

    def _count(self, error: Exception) -> None:
        """Go without a graph that fails, or that often does not hold."""
        self._unlike += isinstance(error, Unlike)
        if not isinstance(error, Unlike):
            self._refuse(f"{type(error).__name__}: {error}")
        elif (self._unlike - EARLY) * OFTEN > self._calls:
            self._refuse("it branches on values that change")

    def _recorded(self, inputs: Sequence[Tensor]) -> Results:
        """Run the function and record it."""
        self._graph, self._is_verified, before = None, False, torch.get_rng_state()
        try:
            outputs, calls = record(self._traced.function, inputs)
        except Exception as error:  # perhaps only now, since a model breaks down at some draws
            self._failures += 1
            if self._failures == FAILURES:
                self._refuse(f"{type(error).__name__}: {error}")
            torch.set_rng_state(before)
            return tuple(self._traced.function(*inputs))
        try:
            self._graph = Graph(Recording(inputs, outputs, calls))
            if self._graph.is_random and not self._traced.draws:
                raise Unrecordable("it draws random numbers")
        except Exception as refusal:  # whatever cannot be recorded runs as it is
            self._refuse(str(refusal))
        return tuple(one if one is None else one.detach().clone() for one in outputs)

    def _verified(self, graph: Graph, inputs: Sequence[Tensor]) -> Results:
        """Run the function and its graph, and compare."""
        try:
            with torch.random.fork_rng([], enabled=graph.is_random):
                found = graph.run(inputs)
        except Exception as error:
            self._count(error)
            return tuple(self._traced.function(*inputs))
        expected = tuple(self._traced.function(*inputs))
        if agree(found, expected, LATER * graph.eps if self._is_verified else graph.eps):
            self._is_verified = True
        else:
            self._refuse("its graph gives other numbers")
        return expected


def _is_power_of_four(number: int) -> bool:
    """True for 16, 64, 256 and so on."""
    return number > 4 and number & (number - 1) == 0 and number.bit_length() % 2 == 1
