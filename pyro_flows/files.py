"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Let ``write`` fill a file beside ``path`` that then takes its place: no half-written file is ever seen."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into")
    # The name keeps its end, by which writers know the format, and begins with no dot, which torch's would not take.
    draft = path.with_name(f"draft-{os.getpid()}-{path.name}")
    try:
        write(str(draft))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
