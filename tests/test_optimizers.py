"""Muon for the networks of large flows, Adam for all else: every parameter has one of them, and their state is kept."""

from __future__ import annotations

import functools
import itertools
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_flows import AutoFlow, fit_svi, flows
from pyro_flows.fitting.optimizers import Muon, optimizers
from pyro_flows.guides.plan import plan_of
from pyro_flows.guides.recipe import FEW
from pyro_flows.training import loop
from pyro_flows.transforms import Coupling

small = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(16,))


def chain(dim: int) -> None:
    """A random walk seen at its end, of which everything is known."""
    steps = pyro.sample("steps", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
    pyro.sample("end", dist.Normal(steps.sum(-1), 1.0), obs=torch.tensor(5.0))


def guide_over(dim: int, recipe=small) -> AutoFlow:
    return AutoFlow(functools.partial(chain, dim), recipe).setup()


@pytest.mark.parametrize("recipe", [small, functools.partial(flows.iaf, num_transforms=2)], ids=["coupling", "iaf"])
def test_muon_has_the_matrices_of_networks_and_adam_all_else(recipe):
    guide = guide_over(FEW + 1, recipe)
    parameters = list(guide.parameters())
    adam, muon = optimizers(parameters, 0.01, guide.matrices())
    assert (type(adam), type(muon)) == (torch.optim.Adam, Muon)
    names = {id(parameter): name for name, parameter in guide.named_parameters()}
    by_muon, by_adam = ({names[id(p)] for g in o.param_groups for p in g["params"]} for o in (muon, adam))
    assert by_muon == {name for name in names.values() if ".conditioner." in name and name.endswith("weight")}
    assert len(by_muon) == (4 if recipe is small else 6)
    assert by_adam == set(names.values()) - by_muon


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon, to compare with: torch 2.9")
def test_muon_side_by_side_does_what_torch_does_one_by_one():
    """Wide, square and tall matrices, several of a shape, and one without a gradient; torch computes in bfloat16."""
    torch.manual_seed(0)
    shapes = [(3, 20), (20, 20), (3, 20), (30, 4), (30, 4), (5, 5)]
    mine, theirs = ([torch.ones(shape, dtype=torch.float64).requires_grad_() for shape in shapes] for _ in range(2))
    both = Muon(mine, lr=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)
    for _ in range(3):
        for left, right in zip(mine[:-1], theirs[:-1], strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        before = [parameter.detach().clone() for parameter in mine]
        for optimizer in both:
            optimizer.step()
        for place, parameter in zip(before[:-1], mine[:-1], strict=True):
            rows, columns = place.shape
            sizes = torch.linalg.svdvals(parameter.detach() - place) / (0.1 * max(1, rows / columns) ** 0.5)
            assert sizes.min() > 0.6
            assert sizes.max() < 1.3
    assert torch.equal(mine[-1], torch.ones(5, 5, dtype=torch.float64))
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0.02)


@pytest.mark.parametrize(("dim", "couplings", "clip_norm"), [(FEW, 8, 100.0), (FEW + 1, 16, 1.0)])
def test_many_latents_have_a_deeper_flow_and_smaller_gradients(dim, couplings, clip_norm):
    guide = AutoFlow(functools.partial(chain, dim)).setup()
    assert sum(isinstance(layer, Coupling) for layer in guide.flow.transforms) == couplings
    assert plan_of(guide).schedule().clip_norm == clip_norm


@pytest.mark.parametrize(
    "guide",
    [lambda: guide_over(FEW), lambda: AutoMultivariateNormal(functools.partial(chain, 40))],
    ids=["few", "Pyro"],
)
def test_adam_has_all_of_small_flows_and_of_other_guides(guide):
    assert plan_of(guide()).matrices() == []


def test_a_large_flow_reaches_the_evidence_without_a_warm_start():
    pyro.set_rng_seed(0)
    dim = FEW + 8
    guide = guide_over(dim)
    fit = fit_svi(guide.model, guide, steps=1500, num_particles=64, warm_start=False, progress=False)
    evidence = dist.Normal(0.0, (dim + 1) ** 0.5).log_prob(torch.tensor(5.0)).item()
    assert -fit.best_loss == pytest.approx(evidence, abs=0.1)


def test_a_killed_run_of_both_optimizers_goes_on_to_the_same_end(tmp_path, monkeypatch):
    clock = itertools.count(step=60)  # each look at the clock takes a minute: a checkpoint every 50 steps
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))

    def run(file, model):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = guide_over(FEW + 1)
        losses = fit_svi(
            model, guide, steps=150, num_particles=4, warm_start=False, progress=False, checkpoint=file
        ).losses
        return [losses, *(parameter.detach().clone() for parameter in guide.parameters())]

    calls = []

    def mortal():
        calls.append(0)
        if len(calls) > 120:
            sys.exit()
        chain(FEW + 1)

    whole = run(tmp_path / "whole", functools.partial(chain, FEW + 1))
    with pytest.raises(SystemExit):
        run(tmp_path / "run", mortal)
    assert 0 < len(torch.load(tmp_path / "run", weights_only=True)["losses"]) < 150
    resumed = run(tmp_path / "run", functools.partial(chain, FEW + 1))
    assert all(torch.equal(*pair) for pair in zip(whole, resumed, strict=True))
