"""The comparison of libraries quotes the page of its benchmark."""

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_comparison_shows_what_was_run():
    shown = (DOCS / "comparison.md").read_text().splitlines()
    rows = [line for line in (DOCS / "benchmarks" / "comparison.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 25
    for row in rows:
        assert row in shown
