"""Several processes that fit together, each on its share of the rows or draws of every step.

Processes that ``torchrun`` starts join a group by themselves; an existing group of ``torch.distributed`` is used.
Process 0 reads, draws and writes whatever exists only once, and sends it to the others.

All processes decide from the same numbers.  Each exchange begins with an all-reduce of one flag.  A process that fails
raises the flag when it leaves the call, so the others fail in their next exchange and none waits forever.  A process
that is killed, or that leaves the call without an error, is for ``torchrun`` to notice.
"""

import atexit
import contextlib
import functools
import os
import pickle
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import pyro
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..programs.plate_rows import Shuffled
from .randomness import random_state, set_random_state

T = TypeVar("T")
PATIENCE = 10.0  # seconds that a process waits for torchrun to end it, after another one has failed


class Parted(RuntimeError):
    """Another process has failed or ended, so this process cannot continue."""


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


@contextlib.contextmanager
def collective(caller: str) -> Iterator[None]:
    """Make a function one call of all processes.

    Random numbers are synchronised before and after the call.  Process 0 alone warns.  An error in one process ends the
    call in all.

    Args:
        caller: The public function, for errors.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ
    if launched and dist.is_available() and not dist.is_initialized():
        on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        if on_gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    if size() == 1:
        yield
        return
    atexit.unregister(_leave)  # registered once, whoever made the group
    atexit.register(_leave)
    try:
        sync()
        with warnings.catch_warnings():
            if rank():
                warnings.simplefilter("ignore")
            yield
        sync()
    except Exception as error:
        if not (isinstance(error, Parted) or getattr(error, "is_announced", False)):
            error.is_announced = True  # type: ignore[attr-defined]
            said = f"{type(error).__name__}: {str(error).removeprefix(f'{caller}: ')}"
            print(f"{caller}: process {rank()} of {size()}: {said}", file=sys.stderr, flush=True)
            with contextlib.suppress(Parted):  # no other process can be reached
                barrier(error)
        raise


def _leave() -> None:
    """Leave the group as the program ends, in such a way that torchrun names the process that failed first."""
    error = getattr(sys, "last_value", None)
    if isinstance(error, Parted):
        time.sleep(PATIENCE)  # torchrun blames the process that ends first
    elif isinstance(error, Exception):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        try:
            raise error
        except Exception:  # the handler records the traceback of the exception that is being handled
            get_error_handler().record_exception(error)
    elif dist.is_initialized():  # after an error it would wait for the others
        dist.destroy_process_group()


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """Raise ``Parted`` if other processes cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        words = f"another process has ended, see its own message, or cannot be reached ({why:.200})"
        raise Parted(words) from error


def barrier(failure: Exception | None = None) -> None:
    """Wait for all processes, and fail if one of them has failed; each exchange begins with it.

    Args:
        failure: The error of this process.

    Raises:
        Parted: If another process has failed; the message quotes its error.
    """
    device = "cpu" if "cpu:" in dist.get_backend_config() else "cuda"
    flag = torch.tensor(failure is not None, dtype=torch.long, device=device)
    said: list[Any] = [None] * size()
    with reaching():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if not flag:
            return
        dist.all_gather_object(said, f"{type(failure).__name__}: {failure}" if failure else None)
    if failure is None:
        number, problem = next((number, found) for number, found in enumerate(said) if found)
        raise Parted(f"process {number} of {size()} has failed: {problem}")


def all_gather(make: Callable[[], T]) -> list[T]:
    """Return the values that all processes make, in all of them."""
    mine = make()
    return [broadcast(lambda: mine, source) for source in range(size())]


def broadcast(make: Callable[[], T], source: int = 0) -> T:
    """Return the value that one process makes, in all processes; the others do not call ``make``."""
    if size() == 1:
        return make()
    made = make() if rank() == source else None
    packed = [pickle.dumps(made)]  # before the barrier, so that a failure here is announced there
    barrier()
    with reaching():
        dist.broadcast_object_list(packed, source)
    return cast(T, made if rank() == source else pickle.loads(packed[0]))


@torch.no_grad()
def add_up(parameters: list[Tensor], loss: Tensor, share: float | None, flags: list[bool]) -> tuple[Tensor, list[bool]]:
    """Replace gradients by their weighted sum over all processes, or None if no process has one.

    One all-reduce of one flat vector serves parameters of modules and of Pyro's store, and objectives that fill in
    gradients themselves.  The vector also holds the loss and the flags, so that all processes skip, save and stop at
    the same steps.

    Args:
        parameters: The tensors with gradients.
        loss: The loss of this process.
        share: The weight of this process; None if all have the same.
        flags: Flags of this process.

    Returns:
        The weighted sum of the losses, and for each flag True if a process has raised it.
    """
    if size() == 1:
        return loss.reshape(()), flags  # it is read by the caller, who reads all numbers of a step at once
    barrier()
    # The dtype of the parameters, because that of a loss that failed may differ between processes.
    dtype = functools.reduce(torch.promote_types, {parameter.dtype for parameter in parameters})
    gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in parameters]
    parts = [gradient.reshape(-1).to(dtype) for gradient in gradients]
    own = torch.cat([*parts, loss.reshape(1).to(parts[0].device, dtype)]).mul_(1 / size() if share is None else share)
    raised = torch.tensor([*flags, *(parameter.grad is not None for parameter in parameters)])
    flat = torch.cat((own, raised.to(own)))
    with reaching():
        dist.all_reduce(flat)
    *sums, rest = flat.split([*(len(part) for part in parts), 1 + len(raised)])
    counts = rest[1:].tolist()
    for parameter, part, count in zip(parameters, sums, counts[len(flags) :], strict=True):
        parameter.grad = part.reshape(parameter.shape).to(parameter.dtype) if count else None
    return rest[0], [count > 0 for count in counts[: len(flags)]]


def share(number: int) -> tuple[slice, float]:
    """Return which of a number of rows belong to this process, and their share of all.

    A process without rows gets one row, with the share 0.
    """
    start, stop = number * rank() // size(), number * (rank() + 1) // size()
    if start == stop and size() > 1:
        return slice(0, 1), 0.0
    return slice(start, stop), (stop - start) / number if number else 1.0


def once(make: Callable[[], T]) -> T:
    """Return the value that process 0 makes, in all processes, with its random numbers."""
    found = broadcast(make)
    sync()
    return found


def sync() -> None:
    """Set the random numbers of all processes to those of process 0."""
    on_gpu = torch.cuda.is_available()
    state, current = broadcast(lambda: (random_state(), torch.cuda.get_rng_state() if on_gpu else None))
    if rank():
        set_random_state(state)
        if current is not None and on_gpu:
            torch.cuda.set_rng_state(current)  # of this process's own device, which has another number


def seed(program: Any = None) -> None:
    """Seed each process but the first differently, and let it shuffle the rows of a guide's plates anew."""
    seed = broadcast(lambda: zlib.crc32(torch.get_rng_state().numpy().tobytes()))
    if rank():
        pyro.set_rng_seed((seed + rank()) % 2**32)
        for part in program.modules() if isinstance(program, nn.Module) else ():
            if isinstance(part, Shuffled):
                part.order.resize_(0)


@torch.no_grad()
def fill(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Set tensors to values; tensors without gradients also take the shapes of their values."""
    for tensor, value in zip(tensors, values, strict=True):
        (tensor if tensor.shape == value.shape else tensor.resize_(value.shape)).copy_(value)


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Set the tensors of all processes to those of process 0; tensors without gradients may change their shapes."""
    if size() == 1:
        return
    own = list({id(tensor): tensor for tensor in tensors}.values())
    new = broadcast(lambda: [tensor.detach().cpu() for tensor in own])
    if rank():
        fill(own, new)


def agree(caller: str, settings: dict[str, Any], tensors: Sequence[Tensor]) -> None:
    """Check that all processes fit the same, and set their tensors to those of process 0.

    Raises:
        ValueError: In all processes, if they do not; the error names what differs, or the way out.
    """
    if size() == 1:
        return
    first, *others = all_gather(lambda: {name: repr(value) for name, value in settings.items()})
    for number, other in enumerate(others, 1):
        if differ := [name for name, value in first.items() if other.get(name) != value]:
            raise ValueError(
                f"{caller}: processes 0 and {number} are to fit different things (their {', '.join(differ)}). Run the "
                "same script on the same data in all. If it generates data, set a seed first."
            )
    broadcast_tensors(tensors)
