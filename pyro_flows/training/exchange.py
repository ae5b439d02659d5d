"""What processes tell each other, so that what fails in one fails in all.

As each exchange begins, processes say whether they have failed; one that has says so until all have left the call.  So
none waits for another in vain, wherever that fails, unless it is killed, interrupted before the first step, or goes on
without the call.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")
WITHIN = 1_000_000  # the depth of the call that ends where none does


class Parted(RuntimeError):
    """Another process has failed or has gone, so that this one cannot go on.

    Attributes:
        gone: Whether it cannot be reached.
        refused: Whether all that has failed there was a ``ValueError`` or ``FloatingPointError``.
    """

    def __init__(self, message: str, *, gone: bool = False, refused: bool = False) -> None:
        super().__init__(message)
        self.gone, self.refused = gone, refused


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def alone() -> bool:
    """Whether this is the only process."""
    return size() == 1


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """Say plainly where other processes cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"another process has ended, see what it says, or cannot be reached ({why:.200})"
        raise Parted(message, gone=True) from error


def refused(error: Exception) -> bool:
    """Whether a fit was refused, or found to be none, in this process or in others."""
    return error.refused if isinstance(error, Parted) else isinstance(error, ValueError | FloatingPointError)


def _heard(failure: Exception | None, depth: int) -> tuple[list[tuple[str, bool]], int]:
    """What each process has failed with, if it has, and at the end of how deep a call the furthest from it is."""
    device = "cpu" if "cpu:" in dist.get_backend_config() else "cuda"
    flags = torch.tensor([failure is not None, depth], dtype=torch.long, device=device)
    own = (f"{type(failure).__name__}: {failure}", refused(failure)) if failure else ("", True)
    said: list[Any] = [own] * size()
    with reaching():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        failed, furthest = flags.tolist()
        if failed:
            dist.all_gather_object(said, own)
    return said, furthest


def meet(failure: Exception | None = None) -> None:
    """Wait for all processes, as each exchange begins; where one has failed, all do.

    Raises:
        Exception: That of this process.
        Parted: If another process has failed, with what it says.
    """
    said, _ = _heard(failure, WITHIN)
    if failure:
        raise failure
    for number, (problem, _) in enumerate(said):
        if problem:
            message = f"process {number} of {size()} has failed: {problem}"
            raise Parted(message, refused=all(refused for _, refused in said))


def end(error: Exception, depth: int) -> None:
    """Let a call of some depth, which has failed here, fail in all: wait until all have left it or are about to."""
    with contextlib.suppress(Parted):
        while not getattr(error, "gone", False) and _heard(error, depth)[1] > depth:
            pass


def _packed(make: Callable[[], T]) -> tuple[T, bytes]:
    """What is made here, and as others are told of it; where either fails, all processes do."""
    try:
        made = make()
        packed = pickle.dumps(made)
    except Exception as error:
        meet(error)
        raise
    meet()
    return made, packed


def each(make: Callable[[], T]) -> list[T]:
    """What each process makes, in all of them; where one fails, all do."""
    if alone():
        return [make()]
    _, packed = _packed(make)
    found: list[Any] = [None] * size()
    with reaching():
        dist.all_gather_object(found, packed)
    return [pickle.loads(made) for made in found]


def first(make: Callable[[], T]) -> T:
    """What process 0 makes, in all of them; the others make nothing; where it fails, all do."""
    if alone():
        return make()
    made, packed = _packed(make if rank() == 0 else lambda: cast(T, None))
    found: list[Any] = [packed]
    with reaching():
        dist.broadcast_object_list(found)
    return made if rank() == 0 else cast(T, pickle.loads(found[0]))
