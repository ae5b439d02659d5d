"""The pages that show what their code prints: it does print that.  And what a page lists is all there is."""

import inspect
import re
from pathlib import Path

import pyro
import pyro.distributions.transforms
import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", flags=re.DOTALL)
PAGES = ["extending", "from_pyro", "start"]


def text_of(page):
    return (DOCS / f"{page}.md").read_text()


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the blocks of a page in one scope, and holds what they print against what is shown."""
    monkeypatch.chdir(tmp_path)

    def run(page):
        scope = {}
        for code, shown in EXAMPLE.findall(text_of(page)):
            exec(code, scope)
            assert capsys.readouterr().out == shown, code
        return scope

    yield run
    pyro.clear_param_store()


@pytest.mark.parametrize("page", [page for page in PAGES if page != "from_pyro"])
def test_the_examples_print_what_is_shown(run, page):
    run(page)


def test_each_of_pyros_flows_has_a_line_and_each_counterpart_exists(run):
    scope = run("from_pyro")
    for line in re.findall(r"^\| `.*", text_of("from_pyro").split("elsewhere in Pyro")[0], flags=re.MULTILINE):
        for code in re.findall(r"`([^`]*\(.*?)`", "|".join(line.split("|")[2:])):
            assert isinstance(eval(code, scope), torch.nn.Module), code
    ours = pyro.distributions.transforms
    learned = {
        name
        for name, found in vars(ours).items()
        if (inspect.isclass(found) and issubclass(found, torch.nn.Module))
        or (inspect.isfunction(found) and found.__module__.startswith(ours.__name__) and not name.startswith("_"))
        or name.startswith("Conditional")
    }
    assert {"planar", "Planar", "elu", "ConditionalSpline", "iterated"} <= learned
    missing = {name for name in learned if f"`{name}`" not in text_of("from_pyro")}
    assert missing <= {"ComposeTransformModule"}
