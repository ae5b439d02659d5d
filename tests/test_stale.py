"""A density uses the current parameters, no matter how they changed since the value was drawn.

Each test is a case in which a cache of transforms has given a stale value, a lost gradient or a leak.  Only two calls
use one pass for draw and score: ``rsample_and_log_prob``, and a sample statement.
"""

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import laws
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_flows import AutoFlow, flows
from pyro_flows.distributions import MixtureBase, NormalBase, StudentTBase
from pyro_flows.flows import Flow
from pyro_flows.transforms import Compose, View

every_recipe = pytest.mark.parametrize("recipe", laws.RECIPES.values(), ids=laws.RECIPES)


def random_flow(recipe: object, context_dim: int = 0) -> Flow:
    flow = recipe(3, context_dim, num_transforms=3, hidden_dims=(8, 8))
    return laws.randomise(flow, scale=0.3).double()


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


@every_recipe
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_own_samples_are_scored_like_any_other_value(recipe: object, mode: Callable[[], Any]) -> None:
    q = random_flow(recipe)()
    with mode():
        x = q.rsample((5,))
    wanted = q.log_prob(x.clone())
    with mode() if x.is_inference() else torch.enable_grad():
        score = q.log_prob(x)
    assert score.requires_grad != x.is_inference()
    close(score.clone(), wanted)


@every_recipe
@pytest.mark.parametrize("optimiser_type", [torch.optim.Adam, torch.optim.SGD])
def test_optimiser_steps_are_seen(recipe: object, optimiser_type: type) -> None:
    """One distribution scores the same data before and after each step, without clear_cache and retain_graph."""
    flow = random_flow(recipe)
    optimiser = optimiser_type(flow.parameters(), lr=0.05)
    q, x, before = flow(), laws.normal(5, 3), torch.zeros(5).double()
    for _ in range(3):
        log_prob = q.log_prob(x)
        close(log_prob, flow().log_prob(x.clone()))
        assert not torch.allclose(log_prob, before)
        optimiser.zero_grad()
        (-log_prob.mean()).backward()
        optimiser.step()
        before = log_prob


@every_recipe
def test_scoring_a_sample_keeps_its_gradient(recipe: object) -> None:
    """``sample`` makes no graph, but the score of its value needs one."""
    flow = random_flow(recipe)
    q = flow()
    x = q.sample((5,))
    got = torch.autograd.grad(q.log_prob(x).sum(), flow.parameters())
    wanted = torch.autograd.grad(flow().log_prob(x.clone()).sum(), flow.parameters())
    for ours, theirs in zip(got, wanted, strict=True):
        close(ours, theirs)
    assert any((g != 0).any() for g in got)


@every_recipe
@pytest.mark.parametrize("draw", ["sample", "frozen_rsample"])
def test_a_sample_made_a_leaf_has_the_right_score_gradient(recipe: object, draw: str) -> None:
    """Path gradients need this: a stored score of the draw would not depend on the leaf."""
    frozen = draw == "frozen_rsample"  # in the grad mode of the score, even the value of rsample can become a leaf
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
    one_pass = functools.partial(flow.rsample_and_log_prob, (5,))
    for draw in (one_pass, lambda: (x := q.rsample((5,)), q.log_prob(x)), lambda: drawn_and_scored(flow)):
        torch.manual_seed(3)
        x, log_prob = draw()
        found.append(torch.autograd.grad(x.square().sum() - log_prob.sum(), flow.parameters()))
    for wanted, *others in zip(*found, strict=True):
        for gradient in others:
            close(gradient, wanted)


@every_recipe
@torch.no_grad()  # one grad mode throughout, so that the change itself must be detected
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


def in_place(flow: Flow) -> Flow:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)
    return flow


def by_vector(flow: Flow) -> Flow:
    vector = nn.utils.parameters_to_vector(flow.parameters())
    nn.utils.vector_to_parameters(vector.detach() + 0.1, flow.parameters())
    return flow


def by_data(flow: Flow) -> Flow:
    for parameter in flow.parameters():
        parameter.data = parameter.data + 0.1
    return flow


def in_data(flow: Flow) -> Flow:
    for parameter in flow.parameters():
        parameter.data.mul_(1.3)
    return flow


def by_assignment(flow: Flow) -> Flow:
    state = {name: value + 0.1 if value.is_floating_point() else value for name, value in flow.state_dict().items()}
    flow.load_state_dict(state, assign=True)
    return flow


def by_fused_optimiser(flow: Flow) -> Flow:
    optimiser = torch.optim.Adam(flow.parameters(), lr=0.1, fused=True)
    context = laws.normal(5, flow.context_dim) if flow.context_dim else None
    (-flow.log_prob(laws.normal(5, 3), context).mean()).backward()
    optimiser.step()
    return flow


def by_freezing(flow: Flow) -> Flow:
    """Freeze two parameters and edit a third in place, so that versions and flags have the same sums as before."""
    first, second, third, *_ = flow.parameters()
    first.requires_grad_(False)
    second.requires_grad_(False)
    with torch.no_grad():
        third.add_(0.3)
    return flow


def by_replacement(flow: Flow) -> Flow:
    for module in flow.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.detach() + 0.1))
    return flow


UPDATES = [in_place, by_vector, by_data, in_data, by_assignment, by_fused_optimiser, by_freezing, by_replacement]
# Two recipes, whose draws leave different caches, have all updates; every other recipe has three of them.
DRAWS = [
    *((name, draw, update) for name in ("realnvp", "iaf") for draw in ("rsample", "sample") for update in UPDATES),
    *(("realnvp", "frozen", update) for update in UPDATES),
    *(
        (name, "rsample", (UPDATES * 2)[place % len(UPDATES) + step])
        for place, name in enumerate(laws.RECIPES)
        if name not in ("realnvp", "iaf")
        for step in range(3)
    ),
]
every_update = pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)


@pytest.mark.parametrize(("recipe", "draw", "update"), DRAWS, ids=lambda part: getattr(part, "__name__", part))
def test_no_update_leaves_a_stale_density(recipe: str, draw: str, update: Callable[[Flow], Flow]) -> None:
    """After ``q = flow(); y = q.rsample()`` and an update by any means, ``q.log_prob(y)`` is right."""
    flow = random_flow(laws.RECIPES[recipe])
    q = flow()
    with torch.set_grad_enabled(draw != "frozen"):
        y = q.sample((5,)) if draw == "sample" else q.rsample((5,))
        before = flow.log_prob(y)
        with torch.enable_grad():
            update(flow)
        got, wanted = q.log_prob(y), flow().log_prob(y.detach().clone())
    close(got, wanted)
    assert not torch.allclose(got, before)


@pytest.mark.parametrize("base", [NormalBase, StudentTBase, lambda dim: MixtureBase(dim, 3)])
@every_update
def test_an_update_of_a_trained_base_is_seen(base: Callable[[int], nn.Module], update: Callable[[Flow], Flow]) -> None:
    flow = Flow(flows.realnvp(3, num_transforms=2, hidden_dims=(8,)).transforms, base(3)).double()
    laws.randomise(flow, scale=0.3)
    q = flow()
    y = q.rsample((5,))
    update(flow)
    close(q.log_prob(y), flow.log_prob(y.detach().clone()))
    torch.manual_seed(0)
    got = q.sample((4,))
    torch.manual_seed(0)
    close(got, flow().sample((4,)))


@every_recipe
@pytest.mark.parametrize("update", [in_data, by_fused_optimiser])
def test_a_view_computes_values_anew_after_an_update(recipe: object, update: Callable[[Flow], Flow]) -> None:
    flow = random_flow(recipe, context_dim=2)
    context, x = laws.normal(5, 2), laws.normal(5, 3)
    views = flow(context).transforms
    images = [view(x) for view in views]
    update(flow)
    for view, y in zip(views, images, strict=True):
        close(view.inv(y), view.transform.inverse_and_log_det(y, view.context)[0])


@every_update
def test_a_view_gives_no_stale_log_determinant(update: Callable[[Flow], Flow]) -> None:
    flow, x = random_flow(laws.RECIPES["realnvp"]), laws.normal(5, 3)
    view = View(Compose(flow.transforms))
    y = view(x)
    update(flow)
    close(view.log_abs_det_jacobian(x, y), view.transform.forward_and_log_det(x)[1])


def counted(flow: Flow) -> list[int]:
    """Return a list that grows with each call of a transform of the flow."""
    calls: list[int] = []
    for transform in flow.transforms:
        for verb in ("forward_and_log_det", "inverse_and_log_det"):
            inner = getattr(transform, verb)
            setattr(transform, verb, lambda *args, inner=inner: calls.append(1) or inner(*args))
    return calls


@pytest.mark.parametrize("wrap", [lambda q: q.to_event(1), lambda q: q.mask(torch.ones(4, dtype=torch.bool))])
def test_wrapped_flows_are_scored_in_the_pass_that_drew_them(wrap: Callable[..., object]) -> None:
    flow = random_flow(laws.RECIPES["realnvp"])
    calls = counted(flow)
    pyro.poutine.trace(lambda: pyro.sample("y", wrap(flow().expand((4,))))).get_trace().compute_log_prob()
    assert len(calls) == len(flow.transforms)


@every_recipe
def test_a_sample_statement_is_scored_in_the_pass_that_drew_it(recipe: object) -> None:
    """The score equals ``log_prob``, and it uses the parameters at the time of the call."""
    flow = random_flow(recipe)
    calls = counted(flow)
    site = pyro.poutine.trace(lambda: pyro.sample("y", flow())).get_trace().nodes["y"]
    score = site["fn"].log_prob(site["value"])
    assert len(calls) == len(flow.transforms)
    close(score, flow().log_prob(site["value"].clone()))
    in_place(flow)
    close(site["fn"].log_prob(site["value"]), flow().log_prob(site["value"].clone()))


@every_update
@pytest.mark.parametrize("expanded", [False, True])
def test_a_draw_under_a_handler_is_scored_with_the_parameters_as_they_are(
    update: Callable[[Flow], Flow], expanded: bool
) -> None:
    flow = random_flow(laws.RECIPES["realnvp"])
    q = flow().expand((4,)) if expanded else flow()
    trace = pyro.poutine.trace(lambda: pyro.sample("y", q)).get_trace()
    y = trace.nodes["y"]["value"]
    update(flow)
    close(trace.nodes["y"]["fn"].log_prob(y), flow.log_prob(y.detach().clone()))
    trace.compute_log_prob()
    close(trace.nodes["y"]["log_prob"], flow.log_prob(y.detach().clone()))


def test_a_draw_that_was_changed_in_place_in_a_program_is_scored_as_it_is() -> None:
    flow = random_flow(laws.RECIPES["realnvp"])

    def program() -> None:
        y = pyro.sample("y", flow().expand((5,)))
        with torch.no_grad():
            y.clamp_(-0.1, 0.1)

    trace = pyro.poutine.trace(program).get_trace()
    trace.compute_log_prob()
    close(trace.nodes["y"]["log_prob"], flow.log_prob(trace.nodes["y"]["value"].detach().clone()))


def test_a_draw_that_was_detached_in_place_has_the_gradients_of_any_value() -> None:
    flow = random_flow(laws.RECIPES["realnvp"])
    q = flow()
    y = q.rsample((5,))
    values = y.detach_(), y.clone()
    found = [torch.autograd.grad(q.log_prob(value).sum(), flow.parameters()) for value in values]
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)


def drawn_and_scored(flow: Flow) -> tuple[Tensor, Tensor]:
    trace = pyro.poutine.trace(lambda: pyro.sample("y", flow().expand((5,)))).get_trace()
    trace.compute_log_prob()
    return trace.nodes["y"]["value"], trace.nodes["y"]["log_prob"]


def test_threads_on_one_distribution_do_not_meet() -> None:
    flow = random_flow(laws.RECIPES["realnvp"])
    q = flow()

    def work(_: int) -> float:
        with torch.no_grad():
            worst = 0.0
            for _ in range(50):
                y = q.rsample((2,))
                worst = max(worst, float((q.log_prob(y) - flow.log_prob(y)).abs().max()))
        return worst

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(8))) < 1e-9


@pytest.mark.parametrize("handled", [False, True])
def test_distributions_and_views_are_copied_and_pickled_after_use(handled: bool) -> None:
    flow = random_flow(laws.RECIPES["realnvp"], context_dim=2)
    q = flow(laws.normal(5, 2))
    if handled:
        pyro.poutine.trace(lambda: pyro.sample("y", q)).get_trace()
    q.rsample()
    q.transforms[0](laws.normal(5, 3))
    y = laws.normal(5, 3)
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        close(other.log_prob(y), q.log_prob(y))


def test_a_view_answers_torchs_own_questions() -> None:
    """torch asks for the inverse and for its log-determinant in turn, in either order of directions."""
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


@pytest.mark.parametrize("recipe", [None, flows.iaf], ids=["default", "iaf"])
def test_a_trace_of_a_guide_is_scored_with_the_parameters_as_they_are(recipe: object) -> None:
    """Its draws are scored in the step that draws them, and an update in between is detected."""

    def model() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guide = AutoFlow(model, recipe).setup()
    trace = pyro.poutine.trace(guide).get_trace()
    site = next(site for name, site in trace.nodes.items() if name.endswith("_latent"))
    in_place(guide.flow)
    trace.compute_log_prob()
    torch.testing.assert_close(site["log_prob"], guide.flow.log_prob(site["value"].detach().clone()))
