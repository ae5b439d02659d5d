"""Ctrl-C in a loop: the step at hand is finished first, so that what was trained can be kept."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def hold_interrupts(grace: float = 0.0) -> Iterator[Callable[[], bool]]:
    """Let a first Ctrl-C wait until somebody asks whether there was one; a second one, unless it comes within ``grace``
    seconds, does not wait: of one Ctrl-C a launcher tells its processes once more."""
    held, first = threading.Event(), 0.0

    def hold(*_: Any) -> None:
        nonlocal first
        if held.is_set() and time.monotonic() - first >= grace:
            raise KeyboardInterrupt
        if not held.is_set():
            first = time.monotonic()
        held.set()

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield held.is_set  # somebody else listens
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield held.is_set
    finally:
        signal.signal(signal.SIGINT, before)
