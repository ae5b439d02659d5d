"""Checkpoints: what a run needs to go on as if it had never stopped, in one file that is never half written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from ..atomic_files import save_tensors, write_atomically
from . import distributed
from .output_files import Attempts, why_not
from .randomness import random_state, set_random_state
from .state import Run

FORMAT = 4
EVERY = 10.0  # seconds
WAY_OUT = "Use the same settings, name another file, or remove this one."


class Saver(Attempts):
    """Keep the state of a run in a file, as often as is due; a disk that is full does not end the run.

    Args:
        caller: The public function that asks, for warnings.
        path: The file; without one nothing is kept.
        settings: What tells this run from another.
    """

    def __init__(self, caller: str, path: Path | None, settings: dict[str, Any]) -> None:
        super().__init__(caller, "checkpoint", path or Path())
        self._path, self._settings, self._last = path, settings, time.perf_counter()

    @property
    def due(self) -> bool:
        """True if it is time to save."""
        return time.perf_counter() - self._last > EVERY

    @property
    def holds(self) -> bool:
        """True if the file holds the state that was saved last."""
        return self._path is not None and not self.problem

    def save(self, run: Run) -> None:
        """Write the state of a run, or warn that it could not be written."""
        if self._path is not None:
            self.note(write(self._path, {"settings": self._settings, **run.state_dict()}, run.own))
            self._last = time.perf_counter()


def write(path: Path, state: dict[str, Any], own: tuple[str, ...] = ()) -> str:
    """Put a state, and that of the random numbers, in a file, which takes its place at once or not at all.

    Process 0 does so; beside its state it keeps the random numbers of the others, and those entries that are each
    process's ``own``.

    Returns:
        Why the file could not be written, in all processes; nothing where it was.
    """
    mine = {name: state[name] for name in own} | {"random": random_state()}
    _, *others = distributed.all_gather(lambda: mine)
    content = {"format": FORMAT, **state, **mine, **({"others": others} if others else {})}
    return distributed.broadcast(
        lambda: why_not(lambda: write_atomically(path, lambda draft: save_tensors(content, draft)))
    )


def read(path: Path, settings: dict[str, Any], caller: str = "fit_svi") -> dict[str, Any] | None:
    """The state in a file, with the random numbers set as they were; None where there is no file.

    Process 0 reads for all.  Processes that the file knows nothing of go on from the state of process 0 with random
    numbers of their own.

    Raises:
        ValueError: If the file is no checkpoint, or one of a run with other settings.
    """
    state = distributed.broadcast(lambda: _load(path, caller, settings) if path.exists() else None)
    if state is None:
        return None
    if distributed.rank() == 0:
        set_random_state(state["random"])
    distributed.seed()
    others = state.pop("others", [])
    if 0 < distributed.rank() <= len(others):
        state |= others[distributed.rank() - 1]
        set_random_state(state["random"])
    return state


def steps_of(path: Path) -> int | None:
    """How many steps the run in a file was to take, None where there is no file; errors as in :func:`read`."""
    return distributed.broadcast(lambda: int(_load(path, "fit_svi")["settings"]["steps"]) if path.exists() else None)


def _load(path: Path, caller: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the state in a file; refuse one of other settings, where some are given."""

    def refused(words: str) -> ValueError:
        return ValueError(f"{caller}: checkpoint={str(path)!r} is {words}. {WAY_OUT}")

    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        version, kept, _ = state["format"], state["settings"], state["settings"]["steps"]
    except Exception as error:
        raise refused(f"not a checkpoint ({error!s:.100})") from error
    if version != FORMAT:
        raise refused("of another run (another format)")
    if settings is not None and kept != settings:
        other = [f"{k}={kept.get(k)!r} and not {v!r}" for k, v in settings.items() if kept.get(k) != v]
        raise refused(f"of another run ({', '.join(other)})")
    return state
