"""SOAP trains small flows, Muon the networks of large ones, and Adam all else; checkpoints keep their states."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_flows import AutoFlow, fit_svi, flows
from pyro_flows.fitting.optimizers import SOAP, WIDEST, Muon, optimizers
from pyro_flows.guides.base import plan_of
from pyro_flows.guides.guide_flow import LIMITS
from pyro_flows.transforms import Coupling

small = functools.partial(flows.realnvp, num_transforms=2, hidden_dims=(16,))


def chain(dim: int) -> None:
    """Sample a random walk that is observed at its end, so that its posterior is known."""
    steps = pyro.sample("steps", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
    pyro.sample("end", dist.Normal(steps.sum(-1), 1.0), obs=torch.tensor(5.0))


def guide_over(dim: int, recipe=small) -> AutoFlow:
    return AutoFlow(functools.partial(chain, dim), recipe).setup()


@pytest.mark.parametrize("recipe", [small, functools.partial(flows.iaf, num_transforms=2)], ids=["coupling", "iaf"])
def test_muon_has_the_matrices_of_networks_and_adam_all_else(recipe):
    guide = guide_over(LIMITS.few + 1, recipe)
    parameters = list(guide.parameters())
    adam, muon = optimizers(parameters, 0.01, by_soap=guide.by_soap(), by_muon=guide.by_muon())
    assert (type(adam), type(muon)) == (torch.optim.Adam, Muon)
    names = {id(parameter): name for name, parameter in guide.named_parameters()}
    by_muon, by_adam = ({names[id(p)] for g in o.param_groups for p in g["params"]} for o in (muon, adam))
    assert by_muon == {name for name in names.values() if ".conditioner." in name and name.endswith("weight")}
    assert len(by_muon) == (4 if recipe is small else 6)
    assert by_adam == set(names.values()) - by_muon


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon, to compare with: torch 2.9")
def test_muon_side_by_side_does_what_torch_does_one_by_one():
    """Wide, square and tall matrices, several of one shape, and one without a gradient; torch computes in bfloat16."""
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
            assert 0.6 < sizes.min() <= sizes.max() < 1.3
    assert torch.equal(mine[-1], torch.ones(5, 5, dtype=torch.float64))
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0.02)


def test_soap_has_all_of_a_joint_guide_and_adam_all_else():
    guide = guide_over(5)
    other = torch.nn.Parameter(torch.ones(3))
    parameters = [*guide.parameters(), other]
    adam, soap = optimizers(parameters, 0.01, by_soap=guide.by_soap(), by_muon=guide.by_muon())
    assert (type(soap), type(adam)) == (SOAP, torch.optim.Adam)
    assert [id(p) for g in soap.param_groups for p in g["params"]] == [id(p) for p in guide.parameters()]
    assert [id(p) for g in adam.param_groups for p in g["params"]] == [id(other)]


def moved(gradients: list[torch.Tensor], build=SOAP, **settings) -> torch.Tensor:
    """Return a matrix of zeros after steps with some gradients."""
    weight = torch.zeros_like(gradients[0]).requires_grad_()
    optimizer = build([weight], lr=0.1, **settings)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def normals(number: int, *shape: int) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return list(torch.randn(number, *shape, generator=source, dtype=torch.float64))


def test_soap_turns_with_its_gradients():
    """SOAP does not depend on the basis of the units, while Adam does."""
    gradients = normals(25, 4, 4)
    left, right = (torch.linalg.qr(matrix).Q for matrix in normals(2, 4, 4))
    wanted = left @ moved(gradients) @ right
    torch.testing.assert_close(moved([left @ g @ right for g in gradients]), wanted, rtol=0, atol=1e-4)
    adam = functools.partial(torch.optim.Adam, betas=(0.9, 0.95))
    found, wanted = moved([left @ g @ right for g in gradients], adam), left @ moved(gradients, adam) @ right
    assert (found - wanted).abs().max() > 0.1


def test_soap_is_adam_where_the_eigenbases_are_the_units(monkeypatch):
    monkeypatch.setattr("pyro_flows.fitting.optimizers.DAMPING", 0.0)
    diagonal = [gradient.diag() for gradient in normals(25, 4)]
    adam = functools.partial(torch.optim.Adam, betas=(0.9, 0.95))
    torch.testing.assert_close(moved(diagonal), moved(diagonal, adam), rtol=0, atol=1e-6)
    vectors = normals(25, 7)
    torch.testing.assert_close(moved(vectors), moved(vectors, adam), rtol=0, atol=1e-6)


def test_directions_with_next_to_no_gradient_hardly_move():
    gradients = [gradient * torch.tensor([1.0, 1e-3]) for gradient in normals(25, 6, 2)]
    found = moved(gradients).norm(dim=0)
    assert found[1] < 0.05 * found[0]


def test_a_stack_moves_as_each_of_its_matrices_does():
    """Wide, square and tall matrices, several of one shape, one with a single row, and one without a gradient."""
    shapes = [(3, 20), (20, 20), (3, 20), (30, 4), (1, 4), (5, 5)]
    together = [torch.zeros(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    gradients = [normals(12, *shape) for shape in shapes[:-1]]
    optimizer = SOAP(together, lr=0.1)
    for step in range(12):
        for weight, own in zip(together[:-1], gradients, strict=True):
            weight.grad = own[step].clone()
        optimizer.step()
    for weight, own in zip(together[:-1], gradients, strict=True):
        torch.testing.assert_close(weight.detach(), moved(own), rtol=0, atol=1e-12)
    assert not together[-1].any()


def test_wide_sides_keep_their_basis():
    weight = torch.zeros(2, WIDEST + 1).requires_grad_()
    weight.grad = torch.randn_like(weight)
    optimizer = SOAP([weight], lr=0.1)
    optimizer.step()
    assert {"rows", "columns"} & {*optimizer.state[f"2x{WIDEST + 1}"]} == {"rows"}


@pytest.mark.parametrize(("dim", "couplings", "clip_norm"), [(LIMITS.few, 8, 100.0), (LIMITS.few + 1, 16, 1.0)])
def test_many_latents_have_a_deeper_flow_and_smaller_gradients(dim, couplings, clip_norm):
    guide = AutoFlow(functools.partial(chain, dim)).setup()
    assert sum(isinstance(layer, Coupling) for layer in guide.flow.transforms) == couplings
    assert plan_of(guide).schedule().clip_norm == clip_norm


def test_adam_has_all_of_other_guides():
    assert plan_of(AutoMultivariateNormal(functools.partial(chain, 40))).by_muon() == []


@pytest.mark.slow
def test_a_large_flow_reaches_the_evidence_without_a_warm_start():
    dim = LIMITS.few + 8
    guide = guide_over(dim)
    fit = fit_svi(guide.model, guide, steps=600, num_particles=64, warm_start=False, progress=False)
    evidence = dist.Normal(0.0, (dim + 1) ** 0.5).log_prob(torch.tensor(5.0)).item()
    assert -fit.best_loss == pytest.approx(evidence, abs=0.1)
