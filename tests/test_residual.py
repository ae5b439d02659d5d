"""Residual transforms: the bound holds for all parameters, and determinants are exact or estimated without bias.

The inverse is exact to the last bits, with the derivatives of the implicit function."""

import math

import laws
import pytest
import torch
from torch import Tensor, nn

from pyro_flows import flows
from pyro_flows.conditioners import LipschitzMLP
from pyro_flows.conditioners.jacobian import Jacobian, spectral_bound
from pyro_flows.transforms import Residual
from pyro_flows.transforms.residual import _search

every_widths = pytest.mark.parametrize("widths", [(24, 24), (4, 16), (16, 4), (3,), (16, 2, 16)], ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def net_of(dim: int, widths: tuple[int, ...], context_dim: int = 0, scale: float = 3.0) -> LipschitzMLP:
    return laws.randomise(LipschitzMLP(dim, widths, context_dim), scale=scale).double()


@torch.no_grad()
def steep(dim: int, width: int, *, at_zero: bool = False, lipschitz: float = 0.9) -> LipschitzMLP:
    """Return a network as steep as the bound in many directions; ``at_zero`` makes its Jacobian -lipschitz at x = 0."""
    net = LipschitzMLP(dim, (width, width), lipschitz=lipschitz).double()
    net.steepness.fill_(9.0)
    for seed, layer in enumerate((*net.hidden, net.output)):
        left, _, right = torch.linalg.svd(laws.normal(*layer.weight.shape, seed=seed), full_matrices=False)
        layer.weight.copy_(100 * left @ right)
        layer.bias.copy_(laws.normal(len(layer.bias), seed=seed + 9))
    if at_zero:
        net.output.weight.copy_(-(net.hidden[1].weight @ net.hidden[0].weight).T)
        a = 2.4 / 9  # a sigmoid(9 a) has its largest slope there
        net.hidden[0].bias.fill_(a)
        h = torch.full((width,), a / (1 + math.exp(-2.4)) / 1.1, dtype=torch.float64)
        net.hidden[1].bias.copy_(a - net.at().weights[1] @ h)
    return net


# ------------------------------------------------------------ the bound


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (9, 64), (64, 9)], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_spectral_bound_is_one_and_tight(shape: tuple[int, int], dtype: torch.dtype, size: float) -> None:
    rank = min(shape)
    dense = laws.normal(*shape)
    left, _, right = torch.linalg.svd(dense, full_matrices=False)
    low = laws.normal(shape[0], 1) @ laws.normal(1, shape[1], seed=1)
    for matrix, most in ((dense, 1.01), (left @ right, rank ** (1 / 128)), (low, 1.0)):
        ratio = spectral_bound((matrix * size).to(dtype)).double() / (size * torch.linalg.matrix_norm(matrix, 2))
        slack = {4: 1e-5, 8: 1e-12}[dtype.itemsize]
        assert 1 - slack <= ratio.item() <= most * (1 + slack)


def test_the_spectral_bound_is_differentiable_and_at_zero_harmless() -> None:
    matrix = laws.normal(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(spectral_bound, matrix)
    assert torch.autograd.gradgradcheck(spectral_bound, matrix)
    zero = torch.zeros(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(spectral_bound(zero), zero)
    assert torch.equal(gradient, torch.zeros(4, 3))


@every_widths
@pytest.mark.parametrize("scale", [0.3, 3.0, 100.0])
def test_no_parameters_break_the_lipschitz_bound(widths: tuple[int, ...], scale: float) -> None:
    net = net_of(5, widths, laws.CONTEXT_DIM, scale)
    context, x = laws.normal(500, laws.CONTEXT_DIM), laws.normal(500, 5, seed=1, scale=5.0)
    matrix = laws.jacobian(lambda value: net(value, context), x)
    assert torch.linalg.matrix_norm(matrix, 2).max() <= 0.9
    x, other = x, x + laws.normal(500, 5, seed=3)
    assert ((net(x, context) - net(other, context)).norm(dim=-1) <= 0.9 * (x - other).norm(dim=-1)).all()


def test_the_bound_can_be_used_up() -> None:
    """All directions together can have nearly the largest slope, so that the bound costs little freedom."""
    matrix = laws.jacobian(steep(5, 5, at_zero=True), laws.normal(50, 5, scale=1e-4))
    identity = torch.eye(5, dtype=torch.float64)
    assert torch.linalg.matrix_norm(matrix + 0.875 * identity, 2).max() < 0.025


def test_it_is_the_map_it_says() -> None:
    """Matrices within their bounds do not change: x + W₂ h, h = a sigmoid(β a) / 1.1, a = W₁ x + b + V context."""
    layer = Residual(laws.randomise(LipschitzMLP(3, (7,), 2), scale=0.05).double())
    x, context = laws.normal(6, 3), laws.normal(6, 2, seed=1)
    net, inner = layer.net, layer.net.hidden[0]
    a = x @ inner.weight.T + inner.bias + context @ net.from_context.weight.T
    h = a * torch.sigmoid(nn.functional.softplus(net.steepness) * a) / 1.1
    y, _ = layer.forward_and_log_det(x, context)
    torch.testing.assert_close(y, x + h @ net.output.weight.T + net.output.bias)


# ------------------------------------------------------------ the determinant


@every_widths
@pytest.mark.parametrize("dim", [1, 5])
def test_determinants_and_solutions_are_those_of_the_whole_matrix(widths: tuple[int, ...], dim: int) -> None:
    """They agree for any position of the narrowest layer."""
    x, v = laws.normal(6, dim, scale=3.0), laws.normal(6, dim, seed=1)
    net = net_of(dim, widths)
    _, factors = net.at().linearise(x)
    whole = laws.jacobian(net, x)
    matrix = torch.eye(dim, dtype=torch.float64) + whole
    torch.testing.assert_close(factors.push(v), (whole @ v.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(factors.pull(v), (whole.mT @ v.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(factors.log_det(), torch.linalg.slogdet(matrix).logabsdet)
    torch.testing.assert_close(factors.solve(v), torch.linalg.solve(matrix, v))
    transposed = Jacobian([weight.mT for weight in reversed(factors.weights)], factors.slopes[::-1])
    torch.testing.assert_close(transposed.solve(v), torch.linalg.solve(matrix.mT, v))


@pytest.mark.slow
def test_estimates_are_unbiased() -> None:
    """Estimates and their gradients are unbiased.  The series converges as slowly as possible, so its tail matters."""
    x = laws.normal(3, 3, scale=0.05).repeat(8, 1)
    net = steep(3, 3, at_zero=True)
    parameters = [net.steepness, net.hidden[0].bias, net.hidden[1].weight]

    def value_and_gradients(exact: bool) -> Tensor:
        _, log_det = Residual(net, exact).forward_and_log_det(x)
        log_det = log_det.unflatten(0, (8, 3)).mean(0)
        gradients = torch.autograd.grad((log_det * laws.normal(3, seed=5)).sum(), parameters)
        return torch.cat((log_det.detach(), *(gradient.flatten() for gradient in gradients)))

    torch.manual_seed(0)
    draws = torch.stack([value_and_gradients(False) for _ in range(200)])
    wanted = value_and_gradients(True)
    error, spread = draws.mean(0) - wanted, draws.std(0) / len(draws) ** 0.5
    assert (error.abs() <= 4 * spread).all()


def test_estimates_come_where_no_layer_is_narrow_unless_asked_for() -> None:
    assert Residual(LipschitzMLP(100, (64, 100))).is_exact
    assert Residual(LipschitzMLP(64, (100, 100))).is_exact
    assert not Residual(LipschitzMLP(100, (100, 65))).is_exact
    assert Residual(LipschitzMLP(100, (100, 65)), exact=True).is_exact
    assert not Residual(LipschitzMLP(2), exact=False).is_exact


def test_estimates_follow_the_seed() -> None:
    flow = laws.randomise(flows.residual_flow(3, num_transforms=2, exact=False), scale=1.0)
    x, scores = laws.normal(5, 3, dtype=torch.float32), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        scores.append(flow.log_prob(x))
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


# ------------------------------------------------------------ the inverse


@pytest.mark.parametrize(
    ("exact", "lipschitz", "at_zero"),
    [(True, 0.9, False), (True, 0.9, True), (True, 0.99, True), (False, 0.9, False), (False, 0.9, True)],
)
@every_dtype
@pytest.mark.parametrize("dim", [1, 2, 33])
def test_the_steepest_networks_are_inverted(
    dim: int, dtype: torch.dtype, lipschitz: float, at_zero: bool, exact: bool
) -> None:
    layer = Residual(steep(dim, max(dim, 8), at_zero=at_zero, lipschitz=lipschitz), exact).to(dtype)
    y = torch.cat([laws.normal(60, dim, seed=seed, scale=10.0**power) for seed, power in enumerate((-2, 0, 1, 3))])
    with torch.no_grad():
        x, _ = layer.inverse_and_log_det(y.to(dtype))
        again, _ = layer.forward_and_log_det(x)
    assert laws.gap(again, y.to(dtype), 1).max() < {4: 3e-6, 8: 1e-14}[dtype.itemsize]


class Bend:
    """Map x + g(x) = 0.1 x + 0.45 tanh(4 x) + 2, with slopes of g between -0.9 and 0.9."""

    weights = [torch.ones(1, 1, dtype=torch.float64)] * 2

    def linearise(self, x: Tensor) -> tuple[Tensor, Jacobian]:
        t = torch.tanh(4 * x)
        return 0.45 * t - 0.9 * x + 2, Jacobian(self.weights, [1.8 * (1 - t * t) - 0.9])


def test_the_search_converges_where_newtons_steps_alone_go_back_and_forth() -> None:
    y = torch.tensor([[2.0]], dtype=torch.float64)
    x = y
    for _ in range(10):
        change, jacobian = Bend().linearise(x)
        x = x - jacobian.solve(x + change - y)
    assert x.abs() > 4
    assert _search(Bend(), y, 0.9).abs() < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("exact", [True, False], ids=["newton", "contraction"])
def test_the_inverse_has_the_derivatives_of_the_implicit_function(dim: int, exact: bool) -> None:
    """First derivatives are right in the value, the context and all parameters; second ones if matrices are solved."""

    def back(layer: Residual, *given: Tensor) -> tuple[Tensor, ...]:
        return layer.inverse_and_log_det(*given)[: 2 if exact else 1]

    layer, given = Residual(net_of(dim, (4, 3), 2, scale=0.7), exact), (laws.normal(2, dim, seed=1), laws.normal(2, 2))
    assert laws.passes(torch.autograd.gradcheck, back, layer, *given, fast_mode=not exact)
    if exact:
        assert laws.passes(torch.autograd.gradgradcheck, back, layer, *given, fast_mode=True)


# ------------------------------------------------------------ compilers


@pytest.mark.slow
def test_exact_transforms_compile_to_one_graph() -> None:
    net = LipschitzMLP(3, (8,), 2, lipschitz=0.3)  # the search is short then
    layer = Residual(laws.randomise(net, scale=0.5)).double()
    laws.compiles(layer, laws.normal(4, 3), laws.normal(4, 2, seed=1))


def test_estimates_map_under_vmap_with_the_same_noise_for_all() -> None:
    layer = Residual(net_of(3, (8, 8)), exact=False)
    x = laws.normal(2, 4, 3)
    for verb in (layer.forward_and_log_det, layer.inverse_and_log_det):
        y, log_det = torch.func.vmap(verb, randomness="same")(x)
        torch.testing.assert_close(y, verb(x)[0])
        assert log_det.isfinite().all()


# ------------------------------------------------------------ the recipe


def test_it_fits_a_banana() -> None:
    flow = flows.residual_flow(2, num_transforms=3, hidden_dims=(16, 16))
    torch.manual_seed(0)
    z = torch.randn(400, 2)
    x = torch.stack((2 * z[:, 0], z[:, 0].square() + 0.3 * z[:, 1]), -1)
    entropy = (0.5 * z.square().sum(-1) + torch.tensor(2 * torch.pi * 0.6).log()).mean()
    flow.initialize(x)
    losses = laws.descend(flow.parameters(), lambda: -flow.log_prob(x).mean() - entropy, 60, lr=0.03)
    assert losses[0] > 1
    assert losses[-1] < 0.1


test_errors_name_argument_and_value = laws.refusals(
    (lambda: LipschitzMLP(2, ()), r"LipschitzMLP: hidden_dims .*got \(\)"),
    (lambda: LipschitzMLP(2, (4, 0)), r"LipschitzMLP: hidden_dims .*got \(4, 0\)"),
    (lambda: LipschitzMLP(2, context_dim=3)(torch.zeros(2)), "LipschitzMLP: context is missing; .* width 3"),
)
