"""Files that a run writes while it trains: tested before it begins, and tried again after a failure."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..arguments import as_path
from ..atomic_files import try_path
from . import distributed


def check_path(caller: str, argument: str, value: Any, ends: str = "") -> Path | None:
    """Return the path of a file that process 0 can write, or None for None.

    Args:
        caller: The public function, for errors.
        argument: Its argument that names the file.
        value: The file.  A folder is accepted without ``ends``; the reader of the file refuses it.
        ends: The longest suffix that is added to the name.

    Raises:
        TypeError: If the value is not a path.
        ValueError: If the file cannot be written.
    """
    path = as_path(caller, argument, value)
    if path is None:
        return None

    def problem() -> str:
        if not os.path.isdir(path.parent):  # Path.is_dir raises for names that are too long
            return "lies in a folder that does not exist."
        if os.path.isdir(path) and not ends:
            return ""
        if why := _why_not(lambda: try_path(path.with_name(f"{path.name}{ends}"))):
            longest = f" with {ends!r} at its end" if ends else ""
            return f"cannot be written{longest} ({why}). Name another file."
        return ""

    if words := distributed.broadcast(problem):
        raise ValueError(f"{caller}: {argument}={os.fspath(path)!r} {words}")
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

    The first failure warns, and each failure for a new reason.  A failure that lasts to the end warns again.

    Args:
        caller: The public function, for warnings.
        argument: Its argument that names the file.
        path: The file; None to write nothing.
    """

    def __init__(self, caller: str, argument: str, path: Path | None) -> None:
        self.path, self._file = path, f"{caller}: {argument}={str(path)!r}"
        self._told: set[str] = set()
        self.problem = ""  # of the last attempt

    def attempt(self, write: Callable[[Path], object]) -> None:
        """Write the file, or warn that it could not be written."""
        if (path := self.path) is None or distributed.rank():
            return
        self.problem = _why_not(lambda: write(path))
        if self.problem and self.problem not in self._told:
            self._told.add(self.problem)
            warnings.warn(
                f"{self._file} could not be written ({self.problem}). Training goes on, and the file is tried again; "
                "until then it is as it was before.",
                stacklevel=3,
            )

    def conclude(self) -> None:
        """Warn if the last attempt failed."""
        if self.problem:
            warnings.warn(
                f"{self._file} could not be written at the end ({self.problem}): it lacks the last part of the "
                "training. The fit itself is complete.",
                stacklevel=3,
            )
