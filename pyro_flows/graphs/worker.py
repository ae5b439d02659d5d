"""The compiler's process: turn the jobs in a folder into shared libraries, one after the other, and end.

It runs as a script that imports torch alone, at the lowest priority.  A job is a JSON file ``KEY.job`` with the source
of a graph, the names of its operations, and the shapes, strides and types of its arguments.  Its library is ``KEY.so``,
next to ``KEY.json`` if torch's own code must find operations by name.  ``KEY.done`` has the digests of these files, and
is written last.  A job that fails leaves ``KEY.failed`` with the reason.

One process per folder works at a time.  It goes on when the program that asked for a library has ended, since the next
run of that program will ask again.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LONGEST = 600  # seconds of processor time of all jobs of a process


def main(folder: Path) -> None:
    """Compile all jobs in a folder, the newest first, unless another process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asked
    with contextlib.suppress(OSError):
        os.nice(19)
    with _alone(folder) as is_alone, tempfile.TemporaryDirectory(prefix="pyro_flows_") as scratch:
        if not is_alone:
            return
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
        while jobs := sorted(folder.glob("*.job"), key=lambda path: -path.stat().st_mtime):
            try:
                compile_job(jobs[0])
            except Exception as error:  # a compiler may fail in any way
                jobs[0].with_suffix(".failed").write_text(f"{type(error).__name__}: {error}"[:2000])
            jobs[0].unlink(missing_ok=True)
            if sum(os.times()[:4]) > LONGEST:
                return


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Context manager that yields True while this process alone works in a folder."""
    import fcntl

    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def compile_job(path: Path) -> None:
    """Compile one job."""
    import torch
    from torch._inductor import aot_compile
    from torch.fx.experimental.proxy_tensor import make_fx

    torch.set_num_threads(1)
    job = json.loads(path.read_text())
    run = function_of(job)
    arguments = [
        torch.empty_strided(shape, stride, dtype=getattr(torch, dtype.removeprefix("torch.")))
        for shape, stride, dtype in job["specs"]
    ]
    with torch.no_grad():
        graph = make_fx(run, tracing_mode="fake")(*arguments)
        built = Path(str(aot_compile(graph, tuple(arguments), options={"cpp.threads": 1})))
    digests = {}
    for suffix in (".so", ".json"):
        if built.with_suffix(suffix).exists():
            shutil.copyfile(built.with_suffix(suffix), path.with_suffix(suffix))
            digests[suffix] = hashlib.sha256(path.with_suffix(suffix).read_bytes()).hexdigest()
    done = path.with_suffix(".part")
    done.write_text(json.dumps(digests))
    done.replace(path.with_suffix(".done"))


def function_of(job: dict[str, Any]) -> Any:
    """Return the function of a job's source."""
    import torch

    scope: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
    for name, path in job["operations"].items():
        scope[name] = torch.ops
        for part in path.split("."):
            scope[name] = getattr(scope[name], part)
        scope[name] = getattr(scope[name], "_op", scope[name])  # without torch's wrapper in Python
    exec(job["source"], scope)
    return scope["run"]


if __name__ == "__main__":
    sys.path.pop(0)  # this folder has a module of the same name as one of Python's own, code
    main(Path(sys.argv[1]))
