"""Laws of bijectors, at large random parameters and far outside the box.

A bijector is an increasing map of the real line onto itself, and the identity at zero parameters.  Its two directions
are inverse to each other, and its log-determinant equals that of autograd.
"""

import math
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import params_of
from torch import Tensor

from pyro_flows.bijectors import (
    Affine,
    Bijector,
    CircularSpline,
    Continued,
    Integral,
    LinearRationalSpline,
    RationalQuadraticSpline,
    SoftplusAffine,
)

DTYPES = [torch.float32, torch.float64]
Spline = RationalQuadraticSpline | LinearRationalSpline
SPLINES = [name for name, bijector in laws.BIJECTORS.items() if isinstance(bijector, Spline)]
every_bijector = pytest.mark.parametrize("bijector", laws.BIJECTORS.values(), ids=laws.BIJECTORS)
CIRCULAR = [CircularSpline(), CircularSpline(bins=2, bound=1.0), CircularSpline(bins=16, bound=2.7)]
every_circular = pytest.mark.parametrize("circular", CIRCULAR, ids=repr)
every_spline = pytest.mark.parametrize("spline", [laws.BIJECTORS[name] for name in SPLINES], ids=SPLINES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def knots_of(spline: Spline | Integral | CircularSpline, params: Tensor) -> tuple[Tensor, Tensor]:
    """Return the K + 1 knots along x and along y, exactly."""
    xs, ys = spline._table(params)[:2]
    return xs, ys


def places(bijector: Bijector, params: Tensor) -> Tensor:
    """Return values where a formula may fail: zero, large values, and the exact knots and edges of the spline."""
    far = torch.tensor([0.0, 1e-30, 1.0, 4.99, 1e3, 1e30], dtype=params.dtype)
    if not isinstance(bijector, Spline | CircularSpline):
        return torch.cat((-far, far))
    edge = torch.tensor([bijector.bound], dtype=params.dtype)
    return torch.cat((-far, far, -edge, edge, torch.nextafter(edge, 0 * edge), *knots_of(bijector, params)))


def neighbours(values: Tensor) -> Tensor:
    """Return values with the three nearest floating-point numbers on either side, ``(7 N,)``."""
    found = [values]
    for end in (-math.inf, math.inf):
        value = values
        for _ in range(3):
            value = torch.nextafter(value, torch.full_like(value, end))
            found.append(value)
    return torch.cat(found)


@every_dtype
@every_bijector
def test_zero_parameters_are_the_identity(bijector: Bijector, dtype: torch.dtype) -> None:
    x = torch.cat((laws.normal(200, dtype=dtype, scale=3.0), torch.linspace(-1e3, 1e3, 201, dtype=dtype)))
    laws.starts_at_identity(bijector, x, torch.zeros(bijector.num_params, dtype=dtype))


@every_bijector
def test_the_two_verbs_undo_each_other(bijector: Bijector) -> None:
    x = torch.cat((laws.normal(500, scale=3.0), torch.linspace(-1e3, 1e3, 500, dtype=torch.float64)))
    laws.undoes_itself(bijector, x, params_of(bijector, 1000))
    laws.inverts(bijector, x, params_of(bijector, 1000), 1e-12)


@every_bijector
def test_the_inverse_is_exact_backwards_in_float32(bijector: Bijector) -> None:
    x = torch.linspace(-10, 10, 2000)
    laws.inverts(bijector, x, params_of(bijector, 2000, dtype=torch.float32), 1e-4)


@every_dtype
@every_bijector
def test_log_det_is_the_log_of_the_derivative(bijector: Bijector, dtype: torch.dtype) -> None:
    x = torch.cat((laws.normal(500, dtype=dtype, scale=3.0), torch.linspace(-1e3, 1e3, 501, dtype=dtype)))
    laws.log_det_is_slope(bijector, x, params_of(bijector, 1001, dtype=dtype), {4: 1e-3, 8: 1e-9}[dtype.itemsize])


@every_dtype
@every_bijector
def test_the_log_dets_are_opposite(bijector: Bijector, dtype: torch.dtype) -> None:
    x = torch.linspace(-10, 10, 1000, dtype=dtype)
    laws.log_dets_are_opposite(bijector, x, params_of(bijector, 1000, dtype=dtype), {4: 1e-3, 8: 1e-10}[dtype.itemsize])


@pytest.mark.slow
@every_bijector
@settings(deadline=None, derandomize=True, max_examples=30)
@given(data=st.data())
def test_any_values_and_parameters(bijector: Bijector, data: st.DataObject) -> None:
    """Round trip and order hold for all values of hypothesis, with parameters far beyond those of training."""
    number = st.floats(-10, 10, allow_subnormal=False)
    params = torch.tensor(
        data.draw(st.lists(number, min_size=bijector.num_params, max_size=bijector.num_params)), dtype=torch.float64
    )
    low, high = sorted(data.draw(st.tuples(*(st.floats(-1e3, 1e3),) * 2)))
    x = torch.tensor([low, high], dtype=torch.float64)
    laws.undoes_itself(bijector, x, params)
    (y_low, y_high), _ = bijector.forward_and_log_det(x, params)
    assert y_low <= y_high if high - low < 1e-6 else y_low < y_high


@every_dtype
@every_bijector
def test_values_and_gradients_are_finite_everywhere(bijector: Bijector, dtype: torch.dtype) -> None:
    for params in params_of(bijector, 5, dtype=dtype):
        for verb in (bijector.forward_and_log_det, bijector.inverse_and_log_det):
            leaves = places(bijector, params).requires_grad_(), params.clone().requires_grad_()
            y, log_det = verb(*leaves)
            grads = torch.autograd.grad(y.sum() + log_det.sum(), leaves)
            assert all(t.isfinite().all() for t in (y, log_det, *grads))


@every_dtype
@every_spline
def test_knots_map_to_knots(spline: Spline, dtype: torch.dtype) -> None:
    for params in params_of(spline, 20, dtype=dtype):
        xs, ys = knots_of(spline, params)
        torch.testing.assert_close(spline.forward_and_log_det(xs, params)[0], ys)
        torch.testing.assert_close(spline.inverse_and_log_det(ys, params)[0], xs)


@every_spline
def test_a_value_outside_the_box_poisons_no_gradient(spline: Spline) -> None:
    """If the unselected branch of ``where`` has a NaN gradient, 0 × NaN makes all gradients NaN."""
    inner = torch.linspace(-0.99, 0.99, 9, dtype=torch.float64) * spline.bound
    outer = torch.tensor([-1e30, -spline.bound, spline.bound, 1e30], dtype=torch.float64)
    for verb in (spline.forward_and_log_det, spline.inverse_and_log_det):
        alone, together = [], []
        for x, found in ((inner, alone), (torch.cat((inner, outer)), together)):
            leaves = x.clone().requires_grad_(), params_of(spline).requires_grad_()
            y, log_det = verb(*leaves)
            found += torch.autograd.grad(y.sum() + log_det.sum(), leaves)
        torch.testing.assert_close(together[0][: len(inner)], alone[0])
        torch.testing.assert_close(together[1], alone[1])
        assert (together[0][len(inner) :] == 1).all()


@every_spline
def test_the_slope_does_not_jump_at_the_edge_of_the_box(spline: Spline) -> None:
    params = params_of(spline, 50)
    for edge in (-spline.bound, spline.bound):
        inside = torch.full((50,), edge * (1 - 1e-10), dtype=torch.float64)
        for verb in (spline.forward_and_log_det, spline.inverse_and_log_det):
            y, log_det = verb(inside, params)
            assert 0 < log_det.abs().max() < 1e-5  # not zero: the value is inside the box
            assert (y - edge).abs().max() < 1e-8


@pytest.mark.parametrize(
    "bijector", [RationalQuadraticSpline(), LinearRationalSpline(), Integral(), *CIRCULAR], ids=repr
)
def test_gradients_do_not_stop_next_to_a_knot(bijector: Spline | Integral | CircularSpline) -> None:
    """Within round-off of a knot, a formula may leave its bin; the derivative must still equal the log-det."""
    for params in params_of(bijector, 20):
        rotation = params[-1] if isinstance(bijector, CircularSpline) else 0.0
        xs, ys = knots_of(bijector, params)
        for verb, knots in ((bijector.forward_and_log_det, xs), (bijector.inverse_and_log_det, ys + rotation)):
            value = neighbours(knots).requires_grad_()
            y, log_det = verb(value, params)
            (slope,) = torch.autograd.grad(y.sum(), value)
            torch.testing.assert_close(slope.log(), log_det, atol=1e-6, rtol=0)


@every_circular
def test_once_around_is_once_around(circular: CircularSpline) -> None:
    """f(x + 2 B k) = f(x) + 2 B k, with the same slope; so it is a map of the circle."""
    x, params = laws.normal(200, scale=3.0), params_of(circular, 200)
    for verb in (circular.forward_and_log_det, circular.inverse_and_log_det):
        y, log_det = verb(x, params)
        for turns in (-150, -1, 1, 2, 150):
            far, of_far = verb(x + 2 * circular.bound * turns, params)
            torch.testing.assert_close(far, y + 2 * circular.bound * turns, atol=1e-9, rtol=0)
            torch.testing.assert_close(of_far, log_det, atol=1e-6, rtol=0)


@every_dtype
@every_circular
def test_the_seams_cannot_be_seen(circular: CircularSpline, dtype: torch.dtype) -> None:
    """On both sides of an odd multiple of B, value and slope equal those at the seam."""
    seams = circular.bound * torch.tensor([-7.0, -1.0, 1.0, 3.0], dtype=dtype)
    tolerance = {4: 5e-2, 8: 1e-9}[dtype.itemsize]  # 7 B is known to 1e-6 in float32
    for params in params_of(circular, 20, dtype=dtype, scale=1.0):
        slope = circular._table(params)[2, 0].log()
        for verb, at, wanted, sign in (
            (circular.forward_and_log_det, seams, seams + params[-1], 1),
            (circular.inverse_and_log_det, seams + params[-1], seams, -1),
        ):
            value = neighbours(at).requires_grad_()
            y, log_det = verb(value, params)
            (gradient,) = torch.autograd.grad(y.sum(), value)
            torch.testing.assert_close(y.view(-1, 4), wanted.expand(7, 4), atol=tolerance, rtol=0)
            for found in (log_det, gradient.log()):
                torch.testing.assert_close(found, (sign * slope).expand(28), atol=tolerance, rtol=0)
        assert slope != 0


@every_circular
def test_a_circular_spline_can_be_a_rotation(circular: CircularSpline) -> None:
    params = torch.zeros(circular.num_params, dtype=torch.float64)
    params[-1] = 100.0
    x = laws.normal(200, scale=3.0)
    y, log_det = circular.forward_and_log_det(x, params)
    torch.testing.assert_close(y, x + 100)
    torch.testing.assert_close(log_det, torch.zeros_like(x))


@every_bijector
@pytest.mark.parametrize(
    ("value_shape", "params_shape"),
    [((), ()), ((4,), ()), ((), (3,)), ((4, 1), (3,)), ((3,), (4, 1)), ((2, 4, 3), (3,))],
)
def test_parameters_broadcast_against_values(
    bijector: Bijector, value_shape: tuple[int, ...], params_shape: tuple[int, ...]
) -> None:
    x, params = laws.normal(*value_shape, scale=2.0), params_of(bijector, *params_shape)
    shape = torch.broadcast_shapes(value_shape, params_shape)
    for verb in (bijector.forward_and_log_det, bijector.inverse_and_log_det):
        y, log_det = verb(x, params)
        assert y.shape == log_det.shape == shape
        wanted = verb(x.expand(shape).clone(), params.expand(*shape, -1).clone())
        torch.testing.assert_close((y, log_det), wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.slow
@every_bijector
def test_gradcheck(bijector: Bijector) -> None:
    x = laws.normal(4, scale=2.0).requires_grad_()
    params = params_of(bijector, 4, scale=1.0).requires_grad_()
    assert torch.autograd.gradcheck(bijector.forward_and_log_det, (x, params))
    assert torch.autograd.gradcheck(bijector.inverse_and_log_det, (x, params))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in laws.CONDITIONED if name != "spline_2_bins"])
def test_it_compiles_to_one_graph(name: str) -> None:
    """The root search is long and equal in all bijectors, so its graph is lowered for only one of them."""
    bijector = laws.BIJECTORS[name]
    inverse = "eager" if isinstance(bijector, Continued) and name != "squares" else "aot_eager"
    laws.compiles(bijector, laws.normal(4, 3, scale=3.0), params_of(bijector, 4, 3), inverse)


@every_bijector
def test_it_maps_under_vmap(bijector: Bijector) -> None:
    laws.maps(bijector, laws.normal(4, 3, scale=3.0), params_of(bijector, 4, 3), in_dims=(0, 0))


@pytest.mark.parametrize(("bound", "value"), [(4.0, 1000.0), (2.0, -1000.0)])
def test_affine_scales_are_bounded(bound: float, value: float) -> None:
    for bijector, raw, wanted in (
        (Affine(bound), value, math.copysign(bound, value)),
        (Affine(bound), 0.01, 0.01 / 4),  # for every bound
        (Affine(bound, slope=1.0), 0.01, 0.01),
    ):
        _, log_det = bijector.forward_and_log_det(torch.tensor(1.0), torch.tensor([raw, 0.0]))
        assert log_det.item() == pytest.approx(wanted, rel=1e-3 if raw == 0.01 else 1e-6)


test_errors_name_argument_and_value = laws.refusals(
    (lambda: Affine(0.0), "Affine: max_log_scale .*got 0.0"),
    (lambda: Affine(math.nan), "Affine: max_log_scale .*got nan"),
    (lambda: Affine(slope=0.0), "Affine: slope .*got 0.0"),
    (lambda: Affine(slope=math.inf), "Affine: slope .*got inf"),
    (lambda: RationalQuadraticSpline(bins=1), "Spline: bins .*got 1"),
    (lambda: RationalQuadraticSpline(bound=0.0), "Spline: bound .*got 0.0"),
    (lambda: RationalQuadraticSpline(bins=4, min_bin=0.25), "Spline: min_bin .*got 0.25"),
    (lambda: RationalQuadraticSpline(min_bin=0.0), "Spline: min_bin .*got 0.0"),
    (lambda: RationalQuadraticSpline(max_slope=1.0), "Spline: max_slope .*got 1.0"),
    (lambda: RationalQuadraticSpline(max_slope=math.inf), "Spline: max_slope .*got inf"),
    (lambda: LinearRationalSpline(bins=1), "LinearRationalSpline: bins .*got 1"),
    (lambda: LinearRationalSpline(bins=4, min_bin=0.25), "LinearRationalSpline: min_bin .*got 0.25"),
    (lambda: CircularSpline(bins=1), "CircularSpline: bins .*got 1"),
    (lambda: CircularSpline(bound=math.inf), "CircularSpline: bound .*got inf"),
    (lambda: CircularSpline(bins=4, min_bin=0.25), "CircularSpline: min_bin .*got 0.25"),
    (lambda: CircularSpline(max_slope=0.5), "CircularSpline: max_slope .*got 0.5"),
)


@every_dtype
def test_softplus_scales_and_their_gradients_are_finite_from_tiny_to_huge(dtype: torch.dtype) -> None:
    bijector = SoftplusAffine()
    params = torch.stack((torch.linspace(-200, 200, 81, dtype=dtype), torch.full((81,), 0.3, dtype=dtype)), -1)
    params.requires_grad_()
    for verb in (bijector.forward_and_log_det, bijector.inverse_and_log_det):
        value, log_det = verb(torch.tensor(2.0, dtype=dtype), params)
        (grad,) = torch.autograd.grad(value.sum() + log_det.sum(), params)
        assert all(t.isfinite().all() for t in (value, log_det, grad))
    for scale in (1e-7, 0.01, 0.1, 1.0, 30.0, 1e6):
        _, log_det = bijector.forward_and_log_det(torch.ones((), dtype=dtype), torch.tensor([bijector.raw(scale), 0.0]))
        assert abs(log_det.item() - math.log(scale)) < 1e-5


class Off(Affine):
    """A wrong bijector: zero parameters shift by a thousandth."""

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward_and_log_det(x, params)
        return y + 1e-3, log_det


def test_the_laws_on_the_page_allow_for_rounding_and_no_more() -> None:
    page = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    scope: dict[str, Any] = {"torch": torch}
    exec("def keeps" + page.split("def keeps", 1)[1].split("\n\n\n", 1)[0], scope)
    torch.manual_seed(0)
    for bijector in laws.BIJECTORS.values():
        for dtype in DTYPES:
            assert scope["keeps_the_laws"](bijector, dtype=dtype)
    with pytest.raises(AssertionError, match="zero parameters are the identity"):
        scope["keeps_the_laws"](Off())
