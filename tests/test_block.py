"""Block neural autoregressive transform.

The map follows its formula, with bounded slopes at all parameters.  Its inverse is exact in both dtypes and cheap, and
has the derivatives of the implicit function.  The laws of all transforms are in test_transforms.py, and those of all
recipes in test_flows.py.
"""

import math
from unittest import mock

import laws
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_flows import flows
from pyro_flows.conditioners import MLP
from pyro_flows.transforms import BlockAutoregressive, Inverse, Permute, block_autoregressive

every_width = pytest.mark.parametrize("hidden_dims", [(8, 8), (6,), (4, 1, 3)], ids=str)


def random(
    dim: int, hidden_dims: tuple[int, ...] = (4, 3), scale: float = 3.0, **options: float
) -> BlockAutoregressive:
    return laws.randomise(BlockAutoregressive(dim, hidden_dims, **options).double(), scale=scale)


# ------------------------------------------------------------ the map


def by_the_formula(layer: BlockAutoregressive, x: Tensor, added: Tensor) -> Tensor:
    """Return the map of one event ``(D)``, unit by unit, with the terms of a context, ``(D, P)``."""
    bound, dim, widths = layer.max_log_slope, layer.input_dim, layer.hidden_dims

    def exp(raw: Tensor) -> Tensor:
        return torch.exp(bound * torch.tanh(raw / bound))

    def crossing(number: int, width: int, seen: list[Tensor], i: int) -> Tensor:
        weight = layer.cross[number].weight.unflatten(1, (dim, -1)).unflatten(0, (dim, width))  # (D, K, D, K')
        bias = layer.cross[number].bias.view(dim, width)[i]
        return sum((weight[i, :, j] @ seen[j] for j in range(i)), bias) + added.split((*widths, 2), 1)[number][i]

    copies = seen = list(x.unsqueeze(-1))
    for number, width in enumerate(widths):
        above, next_seen = [], []
        for i in range(dim):
            mixture = torch.softmax(layer.mixtures[number - 1][i], -1) if number else torch.ones(width, 1).double()
            m, a = mixture @ copies[i], exp(layer.steepness[number][i, :, 0])
            next_seen.append(torch.tanh(a * (m + crossing(number, width, seen, i))))
            above.append(m + (exp(layer.gates[number][i, :, 0] * width**0.5) - 1) * next_seen[i] / a)
        copies, seen = above, next_seen
    y = []
    for i in range(dim):
        s, o = crossing(-1, 2, seen, i)
        y.append(exp(s) * torch.softmax(layer.mixtures[-1][i, 0], -1) @ copies[i] + o)
    return torch.stack(y)


@every_width
def test_it_is_the_map_it_says(hidden_dims: tuple[int, ...]) -> None:
    layer = BlockAutoregressive(3, hidden_dims, MLP(2, 3, sum(hidden_dims) + 2, (8,)))
    laws.randomise(layer.double(), scale=1.0)
    x, context = laws.normal(4, 3), laws.normal(4, 2, seed=1)
    events = zip(x, layer.conditioner(context), strict=True)
    wanted = torch.stack([by_the_formula(layer, *event) for event in events])
    torch.testing.assert_close(layer.forward_and_log_det(x, context)[0], wanted, atol=1e-12, rtol=1e-12)


def test_every_feature_sees_all_earlier_ones_and_the_context() -> None:
    layer = laws.randomise(BlockAutoregressive(4, (8, 8), MLP(2, 4, 18, (8,))).double(), scale=0.5)
    x, context = laws.normal(20, 4), laws.normal(20, 2, seed=1)
    matrix = laws.jacobian(lambda value: layer.forward_and_log_det(value, context)[0], x)
    assert (matrix.abs().amax(0).tril() > 1e-3).equal(torch.ones(4, 4).tril().bool())
    matrix = laws.jacobian(lambda value: layer.forward_and_log_det(x, value)[0], context)
    assert (matrix.abs().amax(0) > 1e-3).all()


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e4])
@every_width
def test_slopes_are_bounded_whatever_the_parameters(scale: float, hidden_dims: tuple[int, ...]) -> None:
    """The bound is one nat per nonlinear layer and one for the scale, so no optimiser step makes a feature flat."""
    for seed in range(5):
        layer = BlockAutoregressive(3, hidden_dims, max_log_slope=1.0).double()
        laws.randomise(layer, seed=seed, scale=scale)
        x = laws.normal(50, 3, seed=seed, scale=3.0)
        matrix = laws.jacobian(lambda value, layer=layer: layer.forward_and_log_det(value)[0], x)
        assert matrix.diagonal(dim1=1, dim2=2).log().abs().max() <= len(hidden_dims) + 1 + 1e-12
        for verb in (layer.forward_and_log_det, layer.inverse_and_log_det):
            layer.zero_grad()
            value, log_det = verb(x)
            (value.sum() + log_det.sum()).backward()
            assert value.isfinite().all()
            assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_a_layer_can_bend_both_ways() -> None:
    """With gates of both signs, slopes are above one at some values and below one at others."""
    layer = BlockAutoregressive(1, (2,)).double()
    with torch.no_grad():
        layer.cross[0].bias.copy_(torch.tensor([-2.0, 2.0]))
        layer.gates[0].copy_(torch.tensor([[[-2.0], [2.0]]]))
    _, log_slope = layer.forward_and_log_det(torch.tensor([[2.0], [-2.0], [100.0]]).double())
    assert log_slope[0] < -0.1
    assert log_slope[1] > 0.1
    assert log_slope[2].abs() < 1e-12


# ------------------------------------------------------------ the inverse


@pytest.mark.parametrize("dim", [1, 2, 3])
@every_width
def test_the_inverse_is_exact_at_large_parameters(dim: int, hidden_dims: tuple[int, ...]) -> None:
    layer, x = random(dim, hidden_dims), torch.empty(500, dim).double().uniform_(-100, 100)
    with torch.no_grad():
        y, forward = layer.forward_and_log_det(x)
        again, backward = layer.inverse_and_log_det(y)
    assert (again - x).abs().max() < 1e-9
    assert laws.gap(-backward, forward, 0).max() < 1e-9


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("max_log_slope", [1.0, 3.0, 5.0])
def test_the_steps_suffice_at_all_bounds(max_log_slope: float, scale: float) -> None:
    """Many steep layers on a fine grid: an insufficient search would fail in some of 60,000 equations."""
    worst = 0.0
    with torch.no_grad():
        for seed, hidden_dims in enumerate([(8, 8), (8,), (2, 2)] * 5):
            layer = BlockAutoregressive(1, hidden_dims, max_log_slope=max_log_slope).double()
            laws.randomise(layer, seed=seed, scale=scale)
            y = torch.cat((torch.linspace(-300, 300, 2000), torch.linspace(-20, 20, 2000))).double().unsqueeze(-1)
            again, _ = layer.forward_and_log_det(layer.inverse_and_log_det(y)[0])
            worst = max(worst, laws.gap(again, y, 1).max().item())
    assert worst < 1e-15 * math.exp(3 * max_log_slope)  # round-off, multiplied by the slopes


def test_the_inverse_takes_the_evaluations_that_it_promises() -> None:
    """An evaluation of the units of one feature counts as 1 / D of the network's."""
    net = block_autoregressive._Net
    with mock.patch.object(net, "ascend", autospec=True, side_effect=net.ascend) as ascend:
        random(4).inverse_and_log_det(laws.normal(10, 4))
    assert ascend.call_count / 4 == 22


@pytest.mark.slow
@pytest.mark.parametrize("hidden_dims", [(2, 2), (3,)], ids=str)
def test_the_inverse_has_first_and_second_derivatives(hidden_dims: tuple[int, ...]) -> None:
    """Derivatives with respect to value, context and parameters are those of the implicit function."""
    conditioner = MLP(1, 3, sum(hidden_dims) + 2, (2,), activation=nn.Tanh)
    layer = laws.randomise(BlockAutoregressive(3, hidden_dims, conditioner).double(), scale=0.7)
    values, inverse = (laws.normal(2, 3, seed=1), laws.normal(2, 1, seed=2)), BlockAutoregressive.inverse_and_log_det
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert laws.passes(check, inverse, layer, *values, fast_mode=True)


def test_gradients_of_the_inverse_are_those_of_the_forward_map_read_backwards() -> None:
    """dx/dθ = -(dy/dx)⁻¹ dy/dθ for all parameters, at sizes for which finite differences are too slow."""
    layer, x = random(5, (8, 8), scale=1.0), laws.normal(6, 5)
    y = layer.forward_and_log_det(x)[0].detach()
    matrix = laws.jacobian(lambda value: layer.forward_and_log_det(value)[0], x).detach()
    g = laws.normal(6, 5, seed=1)
    parameters = list(layer.parameters())
    got = torch.autograd.grad((layer.inverse_and_log_det(y)[0] * g).sum(), parameters)
    cotangent = -torch.linalg.solve(matrix.mT, g)
    wanted = torch.autograd.grad((layer.forward_and_log_det(x)[0] * cotangent).sum(), parameters)
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_it_compiles_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are unrolled and equal, so a few steps suffice."""
    monkeypatch.setattr(block_autoregressive, "STEPS", 2 - 3)
    layer = random(2, (3,), scale=0.3)
    laws.compiles(layer, laws.normal(4, 2), None)


# ------------------------------------------------------------ training


def test_no_two_units_become_alike() -> None:
    layer = BlockAutoregressive(3, (8, 8)).double()

    def loss() -> Tensor:
        y, log_det = layer.forward_and_log_det(laws.normal(200, 3).cumsum(-1) + 1)
        return (0.5 * y.square().sum(-1) - log_det).mean()

    laws.descend(layer.parameters(), loss)
    for number, width in enumerate(layer.hidden_dims):
        of_unit = layer.cross[number].bias.view(3, width, 1), layer.steepness[number], layer.gates[number]
        apart = torch.cdist(torch.cat(of_unit, -1), torch.cat(of_unit, -1))  # (D, K, K)
        assert (apart + torch.eye(width) > 1e-2).all()
        assert (layer.gates[number] != 0).all()


def test_the_recipe_reverses_the_features_between_layers() -> None:
    flow = flows.bnaf(3, 2, num_transforms=3, hidden_dims=(4, 5))
    assert [type(layer) for layer in flow.transforms] == [Inverse, Permute, Inverse, Permute, Inverse]
    assert flow.transforms[1].permutation.tolist() == [2, 1, 0]
    layer = flow.transforms[0].inv
    assert (layer.hidden_dims, layer.conditioner.hidden_dims, layer.max_log_slope) == ((4, 5), (12, 15), 3.0)
    assert len(flows.bnaf(1, num_transforms=3).transforms) == 3  # a single feature has no order


@pytest.mark.slow
def test_one_feature_fits_narrow_modes_beside_a_gap() -> None:
    """The flow starts from a standard normal, which is 1.1 nats away."""
    target = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.6, 0.4], dtype=torch.float64)),
        dist.Normal(torch.tensor([-1.5, 1.5], dtype=torch.float64), torch.tensor([0.3, 0.2], dtype=torch.float64)),
    )
    flow = flows.bnaf(1, num_transforms=2).double()
    x = torch.linspace(-4, 4, 400, dtype=torch.float64)
    log_p = target.log_prob(x)

    def divergence() -> Tensor:
        return (x[1] - x[0]) * (log_p.exp() * (log_p - flow().log_prob(x.unsqueeze(-1)))).sum()

    assert laws.descend(flow.parameters(), divergence, steps=200, lr=0.03, cosine=200)[0] > 1
    assert divergence() < 0.03


# ------------------------------------------------------------ errors


test_errors_name_argument_and_value = laws.refusals(
    (lambda: BlockAutoregressive(3, (4, 5), MLP(2, 3, 10)), r"num_params\) = \(3, 11\), got \(3, 10\)"),
    (lambda: BlockAutoregressive(3, (4, 5), MLP(2, 1, 11)), r"num_params\) = \(3, 11\), got \(1, 11\)"),
    (lambda: BlockAutoregressive(2, (2,), MLP(3, 2, 4))(torch.zeros(2)), "context is missing; its width is 3"),
)
