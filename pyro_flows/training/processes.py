"""Several processes that fit as one, each on its share of the rows or draws of every step.

What ``torchrun`` starts joins by itself, and so does what has a group of ``torch.distributed`` already.  Process 0 is
what a single process would be: it reads, draws and writes what there is once only, and the others take that over.
Decisions are taken in all processes from the same numbers, and what fails in one fails in all.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pyro
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..programs.minibatches import Shuffled
from .exchange import Parted as Parted
from .exchange import alone as alone
from .exchange import each as each
from .exchange import end
from .exchange import first as first
from .exchange import meet as meet
from .exchange import rank as rank
from .exchange import reaching as reaching
from .exchange import size as size
from .randomness import random_state, set_random_state

P = ParamSpec("P")
T = TypeVar("T")
_calls: list[str] = []  # the calls that are under way, from the outermost


def together(fit: Callable[P, T]) -> Callable[P, T]:
    """Let a function that fits be one call of all processes, which begins and ends with the same random numbers in
    all; process 0 alone warns, and an error, which names the process that it is of, ends it in all."""

    @functools.wraps(fit)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        _join()
        if alone():
            return fit(*args, **kwargs)
        _calls.append(fit.__name__)
        try:
            as_one()
            with warnings.catch_warnings():
                if rank():
                    warnings.simplefilter("ignore")
                found = fit(*args, **kwargs)
            as_one()
            return found
        except Exception as error:
            if len(_calls) == 1:
                _tell(error)
            end(error, len(_calls))
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
    said = str(error).removeprefix(f"{_calls[0]}: ")
    print(f"{_calls[0]}: process {rank()} of {size()}: {type(error).__name__}: {said}", file=sys.stderr, flush=True)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and isinstance(error, Parted):  # which is no cause, as the first error is, and may be of the same second
        about = {"py_callstack": said, "timestamp": str(int(time.time()) + 1)}
        Path(file).write_text(json.dumps({"message": {"message": f"Parted: {said}", "extraInfo": about}}))
    elif file:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def share(number: int) -> tuple[slice, float]:
    """Which of a number of rows are this process's, and what share of them: one for nothing where it has none."""
    start, stop = number * rank() // size(), number * (rank() + 1) // size()
    if start == stop and size() > 1:
        return slice(0, 1), 0.0
    return slice(start, stop), (stop - start) / number if number else 1.0


def as_one() -> None:
    """Let all processes go on with the random numbers of process 0."""
    if not alone():
        state, on_gpu = first(lambda: (random_state(), _gpu_state()))
        if rank():
            set_random_state(state)
            if on_gpu is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(on_gpu)  # that of the own device, whichever it is


def apart(program: Any = None) -> None:
    """Let all processes but the first go on with random numbers of their own, and with minibatches of their own of the
    rows of a guide's plates."""
    if alone():
        return
    seed = first(lambda: zlib.crc32(torch.get_rng_state().numpy().tobytes()))
    if rank():
        pyro.set_rng_seed((seed + rank()) % 2**32)
        for part in program.modules() if isinstance(program, nn.Module) else ():
            if isinstance(part, Shuffled):
                part.order.resize_(0)


def _gpu_state() -> Tensor | None:
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None


@torch.no_grad()
def spread(tensors: Iterable[Tensor]) -> None:
    """Give all processes the tensors of process 0.

    Raises:
        ValueError: If they have others to put them in.
    """
    own = list({id(tensor): tensor for tensor in tensors}.values())
    if alone():
        return
    new = first(lambda: [tensor.detach().cpu() for tensor in own])
    mine, given = ([tuple(tensor.shape) for tensor in group] for group in (own, new))

    def put() -> None:
        trained = [tensor.requires_grad for tensor in own]
        if len(mine) != len(given) or any(a != b for a, b, t in zip(mine, given, trained, strict=True) if t):
            raise ValueError(f"process 0 trains tensors of the shapes {given[:8]}, process {rank()} {mine[:8]}.")
        if rank():
            for tensor, value in zip(own, new, strict=True):
                (tensor if tensor.shape == value.shape else tensor.resize_(value.shape)).copy_(value)

    each(put)


def agree(caller: str, settings: dict[str, Any], parameters: list[Tensor]) -> None:
    """Refuse processes that do not fit the same, or of which two share a GPU, which nccl cannot serve.

    Raises:
        ValueError: Naming what differs, or the device.
    """
    if alone():
        return
    found = each(lambda: ({name: repr(value) for name, value in settings.items()}, _gpu(parameters)))
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


def _gpu(parameters: list[Tensor]) -> str:
    """Which GPU this process trains on, where nccl adds up."""
    if not parameters[0].is_cuda or "nccl" not in dist.get_backend_config():
        return ""
    return str(torch.cuda.get_device_properties(parameters[0].device).uuid)
