"""Several processes that fit as one, each on its share of the rows or draws of every step.

What ``torchrun`` starts joins by itself, and so does what has a group of ``torch.distributed`` already.  Process 0 is
what a single process would be: it reads, draws and writes what there is once only, and the others take that over.

Decisions are taken in all processes from the same numbers, and what fails in one fails in all.  Each exchange begins
with an all-reduce of one flag, by which a process says that it has failed.  One that fails between two exchanges says
so as it leaves the call: the others hear of it in their next exchange.  So none waits for another in vain, unless that
is killed, interrupted before the first step, or goes on without the call.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pickle
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import pyro
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..programs.minibatches import Shuffled
from .randomness import random_state, set_random_state

P = ParamSpec("P")
T = TypeVar("T")
PATIENCE = 10.0  # seconds that a process waits for the launcher to end it, after another has failed


class Parted(RuntimeError):
    """Another process has failed or has gone, so that this one cannot go on.

    Attributes:
        refused: Whether all that has failed there was a ``ValueError`` or ``FloatingPointError``.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


@dataclass
class _Call:
    """A call of all processes.

    Attributes:
        name: The function.
        told: The error that all processes know of, or that says that one of them cannot be reached.
    """

    name: str
    told: Exception | None = None


_calls: list[_Call] = []  # those under way, from the outermost


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def alone() -> bool:
    """True if this is the only process."""
    return size() == 1


def collective(fit: Callable[P, T]) -> Callable[P, T]:
    """Let a function that fits be one call of all processes, which begins and ends with the same random numbers in
    all; process 0 alone warns, and an error, which names the process that it is of, ends it in all."""

    @functools.wraps(fit)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        _join()
        if alone():
            return fit(*args, **kwargs)
        own = _Call(fit.__name__)
        _calls.append(own)
        try:
            sync()
            with warnings.catch_warnings():
                if rank():
                    warnings.simplefilter("ignore")
                found = fit(*args, **kwargs)
            sync()
            return found
        except Exception as error:
            if len(_calls) == 1:
                _tell(error)
            if error is not own.told:
                with contextlib.suppress(Exception):
                    barrier(error)
            raise
        finally:
            _calls.pop()

    return call


def _join() -> None:
    """Make the group that a launcher has started processes for, unless there is one."""
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ
    if not launched or not dist.is_available() or dist.is_initialized():
        return
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    atexit.register(dist.destroy_process_group)


def _tell(error: Exception) -> None:
    """Write which process an error is of, for people and for the launcher's summary."""
    atexit.unregister(dist.destroy_process_group)  # it would wait for the others
    name = _calls[0].name
    said = str(error).removeprefix(f"{name}: ")
    print(f"{name}: process {rank()} of {size()}: {type(error).__name__}: {said}", file=sys.stderr, flush=True)
    if isinstance(error, Parted):
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            Path(file).unlink(missing_ok=True)  # an earlier error, which the program has survived
        atexit.register(_wait_for_the_launcher)
    else:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _wait_for_the_launcher() -> None:
    """After an error that another process has caused, let the launcher find that process first, and end this one."""
    if isinstance(getattr(sys, "last_value", None), Parted):
        time.sleep(PATIENCE)


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """Say plainly where other processes cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        parted = Parted(f"another process has ended, see what it says, or cannot be reached ({why:.200})")
        raise _told(parted) from error


def _told(error: Exception) -> Exception:
    """Mark an error as one that the other processes need not be told of."""
    if _calls:
        _calls[-1].told = error
    return error


def barrier(failure: Exception | None = None) -> None:
    """Wait for all processes, as each exchange begins; where one has failed, all do.

    Raises:
        Exception: That of this process.
        Parted: If another process has failed, with what it says.
    """
    device = "cpu" if "cpu:" in dist.get_backend_config() else "cuda"
    flag = torch.tensor(failure is not None, dtype=torch.long, device=device)
    refused = getattr(failure, "refused", isinstance(failure, ValueError | FloatingPointError))
    said: list[Any] = [None] * size()
    with reaching():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if not flag:
            return
        dist.all_gather_object(said, (f"{type(failure).__name__}: {failure}", refused) if failure else None)
    if failure:
        raise _told(failure)
    failed = {number: found for number, found in enumerate(said) if found}
    number, (problem, _) = next(iter(failed.items()))
    message = f"process {number} of {size()} has failed: {problem}"
    raise _told(Parted(message, refused=all(others for _, others in failed.values())))


def _packed(make: Callable[[], T]) -> tuple[T, bytes]:
    """Return what is made here, and as others are told of it; where either fails, all processes do."""
    try:
        made = make()
        packed = pickle.dumps(made)
    except Exception as error:
        barrier(error)
        raise
    barrier()
    return made, packed


def all_gather(make: Callable[[], T]) -> list[T]:
    """Return what each process makes, in all of them; where one fails, all do."""
    if alone():
        return [make()]
    _, packed = _packed(make)
    found: list[Any] = [None] * size()
    with reaching():
        dist.all_gather_object(found, packed)
    return [pickle.loads(made) for made in found]


def broadcast(make: Callable[[], T]) -> T:
    """Return what process 0 makes, in all of them; the others make nothing; where it fails, all do."""
    if alone():
        return make()
    made, packed = _packed(make if rank() == 0 else lambda: cast(T, None))
    found: list[Any] = [packed]
    with reaching():
        dist.broadcast_object_list(found)
    return made if rank() == 0 else cast(T, pickle.loads(found[0]))


def share(number: int) -> tuple[slice, float]:
    """Which of a number of rows are this process's, and what share of them: one for nothing where it has none."""
    start, stop = number * rank() // size(), number * (rank() + 1) // size()
    if start == stop and size() > 1:
        return slice(0, 1), 0.0
    return slice(start, stop), (stop - start) / number if number else 1.0


def sync() -> None:
    """Let all processes go on with the random numbers of process 0."""
    if not alone():
        state, on_gpu = broadcast(
            lambda: (random_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None)
        )
        if rank():
            set_random_state(state)
            if on_gpu is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(on_gpu)  # that of the own device, whichever it is


def seed(program: Any = None) -> None:
    """Let all processes but the first go on with random numbers of their own, and with minibatches of their own of the
    rows of a guide's plates."""
    if alone():
        return
    seed = broadcast(lambda: zlib.crc32(torch.get_rng_state().numpy().tobytes()))
    if rank():
        pyro.set_rng_seed((seed + rank()) % 2**32)
        for part in program.modules() if isinstance(program, nn.Module) else ():
            if isinstance(part, Shuffled):
                part.order.resize_(0)


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Give all processes the tensors of process 0.

    Raises:
        ValueError: If they have others to put them in.
    """
    own = list({id(tensor): tensor for tensor in tensors}.values())
    if alone():
        return
    new = broadcast(lambda: [tensor.detach().cpu() for tensor in own])
    mine, given = ([tuple(tensor.shape) for tensor in group] for group in (own, new))

    def put() -> None:
        trained = [tensor.requires_grad for tensor in own]
        if len(mine) != len(given) or any(a != b for a, b, t in zip(mine, given, trained, strict=True) if t):
            raise ValueError(f"process 0 trains tensors of the shapes {given[:8]}, process {rank()} {mine[:8]}.")
        if rank():
            for tensor, value in zip(own, new, strict=True):
                (tensor if tensor.shape == value.shape else tensor.resize_(value.shape)).copy_(value)

    all_gather(put)


def agree(caller: str, settings: dict[str, Any], parameters: list[Tensor]) -> None:
    """Refuse processes that do not fit the same, or of which two share a GPU, which nccl cannot serve.

    Raises:
        ValueError: Naming what differs, or the device.
    """
    if alone():
        return
    device, gpu = parameters[0].device, ""
    if device.type == "cuda" and "nccl" in dist.get_backend_config():
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    found = all_gather(lambda: ({name: repr(value) for name, value in settings.items()}, gpu))
    for number, (others, _) in enumerate(found):
        if differ := [name for name, value in found[0][0].items() if others.get(name) != value]:
            raise ValueError(
                f"{caller}: processes 0 and {number} are to fit different things (their {', '.join(differ)}). All must "
                "run the same script on the same data; where it makes data up, let it set a seed first."
            )
    gpus = [gpu for _, gpu in found if gpu]
    if len(set(gpus)) < len(gpus):
        raise ValueError(
            f"{caller}: two processes train on one GPU. Give each its own: `torchrun --virtual-local-rank ...`, or "
            'torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) before the flow or guide is put on "cuda".'
        )
