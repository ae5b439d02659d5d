"""Ctrl-C in a loop: the step at hand is finished first, so that what was trained can be kept."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class _Hold:
    """A handler of Ctrl-C that holds the first one back; inside of another, it knows of what that one holds."""

    def __init__(self, outer: Any, grace: float, notice: str) -> None:
        self._outer = outer if isinstance(outer, _Hold) else None
        self._grace, self._notice = grace, notice.encode()
        self._first: float | None = None

    @property
    def first(self) -> float | None:
        """When the first one came, if it did."""
        return self._outer.first if self._first is None and self._outer else self._first

    def held(self) -> bool:
        """True if there was one."""
        return self.first is not None

    def __call__(self, *_: Any) -> None:
        if self.first is None:
            self._first = time.monotonic()
            if self._notice:
                os.write(2, self._notice)  # print may be at work already
        elif time.monotonic() - self.first >= self._grace:
            raise KeyboardInterrupt


@contextlib.contextmanager
def hold_interrupts(grace: float = 0.0, notice: str = "") -> Iterator[Callable[[], bool]]:
    """Let a first Ctrl-C wait until somebody asks whether there was one; a second one does not wait.

    Args:
        grace: Seconds within which a second one is taken for the first: a launcher tells its processes once more.
        notice: What to say when the first one comes.
    """
    before = signal.getsignal(signal.SIGINT)
    hold = _Hold(before, grace, notice)
    ours = before is signal.default_int_handler or isinstance(before, _Hold)
    if threading.current_thread() is not threading.main_thread() or not ours:
        yield hold.held  # somebody else listens
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield hold.held
    finally:
        signal.signal(signal.SIGINT, before)
