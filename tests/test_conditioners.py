"""Conditioners.

A MADE depends only on features of lower rank.  Incremental evaluation costs one pass in both directions, with exact
gradients.  An MLP broadcasts its context and starts at zero.
"""

import copy
import itertools

import laws
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pyro_flows.bijectors import Affine, Bijector, RationalQuadraticSpline
from pyro_flows.conditioners import MADE, MLP, CausalTransformer, ConvNet, Periodic, stream, stream_vjp
from pyro_flows.conditioners.base import networks_of, set_pace
from pyro_flows.transforms import Autoregressive, Coupling
from pyro_flows.transforms.autoregressive import invert_by_passes

aten = torch.ops.aten
NARROW, WIDE = (2, 3), (70, 70)
SIZES = [1, 2, 5, 33]
every_size = pytest.mark.parametrize("dim", SIZES)
every_context = pytest.mark.parametrize("context_dim", [0, 3], ids=["plain", "context"])
every_width = pytest.mark.parametrize("hidden_dims", [NARROW, WIDE, (7,)], ids=["narrow", "wide", "one_layer"])


def made(dim: int, num_params: int = 2, hidden_dims: tuple[int, ...] = WIDE, context_dim: int = 0, **options) -> MADE:
    """Return a MADE in float64 with large random parameters and a shuffled order."""
    net = MADE(dim, num_params, hidden_dims, context_dim, order=laws.shuffled(dim), **options)
    return laws.randomise(net).double()


def inputs(dim: int, context_dim: int, rows: int = 16) -> tuple[Tensor, Tensor | None]:
    return laws.normal(rows, dim, seed=1), laws.normal(rows, context_dim, seed=2) if context_dim else None


@every_width
@every_context
@every_size
def test_parameters_depend_on_lower_ranks_alone(dim: int, context_dim: int, hidden_dims: tuple[int, ...]) -> None:
    net = made(dim, 1, hidden_dims, context_dim, activation=nn.Tanh)
    x, context = inputs(dim, context_dim, rows=4)
    matrix = laws.jacobian(lambda value: net(value, context).squeeze(-1), x)
    touched = (matrix != 0).any(0)  # feature i's parameters, by feature j
    lower = net.order[:, None] > net.order
    assert not (touched & ~lower).any()
    if hidden_dims is WIDE:  # one unit per degree, so all allowed dependencies remain
        assert (touched == lower).all()


@every_size
def test_every_feature_sees_the_context(dim: int) -> None:
    """The parameters of the first feature depend on the context alone."""
    net = made(dim, 1, WIDE, 3, activation=nn.Tanh)
    x, context = inputs(dim, 3, rows=4)
    matrix = laws.jacobian(lambda c: net(x, c).squeeze(-1), context)
    assert (matrix != 0).any(0).all()


@every_width
@every_context
@every_size
def test_a_stream_fed_rank_by_rank_gives_the_parameters(
    dim: int, context_dim: int, hidden_dims: tuple[int, ...]
) -> None:
    net = made(dim, 3, hidden_dims, context_dim)
    x, context = inputs(dim, context_dim)
    with torch.no_grad():
        chain, given, wanted = stream(net, context, x.T), None, net(x, context)
        for feature in net.features:
            torch.testing.assert_close(chain.step(given).T, wanted[:, feature], atol=1e-10, rtol=1e-10)
            given = x.T[[feature]]


@every_width
@every_context
@every_size
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU], ids=["relu", "silu"])
def test_a_streamed_vector_jacobian_product_gives_the_gradient_rank_by_rank(
    dim: int, context_dim: int, hidden_dims: tuple[int, ...], activation: type[nn.Module]
) -> None:
    net = made(dim, 3, hidden_dims, context_dim, activation=activation)
    x, context = inputs(dim, context_dim)
    x.requires_grad_()
    cotangents = laws.normal(16, dim, 3, seed=4)
    (wanted,) = torch.autograd.grad(net(x, context), x, cotangents, materialize_grads=True)
    params, slopes = net.params_and_slopes(x, context)
    torch.testing.assert_close(params, net(x, context))
    with torch.no_grad():  # as in a backward pass
        chain = stream_vjp(net, slopes)
        for rank in reversed(range(dim)):
            passed = chain.step(cotangents[:, net.features[rank]].T)
            if rank:
                torch.testing.assert_close(passed[0], wanted[:, net.features[rank - 1]], atol=1e-9, rtol=1e-9)
        assert passed is None


def inverse_gradients(by_passes: bool, layer: Autoregressive, y: Tensor, context: Tensor | None) -> list[Tensor]:
    """Return the gradients of a function of the inverse and its log-determinant, for all inputs and parameters."""
    leaves = [t.clone().requires_grad_() for t in (y, context) if t is not None]
    arguments = leaves[0], leaves[1] if context is not None else None
    if by_passes:
        x, log_det = invert_by_passes(layer.bijector, layer.conditioner, *arguments)
    else:
        x, log_det = layer.inverse_and_log_det(*arguments)
    wanted = [*leaves, *(p for p in layer.parameters() if p.requires_grad)]
    weights = laws.normal(*x.shape, seed=5)
    gradients = torch.autograd.grad((x * weights).sum() + log_det.square().sum(), wanted, materialize_grads=True)
    return [x.detach(), log_det.detach(), *gradients]


@pytest.mark.parametrize("dim", [1, 5, 11])
@every_context
@pytest.mark.parametrize(
    ("activation", "frozen"),
    [(nn.ReLU, "none"), (nn.SiLU, "none"), (nn.Tanh, "none"), (nn.ReLU, "all"), (nn.SiLU, "biases")],
)
@pytest.mark.parametrize("bijector", [Affine(1.0), RationalQuadraticSpline(4)], ids=["affine", "spline"])
@pytest.mark.parametrize("fixed_point", [False, True], ids=["swept", "iterated"])
def test_the_inverse_has_autograds_gradient(
    fixed_point: bool, bijector: Bijector, frozen: str, activation: type[nn.Module], context_dim: int, dim: int
) -> None:
    net = MADE(dim, bijector.num_params, (16, 12), context_dim, order=laws.shuffled(dim), activation=activation)
    layer = Autoregressive(bijector, laws.randomise(net, scale=0.3).double(), fixed_point=fixed_point)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen == "none" or (frozen == "biases" and "bias" not in name))
    ours, plain = (inverse_gradients(by_passes, layer, *inputs(dim, context_dim, 6)) for by_passes in (False, True))
    torch.testing.assert_close(ours, plain, atol=1e-8, rtol=1e-8)


@pytest.mark.slow
@every_context
def test_the_swept_inverse_can_be_differentiated_twice(context_dim: int) -> None:
    net = MADE(2, 2, (4,), context_dim, activation=nn.Tanh)
    layer = Autoregressive(Affine(), laws.randomise(net, scale=0.5).double())
    given = [value for value in inputs(2, context_dim, rows=3) if value is not None]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert laws.passes(check, Autoregressive.inverse_and_log_det, layer, *given)


def test_the_gradient_is_that_of_the_weights_of_a_functional_call() -> None:
    """The backward pass runs after the call has restored the module's own weights."""
    layer = Autoregressive(Affine(), made(5))
    other = copy.deepcopy(layer)
    laws.randomise(other, seed=9)
    y, _ = inputs(5, 0)
    weights = {f"module.{name}": p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    x, log_det = functional_call(laws.Call(Autoregressive.inverse_and_log_det, layer), weights, (y,))
    got = torch.autograd.grad(x.sum() + log_det.sum(), weights.values())
    x, log_det = other.inverse_and_log_det(y)
    wanted = torch.autograd.grad(x.sum() + log_det.sum(), other.parameters())
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


class Flops(TorchDispatchMode):
    """Mode that counts the work of matrix products, also in backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> object:
        result = function(*args, **kwargs or {})
        packet = function._overloadpacket
        count = flop_registry.get(aten.addmm if packet is aten.addmm_ else packet)  # same work in place
        if count is not None:
            self.total += count(*args, **kwargs or {}, out_val=result)
        return result


@pytest.mark.parametrize("bijector", [Affine(), RationalQuadraticSpline()], ids=["affine", "spline"])
def test_inverting_costs_about_one_pass_and_not_one_for_each_feature(bijector: Bijector) -> None:
    layer = Autoregressive(bijector, MADE(64, bijector.num_params, (128, 128), 3))
    x, context = torch.randn(8, 64), torch.randn(8, 3)
    spent = []
    for verb in (layer.forward_and_log_det, layer.inverse_and_log_det):
        with Flops() as once:
            y, log_det = verb(x, context)
        with Flops() as again:
            (y.sum() + log_det.sum()).backward()
        spent.append((once.total, again.total))
    for forward, inverse in zip(*spent, strict=True):
        assert 0 < inverse <= 2.5 * forward


def periodic() -> Periodic:
    """Return a periodic network in float64 with random parameters."""
    net = Periodic(MLP(7, 4, 3, (16,), activation=nn.Tanh), [True, False, True, False, False], 2.0)
    return laws.randomise(net, scale=1.0).double()


def test_the_network_sees_cosines_sines_and_the_others() -> None:
    net = periodic()
    x, _ = inputs(5, 0)
    angle = x[:, [0, 2]] * (torch.pi / 2)
    assert torch.equal(net(x), net.net(torch.cat((angle.cos(), angle.sin(), x[:, [1, 3, 4]]), -1)))


def test_which_features_are_periodic_is_part_of_the_state() -> None:
    net = periodic()
    other = Periodic(MLP(7, 4, 3, (16,), activation=nn.Tanh), [False, True, False, False, True], 2.0).double()
    other.load_state_dict(net.state_dict(), strict=True)
    x, _ = inputs(5, 0)
    assert torch.equal(other(x), net(x))
    assert torch.equal(copy.deepcopy(net)(x), net(x))


test_errors_name_argument_and_value = laws.refusals(
    (lambda: Periodic(MLP(2, 1, 1), [True, False]), "Periodic: .*3 inputs, .*got 2"),
    (lambda: Periodic(MLP(2, 1, 1), [[True]]), r"Periodic: .*one bool for each feature, got \[\[True\]\]"),
    (lambda: ConvNet(1, 1, 2, (4, 4, 4)), r"ConvNet: size must be height and width, got \(4, 4, 4\)"),
    (lambda: ConvNet(1, 1, 2, (0, 4)), r"ConvNet: size must be height and width, got \(0, 4\)"),
    (lambda: MADE(3, 2, order=[0, 0, 1]), r"order must hold each of 0 … 2 once, got \["),
    (lambda: MADE(3, 2, order=[1, 2, 3]), r"order must hold each of 0 … 2 once, got \["),
    (lambda: MADE(3, 2, order=[0, 1]), r"order must hold each of 0 … 2 once, got \["),
    (lambda: MLP(4, 3, 2, centered=True, context_dim=3), "MLP: centered must be False"),
    (lambda: MLP(4, 3, 2, centered=True, skip=True), "MLP: centered must be False"),
    (lambda: MLP(0, 3, 2, centered=True), "MLP: centered must be False"),
    (lambda: Autoregressive(Affine(), CausalTransformer(4, 2, 2, 8), fixed_point=True), "True is for a MADE"),
    (lambda: Autoregressive(Affine(), MADE(4, 2), fixed_point="yes"), "fixed_point must be True or False, got 'yes'"),
)


@pytest.mark.parametrize("activation", [nn.ELU, nn.ReLU, nn.Tanh, nn.SiLU, nn.Softplus, nn.GELU])
@pytest.mark.parametrize("options", [{}, {"centered": True}, {"residual": True}, {"skip": True}], ids=str)
def test_the_gradient_of_a_coupling_is_autograds(activation: type[nn.Module], options: dict[str, object]) -> None:
    layer = Coupling(Affine(), MLP(3, 2, 2, (8, 8), activation=activation, **options), [True, False, True, False, True])
    set_pace(networks_of(laws.randomise(layer))[0], 0.25)
    laws.carries_the_gradient(layer.double(), laws.normal(5, 6, 5), 1e-9)


@pytest.mark.parametrize("build", [lambda: MADE(4, 2, (8, 8), 3), lambda: MLP(4, 4, 2, (8, 8), 3)], ids=["made", "mlp"])
def test_contexts_broadcast_against_inputs(build: object) -> None:
    net = laws.randomise(build()).double()
    shapes = [(), (5,), (1,), (7, 1), (7, 5)]
    for of_x, of_context in itertools.product(shapes, shapes):
        x, context = laws.normal(*of_x, 4, seed=1), laws.normal(*of_context, 3, seed=2)
        batch = torch.broadcast_shapes(of_x, of_context)
        params = net(x, context)
        assert params.shape == (*batch, 4, 2)
        torch.testing.assert_close(params, net(x.expand(*batch, 4), context.expand(*batch, 3)))


def test_residual_layers_add_their_input() -> None:
    net = laws.randomise(MLP(4, 3, 2, (8, 8, 6), residual=True)).double()
    x = laws.normal(5, 4)
    h = net.hidden[0](x).relu()
    h = h + net.hidden[1](h).relu()
    h = net.hidden[2](h).relu()  # the width changes, so this layer has no residual
    torch.testing.assert_close(net(x), net.output(h).unflatten(-1, (2, 3)).mT)


def test_a_centered_network_has_its_bias_for_mean() -> None:
    net = laws.randomise(MLP(4, 3, 2, (8, 8), centered=True)).double()
    mean = net(net.points).mean(0)
    torch.testing.assert_close(mean, net.output.bias.unflatten(0, (2, 3)).mT)
    (gradient,) = torch.autograd.grad(mean.sum(), net.output.weight)
    assert gradient.abs().max() < 1e-12


def test_gradients_that_point_one_way_hardly_move_the_weights_of_a_centered_network() -> None:
    norms = []
    for centered in (True, False):
        torch.manual_seed(0)
        net = MLP(4, 3, 2, (64, 64), activation=nn.ELU, centered=centered)
        norms += torch.autograd.grad(net(laws.normal(4000, 4).float()).sum(), net.output.weight)
    assert norms[0].norm() < norms[1].norm() / 4


def test_create_graph_changes_no_gradient():
    """With shared weights, the gradient through y must not count twice if the graph is kept."""
    layer = Autoregressive(Affine(), MADE(3, 2, (8,), order=(1, 2, 0))).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3)
    y = torch.randn(5, 3, dtype=torch.float64)
    for chain in ([layer, layer], [layer.inv, layer]):

        def loss(chain=chain) -> torch.Tensor:
            x, total = y, 0.0
            for transform in chain:
                x, log_det = transform.inverse_and_log_det(x)
                total = total + log_det.sum()
            return total + x.sin().sum()

        plain = torch.autograd.grad(loss(), list(layer.parameters()))
        kept = torch.autograd.grad(loss(), list(layer.parameters()), create_graph=True)
        torch.testing.assert_close(plain, kept)


def test_an_empty_batch_stays_empty():
    layer = Autoregressive(Affine(), MADE(3, 2, (8,)))
    assert [part.shape for part in layer.inverse_and_log_det(torch.zeros(0, 3))] == [(0, 3), (0,)]


def test_autocast_leaves_the_sweep_alone():
    layer = Autoregressive(Affine(), MADE(3, 2, (8,), context_dim=2))
    y, context = torch.randn(5, 3), torch.randn(5, 2)
    expected = layer.inverse_and_log_det(y, context)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer.inverse_and_log_det(y, context)[0], expected)


def test_a_fixed_point_takes_few_passes_where_features_steer_one_another_weakly() -> None:
    net = laws.randomise(MADE(24, 2, (16,)), scale=0.05).double()
    layer, passes = Autoregressive(Affine(), net, fixed_point=True), []
    net.register_forward_hook(lambda *_: passes.append(1))
    y = laws.normal(5, 24)
    x, _ = layer.inverse_and_log_det(y)
    assert 1 < len(passes) < 12
    torch.testing.assert_close(layer.forward_and_log_det(x)[0], y)
    laws.randomise(net, scale=3.0)
    passes.clear()
    layer.inverse_and_log_det(y)
    assert len(passes) <= 24  # and never more than the number of features
