"""Bijectors without an inverse in closed form: bent on [-B, B], linear outside, and inverted by Newton's method.

The linear continuation makes f and its derivative continuous on R, and f unbounded.  Values far out cannot overflow
the bent part.  The root of f(x) = y has a bracket in closed form: between -B and B if y lies in [g(-B), g(B)], and on a
tangent otherwise.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..arguments import check_integers, check_numbers
from .base import Bijector, as_column, bounded, evenly_spaced

Curve = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> (f(x), log f'(x))
STEPS = 16  # With the two ends, two differentiable steps and the log-determinant, an inverse costs 21 evaluations.


class Continued(Bijector):
    """A bijector that is bent inside [-B, B], continued by its tangents outside, and inverted numerically::

        f(x) = g(c) + g'(c) (x - c),    c = x clamped to [-B, B]

    It is the abstract base class of maps g without an inverse in closed form.  Subclasses are frozen dataclasses that
    define ``bound``, which is B, ``num_params``, :meth:`table` and :meth:`bend`.  Both directions follow.  The inverse
    costs 21 evaluations of :meth:`bend`, whatever the data.  It has first and second derivatives, those of the implicit
    function.

    Attributes:
        bound: The half-width B of the interval that is bent, positive and finite.

    Example::

        >>> import torch
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Wave(Continued):
        ...     bound: float = 3.0
        ...     num_params = 1
        ...     def table(self, params):
        ...         return (torch.tanh(params.movedim(-1, 0)[0]) / 2,)  # of size 1/2 at most
        ...     def bend(self, x, table):
        ...         (s,) = table
        ...         return x + s * torch.sin(x), torch.log1p(s * torch.cos(x))
        >>> x, params = torch.linspace(-9.0, 9.0, 5), torch.randn(5, 1)
        >>> y, log_det = Wave().forward_and_log_det(x, params)
        >>> torch.allclose(Wave().inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    bound: float

    @abstractmethod
    def table(self, params: Tensor) -> tuple[Tensor, ...]:
        """Return the constrained parameters, computed once for all evaluations of ``bend``.

        Args:
            params: Parameters of shape ``(*s, P)``.

        Returns:
            Tensors of shape ``(..., *s)``, with parameters first, so that they broadcast with the values.
        """

    @abstractmethod
    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Map x in [-B, B] by g, whose slopes lie between two positive bounds.

        Args:
            x: Values in [-B, B], ``(*s)``.
            table: The result of ``table``.

        Returns:
            ``(g(x), log g'(x))``, each of shape ``(*s)``, the log-slope in nats.
        """

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._continue(*self._aligned(x, params))

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y, table = self._aligned(y, params)
        fixed, target = tuple(part.detach() for part in table), y.detach()
        edge = torch.full_like(target, self.bound)
        low, high = self.bend(-edge, fixed), self.bend(edge, fixed)
        inside = torch.maximum(torch.minimum(target, high[0]), low[0])
        x = bracketed_root(lambda value: self.bend(value, fixed), inside, (-edge, *low), (edge, *high))
        x = x + (target - inside) * torch.exp(-torch.where(target < low[0], low[1], high[1]))
        x = implicit_root(lambda value: self._continue(value, table), x, y)
        return x, -self._continue(x, table)[1]

    def _aligned(self, value: Tensor, params: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return values of the batch shape of both arguments, and the table, which broadcasts with them."""
        value = value.expand(torch.broadcast_shapes(value.shape, params.shape[:-1]))
        return value, self.table(params.reshape((1,) * (value.dim() + 1 - params.dim()) + params.shape))

    def _continue(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        inside = x.clamp(-self.bound, self.bound)
        y, log_slope = self.bend(inside, table)
        return torch.addcmul(y, x - inside, log_slope.exp()), log_slope


def bracketed_root(
    f: Curve, y: Tensor, low: tuple[Tensor, Tensor, Tensor], high: tuple[Tensor, Tensor, Tensor], steps: int = STEPS
) -> Tensor:
    """Return the root of f(x) = y for an increasing f, by Newton's method inside a bracket that shrinks.

    A step follows the tangent at the better end of the bracket.  It is rejected if it leaves the bracket, or if the
    step before has not halved the residual.  Then the linear-rational curve through both ends, with their slopes, is
    solved instead, and its root is moved into the middle half of the bracket.  The number of steps is fixed, so that
    no branch depends on data.  (After Press et al. 2007, Numerical Recipes, section 9.4.)

    Args:
        f: The map, elementwise.
        y: The values, ``(*s)``.
        low: Points where f is at most y, with the values and log-slopes of f there, each ``(*s)``.
        high: The same where f is at least y.
        steps: The number of evaluations of f.
    """
    (a, of_a, slope_a), (b, of_b, slope_b) = low, high
    slow, tiny = torch.ones_like(y, dtype=torch.bool), torch.finfo(y.dtype).tiny
    for _ in range(steps):
        over, under = y - of_a, of_b - y
        ahead = over < under
        x = torch.where(ahead, torch.addcmul(a, over, torch.exp(-slope_a)), b - under * torch.exp(-slope_b))
        share = over * torch.exp((slope_b - slope_a) / 2)
        share = (share + tiny) / (share + under + 2 * tiny)
        x = torch.where((a < x) & (x < b) & ~slow, x, torch.lerp(a, b, 0.25 + 0.5 * share))
        of_x, slope_x = f(x)
        slow = (of_x - y).abs() > torch.minimum(over, under) / 2
        below = of_x <= y
        a, of_a, slope_a = (torch.where(below, *p) for p in ((x, a), (of_x, of_a), (slope_x, slope_a)))
        b, of_b, slope_b = (torch.where(below, *p) for p in ((b, x), (of_b, of_x), (slope_b, slope_x)))
    return torch.where(y - of_a < of_b - y, a, b)


def implicit_root(f: Curve, x: Tensor, y: Tensor) -> Tensor:
    """Return a root x of f(x) = y, found without gradients, with its first and second derivatives.

    Each Newton step at a root doubles the order of the derivatives that are right.
    """
    for _ in range(2):
        value, log_slope = f(x)
        x = x - (value - y) * torch.exp(-log_slope)
    return x


FLOOR = 0.01  # ε
UNIT = 1 / 2  # with 1, steps of .003 in coefficients compound over layers until rows overflow: slopes are squares


@dataclass(frozen=True)
class Bernstein(Continued):
    """An increasing Bernstein polynomial of degree n on [-B, B] with linear tails, inverted numerically::

        y = Σ_j β_j B_{j,n}(u),    u = (x + B) / 2B,    B_{j,n}(u) = C(n, j) u^j (1 - u)^{n-j}

        dy/dx = Σ_j s_j B_{j,n-1}(u),    s_j = n (β_{j+1} - β_j) / 2B

    The n + 1 parameters are the logarithms of the n slopes s and the shift of y.  The slope of y is a weighted mean of
    the s_j, so it stays within their bounds.

    Deep Transformation Models (Sick, Hothorn, Dürr 2020, arXiv:2004.00464).

    Args:
        degree: The degree n, at least 2.
        bound: The half-width B of the interval that is bent.
        max_log_slope: The bound on the log-slope, in nats.

    Raises:
        ValueError: If ``degree`` is below 2, or ``bound`` or ``max_log_slope`` is not positive and finite.

    Example::

        >>> import torch
        >>> bernstein = Bernstein(degree=8)
        >>> x, params = torch.linspace(-9.0, 9.0, 5), torch.randn(5, bernstein.num_params)
        >>> y, log_det = bernstein.forward_and_log_det(x, params)
        >>> torch.allclose(bernstein.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    degree: int = 32
    bound: float = 5.0
    max_log_slope: float = 5.0

    def __post_init__(self) -> None:
        check_integers("Bernstein", 2, degree=self.degree)
        check_numbers("Bernstein", above=0, bound=self.bound, max_log_slope=self.max_log_slope)

    @property
    def num_params(self) -> int:
        return self.degree + 1

    def table(self, params: Tensor) -> tuple[Tensor, ...]:
        raw, shift = params.movedim(-1, 0).split((self.degree, 1))
        slopes = bounded(raw, self.max_log_slope).exp()
        steps = slopes * (2 * self.bound / self.degree)
        ends = steps.cumsum(0)  # β_1 … β_n, relative to β_0
        first = shift - ends[-1:] / 2  # so that steeper slopes raise the right end as much as they lower the left one
        binomials = as_column([float(math.comb(self.degree - 1, j)) for j in range(self.degree)], params)
        return binomials, slopes, steps, first + ends - steps

    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        binomials, slopes, steps, starts = table
        u, v = (self.bound + x) / (2 * self.bound), (self.bound - x) / (2 * self.bound)
        basis = binomials * powers(u, self.degree) * powers(v, self.degree).flip(0)
        basis = basis / basis.sum(0).detach()  # removes the round-off of u + v to the power n - 1
        # B_{j,n} = u B_{j-1,n-1} + (1 - u) B_{j,n-1}, so the basis of degree n - 1 gives both results.
        return (basis * torch.addcmul(starts, steps, u)).sum(0), torch.log((basis * slopes).sum(0))


def powers(x: Tensor, number: int) -> Tensor:
    """Return 1, x, x², … as products, whose derivatives are right at zero too, ``(*s) -> (number, *s)``."""
    found = torch.ones_like(x).unsqueeze(0)
    while len(found) < number:
        found = torch.cat((found, found * (found[-1] * x)))
    return found[:number]


@dataclass(frozen=True)
class SumOfSquares(Continued):
    """The integral of the squares of K polynomials of degree n on [-B, B], with linear tails, inverted numerically::

        y = b + ∫₀ˣ ε + (1 - ε) Σ_k p_k(t)² dt,    p_k(t) = Σ_j a_kj P_j(t / B),    ε = 0.01

    The P_j are Legendre's polynomials, so the mean over [-B, B] of the sum of squares is Σ_kj a_kj² / (2 j + 1).
    Gauss's rule on [0, x] with n + 1 nodes is exact.

    The K (n + 1) + 1 parameters are 2 a, before the mean is bounded, and the shift b.  At zero the polynomials are
    distinct constants, whose squares add up to 1.

    Sum-of-Squares Polynomial Flow (Jaini, Selby, Yu 2019, arXiv:1905.02325).

    Args:
        degree: The degree n of each polynomial, at least 1.
        polynomials: The number K of polynomials, at least 1.  Two represent any positive polynomial.
        bound: The half-width B of the interval that is bent.
        max_mean_slope: The bound on the mean slope over [-B, B], more than 1.

    Raises:
        ValueError: If ``degree`` or ``polynomials`` is below 1, ``bound`` not positive and finite, or
            ``max_mean_slope`` not above 1 and finite.

    Example::

        >>> import torch
        >>> squares = SumOfSquares(degree=3)
        >>> x, params = torch.linspace(-9.0, 9.0, 5), torch.randn(5, squares.num_params)
        >>> y, log_det = squares.forward_and_log_det(x, params)
        >>> torch.allclose(squares.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    degree: int = 8
    polynomials: int = 2
    bound: float = 5.0
    max_mean_slope: float = 10.0
    _rule: tuple[list[float], list[float]] = field(init=False, repr=False, compare=False)  # Gauss's, on (0, 1)

    def __post_init__(self) -> None:
        check_integers("SumOfSquares", 1, degree=self.degree, polynomials=self.polynomials)
        check_numbers("SumOfSquares", above=0, bound=self.bound)
        check_numbers("SumOfSquares", above=1, max_mean_slope=self.max_mean_slope)
        nodes, weights = np.polynomial.legendre.leggauss(self.degree + 1)  # here, since compilers cannot trace it
        object.__setattr__(self, "_rule", (((1 + nodes) / 2).tolist(), (weights / 2).tolist()))

    @property
    def num_params(self) -> int:
        return self.polynomials * (self.degree + 1) + 1

    def table(self, params: Tensor) -> tuple[Tensor, ...]:
        raw, shift = params.movedim(-1, 0).split((self.num_params - 1, 1))
        raw = UNIT * raw.unflatten(0, (self.degree + 1, self.polynomials))  # (n + 1, K, *s)
        constants = evenly_spaced(1, 2, self.polynomials, params)
        raw = torch.cat((raw[:1] + constants / torch.linalg.vector_norm(constants), raw[1:]))
        norms = as_column(torch.arange(1, 2 * self.degree + 2, 2, device=params.device), raw)
        mean, limit = (raw.square() / norms).sum((0, 1)), self.max_mean_slope
        coefficients = (raw * torch.sqrt(limit / (mean + (limit - 1)))).unsqueeze(2)  # a mean of one stays one
        nodes, weights = self._rule
        return shift[0], coefficients, as_column([*nodes, 1.0], params) / self.bound, as_column(weights, params)

    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        shift, coefficients, ends, weights = table
        z = ends * x  # nodes between 0 and x, then x
        before, basis = torch.ones_like(z), z
        values = torch.addcmul(coefficients[0], coefficients[1], z)  # (K, n + 2, *s)
        for j in range(2, self.degree + 1):
            before, basis = basis, torch.addcmul(before * ((1 - j) / j), z, basis, value=(2 * j - 1) / j)
            values = torch.addcmul(values, coefficients[j], basis)
        slopes = FLOOR + (1 - FLOOR) * values.square().sum(0)
        return torch.addcmul(shift, x, (weights * slopes[:-1]).sum(0)), torch.log(slopes[-1])


SPREAD = 3.0
FAR = 30.0  # where x - y₀ is constant to the last bit


@dataclass(frozen=True)
class Sigmoidal(Continued):
    """The map of neural autoregressive flows: layers of logits of mixtures of K sigmoids, with linear tails.

    With weights w on the simplex and slopes a > 0, a layer maps x to ::

        (1 - ε) (y + ρ (x - y₀)) + ε x,    y = logit Σ_k w_k σ(a_k x + b_k),    ε = 0.01

    where y₀ is y with equal weights and slopes.  At zero parameters y = y₀ and ρ = 1: the map is the identity, although
    the sigmoids start at distinct places.

    The 3 K + 1 parameters of a layer are K log-slopes, K shifts, K logits of weights and one number for the share ρ.
    The inverse is found numerically.

    Neural Autoregressive Flows (Huang, Krueger, Lacoste, Courville 2018, arXiv:1804.00779).

    Args:
        components: The number K of sigmoids, at least 2.
        layers: The number of layers, at least 1.
        bound: The half-width B of the interval that is bent.
        max_log_slope: The bound on the log-slope of each sigmoid, in nats.

    Raises:
        ValueError: If ``components`` is below 2, ``layers`` below 1, or ``bound`` or ``max_log_slope`` not positive and
            finite.

    Example::

        >>> import torch
        >>> sigmoidal = Sigmoidal(components=4)
        >>> x, params = torch.linspace(-20.0, 20.0, 5), torch.randn(5, sigmoidal.num_params)
        >>> y, log_det = sigmoidal.forward_and_log_det(x, params)
        >>> torch.allclose(sigmoidal.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    components: int = 8
    layers: int = 1
    bound: float = 10.0
    max_log_slope: float = 3.0

    def __post_init__(self) -> None:
        check_integers("Sigmoidal", 2, components=self.components)
        check_integers("Sigmoidal", 1, layers=self.layers)
        check_numbers("Sigmoidal", above=0, bound=self.bound, max_log_slope=self.max_log_slope)

    @property
    def num_params(self) -> int:
        return (3 * self.components + 1) * self.layers

    def table(self, params: Tensor) -> tuple[Tensor, ...]:
        layers = params.movedim(-1, 0).unflatten(0, (self.layers, -1))
        a, b, w, rest = layers.split((*(self.components,) * 3, 1), 1)  # (L, K, *s) thrice and (L, 1, *s)
        shifts = b - evenly_spaced(-SPREAD, SPREAD, self.components, b[0])
        return bounded(a / 2, self.max_log_slope), shifts, torch.log_softmax(w, 1), rest[:, 0]

    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x)
        for log_slopes, shifts, log_weights, rest in zip(*(part.unbind(0) for part in table), strict=True):
            x, slope = completed_logit(x, log_slopes, shifts, log_weights, rest)
            total = total + torch.log(slope)
        return x, total


@dataclass(frozen=True)
class LogisticMixture(Continued):
    """The map of Flow++, the logit of a mixture of K logistics, scaled and shifted, with linear tails::

        y = e^a logit Σ_k π_k σ((x - μ_k) e^{-s_k}) + b

    The 3 K + 3 parameters are K logits of weights π, K means μ, K log-scales s, the log-scale a, the shift b, and one
    number that completes the logit as in :class:`Sigmoidal`.  So zero parameters are the identity, although the means
    start at distinct places.  The inverse is found numerically.

    Flow++: Improving Flow-Based Generative Models (Ho, Chen, Srinivas, Duan, Abbeel 2019, arXiv:1902.00275).

    Args:
        components: The number K of logistics, at least 2.
        bound: The half-width B of the interval that is bent.
        max_log_scale: The bound on each log-scale, in nats.

    Raises:
        ValueError: If ``components`` is below 2, or ``bound`` or ``max_log_scale`` is not positive and finite.

    Example::

        >>> import torch
        >>> mixture = LogisticMixture(components=4)
        >>> x, params = torch.linspace(-20.0, 20.0, 5), torch.randn(5, mixture.num_params)
        >>> y, log_det = mixture.forward_and_log_det(x, params)
        >>> torch.allclose(mixture.inverse_and_log_det(y, params)[0], x, atol=1e-3)
        True
    """

    components: int = 8
    bound: float = 10.0
    max_log_scale: float = 3.0

    def __post_init__(self) -> None:
        check_integers("LogisticMixture", 2, components=self.components)
        check_numbers("LogisticMixture", above=0, bound=self.bound, max_log_scale=self.max_log_scale)

    @property
    def num_params(self) -> int:
        return 3 * self.components + 3

    def table(self, params: Tensor) -> tuple[Tensor, ...]:
        weights, means, scales, others = params.movedim(-1, 0).split((*(self.components,) * 3, 3))
        log_slopes = -bounded(scales, self.max_log_scale)
        shifts = -(means + evenly_spaced(-SPREAD, SPREAD, self.components, means)) * log_slopes.exp()
        a, b, rest = others.unbind(0)
        return log_slopes, shifts, torch.log_softmax(weights, 0), rest, bounded(a / 4, self.max_log_scale), b

    def bend(self, x: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        *mixture, a, b = table
        y, slope = completed_logit(x, *mixture)
        return torch.addcmul(b, a.exp(), y), a + torch.log(slope)


def completed_logit(
    x: Tensor, log_slopes: Tensor, shifts: Tensor, log_weights: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (1 - ε) (y + ρ (x - y₀)) + ε x and its slope, ``(*s)``, with ρ = 1 + tanh(rest) and the logit y.

    Args:
        x: Values, ``(*s)``.
        log_slopes: Log-slopes of the sigmoids, ``(K, *s)``.
        shifts: Their shifts, ``(K, *s)``.
        log_weights: Their log-weights, normalised, ``(K, *s)``.
        rest: ``(*s)``.
    """
    y, slope = mixture_logit(torch.addcmul(shifts, log_slopes.exp(), x), log_slopes, log_weights)
    near = x.clamp(-FAR, FAR)
    u = near - evenly_spaced(-SPREAD, SPREAD, len(log_slopes), near.unsqueeze(0))
    below, above = torch.sigmoid(u), torch.sigmoid(-u)
    share, left = below.mean(0), above.mean(0)
    rest = 1 + torch.tanh(rest)
    lacking, of_lacking = near - torch.log(share / left), 1 - (below * above).mean(0) / (share * left)
    y, slope = torch.addcmul(y, rest, lacking), torch.addcmul(slope, rest, of_lacking)
    return (1 - FLOOR) * y + FLOOR * x, (1 - FLOOR) * slope + FLOOR


def mixture_logit(u: Tensor, log_slope: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logit of the mixture Σ_k w_k σ(u_k), and its derivative in x if du_k/dx = exp(log_slope_k).

    Args:
        u: The arguments of the sigmoids, ``(K, *s)``.
        log_slope: ``(K, *s)``.
        log_weight: Log-weights, normalised, ``(K, *s)``.

    Returns:
        The logit ``(*s)``, exact far out in both tails, and its derivative ``(*s)``, at most the largest slope.
    """
    below, above = log_weight + logsigmoid(u), log_weight + logsigmoid(-u)
    # With S the mixture: the shares w_k σ_k / S below and w_k (1 - σ_k) / (1 - S) above, over w_k, in one exponential,
    # since a share may vanish and 1 / w_k overflow where their product is near one.
    shares = torch.log_softmax(below, 0) + torch.log_softmax(above, 0)
    return below.logsumexp(0) - above.logsumexp(0), torch.exp(shares + (log_slope - log_weight)).sum(0)
