"""The user's own lines of code: where an error arose, and where a warning belongs."""

import linecache
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

INNER = {"pyro", "torch", __name__.partition(".")[0], *sys.stdlib_module_names} - {"__main__"}


def place_of(error: BaseException) -> str:
    """Return an error's innermost line outside Python's library, torch, Pyro and this package, or an empty string."""
    return _innermost(reversed(list(traceback.walk_tb(error.__traceback__))))


def place_now() -> str:
    """Return the innermost line of the user's that is being run, or an empty string."""
    return _innermost(traceback.walk_stack(sys._getframe()))


def _innermost(frames: Iterable[tuple[FrameType, int]]) -> str:
    for frame, number in frames:
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
