"""Files that a run writes while it trains: tested before it begins, and tried again after a failure.

A checkpoint is the state of a run in one file, from which it resumes to the same end as without the break.
"""

import inspect
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import as_file
from ..atomic_files import save_tensors, try_path, write_atomically
from ..bijectors import Bijector
from ..user_code import warn_user
from . import distributed
from .randomness import random_state, set_random_state

FORMAT = 11
EVERY = 10.0  # seconds


def check_path(caller: str, argument: str, value: Any, ends: str = "") -> Path | None:
    """Return the path of a file that process 0 can write, or None for None.

    Args:
        caller: The public function, for errors.
        argument: Its argument that names the file.
        value: The file.
        ends: The longest suffix that is added to the name.

    Raises:
        TypeError: If the value is not a path.
        ValueError: If the file cannot be written.
    """
    if value is None:
        return None
    path = as_file(caller, argument, value)
    longest = Path(f"{path}{ends}")
    if why := distributed.broadcast(lambda: _why_not(lambda: try_path(longest))):
        more = f" with {ends!r} at its end" if ends else ""
        raise ValueError(f"{caller}: {argument}={str(path)!r} cannot be written{more} ({why}). Name another file.")
    return path


def _why_not(write: Callable[[], object]) -> str:
    """Write a file; return the system's reason if it could not be written, else an empty string."""
    try:
        write()
    except OSError as error:
        return error.strerror or str(error)
    return ""


class Attempts:
    """Attempts of process 0 to write one file while training continues.

    A failure warns once for each reason.  One that lasts to the end warns again.

    Args:
        caller: The public function, for warnings.
        argument: Its argument that names the file.
        path: The file; None to write nothing.
    """

    def __init__(self, caller: str, argument: str, path: Path | None) -> None:
        self.path, self._file = path, f"{caller}: {argument}={str(path)!r}"
        self.problem, self._told = "", set[str]()  # of the last attempt, and those that were warned of

    def attempt(self, write: Callable[[Path], object]) -> None:
        """Write the file, or warn that it could not be written."""
        if (path := self.path) is None or distributed.rank():
            return
        self.problem = _why_not(lambda: write(path))
        if self.problem and self.problem not in self._told:
            self._told.add(self.problem)
            words = f"{self._file} could not be written ({self.problem}). Training goes on, and the file is tried again"
            warn_user(f"{words}; until then it is as it was before.")

    def conclude(self) -> None:
        """Warn if the last attempt failed."""
        if self.problem:
            words = f"{self._file} could not be written at the end ({self.problem})"
            warn_user(f"{words}: it lacks the last part of the training. The fit itself is complete.")


class Checkpoint(Attempts):
    """A file for the state of a run, written at regular times; a full disk does not end the run.

    Args:
        caller: The public function, for errors and warnings.
        path: The file; None to keep nothing.
        settings: The settings that identify the run.
    """

    def __init__(self, caller: str, path: Path | None, settings: dict[str, Any]) -> None:
        super().__init__(caller, "checkpoint", path)
        self._caller, self._settings, self._last = caller, settings, time.perf_counter()

    @property
    def due(self) -> bool:
        """True if it is time to save."""
        return self.path is not None and time.perf_counter() - self._last > EVERY

    def save(self, state: dict[str, Any], own: tuple[str, ...] = ()) -> None:
        """Replace the file by a state and the state of the random numbers, or warn and leave it unchanged.

        The file keeps the random numbers of all processes, and from each the entries of the state named in ``own``.
        """
        if self.path is None:
            return
        mine = {name: state[name] for name in own} | {"random": random_state()}
        _, *others = distributed.all_gather(lambda: mine)
        content = {"format": FORMAT, "settings": self._settings, **state, **mine, "others": others}
        self.attempt(lambda path: write_atomically(path, lambda draft: save_tensors(content, draft)))
        self._last = time.perf_counter()

    def read(self) -> dict[str, Any] | None:
        """Return the state in the file, or None if there is no file, and set the random numbers to it.

        Process 0 reads for all.  Processes that are not in the file take the state of process 0 and a new seed.

        Raises:
            ValueError: If the file is not a checkpoint, or is one of a run with other settings.
        """
        state = distributed.broadcast(lambda: _load(self.path, self._caller, self._settings))
        if state is None:
            return None
        set_random_state(state["random"])
        distributed.seed()
        if 0 < (rank := distributed.rank()) <= len(state["others"]):
            state |= state["others"][rank - 1]
            set_random_state(state["random"])
        return state


def settings_of(path: Path) -> dict[str, Any] | None:
    """Return the settings of the run in a file, None if there is no file; errors as in :class:`Checkpoint`."""
    return distributed.broadcast(lambda: (_load(path, "fit_svi") or {}).get("settings"))


def _load(path: Path | None, caller: str, settings: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the state in a file, None if there is no file; raise ValueError if it has other settings."""
    if path is None or not path.exists():
        return None
    fault, way, cause = "", "Use the same settings, name another file, or remove this one.", None
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        kept = state["settings"]
        if state["format"] != FORMAT:
            fault = "was written by another version of pyro_flows"
            way = "Resume it with that version, name another file, or remove this one."
        elif "steps" not in kept:
            fault = "is not a checkpoint (it has no settings)"
        elif settings is not None and kept != settings:
            other = [f"{k}={kept.get(k)!r} and not {v!r}" for k, v in settings.items() if kept.get(k) != v]
            fault = f"is of another run ({', '.join(other)})"
    except Exception as error:
        fault, cause = f"is not a checkpoint ({error!s:.100})", error
    if fault:
        raise ValueError(f"{caller}: checkpoint={str(path)!r} {fault}. {way}") from cause
    return state


def fingerprint(data: tuple[Any, ...]) -> list[str]:
    """Return words that identify a dataset: checksums of tensors, and numbers and strings unchanged."""
    found = []
    for value in data:
        if isinstance(value, Tensor):
            found.append(f"{zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes()):08x}")
        elif isinstance(value, int | float | str):
            found.append(repr(value))
    return found


def design(model: nn.Module) -> str:
    """Return a checksum of the classes in a module and of their settings.

    It tells modules apart whose parameters have the same shapes.  The settings are the arguments of a constructor that
    the object keeps as attributes.
    """
    found = [(name, type(part).__qualname__, kept_settings(part)) for name, part in model.named_modules()]
    return f"{zlib.crc32(repr(found).encode()):08x}"


def kept_settings(part: object) -> dict[str, Any]:
    """Return the arguments of an object's constructor that it keeps as attributes, if they are plain values."""
    kept = {name: getattr(part, name, None) for name in inspect.signature(type(part)).parameters}
    plain = bool | int | float | str | tuple | type | Bijector
    return {name: value for name, value in kept.items() if isinstance(value, plain)}
