"""Docstrings begin with the thing or the act, and sentences of the docs are short."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "pyro_flows").rglob("*.py"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
FIRST = re.compile(r"(What|Those|How|Whether)\b")  # words that no docstring begins with
LONGEST = 30  # the largest number of words in a sentence
MARKS = re.compile(r"```.*?```|<!--.*?-->|\$\$.*?\$\$", flags=re.DOTALL)
ITEM = re.compile(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) |\|")  # separators of paragraphs, list items and table cells
QUOTED = re.compile(r"`[^`]*`|\$[^$]*\$|\([^()]*(?:arXiv|\.md|\.py)[^()]*\)")


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield all docstrings of a file with the names of their objects."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", path.name), text


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a page, without code, formulas and links."""
    for part in ITEM.split(MARKS.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", QUOTED.sub("X", " ".join(part.split())))
        yield from re.split(r"(?<=[.:;?!])[*)\"]* ", plain)


def too_long(text: str) -> list[str]:
    """Return the sentences of a page with too many words."""
    return [found for found in sentences(text) if len(re.findall(r"[^\W\d_][\w'’-]*", found)) > LONGEST]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "pyro_flows")))
def test_docstrings_begin_with_the_thing_or_the_act(path: Path) -> None:
    assert not [(name, text.splitlines()[0]) for name, text in docstrings(path) if FIRST.match(text)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_of_pages_are_short(path: Path) -> None:
    assert not too_long(path.read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_sentences_of_notebooks_are_short(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert not [found for text in texts for found in too_long(text)]


def test_the_reader_of_sentences_counts_their_words() -> None:
    assert too_long("A " + "word " * 30 + "ends.")
    assert not too_long("A word.\n" * 40)
