"""Checkpoints: what a run needs to go on as if it had never stopped, in one file that is never half written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..files import save_tensors, write_atomically
from . import processes
from .randomness import random_state, set_random_state

FORMAT = 4
WAY_OUT = "Use the same settings, name another file, or remove this one."


def write(path: Path, state: dict[str, Any], own: tuple[str, ...] = ()) -> None:
    """Put a state, and that of the random numbers, in a file, which takes its place at once or not at all.

    Process 0 does so; beside its state it keeps the random numbers of the others, and those entries that are each
    process's ``own``.
    """
    mine = {name: state[name] for name in own} | {"random": random_state()}
    _, *others = processes.each(lambda: mine)
    content = {"format": FORMAT, **state, **mine, **({"others": others} if others else {})}
    processes.first(lambda: write_atomically(path, lambda draft: save_tensors(content, draft)))


def read(path: Path, settings: dict[str, Any], caller: str = "fit_svi") -> dict[str, Any] | None:
    """The state in a file, with the random numbers set as they were; None where there is no file.

    Process 0 reads for all.  Processes that the file knows nothing of go on from the state of process 0 with random
    numbers of their own.

    Raises:
        ValueError: If the file is no checkpoint, or one of a run with other settings.
    """
    state = processes.first(lambda: _checked(path, settings, caller))
    if state is None:
        return None
    if processes.rank() == 0:
        set_random_state(state["random"])
    processes.apart()
    others = state.pop("others", [])
    if 0 < processes.rank() <= len(others):
        state |= others[processes.rank() - 1]
        set_random_state(state["random"])
    return state


def steps_of(path: Path) -> int | None:
    """How many steps the run in a file was to take, None where there is no file; errors as in :func:`read`."""
    return processes.first(lambda: int(_load(path, "fit_svi")["settings"]["steps"]) if path.exists() else None)


def _checked(path: Path, settings: dict[str, Any], caller: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    state = _load(path, caller)
    kept = state["settings"]
    if kept != settings:
        other = [f"{k}={kept.get(k)!r} and not {v!r}" for k, v in settings.items() if kept.get(k) != v]
        raise ValueError(f"{caller}: checkpoint={str(path)!r} is of another run ({', '.join(other)}). {WAY_OUT}")
    return state


def _load(path: Path, caller: str) -> dict[str, Any]:
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        version, _ = state["format"], state["settings"]["steps"]
    except Exception as error:
        raise ValueError(
            f"{caller}: checkpoint={str(path)!r} is not a checkpoint ({error!s:.100}). {WAY_OUT}"
        ) from error
    if version != FORMAT:
        raise ValueError(f"{caller}: checkpoint={str(path)!r} is of another run (another format). {WAY_OUT}")
    return state
