"""Page for users of Pyro's flows: its tables list all of these flows, and all named objects exist."""

import inspect
import re
from pathlib import Path

import torch
from pyro.distributions import transforms

from pyro_flows import flows

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "from_pyro.md").read_text()


def test_each_of_pyros_flows_is_named():
    learned = {
        name
        for name, found in vars(transforms).items()
        if (inspect.isclass(found) and issubclass(found, torch.nn.Module))
        or (inspect.isfunction(found) and found.__module__.startswith(transforms.__name__) and name[0] != "_")
        or name.startswith("Conditional")
    }
    assert {"planar", "Planar", "elu", "ConditionalSpline", "iterated"} <= learned
    assert {name for name in learned if f"`{name}`" not in PAGE} <= {"ComposeTransformModule"}


def test_each_counterpart_can_be_built():
    scope = {"flows": flows}
    (names,) = re.findall(r"```python\n([^`]*?\nD, C, widths = .*?)```", PAGE, flags=re.DOTALL)
    exec(names, scope)
    built = 0
    for line in re.findall(r"^\| `.*", PAGE.split("elsewhere in Pyro")[0], flags=re.MULTILINE):
        for code in re.findall(r"`([^`]*\(.*?)`", "|".join(line.split("|")[2:])):
            found = eval(code, scope)
            assert isinstance(found, flows.Flow if code.startswith("flows.") else torch.nn.Module), code
            built += 1
    assert built > 40
