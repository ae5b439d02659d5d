"""The tutorials run if their packages are installed, and have the described contents.

Run ``pip install -e '.[tutorials]'`` first, as the gate does; otherwise the runs are skipped.
"""

import json
import re
import runpy
from datetime import datetime
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
MINUTES = 5  # settings that a notebook may have changed


def cells_of(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_there_are_eleven():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number:02}" for number in range(1, 12)]


@every_notebook
def test_outputs_are_those_of_one_whole_run(path: Path) -> None:
    cells = cells_of(path, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not re.search(r"(?<![\w.])/(tmp|root|home|work|Users)/", json.dumps(outputs))
    times = [time for cell in cells for time in cell["metadata"]["execution"].values()]
    first, last = (datetime.fromisoformat(time.replace("Z", "+00:00")) for time in (min(times), max(times)))
    assert (last - first).total_seconds() <= 60 * MINUTES


@every_notebook
def test_opens_with_a_question_and_ends_with_what_can_go_wrong(path: Path) -> None:
    texts = ["".join(cell["source"]) for cell in cells_of(path, "markdown")]
    title, question = texts[0].strip().split("\n\n")[:2] if "\n\n" in texts[0].strip() else texts[:2]
    assert title.startswith("# ")
    assert question.startswith("**")
    assert question.rstrip("*").endswith("?") or "?**" in question
    headings = re.findall(r"^## (.*)$", "\n".join(texts), flags=re.MULTILINE)
    assert headings[-2:] == ["What can go wrong", "Where next"]
    for target in re.findall(r"\]\(([^)#\s]+)", "\n".join(texts)):
        assert "://" in target or (TUTORIALS / target).exists(), f"{path.name} links to {target}, which is not there"


@every_notebook
def test_runs_in_its_fast_mode(path: Path, monkeypatch, tmp_path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYRO_FLOWS_FAST", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


def test_lightning_trains_a_density():
    pytest.importorskip("lightning")
    tutorial = runpy.run_path(str(TUTORIALS / "lightning_density.py"))
    assert tutorial["ENTROPY"] < tutorial["main"](epochs=2) < tutorial["ENTROPY"] + 0.3
