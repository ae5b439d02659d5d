"""Graphs of autoregressive layers: masks from a graph, and the dependency graph of a Pyro model's posterior."""

import functools

import laws
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_flows import AutoFlow, fit_svi, flows, posterior_graph, psis
from pyro_flows.bijectors import Affine, RationalQuadraticSpline
from pyro_flows.conditioners import MADE
from pyro_flows.transforms import Autoregressive
from pyro_flows.transforms.autoregressive import invert_by_passes

ROWS = 6
every_context = pytest.mark.parametrize("context_dim", [0, 3], ids=["plain", "context"])


def graph_of(dim: int, seed: int, share: float = 0.4) -> Tensor:
    """Return a random directed acyclic graph in a random order of its nodes."""
    source = laws.generator(seed)
    lower = (torch.rand(dim, dim, generator=source) < share).tril(-1)
    shuffle = torch.randperm(dim, generator=source)
    return lower[shuffle][:, shuffle]


def made(graph: Tensor, context_dim: int = 0, num_params: int = 1) -> MADE:
    net = MADE(len(graph), num_params, (40, 40), context_dim, adjacency=graph, activation=nn.Tanh)
    return laws.randomise(net).double()


def inputs(dim: int, context_dim: int) -> tuple[Tensor, Tensor | None]:
    return laws.normal(ROWS, dim, seed=1), laws.normal(ROWS, context_dim, seed=2) if context_dim else None


@every_context
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_parameters_depend_on_parents_and_on_all_of_them(dim: int, seed: int, context_dim: int) -> None:
    graph = graph_of(dim, seed)
    net = made(graph, context_dim)
    x, context = inputs(dim, context_dim)
    matrix = laws.jacobian(lambda value: net(value, context).squeeze(-1), x)
    assert torch.equal((matrix != 0).any(0), graph)
    if context is not None:
        of_context = laws.jacobian(lambda value: net(x, value).squeeze(-1), context)
        assert (of_context != 0).any(0).all()


@every_context
@pytest.mark.parametrize("bijector", [Affine(1.0), RationalQuadraticSpline(4)], ids=["affine", "spline"])
def test_the_sweep_and_its_gradient_know_the_graph(bijector: Affine, context_dim: int) -> None:
    graph = graph_of(7, 1)
    layer = Autoregressive(bijector, made(graph, context_dim, bijector.num_params))
    y, context = inputs(7, context_dim)
    y.requires_grad_()
    x, log_det = layer.inverse_and_log_det(y, context)
    slow = invert_by_passes(bijector, layer.conditioner, y, context)
    torch.testing.assert_close((x, log_det), slow, atol=1e-9, rtol=1e-9)
    wanted = [y, *layer.parameters()]
    weights = laws.normal(ROWS, 7, seed=3)
    ours, theirs = (torch.autograd.grad((weights * a).sum() + b.sum(), wanted) for a, b in ((x, log_det), slow))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-7)


def test_the_graph_is_part_of_the_state() -> None:
    one, other = (Autoregressive(Affine(), made(graph_of(5, seed), num_params=2)) for seed in (1, 2))
    x = laws.normal(ROWS, 5)
    assert not torch.equal(one.conditioner.adjacency, other.conditioner.adjacency)
    other.load_state_dict(one.state_dict(), strict=True)
    assert laws.bits_equal(other.forward_and_log_det(x), one.forward_and_log_det(x))
    assert laws.bits_equal(other.inverse_and_log_det(x), one.inverse_and_log_det(x))


@pytest.mark.parametrize("recipe", [flows.iaf, flows.maf, flows.nsf_ar])
def test_one_layer_has_the_graph_and_more_have_ancestors(recipe: object) -> None:
    chain = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)  # 3 -> 0 -> 1 -> 2
    ancestors = chain.clone()
    for _ in range(3):
        ancestors = ancestors | ((ancestors.float() @ chain.float()) > 0)
    for count, wanted in ((1, ancestors if recipe is flows.iaf else chain), (3, ancestors)):
        flow = laws.randomise(recipe(4, adjacency=chain, num_transforms=count, activation=nn.Tanh), scale=1.0).double()
        fast = flow if recipe is flows.iaf else flow.inv  # the direction of the networks
        x = laws.normal(ROWS, 4, seed=1)

        def through(value: Tensor, fast: flows.Flow = fast) -> Tensor:
            for transform in fast.transforms:
                value, _ = transform.forward_and_log_det(value)
            return value

        touched = (laws.jacobian(through, x) != 0).any(0)
        assert torch.equal(touched & ~torch.eye(4, dtype=torch.bool), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adjacency": [[0, 1], [1, 0]]}, r"no cycle .*got \[0, 1\]"),
        ({"adjacency": torch.zeros(3, 3)}, r"adjacency must have shape \(2, 2\), .*got \(3, 3\)"),
        ({"adjacency": [[0, 1], [0, 0]], "order": [0, 1]}, r"order must put parents first"),
    ],
)
def test_graphs_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MADE(2, 1, **options)


def test_too_few_units_for_a_graph_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden_dims must be at least 4, .*got \(9, 3\)"):
        MADE(5, 1, (9, 3), adjacency=torch.ones(5, 5).tril(-1))


# ------------------------------------------------------------ Pyro's models


@pytest.mark.parametrize("recipe", [flows.iaf, flows.maf])
def test_a_chain_of_latents_is_found_whole(recipe: object) -> None:
    """Distant latents are correlated through their neighbours, and the graph must allow this."""

    def model() -> None:
        place = pyro.sample("s0", dist.Normal(0.0, 1.0))
        for step in range(1, 6):
            place = pyro.sample(f"s{step}", dist.Normal(place, 0.5))
        pyro.sample("y", dist.Normal(place, 0.1), obs=torch.tensor(2.0))

    graph = posterior_graph(model)
    assert torch.equal(graph, torch.ones(5).diag(1).bool())  # each depends on the next
    guide = AutoFlow(model, functools.partial(recipe, adjacency=graph, num_transforms=1))
    flow = laws.randomise(guide.setup().flow, scale=0.5)
    assert torch.corrcoef(flow().sample((4000,)).T)[0, -1].abs() > 0.01


def test_colliders_and_plates() -> None:
    """Parents of the same child are dependent; rows of a plate are not, unless a site joins them."""

    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0, 1))
        with pyro.plate("row", 2):
            weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))  # two numbers, unconstrained
            level = pyro.sample("level", dist.Normal(weights[..., 0], scale))
            pyro.sample("y", dist.Normal(level, 1), obs=torch.zeros(2))

    wanted = [[1, 2, 3, 4, 5, 6], [5], [1, 5], [6], [3, 6], [], []]  # of scale 0, weights 1 2 | 3 4, level 5 | 6
    assert [row.nonzero().flatten().tolist() for row in posterior_graph(model)] == wanted


@pytest.mark.slow
def test_a_guide_with_the_graph_of_its_model_is_exact_where_the_graph_is() -> None:
    """Skewed latents are independent in the posterior, so a layer without edges is exact and finds log Z."""

    def model() -> None:
        with pyro.plate("row", 4):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("count", dist.Poisson(rate), obs=torch.tensor([0.0, 1.0, 3.0, 8.0]))

    graph = posterior_graph(model)
    assert not graph.any()
    guide = AutoFlow(model, functools.partial(flows.nsf_ar, adjacency=graph, num_transforms=1))
    fit_svi(model, guide, progress=False)
    counts = torch.tensor([0.0, 1.0, 3.0, 8.0])
    # Gamma-Poisson: (count + 1) / 2^(count + 2) each
    exact = (torch.log(counts + 1) - (counts + 2) * torch.log(torch.tensor(2.0))).sum()
    result = psis(model, guide, num_samples=4000)
    assert result.ess > 0.99 * 4000
    assert abs(result.log_evidence - exact) < 5 * result.log_evidence_se + 0.005
