"""Page for users of Pyro's flows: its tables list all of these flows, all named objects exist, and its claims hold."""

import copy
import inspect
import re
from pathlib import Path

import laws
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from test_public_api import OBJECTS

from pyro_flows import flows
from pyro_flows.conditioners import MADE, MLP

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


MODULES = {name: kind for name, kind in OBJECTS.items() if isinstance(kind, type) and issubclass(kind, torch.nn.Module)}


@pytest.mark.parametrize("name", MODULES)
def test_each_module_becomes_a_pyro_module(name):
    assert {MODULES[name], PyroModule} <= set(PyroModule[MODULES[name]].__mro__)


@pytest.mark.parametrize("kind", [MLP, MADE])
def test_a_pyro_module_of_a_network_may_have_random_weights(kind):
    net = PyroModule[kind](3, 3, 2) if kind is MLP else PyroModule[kind](3, 2)
    to_pyro_module_(net)
    net.output.weight = PyroSample(dist.Normal(0.0, 1.0).expand(net.output.weight.shape).to_event(2))
    x = torch.ones(5, 3)
    assert list(poutine.trace(net).get_trace(x).stochastic_nodes) == ["output.weight"]
    assert not torch.equal(net(x), net(x))


@pytest.mark.parametrize("name", laws.RECIPES)
def test_a_flow_becomes_a_pyro_module_in_place(name):
    flow = laws.randomise(laws.RECIPES[name](2, 1, num_transforms=1, hidden_dims=(4,)), scale=0.3)
    x, context = torch.randn(3, 2), torch.randn(3, 1)
    before, names = flow.log_prob(x, context), {key for key, _ in flow.named_parameters()}
    to_pyro_module_(flow)
    assert all(isinstance(part, PyroModule) for part in flow.modules())
    for same in (flow, copy.deepcopy(flow), flow.inv.inv):
        assert torch.equal(same.log_prob(x, context), before)
    trace = poutine.trace(lambda: pyro.sample("x", flow(context))).get_trace()
    assert set(trace.param_nodes) <= names
    assert trace.param_nodes
