"""A distribution remembers what it computed for its own samples, so that no network runs twice; nothing may depend on
that.  Each test is a trap in which a cache of transforms has given a stale value, a lost gradient or a leak."""

from __future__ import annotations

from collections.abc import Iterator

import laws
import pytest
import torch
from torch import Tensor, nn

from pyro_flows import flows
from pyro_flows.flows import Flow

every_recipe = pytest.mark.parametrize("recipe", laws.RECIPES.values(), ids=laws.RECIPES)


def random_flow(recipe: object, context_dim: int = 0) -> Flow:
    flow = recipe(3, context_dim, num_transforms=3, hidden_dims=(8, 8))
    return laws.randomise(flow, scale=0.3).double()


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


def nudge(flow: Flow) -> None:
    """An update in place, as an optimiser makes it."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)


@every_recipe
def test_own_samples_are_scored_like_any_other_value(recipe: object) -> None:
    q = random_flow(recipe)()
    x = q.rsample((5,))
    score = q.log_prob(x)
    close(score, q.log_prob(x.clone()))
    close(score, q.log_prob(x))  # asked a second time, when the memo is empty


@every_recipe
def test_an_update_in_place_is_seen(recipe: object) -> None:
    flow = random_flow(recipe)
    q = flow()
    x = q.rsample((5,)).detach()
    y = q.rsample((5,))
    before = q.log_prob(x)
    nudge(flow)
    for value in (x, y):
        close(q.log_prob(value), q.log_prob(value.detach().clone()))
        close(q.log_prob(value), flow().log_prob(value.detach().clone()))
    assert not torch.allclose(q.log_prob(x), before)


@every_recipe
@pytest.mark.parametrize("optimiser_type", [torch.optim.Adam, torch.optim.SGD])
def test_an_optimiser_step_is_seen(recipe: object, optimiser_type: type) -> None:
    """The same data tensor is scored before and after: the classical stale value."""
    flow = random_flow(recipe)
    optimiser = optimiser_type(flow.parameters(), lr=0.05)
    q, x = flow(), laws.normal(5, 3)
    before = q.log_prob(x)
    (-before.mean()).backward()
    optimiser.step()
    after = q.log_prob(x)
    close(after, q.log_prob(x.clone()))
    assert not torch.allclose(after, before)


@every_recipe
def test_a_sample_from_before_a_step_is_scored_afresh(recipe: object) -> None:
    flow = random_flow(recipe)
    optimiser = torch.optim.Adam(flow.parameters(), lr=0.05)
    q = flow()
    x = q.rsample((5,))
    x.square().sum().backward(retain_graph=True)
    optimiser.step()
    close(q.log_prob(x), flow().log_prob(x.detach().clone()))


@every_recipe
def test_a_plain_loop_trains_one_distribution_for_many_steps(recipe: object) -> None:
    """No clear_cache, no retain_graph, and the distribution made once."""
    flow = random_flow(recipe)
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    q, x = flow(), 0.5 * laws.normal(64, 3) + 1
    losses = []
    for _ in range(50):
        optimiser.zero_grad()
        loss = -q.log_prob(x).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    close(q.log_prob(x), flow().log_prob(x.clone()))


@every_recipe
def test_scoring_a_sample_keeps_its_gradient(recipe: object) -> None:
    """``sample`` makes no graph; the score of what it gave needs one nevertheless."""
    flow = random_flow(recipe)
    q = flow()
    x = q.sample((5,))
    got = torch.autograd.grad(q.log_prob(x).sum(), flow.parameters())
    wanted = torch.autograd.grad(flow().log_prob(x.clone()).sum(), flow.parameters())
    for ours, theirs in zip(got, wanted, strict=True):
        close(ours, theirs)
    assert any((g != 0).any() for g in got)


@every_recipe
def test_sampling_without_grad_and_scoring_with_it(recipe: object) -> None:
    flow = random_flow(recipe)
    q = flow()
    with torch.no_grad():
        x = q.rsample((5,))
    score = q.log_prob(x)
    assert score.requires_grad
    close(score, flow().log_prob(x.clone()))


@every_recipe
def test_sampling_in_inference_mode_and_scoring_outside(recipe: object) -> None:
    flow = random_flow(recipe)
    q = flow()
    with torch.inference_mode():
        x = q.rsample((5,))
        inside = q.log_prob(x)
    close(inside.clone(), q.log_prob(x.clone()))


@every_recipe
@pytest.mark.parametrize("draw", ["sample", "frozen_rsample"])
def test_a_sample_made_a_leaf_has_the_right_score_gradient(recipe: object, draw: str) -> None:
    """The path gradient's way: what the memo would answer does not depend on the leaf."""
    frozen = draw == "frozen_rsample"  # then even rsample, in the grad mode of the score, gives what can become a leaf
    flow = random_flow(recipe).requires_grad_(not frozen)
    q = flow()
    leaf = (q.rsample((5,)) if frozen else q.sample((5,))).requires_grad_()
    (got,) = torch.autograd.grad(q.log_prob(leaf).sum(), leaf)
    clone = leaf.detach().clone().requires_grad_()
    (wanted,) = torch.autograd.grad(flow().log_prob(clone).sum(), clone)
    close(got, wanted)
    assert (got != 0).any()


@every_recipe
def test_reparameterised_gradients_are_those_of_one_pass(recipe: object) -> None:
    flow = random_flow(recipe)
    q, found = flow(), []
    for draw in (lambda: (x := q.rsample((5,)), q.log_prob(x)), lambda: flow.rsample_and_log_prob((5,))):
        torch.manual_seed(3)
        x, log_prob = draw()
        found.append(torch.autograd.grad(x.square().sum() - log_prob.sum(), flow.parameters()))
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)


@every_recipe
@torch.no_grad()  # one grad mode throughout: the change itself has to be seen
def test_a_sample_changed_in_place_is_scored_as_it_is(recipe: object) -> None:
    flow = random_flow(recipe)
    q = flow()
    x = q.sample((5,))
    x += 0.3
    close(q.log_prob(x), flow().log_prob(x.clone()))


@every_recipe
@torch.no_grad()
def test_a_context_changed_in_place_is_seen(recipe: object) -> None:
    flow = random_flow(recipe, context_dim=2)
    context = laws.normal(5, 2)
    q = flow(context)
    x = q.sample()
    context += 0.5
    close(q.log_prob(x), flow(context.clone()).log_prob(x.clone()))
    y = q.sample()
    close(q.log_prob(y), flow(context.clone()).log_prob(y.clone()))


@every_recipe
def test_what_was_drawn_is_forgotten_when_it_is_scored(recipe: object) -> None:
    q = random_flow(recipe)()
    x = q.rsample((5,))
    assert q._memo.made(x, forward=True)
    q.log_prob(x)
    assert q._memo._kept is None
    view, value = q.transforms[0], laws.normal(5, 3)
    y = view(value)
    assert view._memo.made(y, forward=True)
    assert view.log_abs_det_jacobian(value, y).shape == (5,)
    assert view._memo._kept is None


def test_a_view_answers_torchs_own_questions() -> None:
    """torch asks for the inverse and for its log-determinant one after the other, in either order of directions."""
    flow = random_flow(laws.RECIPES["maf"], context_dim=2)
    context, transform = laws.normal(5, 2), flow.transforms[0]
    x = laws.normal(5, 3)
    y, log_det = transform.forward_and_log_det(x, context)
    view = transform.condition(context)
    close(view.log_abs_det_jacobian(view.inv(y), y), log_det)
    close(view.inv.log_abs_det_jacobian(y, view.inv(y)), -log_det)
    close(view(view.inv(y)), y)
    close(view.inv(view(x)), x)


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item)


@every_recipe
def test_nothing_stays_on_the_module(recipe: object) -> None:
    flow = random_flow(recipe, context_dim=2)
    q = flow(laws.normal(5, 2))
    x = q.rsample((7,))
    q.log_prob(x).sum().backward()
    flow.rsample_and_log_prob((7,), laws.normal(5, 2))
    owned = {id(t) for t in (*flow.parameters(), *flow.buffers())}
    attributes = [module.__dict__ for module in flow.modules() if isinstance(module, nn.Module)]
    assert {id(t) for t in tensors_in(attributes)} == owned


def test_a_sample_drawn_while_frozen_is_scored_anew_once_the_parameters_are_free():
    flow = flows.realnvp(3, num_transforms=2, hidden_dims=(8,)).requires_grad_(False)
    q = flow()
    y = q.rsample()
    flow.requires_grad_(True)
    assert q.log_prob(y).requires_grad


def test_a_context_made_in_inference_mode_is_welcome():
    flow = flows.realnvp(3, 2, num_transforms=2, hidden_dims=(8,))
    with torch.inference_mode():
        context = torch.randn(4, 2)
    assert flow(context).sample().shape == (4, 3)
