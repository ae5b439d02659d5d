"""Maps through a table of knots: splines on the line and on the circle, and the integral of a positive network."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_integers, check_numbers, require
from .base import Bijector, bounded, evenly_spaced

MIN_PIECE = 0.025  # the least share of a bin for each piece of a linear-rational spline


@dataclass(frozen=True)
class Spline(Bijector):
    """A spline from [-B, B] onto itself with K bins and bounded knots and slopes, the identity outside."""

    bins: int = 8
    bound: float = 5.0
    min_bin: float = 0.01
    max_slope: float = 100.0

    def __post_init__(self) -> None:
        name, bins, min_bin = type(self).__name__, self.bins, self.min_bin
        check_integers(name, 2, bins=bins)
        check_numbers(name, above=0, bound=self.bound, min_bin=min_bin)
        require(min_bin * bins < 1, name, "min_bin", f"be below 1 / bins = {1 / bins:.3g}", min_bin)
        check_numbers(name, above=1, max_slope=self.max_slope)

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply(x, params, 0)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply(y, params, 1)

    def _apply(self, value: Tensor, params: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        inside = value.abs() < self.bound
        image, log_det = self._curve(value.clamp(-self.bound, self.bound), self._table(params), axis)
        return torch.where(inside, image, value), torch.where(inside, log_det, 0.0)

    @abstractmethod
    def _table(self, params: Tensor) -> Tensor:
        """Return the table of :func:`knot_table`, ``(*s, P) -> (2 + R, K + 1, *s)``."""

    def _curve(self, value: Tensor, table: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Map values in [-B, B] from x to y for axis 0, or from y to x for axis 1; return them and the log-slopes."""
        return rational_quadratic(value, table, axis)


@dataclass(frozen=True)
class RationalQuadraticSpline(Spline):
    """A rational-quadratic spline from [-B, B] onto itself, the identity outside.

    In the bin [x0, x0 + w] -> [y0, y0 + h] with end slopes d0 and d1, s = h / w and u = (x - x0) / w it is ::

        y = y0 + h (s u² + d0 u (1 - u)) / (s + (d0 + d1 - 2 s) u (1 - u))

    Both outer slopes are 1, so the map and its derivative are continuous on all of R.

    The 3 K - 1 parameters of a scalar are K unnormalised bin widths, K unnormalised bin heights and K - 1 unnormalised
    slopes at the inner knots.

    Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios 2019, arXiv:1906.04032), after Gregory and Delbourgo
    1982.

    Args:
        bins: The number K of bins, at least 2.
        bound: The half-width B of the interval that is bent.
        min_bin: The least width and height of a bin, as a fraction of 2 B; more than 0 and less than 1 / K.
        max_slope: Slopes at the knots stay between ``1 / max_slope`` and ``max_slope``, which exceeds 1.

    Raises:
        ValueError: If ``bins`` is below 2, ``bound`` not positive and finite, ``min_bin`` not between 0 and 1 / K, or
            ``max_slope`` not above 1 and finite.

    Example::

        >>> import torch
        >>> spline = RationalQuadraticSpline(bins=4)
        >>> x, params = torch.linspace(-9.0, 9.0, 5), torch.randn(5, spline.num_params)
        >>> y, log_det = spline.forward_and_log_det(x, params)
        >>> y[[0, 4]].tolist(), log_det[[0, 4]].tolist()  # the tails are the identity
        ([-9.0, 9.0], [0.0, 0.0])
        >>> torch.allclose(spline.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    @property
    def num_params(self) -> int:
        return 3 * self.bins - 1

    def _table(self, params: Tensor) -> Tensor:
        sizes, slopes = params.movedim(-1, 0).split((2 * self.bins, self.bins - 1))
        slopes = bounded_slopes(slopes, self.max_slope)
        one = torch.ones_like(slopes[:1])
        return knot_table(sizes, (one, slopes, one), self.bound, self.min_bin)


@dataclass(frozen=True)
class CircularSpline(Spline):
    """A rational-quadratic spline of the circle of circumference 2 B, and a rotation, lifted to the real line::

        f(x) = g(x - 2 B k) + 2 B k + t,    k the number of turns that brings x into [-B, B]

    Here g is a spline of [-B, B] onto itself that has one free slope at both ends, and t the rotation.  So f(x + 2 B) =
    f(x) + 2 B: all representatives of an angle have the same image on the circle.

    The 3 K + 1 parameters of a scalar are K unnormalised bin widths, K unnormalised bin heights, K unnormalised slopes
    at the knots and the rotation, in the units of x.  The last knot is the first.

    Normalizing Flows on Tori and Spheres (Rezende et al. 2020, arXiv:2002.02428).

    Args:
        bins: The number K of bins, at least 2.
        bound: Half the circumference B; by default x is an angle in radians.
        min_bin: The least width and height of a bin, as a fraction of 2 B; more than 0 and less than 1 / K.
        max_slope: Slopes at the knots stay between ``1 / max_slope`` and ``max_slope``, which exceeds 1.

    Raises:
        ValueError: If ``bins`` is below 2, ``bound`` not positive and finite, ``min_bin`` not between 0 and 1 / K, or
            ``max_slope`` not above 1 and finite.

    Example::

        >>> import math, torch
        >>> spline = CircularSpline(bins=4)
        >>> params = torch.randn(spline.num_params)
        >>> y, _ = spline.forward_and_log_det(torch.tensor([1.0, 1.0 + 2 * math.pi]), params)
        >>> round((y[1] - y[0]).item(), 4)  # one turn of x is one turn of y
        6.2832
    """

    bound: float = math.pi

    @property
    def num_params(self) -> int:
        return 3 * self.bins + 1

    def _apply(self, value: Tensor, params: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        before, after = (0.0, params[..., -1]) if axis == 0 else (params[..., -1], 0.0)
        value = value - before
        angle = torch.remainder(value + self.bound, 2 * self.bound) - self.bound  # in [-B, B], both ends included
        image, log_det = self._curve(angle, self._table(params), axis)
        return image + (value - angle).detach() + after, log_det  # full turns carry no gradient

    def _table(self, params: Tensor) -> Tensor:
        sizes, slopes, _ = params.movedim(-1, 0).split((2 * self.bins, self.bins, 1))
        slopes = bounded_slopes(slopes, self.max_slope)
        return knot_table(sizes, (slopes, slopes[:1]), self.bound, self.min_bin)


@dataclass(frozen=True)
class LinearRationalSpline(Spline):
    """A linear-rational spline from [-B, B] onto itself, the identity outside.

    A bin has two pieces.  They meet, with equal slopes, at a share λ of its width.  A piece of width l and height r
    starts at its knot, where the slope is d.  At the distance ξ from the knot it has risen by ::

        d ξ / D,    D = 1 + (M - 1) ξ / l,    M = d l / r,    0 ≤ ξ ≤ l

    with the slope d / D².  Its inverse has the same form, with 1 / d, 1 / M and r in place of d, M and l.  So both
    directions are exact at the knots, without cancellation.

    The 4 K - 1 parameters of a scalar are K unnormalised bin widths, K unnormalised bin heights, K - 1 unnormalised
    slopes at the inner knots and the K unnormalised shares λ.

    Where two pieces meet, the slope may reach the square of the bin's mean slope times ``max_slope``.  So the bounds
    are tighter than those of a rational-quadratic spline.

    Invertible Generative Modeling using Linear Rational Splines (Dolatabadi, Erfani, Leckie 2020, arXiv:2001.05168).

    Args:
        bins: The number K of bins, at least 2.
        bound: The half-width B of the interval that is bent.
        min_bin: The least width and height of a bin, as a fraction of 2 B; more than 0 and less than 1 / K.
        max_slope: Slopes at the knots stay between ``1 / max_slope`` and ``max_slope``, which exceeds 1.

    Raises:
        ValueError: If ``bins`` is below 2, ``bound`` not positive and finite, ``min_bin`` not between 0 and 1 / K, or
            ``max_slope`` not above 1 and finite.

    Example::

        >>> import torch
        >>> spline = LinearRationalSpline(bins=4)
        >>> x, params = torch.linspace(-9.0, 9.0, 5), torch.randn(5, spline.num_params)
        >>> y, log_det = spline.forward_and_log_det(x, params)
        >>> torch.allclose(spline.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    min_bin: float = 0.03
    max_slope: float = 30.0

    @property
    def num_params(self) -> int:
        return 4 * self.bins - 1

    def _table(self, params: Tensor) -> Tensor:
        sizes, slopes, shares = params.movedim(-1, 0).split((2 * self.bins, self.bins - 1, self.bins))
        slopes = bounded_slopes(slopes, self.max_slope)
        shares = MIN_PIECE + (1 - 2 * MIN_PIECE) * torch.sigmoid(shares)
        one = torch.ones_like(slopes[:1])
        return knot_table(sizes, (one, slopes, one, shares, one), self.bound, self.min_bin)

    def _curve(self, value: Tensor, table: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        x0, x1, y0, y1, d0, d1, share, _ = bin_of(value, table, axis)
        w, h = x1 - x0, y1 - y0
        root = torch.sqrt(d0 / d1)
        mean = torch.addcmul(1 - share, share, root)
        meeting = share * w if axis == 0 else share * root / mean * h
        left = value - (x0, y0)[axis] <= meeting
        x_knot, y_knot, d = (torch.where(left, *pair) for pair in ((x0, x1), (y0, y1), (d0, d1)))
        share, root = torch.where(left, share, 1 - share), torch.where(left, root, 1.0)
        width, height = share * w, share * root / mean * h  # of the piece
        sign, ratio = torch.where(left, 1.0, -1.0).to(value), d * width / height  # a piece runs away from its knot
        if axis == 0:
            start, image, length = x_knot, y_knot, width
        else:
            start, image, length, d, ratio = y_knot, x_knot, height, 1 / d, 1 / ratio
        offset = sign * (value - start)
        denominator = torch.addcmul(length - offset, ratio, offset) / length
        return torch.addcmul(image, sign, d * offset / denominator), torch.log(d / (denominator * denominator))


def bounded_slopes(raw: Tensor, max_slope: float) -> Tensor:
    """Return slopes between 1 / max_slope and max_slope from real numbers; zero gives slope one."""
    low, high = 1 / max_slope, max_slope
    return torch.rsub(torch.sigmoid(raw + math.log((1 - low) / (high - 1))), low, alpha=low - high)


def knot_table(sizes: Tensor, rows: tuple[Tensor, ...], bound: float, min_bin: float) -> Tensor:
    """Return the table of a spline from [-B, B] onto itself: the places of its knots, and further rows.

    Parameters stand first: softmax, sums and gathers then run over whole vectors of scalars.

    Args:
        sizes: K unnormalised bin widths, then K unnormalised bin heights, ``(2 K, *s)``.
        rows: Parts of ``(R, K + 1, *s)``: further numbers of each knot, above all its slope.
        bound: The half-width B.
        min_bin: The least width and height of a bin, as a fraction of 2 B.

    Returns:
        Knots along x, knots along y and the rows, ``(2 + R, K + 1, *s)``.
    """
    bins = len(sizes) // 2
    fractions = torch.softmax(sizes.unflatten(0, (2, bins)), 1)[:, :-1]
    least, inner = 2 * bound * min_bin, bins - 1
    even = evenly_spaced(least - bound, inner * least - bound, inner, sizes)
    knots = torch.add(even, fractions.cumsum(1), alpha=2 * bound - bins * least)
    last = torch.full_like(sizes[:1], bound)
    table = torch.cat((-last, knots[0], last, -last, knots[1], last, *rows))
    return table.unflatten(0, (-1, bins + 1))


def rational_quadratic(value: Tensor, table: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Map values in [-B, B] by the spline of a table, ``(*s), (3, K + 1, *s) -> (*s), (*s)``: see ``Spline._curve``."""
    x0, x1, y0, y1, d0, d1 = bin_of(value, table, axis)
    w, h = x1 - x0, y1 - y0
    s = h / w
    curvature = torch.sub(d0 + d1, s, alpha=2)
    if axis == 0:
        u = (value - x0) / w  # in [0, 1]: differences and quotients are rounded monotonically
    else:
        # With t = (y - y0) / h, a ratio of two quadratics in u, (s - b) u² + b u - s t = 0.  The sign of b selects the
        # form of the root without cancellation.
        t = (value - y0) / h
        b = torch.addcmul(d0, t, curvature, value=-1)
        a, c = s - b, s * t
        root = torch.addcmul(b * b, a, c, value=4).clamp_min(torch.finfo(value.dtype).tiny).sqrt()
        half = (root + b) * 0.5
        rising = b >= 0
        u = torch.where(rising, c, half - b) / torch.where(rising, half, a)
        u = u - (u - u.clamp(0, 1)).detach()  # next to a knot round-off leaves the bin, but the gradient must pass
    v = 1 - u
    denominator = torch.addcmul(s, curvature, u * v)
    ratio = s / denominator
    slope = torch.addcmul(torch.addcmul(d0 * v, s, u) * v, torch.addcmul(d1 * u, s, v), u)
    log_slope = torch.log(ratio * ratio * slope)
    if axis == 0:
        return torch.addcmul(y0, h, u * torch.addcmul(s * u, d0, v) / denominator), log_slope
    return torch.addcmul(x0, w, u), -log_slope


def bin_of(value: Tensor, table: Tensor, axis: int) -> tuple[Tensor, ...]:
    """Return the bin that contains each value, along x for axis 0 and along y for axis 1.

    The bin is two entries of each row of the table, at its start and at its end: x0, x1, y0, y1, d0, d1 and so on.
    """
    shape = torch.broadcast_shapes(value.shape, table.shape[2:])
    table = table.reshape(*table.shape[:2], *(1,) * (len(shape) + 2 - table.dim()), *table.shape[2:])
    table = table.expand(*table.shape[:2], *shape)
    left = (value >= table[axis, 1:-1]).sum(0)  # the bin's number
    place = torch.stack((left, left + 1)).expand(len(table), 2, *shape)
    return table.gather(1, place).flatten(0, 1).unbind(0)


MAX_LOG_RATE = 1.5  # the bound on w


@dataclass(frozen=True)
class Integral(Bijector):
    """The integral of a positive network with H hidden units, by the trapezoid rule, with linear tails::

        y = b + ∫₀ˣ g(t) dt,    log g(t) = M tanh(n(t) / M),    n(t) = c + Σ_k v_k tanh(3 e^{w_k} (t - t_k - u_k))

    The units start at t_k = 0 … H - 1, spread over [-B, B], and t is in units of their distance.  The network is
    evaluated at fixed nodes, and g is linear between them.  So the rule is exact, and the inverse is the root of a
    quadratic.

    The 3 H + 2 parameters are H weights v of the units, their H log-rates w and H shifts u, the bias c and the shift b.
    At zero the units have no weight.

    Unconstrained Monotonic Neural Networks (Wehenkel, Louppe 2019, arXiv:1908.05164).

    Args:
        hidden: The number H of hidden units, at least 2.
        panels: The number of panels between nodes on either side of zero, at least 1.
        bound: The half-width B of the interval that is bent.
        max_log_slope: The bound M on the log-slope, in nats.

    Raises:
        ValueError: If ``hidden`` is below 2, ``panels`` below 1, or ``bound`` or ``max_log_slope`` not positive and
            finite.

    Example::

        >>> import torch
        >>> integral = Integral(hidden=4)
        >>> x, params = torch.linspace(-9.0, 9.0, 5), torch.randn(5, integral.num_params)
        >>> y, log_det = integral.forward_and_log_det(x, params)
        >>> torch.allclose(integral.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    hidden: int = 8
    panels: int = 8
    bound: float = 5.0
    max_log_slope: float = 3.0

    def __post_init__(self) -> None:
        check_integers("Integral", 2, hidden=self.hidden)
        check_integers("Integral", 1, panels=self.panels)
        check_numbers("Integral", above=0, bound=self.bound, max_log_slope=self.max_log_slope)

    @property
    def num_params(self) -> int:
        return 3 * self.hidden + 2

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        within = x.clamp(-self.bound, self.bound)
        x0, x1, y0, y1, g0, g1 = bin_of(within, self._table(params), axis=0)
        u = (within - x0) / (x1 - x0)
        slope = torch.lerp(g0, g1, u)
        share = u * (g0 + slope) / (g0 + g1)  # of the panel's area
        y = torch.addcmul(y0, y1 - y0, share)
        return torch.addcmul(y, x - within, slope), torch.log(slope)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        table = self._table(params)
        within = torch.maximum(torch.minimum(y, table[1, -1]), table[1, 0])
        x0, x1, y0, y1, g0, g1 = bin_of(within, table, axis=1)
        share = (within - y0) / (y1 - y0)
        slope = torch.sqrt(torch.lerp(g0 * g0, g1 * g1, share))  # the square of a linear slope is linear in the area
        u = share * (g0 + g1) / (g0 + slope)
        x = torch.addcmul(x0, x1 - x0, u)
        return x + (y - within) / slope, -torch.log(slope)

    def _table(self, params: Tensor) -> Tensor:
        """Return the nodes along x, their images along y and the slopes there, ``(3, N, *s)``."""
        v, w, u, (c, b) = params.movedim(-1, 0).split((*(self.hidden,) * 3, 2))
        nodes = evenly_spaced(-self.bound, self.bound, 2 * self.panels + 1, params)
        t = (nodes + self.bound) * ((self.hidden - 1) / (2 * self.bound))
        rates = 6 * bounded(w, MAX_LOG_RATE).exp()  # tanh(z) = 2 σ(2 z) - 1, and a sigmoid is faster
        net = c - v.sum(0)
        for k in range(self.hidden):
            bend = torch.sigmoid(torch.addcmul(-rates[k] * (u[k] + k), rates[k], t))
            net = torch.addcmul(net, v[k], bend, value=2)
        slopes = bounded(net, self.max_log_slope).exp()
        extra = (slopes[1:] + slopes[:-1] - 2) * (self.bound / (2 * self.panels))  # areas beyond the identity's
        left, right = extra.split(self.panels)
        left = -left.flip(0).cumsum(0).flip(0)
        images = nodes + torch.cat((left, torch.zeros_like(slopes[:1]), right.cumsum(0)))
        return torch.stack((nodes.expand_as(slopes), images + b, slopes))
