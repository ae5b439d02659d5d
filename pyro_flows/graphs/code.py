"""Flat code: a list of operations as a Python function, which compiled code replaces between two calls.

Another process compiles it once it has run some times (:mod:`.packages`).  The compiled code takes over if its numbers
agree and it is faster.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import setting
from .packages import Package
from .worker import function_of

REPEATS = 20  # runs, after which code is worth compiling
POLLED = 0.25  # seconds between two looks for compiled code
AGREES = 4500  # the largest difference, in rounding errors of the largest number of a result: 1e-12 in double precision
NAME = re.compile(r"\b[xrcv]\d+(_\d+)?\b")  # of inputs, draws, constants and values in a graph
Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def source_of(arguments: list[str], lines: Iterable[tuple[str, tuple[str, ...]]], results: list[str]) -> str:
    """Return the source of a function ``run`` that forgets each of its values after the last use.

    The names are numbered anew, so that equal code has equal source.

    Args:
        arguments: The names of the arguments.
        lines: The statements, each with the names in it.
        results: The names of the results.
    """
    lines = list(lines)
    last = {name: number for number, (_, names) in enumerate(lines) for name in names}
    text = [f"def run({', '.join(arguments)}):"]
    for number, (line, names) in enumerate(lines):
        spent = [name for name in dict.fromkeys(names) if last[name] == number and name not in results]
        text.append(f"    {line}{'; del ' * bool(spent)}{', '.join(spent)}")
    source, anew = "\n".join([*text, f"    return [{', '.join(results)}]", ""]), dict[str, str]()
    return NAME.sub(lambda found: anew.setdefault(found[0], f"a{len(anew)}"), source)


class Code:
    """A list of operations as a function of a list of tensors.

    Args:
        source: The source of a function ``run`` of tensors.
        operations: The operations that it names.
        arguments: Tensors such as it is called with.
        eps: The rounding error of its numbers.
        is_pure: False if it writes into its arguments, so that it is never compiled.
    """

    def __init__(
        self, source: str, operations: dict[str, Any], arguments: Sequence[Tensor], eps: float, *, is_pure: bool
    ) -> None:
        specs = [(list(one.shape), list(one.stride()), str(one.dtype)) for one in arguments]
        self._job = {"source": source, "operations": {n: str(call) for n, call in operations.items()}, "specs": specs}
        self._flat, self._eps = function_of(self._job), eps
        self._compiles = is_pure and all(one.device.type == "cpu" for one in arguments)
        self._calls, self._looked = 0, 0.0
        self._package: Package | None = None
        self._compiled: Run | None = None

    def __call__(self, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the operations one after the other, or the compiled code."""
        if self._compiled is not None:
            return self._compiled(arguments)
        if self._compiles and setting.COMPILE == "auto":
            self._calls += 1
            if self._calls == 1:
                self._package = Package(self._job)
            elif self._calls == REPEATS and self._package and not self._package.request():
                self._package, self._compiles = None, False
            if self._package and (self._calls == 1 or time.monotonic() > self._looked + POLLED):
                self._looked = time.monotonic()
                if (compiled := self._package.load()) is not None:
                    return self._try(compiled, arguments)
        return self._flat(*arguments)

    def _try(self, compiled: Run, arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run both, and let the compiled code take over if it agrees and is faster."""
        expected, slow = _timed(lambda given: self._flat(*given), arguments)
        found, fast = _timed(compiled, arguments)
        if agree(found, expected, self._eps):
            self._compiled = compiled if fast < slow else None
        elif self._package:
            self._package.remove()
        self._package, self._compiles = None, False
        return expected


def _timed(run: Run, arguments: Sequence[Tensor]) -> tuple[Sequence[Tensor], float]:
    """Return the results of a run, and the seconds of a second one."""
    run(arguments)
    start = time.perf_counter()
    return run(arguments), time.perf_counter() - start


def agree(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], eps: float) -> bool:
    """True if results are equal to within rounding errors of the largest finite number in each."""
    return all(map(lambda one, other: _is_close(one, other, eps * AGREES), found, expected))


def _is_close(one: Tensor | None, other: Tensor | None, error: float) -> bool:
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (other.is_floating_point() or other.is_complex()):  # such as a truth value that is a guard
        return torch.equal(one, other)
    size = float(other.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax()) if other.numel() else 0.0
    return torch.allclose(one, other, error, size * error, equal_nan=True)
