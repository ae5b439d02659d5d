"""A program holds arguments of a model and says how it is run, and stands in for the model everywhere."""

import copy
import functools
import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_flows as pf
from pyro_flows.programs.program import arguments_of, given_nesting, signature_of, vectorize_of

Y = torch.tensor([1.0, 2.0, 0.5])


def model(scale, y=None, *, num_samples=1.0):
    x = pyro.sample("x", dist.Normal(0.0, num_samples))
    with pyro.plate("rows", 3):
        return pyro.sample("y", dist.Normal(x, scale), obs=y)


PROGRAM = pf.Program(model, (0.5,), {"num_samples": 2.0})


def test_it_runs_the_model_with_what_it_holds_before_the_calls_own():
    seen = []
    program = pf.Program(pf.Program(lambda *args, **kwargs: seen.append((args, kwargs)), (1,), {"a": 1, "b": 1}), (2,))
    program(3, b=2)
    assert seen == [((1, 2, 3), {"a": 1, "b": 2})]


def test_its_signature_is_what_is_left_of_the_models():
    assert list(signature_of(PROGRAM).parameters) == ["y", "num_samples"]
    signature_of(poutine.scale(PROGRAM, 2.0)).bind(Y)
    assert arguments_of(PROGRAM, (Y,), {}) == {"scale": 0.5, "y": Y, "num_samples": 2.0}
    names = ["model", "args", "kwargs", "vectorize", "max_plate_nesting"]
    assert list(inspect.signature(pf.Program).parameters) == names


def test_what_it_says_is_seen_through_handlers_and_the_outermost_word_counts():
    inner = poutine.scale(pf.Program(model, vectorize="loop", max_plate_nesting=2), 2.0)
    assert (vectorize_of(inner), given_nesting(inner)) == ("loop", 2)
    outer = pf.Program(inner, vectorize="vmap")
    assert (vectorize_of(outer), given_nesting(outer)) == ("vmap", 2)


def test_it_stands_in_for_a_model_from_the_fit_to_predictions():
    program = copy.deepcopy(PROGRAM)
    guide = pf.AutoFlow(program)
    fit = pf.fit_svi(program, guide, Y, steps=200, progress=False)
    precision = 1 / 4 + 3 / 0.25
    exact = dist.Normal(float(Y.sum()) / 0.25 / precision, precision**-0.5)
    draws = guide.sample(2000)["x"]
    assert abs(draws.mean() - exact.loc) < 0.05
    assert abs(draws.std() / exact.scale - 1) < 0.1
    assert fit.losses.shape == (200,)
    assert pf.psis(program, guide, Y, num_samples=500).reliable
    assert Predictive(program, guide=guide, num_samples=7)()["y"].shape == (7, 3)
    assert pf.posterior_graph(program, Y).shape == (1, 1)
    assert pf.sample(program, guide, Y, num_draws=200, progress=False).converged


def test_a_keyword_of_a_partial_model_is_its_own():
    def named(y, vectorize=1.0):
        x = pyro.sample("x", dist.Normal(0.0, vectorize))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    def guide(y, vectorize=1.0):
        pyro.sample("x", dist.Normal(2.0, 1.0))

    y = torch.tensor(2.0)
    found = pf.psis(functools.partial(named), guide, y, num_samples=500, vectorize=3.0)
    assert abs(found.log_evidence - float(dist.Normal(0.0, 10**0.5).log_prob(y))) < 0.05
    with pytest.raises(TypeError, match="max_plate_nesting must be given with the model"):
        pf.psis(functools.partial(named), guide, y, max_plate_nesting=1)


def test_parameters_of_a_module_that_it_holds_are_trained():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(0.0))

        def forward(self, y):
            x = pyro.sample("x", dist.Normal(0.0, 0.1))
            pyro.sample("y", dist.Normal(x + self.shift, 1.0), obs=y)

    net = Net()
    program = pf.Program(net, (torch.tensor(3.0),))
    pf.fit_svi(program, AutoNormal(program), steps=300, lr=0.1, progress=False)
    assert abs(float(net.shift) - 3) < 0.3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"args": Y}, "args must be a tuple of arguments, got Tensor"),
        ({"kwargs": "x"}, "kwargs must be a dict of keyword arguments, got 'x'"),
        ({"args": (1.0, Y, Y)}, r"model, which takes \(scale, y, num_samples\), got 3 in args: too many"),
        ({"kwargs": {"kk": 1.0}}, "got 0 in args, kk: got an unexpected keyword argument 'kk'"),
        ({"vectorize": "many"}, "vectorize must be 'auto' or 'plate' or 'vmap' or 'loop', got 'many'"),
        ({"max_plate_nesting": -1}, "max_plate_nesting must be an integer of at least 0, got -1"),
    ],
)
def test_what_it_cannot_hold_is_refused_by_name(settings, words):
    with pytest.raises((TypeError, ValueError), match=words):
        pf.Program(model, **settings)
