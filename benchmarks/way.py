"""The way of one object through the package: in how many files does it arrive as an argument?

    python benchmarks/way.py                    # a minute of one core
    python benchmarks/way.py --quick --out DIR  # a smoke run

A function that takes an object must be read by whoever changes what the object means.  So each verb runs once on a
small model under a profiler, which follows one object by identity: the model, or the values of ``log_prob``.  Two
counts differ in what they follow.  *Itself* is the object or a ``Program`` of it, also as an item of a tuple, a list or
a dictionary that is an argument.  *Held* adds values of pyro_flows that hold the object, at any depth, such as a
density.
Modules are not followed: a guide keeps its model, and users pass both.

A *climb* is a call that hands the object, or a value that holds it, from a file to a file of another package that lies
to the right in the layers of ``tests/test_architecture.py``, or that the object had visited and left.  Equal pairs of
files count once.  Writes ``way.md`` into ``docs/benchmarks``.
"""

import argparse
import ast
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows.programs import Program

HOME = Path(__file__).resolve().parents[1]
OUT = HOME / "docs" / "benchmarks"
ROOT = Path(pf.__file__).parent
DEPTH = 5  # of values that hold the object
HEAD = """# The way of an object

This page is for contributors. It shows how many files an object passes on its way through the package, and which. Each
of these files must be read to change what the object means, so a short way is a design goal.

Reproduce with `python benchmarks/way.py`. Each verb runs once on a small model. A profiler follows the model, or the
values of `log_prob`.

* *itself*: the files with a function that gets the object, or a `Program` of it, also inside a tuple or a dictionary.
* *held*: the files with a function that gets the object, or a value of pyro_flows that holds it, except modules.
* *climbs*: pairs of files of two packages. The first passes the object or a holder on, against the order of the
  packages, or back to a package that the object had left.

| verb | itself | held | climbs |
|---|---|---|---|
"""


class Way(NamedTuple):
    """The files in which an object arrived, in order, with the first function that got it.

    Attributes:
        itself: The files that get the object.
        held: The files that get the object or a value that holds it.
        climbs: Pairs of files between which it climbs.
    """

    itself: dict[str, str]
    held: dict[str, str]
    climbs: set[tuple[str, str]]


def layers() -> dict[str, int]:
    """Return the layer of each package, as the test of the architecture lists them."""
    tree = ast.parse((HOME / "tests" / "test_architecture.py").read_text())
    (found,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "LAYERS"
    ]
    return {name: rank for rank, layer in enumerate(ast.literal_eval(found)) for name in layer}


def is_inside(value: Any, target: Any) -> bool:
    """True if a value is the object, a program of it, or a plain container with one of them."""
    items = value.values() if type(value) is dict else value if type(value) in (tuple, list) else (value,)
    return any(item is target or (type(item) is Program and is_inside(item.model, target)) for item in items)


def holds(value: Any, target: Any, depth: int = DEPTH) -> bool:
    """True if a value is the object, or holds it at some depth."""
    if value is target:
        return True
    if type(value) in (tuple, list):
        parts = list(value)
    elif type(value) is dict:
        parts = list(value.values())
    elif type(value).__module__.startswith("pyro_flows.") and not isinstance(value, nn.Module):
        slots = value if isinstance(value, tuple) else vars(value).values() if hasattr(value, "__dict__") else ()
        parts = list(slots)
    else:
        return False
    return depth > 0 and any(holds(part, target, depth - 1) for part in parts)


def follow(run: Callable[[], Any], target: Any) -> Way:
    """Run a verb, and follow an object."""
    way, ranks, left, last = Way({}, {}, set()), layers(), set[str](), ""

    def package(name: str) -> str:
        return name.split("/")[0].removesuffix(".py")

    def inner(frame: FrameType | None) -> str | None:
        return next((str(Path(f).relative_to(ROOT)) for f in files(frame) if f.startswith(f"{ROOT}/")), None)

    def on_call(frame: FrameType, event: str, _: Any) -> None:
        nonlocal last
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(f"{ROOT}/"):
            return
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
        values = [frame.f_locals.get(name) for name in code.co_varnames[:count]]
        if not any(holds(value, target) for value in values):
            return
        name = str(Path(code.co_filename).relative_to(ROOT))
        way.held.setdefault(name, code.co_qualname if sys.version_info >= (3, 11) else code.co_name)
        if any(is_inside(value, target) for value in values):
            way.itself.setdefault(name, code.co_name)
        caller, here = inner(frame.f_back), package(name)
        if last and last != here:
            left.add(last)
        if caller and package(caller) != here and (ranks[here] > ranks[package(caller)] or here in left):
            way.climbs.add((caller, name))
        last = here

    sys.setprofile(on_call)
    try:
        run()
    finally:
        sys.setprofile(None)
    return way


def files(frame: FrameType | None) -> list[str]:
    """Return the files of the calls that led to a frame, the innermost first."""
    found = []
    while frame is not None:
        found.append(frame.f_code.co_filename)
        frame = frame.f_back
    return found


def model(y: Tensor) -> None:
    """A posterior of two modes that are far from Gaussian, so that a flow is trained over them."""
    x = pyro.sample("x", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x**2, scale), obs=y)


def verbs(quick: bool) -> dict[str, tuple[Callable[[], Any], Any]]:
    """Return by name a call of each verb, and the object to follow."""
    y, x, flow = torch.tensor([4.0, 5.0, 4.5]), torch.randn(5, 2), flows.nsf(2)
    guide, steps = pf.AutoFlow(model), 20 if quick else 200
    found: dict[str, tuple[Callable[[], Any], Any]] = {
        "fit_svi": (lambda: pf.fit_svi(model, guide, y, steps=steps, progress=False), model),
        "check": (lambda: pf.check(model, guide, y), model),
        "anneal": (lambda: pf.anneal(model, y, num_particles=64 if quick else 256, progress=False), model),
        "log_prob": (lambda: flow().log_prob(x), x),
    }
    if hasattr(pf, "posterior"):
        found["posterior"] = (lambda: pf.posterior(model, y, num_draws=400, progress=False), model)
    return found


def main() -> None:
    """Follow all verbs, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", help="names of verbs; by default all, and the page is written")
    given = parser.parse_args()
    rows, ways = [], []
    for name, (run, target) in verbs(given.quick).items():
        if given.only and name not in given.only:
            continue
        pyro.set_rng_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            way = follow(run, target)
        rows.append(f"| `{name}` | {len(way.itself)} | {len(way.held)} | {len(way.climbs)} |")
        print(rows[-1])
        for file, function in way.held.items():
            print(f"    {file}: {function}{'' if file in way.itself else ' (held)'}")
        for caller, callee in sorted(way.climbs):
            print(f"    climb {caller} -> {callee}")
        lines = [f"* `{file}`{'' if file in way.itself else ', held'}" for file in way.held]
        ways.append(f"\n## {name}\n\nThe files in order of arrival:\n\n" + "\n".join(lines) + "\n")
    if not given.only:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "way.md").write_text(HEAD + "\n".join(rows) + "\n" + "".join(ways))


if __name__ == "__main__":
    main()
