"""Ctrl-C in a loop: the step at hand is finished first, so that what was trained can be kept."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def hold_interrupts() -> Iterator[Callable[[], bool]]:
    """Let a first Ctrl-C wait until somebody asks whether there was one; a second one does not wait."""
    held = threading.Event()

    def hold(*_: Any) -> None:
        if held.is_set():
            raise KeyboardInterrupt
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
