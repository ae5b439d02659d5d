"""Bijectors without an inverse in closed form.

The numerical inverse is exact up to round-off, at all parameters, after a bounded number of evaluations.  It has the
derivatives of the implicit function.  Each map follows its formula, and trains from its first steps.
"""

import math
from unittest import mock

import laws
import numpy as np
import pytest
import torch
from laws import params_of
from scipy.interpolate import BPoly
from torch import Tensor

from pyro_flows.bijectors import (
    Bernstein,
    Bijector,
    Continued,
    Integral,
    LinearRationalSpline,
    LogisticMixture,
    RationalQuadraticSpline,
    Sigmoidal,
    SumOfSquares,
)
from pyro_flows.bijectors.continued import bracketed_root, mixture_logit

CONTINUED: dict[str, Continued] = {name: b for name, b in laws.BIJECTORS.items() if isinstance(b, Continued)}
ALL = Sigmoidal, LogisticMixture, SumOfSquares, Bernstein, Integral, LinearRationalSpline, RationalQuadraticSpline
DEFAULTS: dict[str, Bijector] = {kind.__name__: kind() for kind in ALL}
ROOTS = {**CONTINUED, **{name: b for name, b in DEFAULTS.items() if isinstance(b, Continued)}}
every_map = pytest.mark.parametrize("bijector", CONTINUED.values(), ids=CONTINUED)
every_default = pytest.mark.parametrize("bijector", DEFAULTS.values(), ids=DEFAULTS)
every_root = pytest.mark.parametrize("bijector", ROOTS.values(), ids=ROOTS)


def places(dtype: torch.dtype = torch.float64) -> Tensor:
    """Return values within [-100, 100], half of them within [-10, 10]."""
    x = torch.linspace(-100, 100, 3000, dtype=dtype)
    return torch.cat((x, x / 10))


# ------------------------------------------------------------ the inverse


@every_root
@pytest.mark.parametrize(("scale", "tolerance"), [(1.0, 1e-12), (3.0, 1e-11), (10.0, 1e-9)])
def test_the_root_is_found(bijector: Continued, scale: float, tolerance: float) -> None:
    """Forward errors grow with the reciprocal of the slope, which is bounded; backward errors do not grow."""
    x, params = places(), params_of(bijector, 6000, scale=scale)
    y, _ = bijector.forward_and_log_det(x, params)
    again, _ = bijector.inverse_and_log_det(y, params)
    assert (again - x).abs().max() <= tolerance * 100
    assert laws.gap(bijector.forward_and_log_det(again, params)[0], y, 0).max() <= 1e-13


@every_root
@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0, 1e3])
def test_the_root_is_found_in_float32(bijector: Continued, scale: float) -> None:
    laws.inverts(bijector, places(torch.float32), params_of(bijector, 6000, dtype=torch.float32, scale=scale), 2e-5)


@every_map
def test_an_inverse_takes_few_evaluations(bijector: Continued) -> None:
    kind = type(bijector)
    with mock.patch.object(kind, "bend", autospec=True, side_effect=kind.bend) as bend:
        bijector.inverse_and_log_det(torch.zeros(3), torch.zeros(3, bijector.num_params))
    assert bend.call_count <= 25


CURVES = {
    "straight": lambda x: (x, torch.zeros_like(x)),
    "step": lambda x: (torch.tanh(50 * x) + 0.01 * x, torch.log(50 / torch.cosh(50 * x) ** 2 + 0.01)),
    "plateau": lambda x: (x**9 + 1e-3 * x, torch.log(9 * x**8 + 1e-3)),
    "stairs": lambda x: (x + 0.99 * torch.sin(x), torch.log(1 + 0.99 * torch.cos(x))),
    "cliff": lambda x: (torch.expm1(3 * x), 3 * x + math.log(3)),
}


@pytest.mark.parametrize("name", CURVES)
def test_the_bracket_closes_on_hard_curves(name: str) -> None:
    curve, ends = CURVES[name], torch.tensor([-10.0, 7.0], dtype=torch.float64)
    wanted = torch.cat((laws.normal(2000), torch.linspace(-10, 7, 2001, dtype=torch.float64)))
    y, (of_ends, slopes) = curve(wanted)[0], curve(ends)
    brackets = [tuple(part[i].expand_as(y) for part in (ends, of_ends, slopes)) for i in range(2)]
    found = bracketed_root(curve, y, *brackets, steps=40)
    assert laws.gap(curve(found)[0], y, 0).max() <= 1e-15 * 4 * y.abs().max().clamp_min(1)


@every_map
def test_the_root_has_first_and_second_derivatives(bijector: Continued) -> None:
    y = torch.tensor([-0.7, 1.3, 30.0], dtype=torch.float64, requires_grad=True)
    params = params_of(bijector, 3, scale=0.5).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(bijector.inverse_and_log_det, (y, params), fast_mode=True)


@every_map
def test_derivatives_are_those_of_the_implicit_function(bijector: Continued) -> None:
    """dx/dy = 1 / f'(x) and dx/dθ = -(∂f/∂θ) / f'(x), also for large values."""
    x, params = places()[::30], params_of(bijector, 200).requires_grad_()
    y, log_det = bijector.forward_and_log_det(x, params)
    (of_params,) = torch.autograd.grad(y.sum(), params)
    value = y.detach().requires_grad_()
    again, _ = bijector.inverse_and_log_det(value, params)
    by_value, by_params = torch.autograd.grad(again.sum(), (value, params))
    torch.testing.assert_close(by_value, torch.exp(-log_det), rtol=1e-8, atol=0)
    assert laws.gap(by_params, -of_params / log_det.exp().unsqueeze(-1), 1).max() < 1e-8


@every_map
def test_the_ends_go_on_as_tangents(bijector: Continued) -> None:
    params = params_of(bijector, 50)
    for end in (-bijector.bound, bijector.bound):
        edge = torch.full((50,), end, dtype=torch.float64)
        of_edge, log_slope = bijector.forward_and_log_det(edge, params)
        for far in (1.0, 1e3, 1e15):
            x = edge + math.copysign(far, end)
            y, log_det = bijector.forward_and_log_det(x, params)
            torch.testing.assert_close(y, of_edge + (x - edge) * log_slope.exp(), rtol=1e-14, atol=0)
            assert torch.equal(log_det, log_slope)
            # Round-off is that of y, divided by the slope.
            again, back = bijector.inverse_and_log_det(y, params)
            assert (again - x).abs().le(1e-15 * (x.abs() + y.abs() / log_slope.exp())).all()
            torch.testing.assert_close(back, -log_slope, rtol=0, atol=1e-12)


# ------------------------------------------------------------ starts


def bimodal() -> Tensor:
    z = laws.normal(600)
    return torch.where(torch.arange(600) % 3 > 0, 0.3 * z - 1, 0.5 * z.abs() + 0.8)


def fitted(bijector: Bijector, x: Tensor, steps: int, lr: float) -> tuple[Tensor, float]:
    """Fit a table of parameters to the density of x by Adam, and return it with the last loss in nats."""
    params = torch.zeros(bijector.num_params, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        z, log_det = bijector.forward_and_log_det(x, params)
        return (0.5 * z.square() - log_det).mean()

    return params.detach(), laws.descend([params], loss, steps, lr)[-1]


@every_default
def test_no_component_stays_equal_to_another(bijector: Bijector) -> None:
    everywhere = torch.linspace(-4.9, 4.9, 100, dtype=torch.float64)  # a bin without data has no gradient
    params, _ = fitted(bijector, torch.cat((bimodal(), everywhere)), steps=3, lr=1e-2)
    assert (params != 0).all()
    match bijector:
        case Sigmoidal():
            parts = torch.stack([part[0] for part in bijector.table(params)[:3]], -1)
        case LogisticMixture():
            parts = torch.stack(bijector.table(params)[:3], -1)
        case SumOfSquares():
            parts = bijector.table(params)[1][:, :, 0].T
        case Integral():
            parts = params[: bijector.hidden].unsqueeze(-1)
        case _:  # bins differ by their position
            return
    assert torch.pdist(parts, p=math.inf).min() > 1e-6


@every_default
def test_learning_does_not_wait(bijector: Bijector) -> None:
    """A map that starts at a saddle would change only affinely at first, and stay at the best affine loss for long."""
    x = bimodal()
    affine = 0.5 + x.std(correction=0).log().item()
    _, loss = fitted(bijector, x, steps=40, lr=5e-2)
    assert loss < affine - 0.03


# ------------------------------------------------------------ formulas


def test_a_mixture_of_logits_is_the_one_it_says() -> None:
    u, log_slope = laws.normal(5, 100, scale=3.0), laws.normal(5, 100, seed=1)
    weight = torch.softmax(laws.normal(5, 100, seed=2), 0)
    logit, slope = mixture_logit(u, log_slope, weight.log())
    mixture = (weight * torch.sigmoid(u)).sum(0)
    torch.testing.assert_close(logit, torch.logit(mixture))
    density = (weight * torch.sigmoid(u) * torch.sigmoid(-u) * log_slope.exp()).sum(0)
    torch.testing.assert_close(slope, density / (mixture * (1 - mixture)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_slopes_of_mixtures_stay_within_those_of_their_parts(dtype: torch.dtype) -> None:
    """This holds also if a weight vanishes and all sigmoids are in a tail, so that shares and weights overflow."""
    u = laws.normal(4, 500, dtype=dtype, scale=1e3)
    log_weight = torch.log_softmax(laws.normal(4, 500, seed=1, dtype=dtype, scale=1e3), 0)
    logit, slope = mixture_logit(u.requires_grad_(), torch.full_like(u, 0.7), log_weight.requires_grad_())
    assert logit.isfinite().all()
    assert (slope >= 0).all()
    assert slope.log().max() <= 0.7 + {4: 1e-2, 8: 1e-9}[dtype.itemsize]
    for gradient in torch.autograd.grad(logit.sum() + slope.sum(), (u, log_weight)):
        assert gradient.isfinite().all()


def test_a_logistic_mixture_has_no_completion_when_its_share_is_gone() -> None:
    """y = e^a ((1 - ε) logit Σ_k π_k σ((x - μ_k) e^{-s_k}) + ε x) + b, the map of Flow++."""
    mixture, x = LogisticMixture(components=3), laws.normal(50, scale=3.0)
    weights, means, scales = (laws.normal(3, seed=seed) for seed in range(3))
    params = torch.cat((weights, means, scales, torch.tensor([0.4, 1.7, -1e3], dtype=torch.float64)))
    y, _ = mixture.forward_and_log_det(x, params)
    s = 3 * torch.tanh(scales / 3)
    means = means + torch.tensor([-3.0, 0.0, 3.0])
    parts = torch.sigmoid((x.unsqueeze(-1) - means) * torch.exp(-s))
    logit = torch.logit((torch.softmax(weights, 0) * parts).sum(-1))
    scale = math.exp(3 * math.tanh(0.1 / 3))
    torch.testing.assert_close(y, scale * (0.99 * logit + 0.01 * x) + 1.7)


@pytest.mark.parametrize(("degree", "polynomials"), [(1, 1), (2, 3), (8, 2), (15, 1)])
def test_a_sum_of_squares_is_the_integral_it_says(degree: int, polynomials: int) -> None:
    """Gauss's rule is exact: NumPy's antiderivative of the same polynomials agrees."""
    squares = SumOfSquares(degree, polynomials, bound=3.0)
    params, x = params_of(squares, scale=1.0), torch.linspace(-3, 3, 41, dtype=torch.float64)
    y, log_det = squares.forward_and_log_det(x, params)
    legendre = [np.polynomial.Legendre(a.numpy(), domain=[-3, 3]) for a in squares.table(params)[1][:, :, 0].T]
    slope = 0.01 + 0.99 * sum(p * p for p in legendre)
    np.testing.assert_allclose(y, params[-1].item() + slope.integ(lbnd=0)(x.numpy()), atol=1e-11)
    np.testing.assert_allclose(log_det, np.log(slope(x.numpy())), atol=1e-11)


@pytest.mark.parametrize("scale", [2.0, 2e4])
def test_the_mean_slope_of_a_sum_of_squares_is_bounded(scale: float) -> None:
    squares = SumOfSquares(max_mean_slope=4.0)
    ends = torch.tensor([-5.0, 5.0], dtype=torch.float64)
    y, _ = squares.forward_and_log_det(ends.unsqueeze(-1), params_of(squares, 200, scale=scale))
    mean = (y[1] - y[0]) / 10
    assert mean.max() <= 4.0
    assert mean.max() > 3.0  # otherwise the test would pass for any map


@pytest.mark.parametrize("degree", [2, 7, 32])
def test_a_bernstein_polynomial_is_the_one_it_says(degree: int) -> None:
    bernstein, x = Bernstein(degree, bound=2.0), torch.linspace(-2, 2, 41, dtype=torch.float64)
    params = params_of(bernstein, scale=2.0)
    y, log_det = bernstein.forward_and_log_det(x, params)
    steps = np.exp(5 * np.tanh(params[:-1].numpy() / 5)) * 4 / degree
    coefficients = np.concatenate(([0.0], steps.cumsum())) - steps.sum() / 2 + params[-1].item()
    wanted = BPoly(coefficients[:, None], [-2.0, 2.0])
    np.testing.assert_allclose(y, wanted(x.numpy()), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(log_det, np.log(wanted.derivative()(x.numpy())), atol=1e-11)


def test_bernstein_polynomials_have_second_derivatives_at_their_ends() -> None:
    """The derivative of a power of zero must not contain 0 · 0^-1."""
    bernstein = Bernstein(degree=6, bound=1.0)
    leaves = (
        torch.tensor([-1.0, 1.0, 5.0]).requires_grad_(),
        params_of(bernstein, dtype=torch.float32).requires_grad_(),
    )
    y, log_det = bernstein.forward_and_log_det(*leaves)
    first = torch.autograd.grad(y.sum() + log_det.sum(), leaves, create_graph=True)
    for gradient in torch.autograd.grad(sum(part.square().sum() for part in first), leaves):
        assert gradient.isfinite().all()


def test_an_integral_is_that_of_its_network() -> None:
    """The error is of second order: half the panel width gives a quarter of the error."""
    x, errors = torch.linspace(-5, 5, 2001, dtype=torch.float64), []
    params = params_of(Integral(), scale=0.5)
    v, w, u = params[:-2].view(3, 8, 1)
    rates = 3 * torch.exp(1.5 * torch.tanh(w / 1.5))
    t = (x + 5) * 0.7 - torch.arange(8).unsqueeze(-1)
    net = params[-2] + (v * torch.tanh(rates * (t - u))).sum(0)
    slope = torch.exp(3 * torch.tanh(net / 3))
    integral = torch.cat((torch.zeros(1), torch.cumulative_trapezoid(slope, x)))
    wanted = integral - integral[1000] + params[-1]
    for panels in (25, 50):
        y, log_det = Integral(panels=panels).forward_and_log_det(x, params)
        errors.append((y - wanted).abs().max().item())
        nodes = slice(None, None, 1000 // panels)
        torch.testing.assert_close(log_det[nodes], slope.log()[nodes])
    assert errors[0] < 0.1
    assert 3 < errors[0] / errors[1] < 5


def test_a_linear_rational_spline_is_the_papers() -> None:
    """The reference is equation (8) of arXiv:2001.05168 with weights w, at random places of random bins."""
    spline = LinearRationalSpline(bins=5)
    for params in params_of(spline, 20):
        xs, ys, slopes, shares = spline._table(params)
        x = torch.lerp(xs[:-1], xs[1:], torch.linspace(0, 1, 11, dtype=torch.float64).unsqueeze(-1))
        width, height, share = xs.diff(), ys.diff(), shares[:-1]
        one, other = torch.ones_like(share), torch.sqrt(slopes[:-1] / slopes[1:])
        middle = (share * slopes[:-1] + (1 - share) * other * slopes[1:]) * width / height
        y_middle = ((1 - share) * ys[:-1] + share * other * ys[1:]) / ((1 - share) + share * other)
        u = (x - xs[:-1]) / width
        left = (ys[:-1] * (share - u) + middle * y_middle * u) / (one * (share - u) + middle * u)
        right = middle * y_middle * (1 - u) + other * ys[1:] * (u - share)
        right = right / (middle * (1 - u) + other * (u - share))
        y, _ = spline.forward_and_log_det(x, params)
        torch.testing.assert_close(y, torch.where(u <= share, left, right), atol=1e-9, rtol=1e-9)


test_errors_name_argument_and_value = laws.refusals(
    (lambda: Sigmoidal(bound=math.inf), "Sigmoidal: bound .*got inf"),
    (lambda: Sigmoidal(max_log_slope=0.0), r"Sigmoidal: max_log_slope .*got 0\.0"),
    (lambda: LogisticMixture(bound=-1.0), r"LogisticMixture: bound .*got -1\.0"),
    (lambda: LogisticMixture(max_log_scale=math.nan), "LogisticMixture: max_log_scale .*got nan"),
    (lambda: Integral(bound=0.0), r"Integral: bound .*got 0\.0"),
    (lambda: Integral(max_log_slope=-2.0), r"Integral: max_log_slope .*got -2\.0"),
    (lambda: SumOfSquares(bound=0.0), r"SumOfSquares: bound .*got 0\.0"),
    (lambda: Bernstein(bound=0.0), r"Bernstein: bound .*got 0\.0"),
    (lambda: Bernstein(max_log_slope=0.0), r"Bernstein: max_log_slope .*got 0\.0"),
)
