"""Threads and memory of a job: as many threads as make it faster, at most as many as the user allows, and memory kept.

Threads wait for each other after each operation.  Small operations take longer with two threads than with one, and ten
times as long while another process keeps a core busy.  Small jobs always use one thread, so that their results can be
reproduced.  Public functions begin with one thread.  Their large parts use more: steps of large networks, and
log-densities of many draws of a model of many rows.
"""

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Iterator
from contextvars import ContextVar

import torch

OPERATIONS = 6  # per draw and weight of a network: a product and a sum, forwards and twice backwards
LARGE = 3e8  # operations of a step, about 10 ms, above which threads may help
TRIED = 5  # steps of a trial; the first two warm up
FASTER = 0.8  # the ratio of times below which several threads are kept
RECENT = 0.1  # weight of a step in the running mean: threads rarely wait for a core, but then for long

LARGEST_BLOCK = 32 * 2**20 - 2**16  # bytes: glibc looks at blocks of up to 32 MB, with its own header

_allowed: ContextVar[int | None] = ContextVar("threads", default=None)  # None outside all jobs


def allowed() -> int:
    """Return the number of threads that the user allows, also inside a job that uses fewer."""
    return _allowed.get() or torch.get_num_threads()


@contextlib.contextmanager
def using(number: int) -> Iterator[None]:
    """Let torch use a number of threads, at most as many as the user allows, and restore the old one afterwards."""
    before, token = torch.get_num_threads(), _allowed.set(allowed())
    torch.set_num_threads(min(number, allowed()))
    try:
        yield
    finally:
        _allowed.reset(token)
        torch.set_num_threads(before)


class Threads:
    """The number of threads of a loop: one for small steps, and for large steps the faster number.

    A loop begins with one thread.  If its steps are large, it tries as many as the user allows, and keeps them if they
    are faster.  It returns to one when they no longer are, for example because another process begins to work.

    Args:
        work: The approximate number of floating-point operations in a step.

    Attributes:
        number: The number for the next step.
    """

    def __init__(self, work: float = math.inf) -> None:
        self.number = 1
        self._times: list[float] = []
        self._alone = 0.0  # seconds of a step with one thread, 0 until they are known
        self._together = 0.0  # running mean of the seconds with several threads, 0 until they are kept
        self._settled, self._is_busy = work < LARGE, False

    def saw(self, seconds: float) -> None:
        """Record the time of a step, and choose the number for the next steps."""
        if self._settled or allowed() == 1:
            return
        if self._together:
            self._together += RECENT * (seconds - self._together)
            if self._together > self._alone:
                self.number, self._settled = 1, True
            return
        self._times.append(seconds)
        if len(self._times) < TRIED:
            return
        seen, self._times = self._times[2:], []
        if not self._alone:
            self._alone, self.number = statistics.median(seen), allowed()
        elif max(seen) <= FASTER * self._alone:  # the maximum, since waits are rare: see RECENT
            self._together = statistics.median(seen)
        else:
            self.number, self._settled = 1, True

    @contextlib.contextmanager
    def turn(self, size: int, least: float = 0.0) -> Iterator[None]:
        """Let torch use the number for one step, and record its time; a step within a step changes nothing.

        Args:
            size: The amount of work, in any unit that all steps share.
            least: The amount from which on several threads may help; a smaller step changes nothing.
        """
        if self._is_busy or size < least:
            yield
            return
        self._is_busy, start = True, time.perf_counter()
        try:
            with using(self.number):
                yield
            self.saw((time.perf_counter() - start) / size)
        finally:
            self._is_busy = False


@functools.cache
def keep_memory() -> None:
    """Let blocks of up to 32 MB be used again, which makes steps on hundreds of rows of data up to five times as fast.

    glibc maps large blocks anew each time, so that the system clears each of their pages.  Once it has seen a block
    freed, it keeps blocks up to that size (mallopt(3), M_MMAP_THRESHOLD).  With other C libraries nothing happens.
    """
    torch.empty(LARGEST_BLOCK, dtype=torch.uint8)
