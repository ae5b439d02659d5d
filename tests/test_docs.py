"""Documentation: examples run and print the shown output, links exist, and quoted figures equal the benchmarks."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "```python" in path.read_text())
LINKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", flags=re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
PRINTED = {  # output of pages that do not show it
    "amortized": "Calibration(",
    "continuous": "OdeReport(",
    "density": "\nTrue\n",
    "images": "torch.Size([5, 2, 1, 8, 8])",
    "scale": "True\n",
}


def alike(shown: str, printed: str) -> bool:
    """True if words and integers are equal, and decimals up to their last digit, because machines round differently."""
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", printed).split():
        return False
    for one, other in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True):
        digits = len(one.partition(".")[2])
        if abs(float(one) - float(other)) > (1.5 * 10**-digits if digits else 0):
            return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[path.stem for path in PAGES])
def test_examples_run_and_print_what_is_shown(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    everything = ""
    for code, shown in BLOCKS.findall(page.read_text()):
        exec(compile(code, str(page), "exec"), scope)
        printed = capsys.readouterr().out
        assert not shown or alike(shown, printed), f"shown:\n{shown}\nprinted:\n{printed}"
        everything += printed
    assert PRINTED.get(page.stem, "") in everything


def test_outputs_are_compared():
    assert alike("k-hat 0.31\n", "k-hat 0.32")
    for shown, printed in (
        ("0.31", "0.34"),
        ("0.31 or 2", "0.31"),
        ("(10, 3)", "(10, 2)"),
        ("-0.5", "0.5"),
        ("a", "b"),
    ):
        assert not alike(f"found {shown}", f"found {printed}")


@pytest.mark.parametrize("page", LINKED, ids=[str(path.relative_to(ROOT)) for path in LINKED])
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of the tables in Markdown text."""
    return [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def part_of(page: str, first: str, last: str) -> str:
    text = (ROOT / "docs" / page).read_text()
    return text[text.index(first) : text.index(last, text.index(first) + 1)]


def test_what_flows_cost_is_what_was_measured():
    """The page "Choosing a flow" quotes the benchmark tables cell by cell."""
    times = {}
    for dim in (8, 32, 128):
        for flow, task, eager, compiled, *_ in rows_of(part_of("benchmarks/speed.md", f"### D = {dim}\n", "\n##"))[2:]:
            times[flow, task, dim] = f"{eager} / {compiled.replace('*', '').split()[0]}"
    by_rows = rows_of(part_of("benchmarks/memory.md", "## MB by rows", "## MB by layers"))
    memory = {row[0]: row[6] for row in by_rows if row[1] == "64"}
    quoted = rows_of(part_of("choosing_a_flow.md", "| | score, D = 8", "\n\n"))[2:]
    assert [row[0] for row in quoted] == ["realnvp", "nsf", "maf", "iaf", "nsf_ar"]
    for flow, *cells in quoted:
        wanted = [times[flow, task, dim] for task in ("log-prob", "sample") for dim in (8, 32, 128)]
        assert cells == [*wanted, times[flow, "step", 32], memory[flow]]


def test_how_flows_fit_is_what_was_measured():
    """The page "Choosing a flow" quotes test nats, and the best other library."""
    pages = {name: rows_of(part_of("benchmarks/tables.md", f"## {name}\n", "\n\n##")) for name in ("magic", "diamonds")}
    pages["protein"] = rows_of(part_of("benchmarks/tables.md", "## protein\n", "\n\nTime of"))
    found = {name: {row[0]: row for row in rows if len(row) == 5} for name, rows in pages.items()}
    for flow, *cells in rows_of(part_of("choosing_a_flow.md", "| | magic,", "\n\n"))[2:]:
        name = flow.replace("nsf(linear=True)", "nsf, linear")
        if flow != "best peer":
            assert cells == [*(found[table][name][1] for table in found), found["diamonds"][name][4]]
            continue
        for cell, table in zip(cells, found.values(), strict=False):
            nats, library = re.fullmatch(r"(.*) \((.*)\)", cell).groups()
            peers = [name for name in table if name.startswith(("zuko", "nflows"))]
            assert library == max(peers, key=lambda name: float(table[name][1].split()[0]))
            assert nats == table[library][1]
