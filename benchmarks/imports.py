"""How long does ``import pyro_flows`` take beyond ``import pyro``?

    python benchmarks/imports.py    # a minute

Fresh interpreters alternate: one imports Pyro, the next imports Pyro and pyro_flows.  Bytecode is cached, as in an
installed package.  Reports the medians of CPU times and of the differences.  Writes ``docs/benchmarks/imports.md``.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pyro
import torch

OUT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
STATEMENTS = "import pyro", "import pyro, pyro_flows"


def milliseconds(statement: str, bytecode: str) -> float:
    """Return the CPU time of an interpreter that runs a statement."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([sys.executable, "-c", statement], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs = [[milliseconds(statement, folder) for statement in STATEMENTS] for _ in range(options.pairs + 1)]
    pairs = pairs[1:]  # the first pair compiles bytecode
    alone, both = (statistics.median(times) for times in zip(*pairs, strict=True))
    more = statistics.median(second - first for first, second in pairs)
    versions = f"torch {torch.__version__.split('+')[0]}, Pyro {pyro.__version__}, Python {platform.python_version()}"
    text = f"""# Import

This page is for authors of short scripts. It compares `import pyro, pyro_flows` with `import pyro`. The median of the
differences is {more:.0f} ms. Reproduce with `python benchmarks/imports.py`.

Medians of the CPU times of {options.pairs} alternating pairs of fresh interpreters, with cached bytecode; {versions}.

| statement | CPU ms |
|---|---:|
| `{STATEMENTS[0]}` | {alone:.0f} |
| `{STATEMENTS[1]}` | {both:.0f} |
| median of the differences | **{more:.0f}** |
"""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "imports.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
