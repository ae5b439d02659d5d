"""The number of torch's threads that a job uses: as many as make it faster, and at most as many as the user allows.

Threads wait for each other after each operation.  Small operations take longer with two of them than with one, and ten
times as long while another process keeps a core busy.  Small jobs always use one thread, so that their results can be
reproduced.  Public functions begin with one thread; their large parts use more: steps of large networks, and
log-densities of many draws of a model of many rows.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from contextvars import ContextVar

import torch

OPERATIONS = 6  # per draw and weight of a network: a product and a sum, forwards and twice backwards
LARGE = 3e8  # operations of a step, some 10 ms, from which on threads may help
TRIED = 5  # steps of a trial; the first two warm up
FASTER = 0.8  # the ratio of times below which several threads are kept
RECENT = 0.1  # of the running mean: threads that wait for a core do so in few steps, and then long


_allowed: ContextVar[int | None] = ContextVar("threads", default=None)  # None outside of all jobs


def allowed() -> int:
    """Return the number of threads that the user allows, also inside a job that uses fewer."""
    return _allowed.get() or torch.get_num_threads()


@contextlib.contextmanager
def using(number: int) -> Iterator[None]:
    """Let torch use some threads, at most as many as the user allows, and restore the number afterwards."""
    before, token = torch.get_num_threads(), _allowed.set(allowed())
    torch.set_num_threads(min(number, allowed()))
    try:
        yield
    finally:
        _allowed.reset(token)
        torch.set_num_threads(before)


class Threads:
    """The number of threads of a loop: one for small steps, and for others as many as the times of steps say.

    A loop begins with one.  If its steps are large, it tries as many as the user allows, keeps them if they are faster,
    and returns to one when they no longer are, as when another process begins to work.

    Args:
        work: About how many operations of floating point a step takes.

    Attributes:
        number: The number for the next step.
    """

    def __init__(self, work: float = math.inf) -> None:
        self.number = 1
        self._times: list[float] = []
        self._alone = 0.0  # seconds of a step with one thread; 0 until they are known
        self._together = 0.0  # a running mean of those with several; 0 until these are kept
        self._settled, self._is_busy = work < LARGE, False

    def saw(self, seconds: float) -> None:
        """Take note of the time of a step, and choose the number for the next ones."""
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
        elif max(seen) <= FASTER * self._alone:  # all of them: see RECENT
            self._together = statistics.median(seen)
        else:
            self.number, self._settled = 1, True

    @contextlib.contextmanager
    def turn(self, size: int) -> Iterator[None]:
        """Let torch use the number for one step, whose time is taken note of; a step within a step changes nothing.

        Args:
            size: How much there is to do; only its ratio to that of other steps counts.
        """
        if self._is_busy:
            yield
            return
        self._is_busy, start = True, time.perf_counter()
        try:
            with using(self.number):
                yield
            self.saw((time.perf_counter() - start) / size)
        finally:
            self._is_busy = False
