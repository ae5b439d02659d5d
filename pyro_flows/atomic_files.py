"""Files that are written whole or not at all.

A file is written as a draft in the folder of its target, forced to the disk, and renamed.  Drafts of killed writers are
removed after a day, by the next writer.
"""

import contextlib
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DRAFT = re.compile(r"draft-[0-9a-f]{16}\.part")
LONGEST_SUFFIX = 16  # bytes; drafts keep a suffix, by which writers know the format
ABANDONED = 86_400.0  # seconds, after which a draft has no writer


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Write a draft and rename it to ``path``, so that readers see the old file or the new one.

    A symbolic link stays, and the file that it points to is replaced.  A file that exists keeps its mode.

    Args:
        path: The file.
        write: Writes a file, given its name, which has the suffix of ``path``.

    Raises:
        OSError: If the file cannot be written; then nothing has changed.
    """
    target = _target_of(path)
    _remove_abandoned(target.parent)
    before = target.stat() if target.exists() else None
    with _draft_for(target, 0o666 if before is None else 0o600) as draft:
        write(str(draft))
        if before is not None:
            _liken(draft, before)
        _to_disk(draft)
        os.replace(draft, target)
        with contextlib.suppress(OSError):  # not every file system can sync a folder
            _to_disk(target.parent)


def try_path(path: Path) -> None:
    """Raise the OSError that prevents a file from being written; the file itself stays as before."""
    target = _target_of(path)
    _remove_abandoned(target.parent)
    with _draft_for(target, 0o600):
        pass


def save_tensors(content: Any, file: str) -> None:
    """Call ``torch.save``, so that a full disk raises an OSError in place of an error of torch.

    Raises:
        OSError: If the file cannot be written.
    """
    import torch  # here, since it is slow to import

    try:
        with open(file, "wb") as stream:  # given a name, torch would not say why it could not write
            torch.save(content, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch fails once more as it ends the file
            raise error.__context__ from None
        raise


def _target_of(path: Path) -> Path:
    """Return the file of a path, after following its symbolic links.

    Raises:
        OSError: If no file can be written there.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        if not target.parent.is_dir():
            words = f"there is no folder {str(target.parent)!r} to write {target.name!r} into"
            raise FileNotFoundError(words) from None
        return target
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe, and not a file", str(path))
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "it is write-protected", str(path))
    return target


@contextlib.contextmanager
def _draft_for(target: Path, mode: int) -> Iterator[Path]:
    """Make an empty file in the folder of a target, under a unique name, and remove it afterwards if it is left."""
    suffix = target.suffix if len(os.fsencode(target.suffix)) <= LONGEST_SUFFIX else ""
    draft = target.with_name(f"draft-{secrets.token_hex(8)}.part{suffix}")
    try:
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove drafts that are a day old, since their writers were killed."""
    with contextlib.suppress(OSError):
        for draft in folder.iterdir():
            if DRAFT.match(draft.name) and time.time() - draft.stat().st_mtime > ABANDONED:
                draft.unlink(missing_ok=True)


def _liken(file: Path, other: os.stat_result) -> None:
    """Give a file the mode of another and, if the system allows it, the owner."""
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(file, other.st_uid, other.st_gid)
    os.chmod(file, stat.S_IMODE(other.st_mode))


def _to_disk(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
