"""The bibliography lists all citations of the code, with their places."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "bibliography.md").read_text()
CITED = re.compile(r"(?:arXiv:(?:[a-z-]+/)?[0-9]{4}\.?[0-9]{3,5}|doi:10\.[0-9]{4,5}/[^\s)]+)")


def places() -> dict[str, set[str]]:
    """Return the modules and benchmarks that cite each identifier."""
    found: dict[str, set[str]] = {}
    for path in [*(ROOT / "pyro_flows").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        part = path.relative_to(ROOT)
        module = ".".join(part.with_suffix("").parts[1:])
        for identifier in CITED.findall(path.read_text()):
            found.setdefault(identifier, set()).add(module if part.parts[0] == "pyro_flows" else part.as_posix())
    return found


def test_the_bibliography_says_where_each_paper_is_cited():
    cited = places()
    assert {"transforms.coupling", "flows.coupling"} <= cited["arXiv:1410.8516"]  # the citation in the code is found
    for identifier, modules in cited.items():
        lines = [line for line in PAGE.splitlines() if f"[{identifier}]" in line]
        assert len(lines) == 1, identifier
        assert set(re.findall(r"`([^`]+)`", lines[0].split(" | ")[2])) == modules, identifier


def test_nothing_is_listed_that_is_not_cited():
    assert set(re.findall(r"\[(arXiv:[^]]+)\]", PAGE)) <= set(places())


def test_pages_cite_what_is_listed():
    for page in (ROOT / "docs").rglob("*.md"):
        for identifier in CITED.findall(page.read_text()):
            assert identifier in PAGE, f"{page.name}: {identifier}"
