"""Errors of a user's program in words, and warnings at the user's line."""

from __future__ import annotations

import linecache
import sys
import traceback
import warnings
from pathlib import Path
from types import FrameType

INNER = {"pyro", "torch", __name__.partition(".")[0], *sys.stdlib_module_names} - {"__main__"}


def quoted(error: BaseException) -> str:
    """Return an error's place, kind and message: ``models.py:7, `assert x.dim() == 1`: AssertionError``.

    An error without a line of the user's, for example from a log-density, has only kind and message.
    """
    words = " ".join(str(error).partition("Trace Shapes:")[0].split())
    place = place_of(error)
    return f"{f'{place}: ' if place else ''}{type(error).__name__}{f': {words:.300}' if words else ''}"


def place_of(error: BaseException) -> str:
    """Return an error's innermost line outside Python's library, torch, Pyro and this package, or an empty string."""
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        if not _is_inner(frame):
            file = frame.f_code.co_filename
            line = linecache.getline(file, number, frame.f_globals).strip()
            return f"{Path(file).name}:{number}{f', `{line}`' if line else ''}"
    return ""


def warn_user(message: str) -> None:
    """Warn at the user's line that called this package."""
    frames = enumerate(traceback.walk_stack(sys._getframe()), 1)
    warnings.warn(message, stacklevel=next((level for level, (frame, _) in frames if not _is_inner(frame)), 1))


def _is_inner(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in INNER
