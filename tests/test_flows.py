"""Flows.

A flow is a persistent module, and ``flow(context)`` is a Pyro distribution.  It starts at its base, its density
integrates to one, and its batch shape is that of its context.  Each network runs once.  Flows work in Pyro as other
distributions do.
"""

import collections
import copy
import functools
import math
from typing import Any

import laws
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.conditional import ConditionalDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_flows import flows
from pyro_flows.compiler_state import NEW_COMPILER
from pyro_flows.conditioners import Conditioner
from pyro_flows.distributions import CircularBase
from pyro_flows.flows import Flow
from pyro_flows.flows.coupling import coupling_masks
from pyro_flows.transforms import ActNorm, Coupling

CONTEXT_DIM = 2
every_recipe = pytest.mark.parametrize("name", laws.RECIPES)
every_size = pytest.mark.parametrize("dim", [1, 2, 5])
every_context = pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM], ids=["plain", "context"])


def start(name: str, dim: int = 3, context_dim: int = 0, **options: Any) -> Flow:
    return laws.RECIPES[name](dim, context_dim, **{"num_transforms": 3, "hidden_dims": (8, 8), **options}).double()


def random(name: str, dim: int = 3, context_dim: int = 0, scale: float = 0.3, **options: Any) -> Flow:
    return laws.randomise(start(name, dim, context_dim, **options), scale=scale)


def context_of(flow: Flow, *batch: int) -> Tensor | None:
    return laws.normal(*batch, flow.context_dim, seed=2) if flow.context_dim else None


def circular_of(flow: Flow) -> Tensor:
    """Return which features are angles, whose density integrates to one over one period."""
    base = flow.base
    return base.circular if isinstance(base, CircularBase) else torch.zeros(flow.event_shape, dtype=torch.bool)


def through(flow: Flow, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the value after all transforms, and the sum of their log-determinants."""
    total = torch.zeros((), dtype=x.dtype)
    for transform in flow.transforms:
        x, log_det = transform.forward_and_log_det(x, context if transform.context_dim else None)
        total = total + log_det
    return x, total


def close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


# -------------------------------------------------------------------------------------------------------- distribution


@every_recipe
@every_size
@every_context
def test_it_starts_at_its_base(name: str, dim: int, context_dim: int) -> None:
    flow = start(name, dim, context_dim)
    x = laws.normal(6, dim, scale=2.0)
    close(flow(context_of(flow, 6)).log_prob(x), flow.base().log_prob(x))


@every_recipe
@pytest.mark.parametrize(("dim", "context_dim"), [(1, 0), (1, CONTEXT_DIM), (2, 0), (5, CONTEXT_DIM)])
def test_shapes_are_those_of_the_context(name: str, dim: int, context_dim: int) -> None:
    flow = random(name, dim, context_dim)
    batch = (5,) if context_dim else ()
    q = flow(context_of(flow, 5))
    assert (q.batch_shape, q.event_shape) == (batch, (dim,))
    x = q.sample((7,))
    assert x.shape == q.shape((7,)) == (7, *batch, dim)
    assert (q.log_prob(x).shape, q.log_prob(x[0]).shape, q.rsample().shape) == ((7, *batch), batch, (*batch, dim))
    assert x.dtype == q.log_prob(x).dtype == torch.float64
    assert (flow.event_shape, flow.context_dim) == ((dim,), context_dim)
    assert isinstance(q, dist.TransformedDistribution)
    assert isinstance(flow, ConditionalDistribution)
    assert q.has_rsample
    assert q.support.event_dim == 1
    assert isinstance(q.support.base_constraint, type(constraints.real))


@pytest.mark.slow
@every_recipe
def test_values_and_contexts_broadcast(name: str) -> None:
    flow = random(name, 3, CONTEXT_DIM)
    context, x = laws.normal(4, 1, CONTEXT_DIM), laws.normal(4, 5, 3, seed=1)
    score = flow(context).log_prob(x)
    assert score.shape == (4, 5)
    close(score, flow(context.expand(4, 5, CONTEXT_DIM)).log_prob(x))
    close(flow(context[0, 0]).log_prob(x)[0], score[0])
    close(flow(context).log_prob(x[0, 0]), flow(context).log_prob(x[0, 0].expand(4, 1, 3)))
    close(flow.condition(context).log_prob(x), score)
    close(flow.log_prob(x, context), score)
    assert flow(context).rsample((6,)).shape == (6, 4, 1, 3)
    assert flow.rsample_and_log_prob((6,), context)[1].shape == (6, 4, 1)


@every_recipe
@every_context
def test_no_events_have_no_densities(name: str, context_dim: int) -> None:
    flow = random(name, 3, context_dim)
    context = laws.normal(0, context_dim) if context_dim else None
    nothing = laws.normal(0, 3).requires_grad_()
    flow.log_prob(nothing, context).sum().backward()
    assert nothing.grad is not None
    assert flow(context).log_prob(nothing).shape == (0,)
    shape = () if context_dim else (0,)
    q = flow(context)
    assert q.log_prob(q.rsample(shape)).shape == (0,)
    assert flow.sample(shape, context).shape == (0, 3)
    assert flow.rsample_and_log_prob(shape, context)[1].shape == (0,)


@every_recipe
@every_size
@every_context
def test_samples_and_scores_belong_together(name: str, dim: int, context_dim: int) -> None:
    flow = random(name, dim, context_dim)
    context = context_of(flow, 5)
    x, log_prob = flow.rsample_and_log_prob((7,), context)
    assert x.requires_grad
    close(log_prob, flow(context).log_prob(x.detach().clone()))


@pytest.mark.slow
@every_context
@every_recipe
@pytest.mark.parametrize("dim", [1, 2])
def test_the_density_integrates_to_one(name: str, dim: int, context_dim: int) -> None:
    """The mean of f(x) under the density equals that of the samples, so both have the same distribution."""
    flow = random(name, dim, context_dim, scale=0.2)
    q, circular = flow(context_of(flow)), circular_of(flow)
    count = 2800 if dim == 1 else 140 if name == "cnf" else 280  # the density of a solver is smooth
    unit = (torch.arange(count, dtype=torch.float64) + 0.5) / count * 2 - 1
    bounds = torch.where(circular, math.pi, 14.0).double()
    grid = torch.cartesian_prod(*(bound * unit for bound in bounds)).reshape(-1, dim)
    with torch.no_grad():
        mass = q.log_prob(grid).exp() * (2 * bounds / count).prod()
        x = q.sample((4000,))
    assert mass.sum().item() == pytest.approx(1, abs=2e-3)
    on_grid, of_draws = (torch.sigmoid(torch.where(circular, v.cos(), v)).prod(-1) for v in (grid, x))
    assert of_draws.mean().item() == pytest.approx((mass * on_grid).sum().item(), abs=0.03)


@pytest.mark.slow
@every_recipe
def test_draws_of_another_law_have_finite_scores_that_are_kept_nowhere(name: str) -> None:
    """10,000 heavy-tailed draws, in both modes, before and after an in-place update of the tensor."""
    flow = random(name, 3, scale=0.3).float()
    x = 5 * dist.StudentT(2.0).sample((10_000, 3))
    with torch.no_grad():
        first, second = (flow.train(mode)().log_prob(x) for mode in (True, False))
        assert torch.equal(first, second)
        for parameter in flow.parameters():
            parameter.mul_(0.9)
        third = flow().log_prob(x)
        assert all(score.isfinite().all() for score in (first, third))
        assert not torch.equal(third, first)
        close(third, copy.deepcopy(flow)().log_prob(x.clone()))


# ----------------------------------------------------------------------------------------------------- network calls


def count_calls(flow: Flow) -> collections.Counter[Conditioner]:
    """Count the calls of each conditioner as a module; incremental evaluation does not count."""
    counts = collections.Counter({part: 0 for part in flow.modules() if isinstance(part, Conditioner)})
    for net in counts:
        net.register_forward_hook(lambda net, *_: counts.update([net]))
    return counts


@pytest.mark.parametrize("name", ["nice", "realnvp", "nsf", "iaf"])
@every_context
def test_each_network_runs_once(name: str, context_dim: int) -> None:
    flow = random(name, 3, context_dim)
    context, counts = context_of(flow, 5), count_calls(flow)
    flow.rsample_and_log_prob((7,), context)
    assert set(counts.values()) == {1}
    q = flow(context)
    x = q.rsample((7,))
    remembered = q.log_prob(x)
    assert set(counts.values()) == {2}
    close(q.log_prob(x.detach().clone()), remembered)
    # Other values need one more run of coupling layers; iaf's networks then run incrementally, not as modules.
    assert set(counts.values()) == ({2} if name == "iaf" else {3})


@pytest.mark.parametrize("name", ["maf", "nsf_ar"])
def test_density_fast_flows_score_in_one_pass_and_never_run_to_score_their_samples(name: str) -> None:
    flow = random(name, 3)
    counts = count_calls(flow)
    flow().log_prob(laws.normal(7, 3))
    assert set(counts.values()) == {1}
    q = flow()
    q.log_prob(q.rsample((7,)))
    assert set(counts.values()) == {1}


# --------------------------------------------------------------------------------------------------------------- depth


@every_recipe
@pytest.mark.parametrize("dim", [2, 3, 5, 8])
def test_every_dimension_is_transformed_by_two_layers(name: str, dim: int) -> None:
    flow = laws.randomise(start(name, dim, num_transforms=2), scale=1.0)
    layers = [layer for layer in flow.transforms if not isinstance(layer, ActNorm)]  # couplings and permutations alone
    x = y = laws.normal(9, dim)
    for layer in layers:
        y, _ = layer.forward_and_log_det(y)
    assert (y != x).any(0).all()


@pytest.mark.parametrize("dim", [2, 3, 4, 5, 8, 13, 33])
def test_coupling_masks_separate_all_features(dim: int) -> None:
    masks = coupling_masks(dim, 2 * math.ceil(math.log2(dim)))
    assert all(mask.any() and not mask.all() for mask in masks)
    for first, second in zip(masks[::2], masks[1::2], strict=True):
        assert torch.equal(first, ~second)
    table = torch.stack(masks)
    apart = (table[:, :, None] != table[:, None]).any(0)
    assert torch.equal(apart, ~torch.eye(dim, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------------------- inverse


@every_recipe
@every_context
def test_inv_is_the_opposite_direction(name: str, context_dim: int) -> None:
    flow = random(name, 3, context_dim)
    context, x = context_of(flow, 6), laws.normal(6, 3)
    y, total = through(flow, x, context)
    close(flow.inv(context).log_prob(x), flow.base().log_prob(y) + total)
    close(flow.inv.inv(context).log_prob(y), flow(context).log_prob(y))
    assert {id(p) for p in flow.inv.parameters()} == {id(p) for p in flow.parameters()}


# --------------------------------------------------------------------------------------------------------------- Pyro


@pytest.mark.slow
@every_recipe
def test_it_expands(name: str) -> None:
    q = random(name, 3)()
    wide, x = q.expand((4, 5)), laws.normal(4, 5, 3)
    assert (wide.batch_shape, wide.event_shape, wide.sample().shape) == ((4, 5), (3,), (4, 5, 3))
    close(wide.log_prob(x), q.log_prob(x))
    assert wide.sample().unique(dim=0).shape[0] == 4  # independent draws, not copies of a single draw
    narrow = random(name, 3, CONTEXT_DIM)(laws.normal(5, CONTEXT_DIM))
    close(narrow.expand((4, 5)).log_prob(x), narrow.log_prob(x))


def test_it_masks_and_becomes_an_event() -> None:
    q = random("nsf", 3, CONTEXT_DIM)(laws.normal(5, CONTEXT_DIM))
    x = q.sample()
    mask = torch.tensor([True, False, True, True, False])
    close(q.mask(mask).log_prob(x), torch.where(mask, q.log_prob(x), 0.0))
    event = q.to_event(1)
    assert (event.batch_shape, event.event_shape) == ((), (5, 3))
    close(event.log_prob(x), q.log_prob(x).sum())


@pytest.mark.slow
@every_recipe
def test_it_is_a_prior_and_a_likelihood(name: str) -> None:
    prior, likelihood = random(name, 3), random(name, 2, 3)

    def model(data: Tensor) -> None:
        pyro.module("prior", prior)
        z = pyro.sample("z", prior())
        with pyro.plate("rows", len(data)):
            local = pyro.sample("local", prior())  # the plate expands it
            pyro.sample("x", likelihood(z + local), obs=data)

    data = laws.normal(6, 2)
    trace = poutine.trace(model).get_trace(data)
    trace.compute_log_prob()
    z, local = (trace.nodes[site]["value"] for site in ("z", "local"))
    assert (z.shape, local.shape) == ((3,), (6, 3))
    for site, value in (("z", z), ("local", local)):
        close(trace.nodes[site]["log_prob"], prior().log_prob(value.detach().clone()))
    close(trace.nodes["x"]["log_prob"], likelihood(z + local).log_prob(data))
    gradient = torch.autograd.grad(trace.log_prob_sum(), list(prior.parameters()), allow_unused=True)
    assert any(g is not None and (g != 0).any() for g in gradient)


def test_it_is_scored_in_nested_and_subsampled_plates() -> None:
    flow = random("maf", 3, CONTEXT_DIM)
    context = laws.normal(4, 6, CONTEXT_DIM)

    def model() -> Tensor:
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 12, subsample_size=6, dim=-1):
            return pyro.sample("x", flow(context))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    x = trace.nodes["x"]["value"]
    assert x.shape == (4, 6, 3)
    close(trace.nodes["x"]["log_prob_sum"], 2 * flow(context).log_prob(x.detach().clone()).sum())


LAPLACE = dist.Laplace(torch.zeros(3).double(), 1.0).to_event(1)
CORRELATED = dist.MultivariateNormal(torch.ones(3).double(), 2 * torch.eye(3).double())


@pytest.mark.parametrize("base", [LAPLACE, CORRELATED], ids=["laplace", "multivariate_normal"])
@every_context
def test_any_distribution_can_be_the_base(base: dist.TorchDistribution, context_dim: int) -> None:
    flow = Flow(start("nsf", 3, context_dim).transforms, base)
    context, x = context_of(flow, 6), laws.normal(6, 3)
    close(flow(context).log_prob(x), base.log_prob(x))
    laws.randomise(flow, scale=0.3)
    y, log_prob = flow.rsample_and_log_prob((6,) if context is None else (), context)
    close(flow(context).log_prob(y.detach().clone()), log_prob)


@every_context
def test_planar_flows_score_what_they_did_not_draw(context_dim: int) -> None:
    """At large parameters, the density of new values integrates to one and equals that of the draws."""
    flow = flows.planar_flow(1, context_dim, num_transforms=4, hidden_dims=(8,)).double()
    with torch.no_grad():
        for seed, parameter in enumerate(flow.parameters()):
            parameter.copy_(laws.normal(*parameter.shape, seed=seed))
        q = flow(context_of(flow))
        grid = torch.linspace(-300, 300, 600001, dtype=torch.float64).unsqueeze(-1)
        mass = q.log_prob(grid).exp() * 1e-3
        assert mass.sum().item() == pytest.approx(1, abs=1e-6)
        below = (q.sample((20000,)) < grid[::20000].T).double().mean(0)
        assert (below - mass.cumsum(0)[::20000]).abs().max() < 0.02


# -------------------------------------------------------------------------------------------------------------- angles


PATTERNS = [[True], [True, True], [False, True], [True, False, True, True, False]]


@pytest.mark.parametrize("circular", PATTERNS, ids=str)
@every_context
def test_the_density_has_the_period_of_each_angle_and_of_no_other(circular: list[bool], context_dim: int) -> None:
    dim = len(circular)
    flow = flows.circular_coupling(dim, context_dim, circular=circular, num_transforms=4, hidden_dims=(8, 8)).double()
    laws.randomise(flow, scale=0.5)
    context, x = context_of(flow, 50), laws.normal(50, dim, scale=2.0)
    score = flow(context).log_prob(x)
    for place, is_angle in enumerate(circular):
        for turns in (-3, 1, 100):
            moved = x + 2 * math.pi * turns * torch.eye(dim, dtype=torch.float64)[place]
            change = (flow(context).log_prob(moved) - score).abs()
            assert (change < 1e-8).all() if is_angle else (change > 1e-6).all()


@pytest.mark.parametrize("circular", PATTERNS, ids=str)
def test_all_features_steer_all_others(circular: list[bool]) -> None:
    """In eight layers, each feature depends on each other feature, angles included."""
    dim = len(circular)
    flow = flows.circular_coupling(dim, circular=circular, num_transforms=8, hidden_dims=(32, 32)).double()
    laws.randomise(flow, scale=0.3)
    x = laws.normal(50, dim)
    matrix = laws.jacobian(lambda value: through(flow, value)[0], x)
    assert (matrix.abs().amax(0) > 1e-6).all()


def test_one_angle_fits_a_mixture_of_von_mises() -> None:
    """One mode lies across the seam.  Below 1e-3 nats, a thousand draws do not distinguish fit and target."""
    target = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.6, 0.4], dtype=torch.float64)),
        dist.VonMises(torch.tensor([-1.0, 3.0], dtype=torch.float64), torch.tensor([4.0, 10.0], dtype=torch.float64)),
    )
    flow = flows.circular_coupling(1, circular=[True], num_transforms=2, bins=16).double()

    def divergence(count: int) -> Tensor:
        """Return KL(target, flow) as a mean over equidistant angles."""
        x = ((torch.arange(count, dtype=torch.float64) + 0.5) / count * 2 - 1) * math.pi
        log_p = target.log_prob(x)
        return 2 * math.pi * (log_p.exp() * (log_p - flow.log_prob(x.unsqueeze(-1)))).mean()

    assert laws.descend(flow.parameters(), lambda: divergence(512), steps=300, lr=0.05, cosine=200)[0] > 0.5
    assert abs(divergence(16384).item()) < 1e-3  # finer than the training grid, between whose points are kinks


# ------------------------------------------------------------------------------------------------------------ learning


@every_recipe
def test_three_steps_from_the_start_move_every_parameter(name: str) -> None:
    flow = start(name, 5, CONTEXT_DIM)
    before = {key: p.detach().clone() for key, p in flow.named_parameters()}
    context, x = laws.normal(64, CONTEXT_DIM), laws.normal(64, 5, seed=1).cumsum(-1) + 1
    laws.descend(flow.parameters(), lambda: -flow(context).log_prob(x).mean())
    assert all((p != before[key]).any() for key, p in flow.named_parameters())


# ------------------------------------------------------------------------------------------------------------ compiler


@pytest.mark.slow
@pytest.mark.parametrize("name", ["realnvp", "maf"])
@pytest.mark.parametrize("verb", ["log_prob", "rsample_and_log_prob"])
def test_it_compiles_to_one_graph(name: str, verb: str) -> None:
    pyro.enable_validation(False)  # a check of values is control flow that depends on data
    if verb == "rsample_and_log_prob" and not NEW_COMPILER:
        pytest.skip("torch.compile of Distribution.expand: torch 2.13, not yet 2.6")
    flow = random(name, 3, CONTEXT_DIM, num_transforms=2)
    context, value = laws.normal(4, CONTEXT_DIM), laws.normal(4, 3)
    torch._dynamo.reset()
    found = []
    for function in (getattr(flow, verb), torch.compile(getattr(flow, verb), fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        outputs = (function(value, context),) if verb == "log_prob" else function((), context)
        found.append([*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), list(flow.parameters()))])
    close(*found)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("context_dim", "context", "message"),
    [
        (2, None, r"context is missing; .* width 2"),
        (0, torch.zeros(5, 2), r"context of shape \(5, 2\) is unexpected"),
        (2, torch.zeros(5, 3), r"context must have width 2 .*got shape \(5, 3\)"),
        (2, torch.zeros(5, 2, dtype=torch.long), r"context must be of a floating dtype, got torch.int64"),
    ],
)
def test_a_wrong_context_is_refused(context_dim: int, context: Tensor | None, message: str) -> None:
    flow, x = start("realnvp", 3, context_dim), torch.zeros(3, dtype=torch.float64)
    for use in (flow, lambda given: flow.rsample_and_log_prob((), given), lambda given: flow.log_prob(x, given)):
        with pytest.raises(ValueError, match=message):
            use(context)


WRONG = [
    (torch.zeros(5, 2), r"event shape \(3,\) on the right, got shape \(5, 2\)"),
    (torch.zeros(5, 3, dtype=torch.long), r"floating dtype, got torch.int64"),
    (torch.tensor([0.0, math.nan, 0.0]).double(), r"NaN or inf \(1 of 3 numbers"),
]
test_a_wrong_value_is_refused = laws.refusals(
    *((lambda value=value: start("realnvp", 3)().log_prob(value), words) for value, words in WRONG),
    # This path skips the check for finite values.
    *((lambda value=value: start("realnvp", 3).log_prob(value), words) for value, words in WRONG[:2]),
)


@every_recipe
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_dim": 0}, "input_dim must be an integer of at least 1, got 0"),
        ({"context_dim": -1}, "context_dim must be an integer of at least 0, got -1"),
        ({"num_transforms": 0}, "num_transforms must be an integer of at least 1, got 0"),
        ({"hidden_dims": ()}, r"hidden_dims must be a sequence .*got \(\)"),
    ],
)
def test_a_recipe_names_itself_the_argument_and_the_value(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        laws.RECIPES[name](**{"input_dim": 2, **arguments})


test_the_recipe_for_angles_wants_one_bool_for_each_feature = laws.refusals(
    (lambda: flows.circular_coupling(2, circular=[True]), "^circular_coupling: circular .* 2 features, got"),
    (lambda: flows.circular_coupling(2, circular=[True, False, True]), "^circular_coupling: circular .* 2 features"),
    (lambda: flows.circular_coupling(2, circular=[0, 2]), "^circular_coupling: circular .* 2 features, got"),
)


def test_couplings_are_what_coupling_recipes_are_made_of() -> None:
    """One feature has no coupling; with two or more features, every layer is a coupling."""
    assert not any(isinstance(layer, Coupling) for layer in start("nsf", 1).transforms)
    assert all(isinstance(layer, Coupling) for layer in start("nsf", 2).transforms[:-1])
    assert all(isinstance(layer.inv, Coupling) for layer in start("realnvp", 2).transforms)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [3e-4, 1e-3, 3e-3, 8e-3])
@pytest.mark.parametrize("name", ["maf", "realnvp"])
def test_affine_recipes_learn_in_a_plain_loop_of_adam_at_any_usual_rate(name: str, rate: float) -> None:
    """The loop has 200 steps without warm-up, clipping or decay; the second column's scale depends on the first."""
    z = laws.normal(4096, 2).float()
    log_scale = 1.5 * z[:, 0]
    x = torch.stack((z[:, 0], z[:, 1] * log_scale.exp()), -1)
    scale, loc = torch.std_mean(x, 0)
    entropy = math.log(2 * math.pi * math.e) + (log_scale.mean() - scale.log().sum()).item()
    x, rows = (x - loc) / scale, functools.partial(torch.randint, 2048, (256,), generator=laws.generator())
    torch.manual_seed(0)
    flow = getattr(flows, name)(2, num_transforms=5)
    assert max(laws.descend(flow.parameters(), lambda: -flow.log_prob(x[rows()]).mean(), 200, rate)) < 20
    with torch.no_grad():
        assert -flow.log_prob(x[2048:]).mean().item() - entropy < 0.06
