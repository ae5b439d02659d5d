"""Flows and guides under torch's own tools: they are traced, mapped, called at other weights, exported and compiled.

The results are those of plain calls.
"""

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import laws
import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import Call, seeded
from pyro.infer import JitTrace_ELBO, Predictive, Trace_ELBO
from test_images import IMAGES
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from pyro_flows import AutoFlow, AutoPlateFlow, AutoStructuredFlow, flows
from pyro_flows.conditioners import LipschitzMLP
from pyro_flows.encoders import MLPEncoder
from pyro_flows.flows import Flow
from pyro_flows.transforms import Residual, Solver
from pyro_flows.transforms.base import chained

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
every_recipe = pytest.mark.parametrize("name", laws.RECIPES)


def small(name: str, context_dim: int = 0) -> Flow:
    """Build a flow of a recipe with fixed steps, which a trace may repeat."""
    fixed = {"solver": Solver("rk4", num_steps=2)} if name == "cnf" else {}
    return laws.RECIPES[name](2, context_dim, num_transforms=1, hidden_dims=(3,), **fixed).double()


def values_and_gradients(function: Callable[..., Any], module: nn.Module, x: Tensor, *others: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y, log_det = function(leaf, *others)
    weights = torch.linspace(-1, 2, y.numel()).to(y).reshape(y.shape)
    wanted = [leaf, *module.parameters()]
    return [y, log_det, *torch.autograd.grad((y * weights).sum() + log_det.sum(), wanted, materialize_grads=True)]


def traces(flow: Flow, verb: Call, few: tuple[Tensor, ...], many: tuple[Tensor, ...]) -> None:
    """A trace at few rows has the values and gradients of the function, also at many rows."""
    traced = torch.jit.trace(verb, few, check_trace=False)
    with torch.jit.optimized_execution(False):  # which takes most of the time, and is torch's own
        for inputs in (few, many):
            found, wanted = (values_and_gradients(one, flow, *inputs) for one in (traced, verb))
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------ torch.jit


@every_recipe
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "random"])
@pytest.mark.parametrize("inverse", [True, False], ids=["inverse", "forward"])
def test_a_traced_flow_has_the_values_and_gradients_of_the_flow(name: str, inverse: bool, fresh: bool) -> None:
    flow = small(name, 0 if fresh else 2)
    if not fresh:
        laws.randomise(flow, scale=0.5)
    verb = Call(lambda flow, x, *context: chained(flow.runs, x, *(context or [None]), inverse=inverse), flow)
    few, many = ((laws.normal(n, 2), *([] if fresh else [laws.normal(n, 2, seed=n)])) for n in (3, 5))
    traces(flow, verb, few, many)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("inverse", [True, False], ids=["inverse", "forward"])
def test_a_traced_flow_of_images_has_the_values_and_gradients_of_the_flow(name: str, inverse: bool) -> None:
    flow = laws.randomise(IMAGES[name]((1, 4, 4)), scale=0.1).double()
    verb = Call(lambda flow, x: chained(flow.runs, x, None, inverse=inverse), flow)
    traces(flow, verb, *((laws.normal(n, 1, 4, 4),) for n in (3, 5)))


def test_a_traced_flow_takes_all_rows_whatever_the_size_of_chunks() -> None:
    flow = laws.randomise(small("nsf")).double()
    traced = torch.jit.trace(
        Call(lambda flow, x: flow.log_prob(x, chunk_size=2), flow), (laws.normal(4, 2),), check_trace=False
    )
    torch.testing.assert_close(traced(laws.normal(7, 2)), flow.log_prob(laws.normal(7, 2)))


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (flows.cnf(2), r"Continuous: torch.jit.trace needs fixed steps .* Solver..rk4"),
        (flows.cnf(2, solver=Solver("rk4", adjoint=True)), r"Continuous: torch.jit.trace needs .* no adjoint"),
        (Flow([Residual(LipschitzMLP(2), exact=False)]), r"Residual: torch.jit.trace needs exact .* exact=True"),
    ],
    ids=["adaptive", "adjoint", "series"],
)
def test_what_a_trace_would_repeat_wrongly_is_refused(flow: Flow, message: str) -> None:
    """Steps that follow the data, and random numbers of terms, are those of the trace for ever."""
    with pytest.raises(ValueError, match=message):
        torch.jit.trace_module(flow, {"log_prob": (torch.zeros(3, 2),)}, check_trace=False)


@pytest.mark.parametrize("name", ["bnaf", "nsf_ar", "residual_flow"])
def test_jit_elbo_trains_flows_that_draw_by_a_search(name: str) -> None:
    """They are equal from the second step on, because tracing uses more random numbers."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z[..., 0] ** 2 + z[..., 1], 1.0), obs=torch.tensor(2.0))

    guide = AutoFlow(model, partial(getattr(flows, name), num_transforms=1, hidden_dims=(3,))).setup()
    optimizer = torch.optim.Adam(guide.parameters(), 0.01)
    compiled, plain = JitTrace_ELBO(ignore_jit_warnings=True), Trace_ELBO()
    with torch.jit.optimized_execution(False):
        for step in range(3):
            found = []
            for elbo in (plain, compiled):
                guide.zero_grad()
                torch.manual_seed(step)
                loss = elbo.loss_and_grads(model, guide)
                found.append([torch.tensor(loss), *(p.grad.clone() for p in guide.parameters() if p.grad is not None)])
            for ours, theirs in zip(*found, strict=True):
                assert ours.isfinite().all()
                assert step == 0 or torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
            optimizer.step()


def joint() -> None:
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.HalfNormal(1.0))
    with pyro.plate("rows", 5):
        pyro.sample("y", dist.Normal(a, b), obs=torch.arange(5.0))


def hierarchy() -> None:
    mean, spread = pyro.sample("mean", dist.Normal(0.0, 1.0)), pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("groups", 4):
        level = pyro.sample("level", dist.Normal(mean, spread))
        pyro.sample("y", dist.Normal(level, 1.0), obs=torch.arange(4.0))


SETUPS: dict[str, Callable[[], tuple[Callable[[], None], Any]]] = {
    "joint": lambda: (joint, AutoFlow(joint).setup()),
    "structured": lambda: (hierarchy, AutoStructuredFlow(hierarchy).setup()),
    "plate": lambda: (hierarchy, AutoPlateFlow(hierarchy, "groups").setup()),
}
every_guide = pytest.mark.parametrize("kind", SETUPS)


def guided(kind: str) -> tuple[Callable[[], None], Any]:
    """Return a model and a guide of it, with parameters moved from their start."""
    model, guide = SETUPS[kind]()
    source = laws.generator()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=source)
    return model, guide


def served(program: Any) -> Callable[[], tuple[Tensor, ...]]:
    """Return the method ``call`` of a program that was traced, saved and loaded."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace_module(program, {"call": ()}, check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file).call


@every_guide
def test_a_traced_guide_draws_as_the_guide_after_a_file(kind: str) -> None:
    _, guide = guided(kind)
    call = served(guide)
    found = seeded(call, guide.call)
    torch.testing.assert_close(*found)
    assert not torch.equal(call()[0], found[0][0])


def test_a_traced_amortised_guide_reads_its_data() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    guide = AutoFlow(model, partial(flows.maf, num_transforms=2), encoder=MLPEncoder(2, 4)).setup(torch.zeros(2))
    laws.randomise(guide, scale=0.3)
    traced = torch.jit.trace_module(guide, {"call": (torch.zeros(2),)}, check_trace=False)
    for x in (torch.zeros(2), torch.ones(2)):
        torch.testing.assert_close(*seeded(partial(traced.call, x), partial(guide.call, x)))


@pytest.mark.parametrize("kind", ["joint", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(SETUPS)[1:])])
def test_a_traced_predictive_draws_as_the_guide_after_a_file(kind: str) -> None:
    """Pyro's ``Predictive`` also draws from the prior, which a trace leaves out, so random numbers differ."""
    model, guide = guided(kind)
    program = Predictive(model, guide=guide, num_samples=2)
    names, call = sorted(program()), served(program)
    with torch.jit.optimized_execution(False):
        draws = [dict(zip(names, call(), strict=True)) for _ in range(20)]
    for name, wanted in guide.sample(10_000).items():
        got = torch.cat([draw[name].reshape(2, *wanted.shape[1:]) for draw in draws])
        assert ((got.mean(0) - wanted.mean(0)).abs() < 5 * wanted.std(0) / len(got) ** 0.5).all()
        assert ((got.std(0) / wanted.std(0)).log().abs() < 5 / len(got) ** 0.5).all()  # tails are not much heavier


# ------------------------------------------------------------ torch.func

X = laws.normal(6, 3)


def flow() -> Flow:
    return laws.randomise(flows.nsf(3, num_transforms=2, hidden_dims=(8,)), scale=0.3).double()


@torch.no_grad()
def at(module: Any, weights: dict[str, Tensor]) -> Any:
    """Return a copy of a module with other weights."""
    other = copy.deepcopy(module)
    for name, parameter in other.named_parameters():
        parameter.copy_(weights[name])
    return other


def density(module: Any) -> Call:
    return Call(lambda module, x: module.log_prob(x), module)


def of_part(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": tensor for name, tensor in parameters.items()}


def test_a_flow_maps_under_vmap() -> None:
    """So do its gradients, its draws, and an ensemble of flows, by functional calls."""
    one, many = flow(), [flow() for _ in range(3)]
    torch.testing.assert_close(vmap(one.log_prob)(X), one.log_prob(X))
    leaf = X.clone().requires_grad_()
    torch.testing.assert_close(vmap(grad(one.log_prob))(X), torch.autograd.grad(one.log_prob(leaf).sum(), leaf)[0])
    y, log_prob = vmap(lambda _: one.rsample_and_log_prob((2,)), randomness="different")(X)
    torch.testing.assert_close(one.log_prob(y), log_prob)
    assert y.flatten(0, 1).unique(dim=0).shape == (12, 3)
    parameters, buffers = stack_module_state(many)
    found = vmap(lambda *state: functional_call(density(one), tuple(map(of_part, state)), X))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([member.log_prob(X) for member in many]))


@every_guide
def test_a_guide_maps_under_vmap(kind: str) -> None:
    _, guide = guided(kind)
    values = guide.sample(7)
    torch.testing.assert_close(vmap(guide.log_prob)(values), guide.log_prob(values))
    guide()  # Pyro's store of parameters is filled by the first call, which vmap cannot do
    for draws in vmap(lambda _: guide(), randomness="different")(torch.arange(7)).values():
        assert draws.flatten().unique().numel() == draws.numel()


@every_guide
@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
def test_a_functional_call_of_a_guide_has_the_given_weights(kind: str, called: bool) -> None:
    """Neither do parameters of Pyro's store, which it holds after a call, replace them, nor they the parameters."""
    _, guide = guided(kind)
    if called:
        guide()
    own = {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}
    given = {name: (1.1 * tensor).requires_grad_() for name, tensor in own.items()}
    values, kept = guide.sample(5), copy.deepcopy(given)
    total = sum(map(torch.sum, functional_call(guide, given).values()))
    gradients = torch.autograd.grad(total, list(given.values()), allow_unused=True)
    assert any(gradient is not None for gradient in gradients)
    found = seeded(lambda: functional_call(guide, given), at(guide, kept), guide, at(guide, own))
    assert all(torch.equal(given[name], tensor) for name, tensor in kept.items())
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])
    score = functional_call(density(guide), of_part(given), values)
    torch.testing.assert_close(score, at(guide, kept).log_prob(values))


# ------------------------------------------------------------ torch.export and torch.compile


def test_an_exported_flow_has_the_densities_of_the_flow_at_any_size() -> None:
    one = flow()
    program = torch.export.export(density(one), (X,), dynamic_shapes=(({0: torch.export.Dim("rows")},),)).module()
    for x in (X, laws.normal(9, 3)):
        torch.testing.assert_close(program(x), one.log_prob(x))


@pytest.mark.parametrize("kind", ["joint", "structured"])
def test_an_exported_guide_draws_as_the_guide(kind: str) -> None:
    _, guide = guided(kind)
    torch.testing.assert_close(*seeded(torch.export.export(guide, ()).module(), guide))


@pytest.mark.slow
def test_a_compiled_flow_is_the_flow() -> None:
    torch._dynamo.reset()
    one = flow()
    whole = torch.compile(one.log_prob, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(X), one.log_prob(X))
    torch.testing.assert_close(torch.compile(one, backend="aot_eager")().log_prob(X), one.log_prob(X))
    y, log_prob = torch.compile(one.rsample_and_log_prob, backend="aot_eager")((4,))
    torch.testing.assert_close(log_prob, one.log_prob(y))


@pytest.mark.slow
@every_guide
def test_a_compiled_guide_is_the_guide(kind: str) -> None:
    torch._dynamo.reset()
    model, guide = guided(kind)
    compiled, values, found = torch.compile(guide, backend="aot_eager"), guide.sample(3), []
    for same in (compiled, guide):
        guide.zero_grad()
        torch.manual_seed(0)
        draws = same()
        loss = Trace_ELBO().differentiable_loss(model, same)
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in guide.parameters() if parameter.grad is not None]
        found.append((draws, loss, gradients, same.log_prob(values)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------ containers

CONTAINERS: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "list": lambda *of: nn.ModuleList(of),
    "dict": lambda *of: nn.ModuleDict(dict(zip("ab", of, strict=True))),
    "sequential": lambda *of: nn.Sequential(*of),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", ["flow", "layer", *SETUPS])
def test_containers_hold_parameters_states_and_copies(kind: str, container: str) -> None:
    builders: dict[str, Callable[[], nn.Module]] = {"flow": flow, "layer": lambda: flow().transforms[0]}
    first, second = (builders[kind]() if kind in builders else guided(kind)[1] for _ in range(2))
    held, other = (CONTAINERS[container](*of) for of in ((first, second), copy.deepcopy((second, first))))
    assert len(list(held.parameters())) == len(list(first.parameters())) + len(list(second.parameters()))
    other.load_state_dict(held.state_dict(), strict=True)
    inside, copies = next(other.children()), next(copy.deepcopy(held).children())
    draw = {"layer": lambda same: same(X), "flow": lambda same: same.sample(())}.get(kind, lambda same: same())
    found = seeded(*(partial(draw, same) for same in (first, inside, copies)))
    torch.testing.assert_close(found[1:], [found[0]] * 2)
    if container == "sequential" and kind == "layer":
        torch.testing.assert_close(held(X), second(first(X)))
