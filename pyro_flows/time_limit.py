"""A time limit on the work of a thread, which ends it as Ctrl-C would.

Work that takes long calls :func:`check_time` where it can be given up.  A loop that keeps what it has so far takes the
limit over by :func:`taken_over`, and ends by itself.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_end: ContextVar[float] = ContextVar("end", default=math.inf)  # of the time, by the monotonic clock


class TimeUp(KeyboardInterrupt):
    """The time is up; whoever handles Ctrl-C handles it too."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Limit the time of a block; of nested limits the earliest counts."""
    token = _end.set(min(_end.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _end.reset(token)


def seconds_left() -> float:
    """Return the seconds until the limit, infinite without one."""
    return _end.get() - time.monotonic()


def check_time() -> None:
    """Raise TimeUp if the time is up."""
    if _end.get() < math.inf and seconds_left() < 0:
        raise TimeUp


@contextmanager
def taken_over() -> Iterator[Callable[[], bool]]:
    """Lift the limit for a block; the function that is yielded returns True once the time is up."""
    end = _end.get()
    token = _end.set(math.inf)
    try:
        yield lambda: time.monotonic() > end
    finally:
        _end.reset(token)
