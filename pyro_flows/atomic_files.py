"""Files that are written whole or not at all.

A file is written as a draft in the folder of its target, forced to the disk, and renamed.  Beside each draft lies a
lock that its writer holds, so that the drafts of killed writers can be told from those of live ones, and removed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

try:
    import fcntl
except ImportError:  # as on Windows, where drafts of killed writers stay
    fcntl = None  # type: ignore[assignment]

LOCK = re.compile(r"draft-([0-9a-f]{8})-[0-9a-f]{16}\.lock")
LONGEST_SUFFIX = 16  # bytes of a name's end that a draft keeps, by which writers know the format
ABANDONED = 86_400.0  # seconds after which an unlocked draft of another machine has no writer


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Write a draft beside ``path`` and let it take the place of ``path``; readers see the old file or the new one.

    A symbolic link stays, and the file that it points to is replaced.  A file that exists keeps its mode.

    Args:
        path: The file.
        write: Writes a file, given its name, which ends as the name of ``path`` does.

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
        with contextlib.suppress(OSError):  # some file systems cannot
            _to_disk(target.parent)


def try_path(path: Path) -> None:
    """Raise the OSError that would keep a file from being written, without touching it."""
    target = _target_of(path)
    _remove_abandoned(target.parent)
    with _draft_for(target, 0o600):
        pass


def save_tensors(content: Any, file: str) -> None:
    """Call ``torch.save``, where a full disk is an OSError and no error of torch's own.

    Raises:
        OSError: If the file cannot be written.
    """
    import torch  # here, as what merely writes files need not wait for it

    errors: list[OSError] = []  # torch would hide the first behind one of its own
    with open(file, "wb") as stream:

        def write(data: bytes) -> int:
            try:
                return len(data) if errors else stream.write(data)
            except OSError as error:
                errors.append(error)
                return len(data)

        torch.save(content, cast("IO[bytes]", SimpleNamespace(write=write, flush=stream.flush)))
        if errors:
            raise errors[0]


def _target_of(path: Path) -> Path:
    """Return the file that a path stands for, its symbolic links followed.

    Raises:
        OSError: If no file can be written there.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        if os.path.islink(target):  # realpath leaves a circle of links as it is
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None
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
    """Make an empty file beside a target, of a name that no other writer has; remove what is left of it afterwards."""
    suffix = target.suffix if len(os.fsencode(target.suffix)) <= LONGEST_SUFFIX else ""
    with _locked_name(target.parent) as name:
        draft = target.with_name(f"{name}.part{suffix}")
        try:
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
            yield draft
        finally:
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked_name(folder: Path) -> Iterator[str]:
    """Reserve a name in a folder by a lock, which is let go when this process ends, however it ends."""
    while True:
        name = f"draft-{_machine()}-{secrets.token_hex(8)}"
        lock = folder / f"{name}.lock"
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            try:
                held = _lock(handle) and os.path.samestat(os.stat(lock), os.fstat(handle))
            except FileNotFoundError:  # another writer has taken it for abandoned before it was locked
                held = False
            except OSError:  # no locks here, so nobody may take the draft for one whose writer is gone
                lock.unlink(missing_ok=True)
                held = True
            if held:
                yield name
                return
        finally:
            lock.unlink(missing_ok=True)
            os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file; False where somebody else has.

    Raises:
        OSError: If the file system has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_abandoned(folder: Path) -> None:
    """Remove the drafts of writers that were killed.

    A lock that can be had has no writer on this machine.  Some shared folders keep locks from other machines, so that
    their drafts must be a day old as well.
    """
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
        for name in names:
            if found := LOCK.fullmatch(name):
                own = found[1] == _machine()
                _remove_if_abandoned(folder / name, [n for n in names if n.startswith(f"{name[:-5]}.part")], own=own)


def _remove_if_abandoned(lock: Path, drafts: list[str], *, own: bool) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(lock, os.O_RDWR)
        try:
            files = [*(lock.with_name(draft) for draft in drafts), lock]
            latest = max(file.stat().st_mtime for file in files)
            if _lock(handle) and (own or time.time() - latest > ABANDONED):
                for file in files:
                    file.unlink(missing_ok=True)
        finally:
            os.close(handle)


@functools.cache
def _machine() -> str:
    """Name this machine, since it was started, in eight letters."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _liken(file: Path, other: os.stat_result) -> None:
    """Give a file the mode of another and, where that is allowed, its owner."""
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):
            os.chown(file, other.st_uid, other.st_gid)
    os.chmod(file, stat.S_IMODE(other.st_mode))


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlast a loss of power."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
