"""Rules of the architecture: imports go one way, siblings do not import each other, networks and maps avoid Pyro."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyro_flows

ROOT = Path(pyro_flows.__file__).parent
LAYERS = [
    {"arguments", "attention", "compiler_state", "threads", "time_limit", "user_code", "vjp"},
    {"bijectors", "arviz_versions", "conditioners", "encoders", "atomic_files"},
    {"graphs"},
    {"transforms"},
    {"distributions", "sampling"},
    {"flows"},
    {"programs"},
    {"plots"},
    {"objectives", "guides", "training"},
    {"data", "diagnostics"},
    {"fitting", "persistence"},
    {"answers"},
    {"__init__"},
    {"commands"},
    {"__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(ROOT.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])


def part_of(path: Path) -> str:
    """Return the part that a file belongs to: a package, or a top-level module."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    """Return the absolute names of all modules that a file imports, at any place in the file."""
    package = ["pyro_flows", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from . import name` may name a module; `from .module import name` names an object inside it.
            names_modules = module == "pyro_flows" or not node.module
            yield from ([f"{module}.{alias.name}" for alias in node.names] if names_modules else [module])


def parts_imported_by(path: Path) -> set[str]:
    """Return the parts that a file imports; a name from the top-level package belongs to ``__init__``."""
    names = [name.split(".") for name in imports_of(path)]
    inner = [parts[1] if len(parts) > 1 else "__init__" for parts in names if parts[0] == "pyro_flows"]
    return {part if part in RANK else "__init__" for part in inner}


@every_file
def test_every_file_has_its_place_and_imports_point_left_only(path: Path) -> None:
    """Siblings do not import each other, and no file is a bag of tools."""
    own = part_of(path)
    rank = RANK[own]
    for other in parts_imported_by(path) - {own}:
        assert RANK[other] < rank, f"{path} imports {other}"
    assert "utils" not in path.relative_to(ROOT).with_suffix("").parts


@pytest.mark.parametrize(
    "package", sorted(path.parent for path in FILES if path.stem == "__init__"), ids=lambda p: p.name
)
def test_imports_between_the_files_of_a_package_go_one_way(package: Path) -> None:
    """Imports for annotations alone count too, since a reader follows them."""
    inside = ".".join(["pyro_flows", *package.relative_to(ROOT).parts])
    left = {
        path.stem: {name.removeprefix(f"{inside}.").split(".")[0] for name in imports_of(path) if name != inside}
        for path in package.glob("*.py")
        if path.stem != "__init__"
    }
    while free := [name for name, others in left.items() if not others & left.keys()]:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


def test_the_reader_of_imports_sees_them() -> None:
    """Without this test, a reader that finds no imports would pass the law above."""
    assert {"bijectors", "conditioners"} <= parts_imported_by(ROOT / "transforms" / "autoregressive.py")
    assert {"distributions", "transforms"} <= parts_imported_by(ROOT / "flows" / "flow.py")
    assert "pyro.distributions" in imports_of(ROOT / "flows" / "distribution.py")


@pytest.mark.parametrize(
    ("package", "known"),
    [
        ("bijectors", set()),
        ("conditioners", set()),
        ("encoders", set()),
        ("sampling", {"graphs", "transforms", "threads"}),
    ],
)
def test_maps_networks_and_samplers_know_neither_pyro_nor_each_other(package: str, known: set[str]) -> None:
    """Samplers take functions of vectors, so that any density can be sampled."""
    for path in (ROOT / package).rglob("*.py"):
        assert not any(name.split(".")[0] == "pyro" for name in imports_of(path)), path
        assert parts_imported_by(path) <= {package, *LAYERS[0]} - {"threads"} | known, path


LINES, PARAMETERS = 40, 10  # of a function


def is_long(function: ast.FunctionDef) -> bool:
    """True if a function has too many lines without its docstring, or too many parameters."""
    first = function.body[ast.get_docstring(function) is not None :]
    lines = (function.end_lineno or 0) - first[0].lineno + 1 if first else 0
    given = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
    return lines > LINES or len([name for name in given if name not in ("self", "cls")]) > PARAMETERS


@every_file
def test_functions_do_one_thing(path: Path) -> None:
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if is_long(node)]
