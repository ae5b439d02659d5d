"""Compiled graphs on disk, which another process makes.

A graph is compiled by Inductor into a shared library of machine code (AOTInductor), which loads within a millisecond
and without any import.  It is kept in a folder next to torch's own cache, named by the graph, the version of torch and
the processor, so that any later process finds it.  Nobody ever waits for a library.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic_files import write_atomically

LARGEST = 500 * 2**20  # bytes of all libraries; the least recently used ones are removed
RETRIED = 86_400.0  # seconds after which a failed compilation is tried again
OTHERS = stat.S_IWGRP | stat.S_IWOTH  # the rights of others to write
WORKER = Path(__file__).with_name("worker.py")
Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
_workers: list[subprocess.Popen[bytes]] = []


def folder() -> Path | None:
    """Return the folder of compiled graphs, made if need be; None if it cannot be used or others can change it."""
    try:
        parent = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or _default())
        found = parent / "pyro_flows"
        found.mkdir(0o700, parents=True, exist_ok=True)
        status, above = found.lstat(), parent.stat()
    except (OSError, KeyError):
        return None
    # Whoever can rename the folder can put another in its place, and a link may lead to files of other kinds.
    kept = above.st_uid in (0, os.getuid()) and (above.st_mode & stat.S_ISVTX or not above.st_mode & OTHERS)
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & OTHERS
    return found if kept and is_own and os.access(found, os.W_OK) else None


def _default() -> str:
    return f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"


def can_compile() -> bool:
    """True if this machine can compile graphs: a processor and torch that AOTInductor knows, and a C++ compiler."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    return (
        os.name == "posix"
        and hasattr(torch._C, "_aoti")
        and compiler is not None
        and shutil.which(compiler) is not None
    )


class Package:
    """Compiled code on disk.

    Args:
        job: The source of the code, its operations, and the shapes, strides and types of its arguments.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._job, self._folder = json.dumps(job), folder()
        machine = f"{torch.__version__} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        name = hashlib.sha256(f"{self._job} {machine} {WORKER.read_text()}".encode()).hexdigest()[:32]
        self._path = (self._folder or Path()) / name

    def _with(self, suffix: str) -> Path:
        return self._path.with_suffix(suffix)

    def load(self) -> Run | None:
        """Return the compiled code, or None if there is none; libraries that are not what was built are removed."""
        if self._folder is None or not self._with(".done").exists():
            return None
        try:
            digests = json.loads(self._with(".done").read_text())
            for suffix, digest in digests.items():
                if hashlib.sha256(self._with(suffix).read_bytes()).hexdigest() != digest:
                    raise ValueError(f"{self._path}{suffix} was changed")
            os.utime(self._with(".done"))
            aoti: Any = torch._C._aoti
            run: Run = aoti.AOTIModelContainerRunnerCpu(str(self._with(".so")), 1).run
        except Exception:  # whatever is wrong with it, it is built anew
            self.remove()
            return None
        return run

    def request(self) -> bool:
        """Ask for the library; return False if it cannot be built."""
        if self._folder is None or self._has_failed or not can_compile():
            return False
        try:
            if not self._with(".job").exists():
                _make_room(self._folder)
                write_atomically(self._with(".job"), lambda path: Path(path).write_text(self._job))
            _start_worker(self._folder)
        except OSError:
            return False
        return True

    @property
    def _has_failed(self) -> bool:
        """True if a compiler failed within the last day."""
        try:
            return time.time() - self._with(".failed").stat().st_mtime < RETRIED
        except OSError:
            return False

    def remove(self) -> None:
        """Remove the library."""
        for suffix in (".done", ".so", ".json"):
            with contextlib.suppress(OSError):
                self._with(suffix).unlink()


def _start_worker(folder: Path) -> None:
    """Start the process that compiles, unless one of this process runs."""
    _workers[:] = [worker for worker in _workers if worker.poll() is None]
    if not _workers:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command, null = [sys.executable, str(WORKER), str(folder)], subprocess.DEVNULL
        _workers.append(subprocess.Popen(command, env=environment, stdin=null, stdout=null, stderr=null))


def _make_room(folder: Path) -> None:
    """Remove the least recently used libraries, so that the others fit into the largest size."""
    files: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        files.setdefault(path.stem, []).append(path)
    sizes: list[tuple[float, int, list[Path]]] = []
    for paths in files.values():
        with contextlib.suppress(FileNotFoundError):  # another process removes it
            known = [path.stat() for path in paths]
            sizes.append((max(one.st_mtime for one in known), sum(one.st_size for one in known), paths))
    total = 0
    for used, size, paths in sorted(sizes, key=lambda entry: -entry[0]):
        total += size
        if total > LARGEST or (size < 10_000 and time.time() - used > 86_400 * 30):
            for path in paths:
                path.unlink(missing_ok=True)
