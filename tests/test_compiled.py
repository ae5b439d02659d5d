"""Compiled flows: equal results, and one graph per direction, for all uses of a flow."""

import copy
import math
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import laws
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

import pyro_flows as pf
from pyro_flows import AutoFlow, Flow, flows
from pyro_flows.compiler_state import NEW_COMPILER
from pyro_flows.conditioners import MLP
from pyro_flows.objectives import Likelihood
from pyro_flows.training import Training
from pyro_flows.transforms import ActNorm, Coupling, Permute
from pyro_flows.transforms.compiled import Compiled

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random(recipe: Callable[..., Flow], *sizes: int, **settings: Any) -> Flow:
    flow = recipe(*sizes, num_transforms=2, hidden_dims=(8,), **settings)
    return laws.randomise(flow, scale=0.3).double()


class Graphs:
    """Backend that runs captured graphs without changes, and counts them."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        self.number += 1
        return graph.forward


def counted(flow: Flow | AutoFlow) -> Graphs:
    graphs = Graphs()
    flow.compile(backend=graphs)
    return graphs


def value_and_grad(flow: Flow, function: Callable[[], Any]) -> list[Tensor]:
    torch.manual_seed(1)
    found = function()
    found = found if isinstance(found, tuple) else (found,)
    return [*found, *torch.autograd.grad(sum(part.sum() for part in found), list(flow.parameters()))]


@pytest.mark.parametrize(
    ("recipe", "context_dim"), [(flows.nsf, 2), (flows.realnvp, 0), (flows.maf, 0), (flows.iaf, 2), (flows.nsf_ar, 0)]
)
def test_it_answers_as_before_in_both_directions(recipe: Callable[..., Flow], context_dim: int) -> None:
    flow, x = random(recipe, 3, context_dim), laws.normal(5, 3)
    context = laws.normal(5, 2) if context_dim else None
    uses = (
        lambda: flow.log_prob(x, context),
        lambda: flow(context).log_prob(x),
        lambda: flow.rsample_and_log_prob((4,), context),
        lambda: flow(context).rsample((4,)),
        lambda: Likelihood()(flow, x, context),
    )
    plain = [value_and_grad(flow, use) for use in uses]
    graphs = counted(flow)
    for use, expected in zip(uses, plain, strict=True):
        torch.testing.assert_close(value_and_grad(flow, use), expected, rtol=1e-9, atol=1e-10)
    assert graphs.number > 0


@pytest.mark.parametrize("name", ["affine", "spline"])
def test_what_compilers_make_of_it_is_right(name: str) -> None:
    """Graphs are decomposed into elementary operations, as for kernels; torch gets them wrong with symbolic sizes."""
    bijector = laws.BIJECTORS[name]
    layer = Coupling(bijector, MLP(1, 2, bijector.num_params, (8,)), [True, False, False])
    plain = Flow([laws.randomise(layer, scale=0.5)]).double()
    flow = Flow([layer]).double()
    flow.compile(backend="aot_eager_decomp_partition")
    for number in (5, 9):
        x = laws.normal(number, 3)
        ours, theirs = (value_and_grad(f, lambda f=f, x=x: f.log_prob(x)) for f in (flow, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
        y, log_prob = flow.rsample_and_log_prob((number,))
        torch.testing.assert_close(plain.log_prob(y), log_prob, rtol=1e-8, atol=1e-9)


def test_machine_code_is_right() -> None:
    """Without a compiler, the fallback is right."""
    flow, x = random(flows.realnvp, 2), laws.normal(7, 2)
    plain = value_and_grad(flow, lambda: flow.log_prob(x))
    flow.compile()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compiled = value_and_grad(flow, lambda: flow.log_prob(x))
    assert shutil.which("g++") is None or not any("runs uncompiled" in str(warning.message) for warning in said)
    torch.testing.assert_close(compiled, plain)


def test_sample_statements_are_scored_without_a_second_pass() -> None:
    flow = random(flows.nsf, 3)
    graphs = counted(flow)
    trace = pyro.poutine.trace(lambda: pyro.sample("x", flow().expand((4,)))).get_trace()
    trace.compute_log_prob()
    assert graphs.number == 1  # the inverse was not compiled
    torch.testing.assert_close(flow.log_prob(trace.nodes["x"]["value"]), trace.nodes["x"]["log_prob"])


def test_batches_of_any_size_share_their_graphs() -> None:
    flow = random(flows.nsf, 3)
    graphs = counted(flow)
    for number in range(2, 8):
        flow.log_prob(laws.normal(number, 3)).sum().backward()
        flow.log_prob(laws.normal(3, number, 3)).sum().backward()
        flow.rsample_and_log_prob((number,))
    assert graphs.number == 2  # one for each direction
    with torch.no_grad():
        for number in range(1, 8):
            flow.log_prob(laws.normal(number, 3))
    assert graphs.number <= 4  # without gradients, and for a single row
    before, batches = graphs.number, iter([laws.normal(number, 3) for number in (7, 8, 9)])
    laws.descend(flow.parameters(), lambda: -flow.log_prob(next(batches)).mean())
    assert graphs.number == before


def test_the_loss_of_a_fit_compiles_to_one_graph() -> None:
    flow, x = random(flows.maf, 3, 2), laws.normal(5, 3)
    context, objective = laws.normal(5, 2), Likelihood()
    plain = value_and_grad(flow, lambda: objective(flow, x, context))
    whole = torch.compile(lambda: objective(flow, x, context), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(flow, whole), plain)


# The splines are compiled once for all layers, and so is the last layer, which maps each feature separately.
@pytest.mark.parametrize(("recipe", "drawn", "scored"), [(flows.maf, 0, 1), (flows.nsf_ar, 2, 4)])
def test_the_direction_that_goes_feature_by_feature_is_left_alone(recipe: Any, drawn: int, scored: int) -> None:
    flow = random(recipe, 3)
    graphs = counted(flow)
    flow.rsample_and_log_prob((4,))
    assert graphs.number == drawn
    flow.log_prob(laws.normal(4, 3))
    assert graphs.number == scored


def test_solvers_are_left_alone() -> None:
    flow = flows.ffjord(2)
    graphs = counted(flow)
    flow.log_prob(torch.zeros(3, 2))
    assert graphs.number == 0


def test_it_copies_and_pickles_and_saves(tmp_path: Any) -> None:
    flow, x = random(flows.realnvp, 3), laws.normal(5, 3)
    graphs = counted(flow)
    expected = flow.log_prob(x)
    assert "runs" not in "".join(flow.state_dict())
    other = copy.deepcopy(flow)
    torch.testing.assert_close(other.log_prob(x), expected)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    assert not torch.allclose(other.log_prob(x), expected)  # the parameters of the copy, not of the original
    torch.testing.assert_close(flow.log_prob(x), expected)
    assert graphs.number == 1  # the copy has its own backend
    flow.compile(backend="aot_eager")
    torch.testing.assert_close(pickle.loads(pickle.dumps(flow)).log_prob(x), expected)
    pf.save(flow, tmp_path / "flow.pt")
    torch.testing.assert_close(pf.load(tmp_path / "flow.pt").log_prob(x), expected)


def test_layers_may_be_added_later() -> None:
    flow, x = random(flows.realnvp, 3), laws.normal(5, 3)
    counted(flow)
    before = flow.log_prob(x)
    flow.transforms.append(ActNorm(3).double())  # type: ignore[attr-defined]
    flow.transforms[-1].log_scale.data.fill_(1.0)
    assert not torch.allclose(flow.log_prob(x), before)


def test_a_fit_and_a_guide_use_it() -> None:
    flow = flows.realnvp(2, num_transforms=2, hidden_dims=(8,))
    graphs = counted(flow)
    fit = pf.fit_density(flow, torch.randn(200, 2) * 3 + 1, max_epochs=2, progress=False)
    assert graphs.number > 0
    assert fit.losses.isfinite().all()

    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1), 0.5), obs=torch.tensor(1.0))

    guide = AutoFlow(model, flow=flows.realnvp)
    with pytest.raises(ValueError, match=r"AutoFlow.compile: .* call setup"):
        guide.compile()
    guide.setup()
    graphs = counted(guide)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    assert all(math.isfinite(svi.step()) for _ in range(5))
    assert graphs.number == 2  # for one draw, from which Pyro infers shapes, and for several


def test_images_and_dequantised_flows_compile() -> None:
    model = flows.Dequantized(flows.glow((1, 4, 4), num_scales=1, num_steps=1, hidden_dim=4))
    x = torch.randint(0, 256, (3, 1, 4, 4))
    torch.manual_seed(0)
    expected = model.log_prob(x)
    model.compile(backend="aot_eager")
    torch.manual_seed(0)
    torch.testing.assert_close(model.log_prob(x), expected)


def test_without_a_compiler_it_says_so_once_and_goes_on() -> None:
    flow, x = random(flows.realnvp, 3), laws.normal(5, 3)
    expected = flow.log_prob(x)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler found")

    flow.compile(backend=broken)
    with pytest.warns(UserWarning, match="runs uncompiled, Compose.inverse_and_log_det: .*no compiler found"):
        torch.testing.assert_close(flow.log_prob(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(flow.log_prob(x), expected)


@pytest.mark.skipif(not NEW_COMPILER, reason="the setting recompile_limit of torch.compile: torch 2.13")
def test_with_too_many_graphs_it_goes_on_without() -> None:
    flow, x = random(flows.realnvp, 3), laws.normal(1, 3)
    expected = flow.log_prob(x)
    flow.compile(backend=Graphs(), recompile_limit=1)
    flow.log_prob(laws.normal(4, 3))
    with pytest.warns(UserWarning, match="runs uncompiled"):
        torch.testing.assert_close(flow.log_prob(x), expected)
    with pytest.raises(ValueError, match="dynamic cannot be set"):
        flow.compile(dynamic=True)
    with pytest.raises(ValueError, match=r"fulgraph cannot be set\. Use backend, "):
        flow.compile(fulgraph=True)


def test_networks_in_bfloat16_run_as_they_are() -> None:
    flow = flows.realnvp(2, num_transforms=2, hidden_dims=(8,))
    graphs = counted(flow)
    pf.fit_density(flow, torch.randn(100, 2), max_epochs=1, training=Training(mixed_precision=True), progress=False)
    assert graphs.number == 0
    flow.log_prob(torch.zeros(3, 2))
    assert graphs.number == 1


def test_the_opposite_flow_is_compiled_too() -> None:
    flow = random(flows.maf, 3)
    graphs = counted(flow)
    flow.inv.rsample_and_log_prob((4,))
    assert graphs.number == 1


def test_wrong_arguments_are_told_as_before() -> None:
    flow = random(flows.realnvp, 3)
    counted(flow)
    with pytest.raises(ValueError, match=r"value"):
        flow.log_prob(torch.zeros(4, 2))
    flow.log_prob(laws.normal(4, 3))


def test_runs_hold_what_compiles_alike() -> None:
    flow = Flow([Permute([1, 0]), *flows.maf(2, num_transforms=2).transforms, ActNorm(2)])
    flow.compile()
    assert [type(run) for run in flow.runs] == [Compiled] * 3
