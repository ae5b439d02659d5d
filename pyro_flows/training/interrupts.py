"""Ctrl-C in a loop: the current step is completed first, so that the trained state can be kept."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ..time_limit import taken_over


@dataclass
class _Hold:
    """A handler of Ctrl-C that holds the first one back.

    Attributes:
        grace: As for :func:`hold_interrupts`.
        notice: As for :func:`hold_interrupts`.
        first: The time of the first Ctrl-C, or None.
    """

    grace: float
    notice: bytes
    first: float | None = None

    def held(self) -> bool:
        """True if there was one."""
        return self.first is not None

    def __call__(self, *_: Any) -> None:
        if self.first is None:
            self.first = time.monotonic()
            if self.notice:
                os.write(2, self.notice)  # print may be running already
        elif time.monotonic() - self.first >= self.grace:
            raise KeyboardInterrupt


@contextlib.contextmanager
def hold_interrupts(grace: float = 0.0, notice: str = "") -> Iterator[Callable[[], bool]]:
    """Hold a first Ctrl-C back; the function that is yielded returns True if there was one, or the time is up.

    A second Ctrl-C is raised.

    Args:
        grace: Seconds within which a second Ctrl-C counts as the first: a launcher passes it on to its processes.
        notice: The words to print at the first one.
    """
    before = signal.getsignal(signal.SIGINT)
    outer = before if isinstance(before, _Hold) else None
    ours = before is signal.default_int_handler or outer is not None
    with taken_over() as is_up:
        if threading.current_thread() is not threading.main_thread() or not ours:
            yield lambda: is_up() or (outer is not None and outer.held())  # another handler is in charge
            return
        hold = _Hold(grace, notice.encode(), outer.first if outer else None)
        signal.signal(signal.SIGINT, hold)
        try:
            yield lambda: is_up() or hold.held()
        finally:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay a first Ctrl-C to the end of a block, such as an import that could not be repeated."""
    before = signal.getsignal(signal.SIGINT)
    is_held = isinstance(before, _Hold) and before.held()
    with hold_interrupts():
        hold = signal.getsignal(signal.SIGINT)
        yield
    if hold is not before and isinstance(hold, _Hold) and hold.held() and not is_held:  # and not that the time is up
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def watching(bar: tqdm, notice: str = "") -> Iterator[Callable[..., bool]]:
    """Hold a first Ctrl-C back under a progress bar.

    The function that is yielded moves the bar on, shows words beside it, and returns True if there was a Ctrl-C.
    """
    with bar, hold_interrupts(notice=notice) as asked:

        def watch(words: str = "") -> bool:
            bar.update()
            bar.set_postfix_str(words, refresh=False)
            return asked()

        yield watch
