"""Planar, radial and Sylvester transforms: the Jacobian is a multiple of the identity plus a matrix of low rank.

Their strength is a number s, which is bounded as for a *ridge*, the map k = z + s tanh z of one number.  A ridge
increases if s > -1.  With log(1 + s) = B tanh(raw / B), a free number gives s: zero is the identity, and slopes stay
within exp(±B).

Variational Inference with Normalizing Flows (Rezende, Mohamed 2015, arXiv:1505.05770, section 4.1 and appendix A).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import check_integers, is_integer, require
from ..bijectors.base import bounded
from ..compiler_state import NEW_COMPILER
from ..conditioners import Conditioner
from .base import WithScore
from .elementwise import Conditional
from .linear import reflect, unit

MAX_LOG_SLOPE = 4.0  # B
MAX_LOG_SCALE = 2.0  # bound on log R̃_ii of a Sylvester transform: ridges are between 1/7 and 7 wide
STEPS = 6  # With the two differentiable ones that follow, one more than any slope within the bound needs in float64.


class Planar(Conditional):
    """A planar transform of a vector ``(*batch, D)``, which bends space along one ridge, the identity at the start::

        y = x + û tanh(z),    z = w·x + b,    log|det dy/dx| = log(1 + s (1 - tanh² z)),    s = w·û

    The free vector u is bounded along w, as in the paper: ``û = u + (s - w·u) w / |w|²`` with
    ``log(1 + s) = B tanh(w·u / B)`` and B = 4.  So s > -1, a bijection at any parameters; no layer stretches or
    squeezes space by more than exp(B).  The inverse solves one increasing scalar equation, ``z + s tanh z = w·y + b``,
    so any value can be scored.

    Its 2 D + 1 parameters (u, w, b) are a table.  Only u starts at zero: w and b are random, so that gradients are not
    zero and all layers differ.  A conditioner adds to the table what depends on the context.

    Args:
        input_dim: The number D of features.
        conditioner: A network from contexts to parameters, with ``input_dim = context_dim``, ``output_dim = 1`` and
            ``num_params = 2 * D + 1``; by default there is no context.

    Raises:
        ValueError: If ``input_dim`` is not positive or the conditioner's sizes do not fit it.  In use, if there is a
            conditioner and no context is given.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import MLP
        >>> planar = Planar(3, MLP(4, 1, num_params=7))
        >>> _ = torch.nn.init.normal_(planar.params)  # as if trained
        >>> y, context = torch.randn(5, 3), torch.randn(4)
        >>> x, log_det = planar.inverse_and_log_det(y, context)
        >>> torch.allclose(planar.forward_and_log_det(x, context)[0], y, atol=1e-3), log_det.shape
        (True, torch.Size([5]))
    """

    def __init__(self, input_dim: int, conditioner: Conditioner | None = None) -> None:
        check_integers("Planar", input_dim=input_dim)
        w = torch.randn(input_dim) / input_dim**0.5  # w·x is of order one
        start = torch.cat((torch.zeros(input_dim), w, torch.randn(1)))
        super().__init__(input_dim, conditioner, (1, len(start)), start)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w, b, s = self._ridge(context)
        t = torch.tanh((x * w).sum(-1) + b)
        return x + u * t.unsqueeze(-1), torch.log1p(s * (1 - t * t))

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w, b, s = self._ridge(context)
        t = torch.tanh(root(s, (y * w).sum(-1) + b))
        return y - u * t.unsqueeze(-1), -torch.log1p(s * (1 - t * t))

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> WithScore:
        # The inverse of the identity plus a matrix of rank one (Sherman, Morrison 1950) needs no way back.
        u, w, b, s = self._ridge(context)
        t = torch.tanh((x * w).sum(-1) + b)
        bend = 1 - t * t
        slope = 1 + s * bend
        along = bend / slope * (2 * s * t / slope - (u * score).sum(-1))
        score = (score + along.unsqueeze(-1) * w).detach()
        return x + u * t.unsqueeze(-1), torch.log1p(s * bend), score

    def _ridge(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the vectors û and w, ``(*batch, D)``, and the numbers b and s = w·û, ``(*batch)``."""
        u, w, b = self._params(context).split((self.input_dim, self.input_dim, 1), -1)
        dot = (w * u).sum(-1, keepdim=True)
        s = bounded_slope(dot)
        # s - w·u vanishes like (w·u)², and so does the whole correction where w does.
        norm = w.square().sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        return u + (s - dot) / norm * w, w, b.squeeze(-1), s.squeeze(-1)


class Radial(Conditional):
    """A radial transform of a vector ``(*batch, D)``, which stretches space around x₀, the identity at the start::

        y = x + β (x - x₀) / (α + r),    r = |x - x₀|
        log|det dy/dx| = (D - 1) log(1 + s h) + log(1 + s h²),    s = β / α > -1,    h = α / (α + r)

    The Jacobian has the eigenvalue 1 + s h across, D - 1 times, and 1 + s h² along x - x₀.  Here ``log(1 + s) =
    B tanh(raw / B)`` with B = 4, so no layer stretches or squeezes space by more than exp(B).  The inverse solves a
    quadratic equation of the radius, ``ρ² + (1 + s - ρ') ρ - ρ' = 0`` with ``ρ = r / α`` and ``ρ' = |y - x₀| / α``, so
    any value can be scored.

    Its D + 2 parameters (x₀, log(α / √D), raw) are a table; the last two are bounded smoothly.  Only raw starts at
    zero: x₀ and α are random, so that all layers differ.  A conditioner adds to the table what depends on the context.

    Args:
        input_dim: The number D of features.
        conditioner: A network from contexts to parameters, with ``input_dim = context_dim``, ``output_dim = 1`` and
            ``num_params = D + 2``; by default there is no context.

    Raises:
        ValueError: If ``input_dim`` is not positive or the conditioner's sizes do not fit it.  In use, if there is a
            conditioner and no context is given.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import MLP
        >>> radial = Radial(3, MLP(4, 1, num_params=5))
        >>> _ = torch.nn.init.normal_(radial.params)  # as if trained
        >>> y, context = torch.randn(5, 3), torch.randn(4)
        >>> x, log_det = radial.inverse_and_log_det(y, context)
        >>> torch.allclose(radial.forward_and_log_det(x, context)[0], y, atol=1e-3), log_det.shape
        (True, torch.Size([5]))
    """

    def __init__(self, input_dim: int, conditioner: Conditioner | None = None) -> None:
        check_integers("Radial", input_dim=input_dim)
        start = torch.cat((torch.randn(input_dim + 1), torch.zeros(1)))
        super().__init__(input_dim, conditioner, (1, len(start)), start)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, alpha, s = self._ball(context)
        away = x - centre
        h = 1 / (1 + _length(away) / alpha)
        return x + s * h * away, self._log_det(s, h)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, alpha, s = self._ball(context)
        away = y - centre
        radius = _length(away) / alpha
        # The sign of p picks the form of the positive root that does not cancel.
        p = 1 + s - radius
        half = ((p * p + 4 * radius).sqrt() + p.abs()) / 2
        h = 1 / (1 + torch.where(p < 0, half, radius / half))
        return y - s * h / (1 + s * h) * away, -self._log_det(s, h)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> WithScore:
        # The inverse of a multiple of the identity plus a matrix of rank one needs no way back.
        centre, alpha, s = self._ball(context)
        away = x - centre
        radius = _length(away)
        h, direction = 1 / (1 + radius / alpha), away / radius
        across, along = 1 + s * h, 1 + s * h * h
        pull = s * h * h / alpha * ((self.input_dim - 1) / across + 2 * h / along)  # minus the slope of the log-det
        turn = (direction * score).sum(-1, keepdim=True) * s * h * (1 - h) / across
        return x + s * h * away, self._log_det(s, h), (score / across + (turn + pull) / along * direction).detach()

    def _log_det(self, s: Tensor, h: Tensor) -> Tensor:
        return ((self.input_dim - 1) * torch.log1p(s * h) + torch.log1p(s * h * h)).squeeze(-1)

    def _ball(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the point x₀, ``(*batch, D)``, and the numbers α > 0 and s > -1, ``(*batch, 1)``."""
        centre, size, raw = self._params(context).split((self.input_dim, 1, 1), -1)
        # Distances between draws of a standard normal grow like √D.
        return centre, self.input_dim**0.5 * bounded(size, MAX_LOG_SLOPE).exp(), bounded_slope(raw)


class Sylvester(Conditional):
    """A Sylvester transform of a vector ``(*batch, D)``, which bends space along M ridges, the identity at the start::

        y = x + Q R t,    t = tanh(R̃ Qᵀ x + b),    log|det dy/dx| = Σ_i log(1 + s_i (1 - t_i²)),    s_i = R_ii R̃_ii

    Q has M orthonormal columns, the first of a product of H Householder reflections; R and R̃ are upper triangular.  In
    the coordinates z = Qᵀ x the Jacobian is triangular.  M and H choose among the paper's three kinds: M = H < D is the
    orthogonal, M = D the Householder kind.  With H = 0 as well it is the triangular kind, for which the order of the
    features is reversed between layers.

    It is a bijection if every s_i > -1.  So the diagonal of R̃ is a free scale, and the diagonal of R is s_i / R̃_ii,
    with s_i from a free number as for a planar transform.  The inverse solves M increasing scalar equations, so any
    value can be scored.

    Its parameters are a table.  Only the parameters of R start at zero: the others are random, so that gradients are
    not zero and all ridges differ.  A conditioner adds to the table what depends on the context.

    Sylvester Normalizing Flows for Variational Inference (van den Berg, Hasenclever, Tomczak, Welling 2018,
    arXiv:1803.05649).

    Args:
        input_dim: The number D of features.
        rank: The number M of ridges, at most D; by default D, but at most 8.
        reflections: The number H of reflections that make Q; by default M, but less than D, which reaches every Q, up
            to signs that R and R̃ can take over.
        conditioner: A network from contexts to parameters, with ``input_dim = context_dim``, ``output_dim = 1`` and
            ``num_params = Sylvester.count_params(input_dim, rank, reflections)``; by default there is no context.

    Raises:
        ValueError: If a size is out of its range or the conditioner's sizes do not fit them.  In use, if there is a
            conditioner and no context is given.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import MLP
        >>> net = MLP(4, 1, Sylvester.count_params(3, rank=2, reflections=2))
        >>> sylvester = Sylvester(3, rank=2, reflections=2, conditioner=net)
        >>> _ = torch.nn.init.normal_(sylvester.params)  # as if trained
        >>> y, context = torch.randn(5, 3), torch.randn(4)
        >>> x, log_det = sylvester.inverse_and_log_det(y, context)
        >>> torch.allclose(sylvester.forward_and_log_det(x, context)[0], y, atol=1e-3), log_det.shape
        (True, torch.Size([5]))
    """

    def __init__(
        self,
        input_dim: int,
        rank: int | None = None,
        reflections: int | None = None,
        conditioner: Conditioner | None = None,
    ) -> None:
        rank, reflections = check_ridges("Sylvester", input_dim, rank, reflections)
        square = torch.randn(rank, rank).tril(-1)
        start = torch.cat((square.flatten(), torch.randn(2 * rank + reflections * input_dim)))
        super().__init__(input_dim, conditioner, (1, len(start)), start)
        self.rank, self.reflections = rank, reflections

    @staticmethod
    def count_params(input_dim: int, rank: int | None = None, reflections: int | None = None) -> int:
        """Return the number of parameters, M² + 2 M + H D, that a conditioner has to yield.

        Args:
            input_dim: The number D of features.
            rank: The number M of ridges, as for the class.
            reflections: The number H of reflections, as for the class.

        Raises:
            ValueError: If a size is out of its range.
        """
        rank, reflections = check_ridges("Sylvester", input_dim, rank, reflections)
        return rank * (rank + 2) + reflections * input_dim

    def compiles(self, inverse: bool) -> bool:
        if not NEW_COMPILER:
            warnings.warn("Sylvester: it runs uncompiled, since torch.compile needs torch 2.13 for it.", stacklevel=2)
        return NEW_COMPILER

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ridges = self._ridges(context)
        t = ridges.tangents(x)
        return x + ridges.rise(t), ridges.log_det(t)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # With v = Qᵀ y, the pre-activation k_i solves
        # k_i + s_i tanh k_i = R̃_ii (v_i - Σ_{j>i} R_ij t_j) + Σ_{j>i} R̃_ij z_j + b_i, from the last i to the first.
        ridges = self._ridges(context)
        z, shift = ridges.coordinates(y), ridges.shift
        tangents = []
        for i in reversed(range(self.rank)):  # here z_i still lacks its own height, z_j is known for all j > i
            k = ridges.inner[..., i, i] * z[..., i] + shift[..., i]
            t = torch.tanh(root(ridges.s[..., i], k)).unsqueeze(-1)
            z = z - ridges.outer[..., i] * t
            shift = shift + ridges.inner[..., i] * z[..., i : i + 1]
            tangents.append(t)
        t = torch.cat(tangents[::-1], -1)
        x = y - ridges.rise(t)
        with torch.no_grad():  # with large heights x has lost bits of z, and a steep ridge would multiply the error
            lost = ridges.back(z - ridges.coordinates(x))
        return x + lost, -ridges.log_det(t)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> WithScore:
        # The inverse of the identity plus a matrix of rank M (Woodbury 1950): one triangular system, no way back.
        ridges = self._ridges(context)
        t = ridges.tangents(x)
        y, log_det = x + ridges.rise(t), ridges.log_det(t)
        with torch.no_grad():
            bend = 1 - t * t
            pull = 2 * ridges.s * t * bend / (1 + ridges.s * bend)  # minus the slope of the log-det
            along = ridges.coordinates(score) + _times(ridges.inner.mT, pull)
            system = (ridges.inner @ ridges.outer).mT * bend.unsqueeze(-2)
            system = system + torch.eye(self.rank, dtype=x.dtype, device=x.device)
            target = _times(ridges.outer.mT, along).unsqueeze(-1)
            solved = torch.linalg.solve_triangular(system, target, upper=False).squeeze(-1)
            return y, log_det, score + ridges.back(_times(ridges.inner.mT, pull - bend * solved))

    def _ridges(self, context: Tensor | None) -> _Ridges:
        # One square holds R above its diagonal, R̃ transposed below it, and the free numbers of s on it.
        sizes = self.rank**2, self.rank, self.rank, self.reflections * self.input_dim
        square, scales, shift, vectors = self._params(context).split(sizes, -1)
        square = square.unflatten(-1, (self.rank, self.rank))
        s, scale = bounded_slope(square.diagonal(dim1=-2, dim2=-1)), bounded(scales, MAX_LOG_SCALE).exp()
        # The factor keeps sums over ridges of order one for any number of ridges.
        outer = torch.diag_embed(s / scale) + square.triu(1) / self.rank**0.5
        inner = torch.diag_embed(scale) + square.tril(-1).mT / self.rank**0.5
        return _Ridges(s, shift, outer, inner, unit(vectors.unflatten(-1, (self.reflections, self.input_dim))))


class _Ridges(NamedTuple):
    """The parameters of a Sylvester transform at a context."""

    s: Tensor  # (*batch, M)
    shift: Tensor  # b, (*batch, M)
    outer: Tensor  # R, (*batch, M, M)
    inner: Tensor  # R̃, (*batch, M, M)
    mirrors: Tensor  # unit vectors of the reflections whose product has the columns of Q, (*batch, H, D)

    def coordinates(self, x: Tensor) -> Tensor:
        """Return Qᵀ x, ``(*batch, D) -> (*batch, M)``."""
        return reflect(x, self.mirrors)[..., : self.s.shape[-1]]

    def back(self, z: Tensor) -> Tensor:
        """Return Q z, ``(*batch, M) -> (*batch, D)``."""
        return reflect(F.pad(z, (0, self.mirrors.shape[-1] - z.shape[-1])), self.mirrors.flip(-2))

    def tangents(self, x: Tensor) -> Tensor:
        """Return t = tanh(R̃ Qᵀ x + b), ``(*batch, D) -> (*batch, M)``."""
        return torch.tanh(_times(self.inner, self.coordinates(x)) + self.shift)

    def rise(self, t: Tensor) -> Tensor:
        """Return y - x = Q R t, ``(*batch, M) -> (*batch, D)``."""
        return self.back(_times(self.outer, t))

    def log_det(self, t: Tensor) -> Tensor:
        return torch.log1p(self.s * (1 - t * t)).sum(-1)


def _length(vector: Tensor) -> Tensor:
    """Return |vector|, ``(*batch, 1)``, positive and with finite gradients at zero too."""
    return vector.square().sum(-1, keepdim=True).clamp_min(torch.finfo(vector.dtype).tiny).sqrt()


def bounded_slope(raw: Tensor) -> Tensor:
    """Return the number s > -1 of a ridge from a free number; near zero they are equal."""
    return torch.expm1(bounded(raw, MAX_LOG_SLOPE))


def root(s: Tensor, k: Tensor) -> Tensor:
    """Return the root z of z + s tanh z = k, for s > -1, with first and second derivatives.

    The map is odd, and convex (s < 0) or concave on z > 0.  There Newton's iteration starts where the tangents at zero
    and at infinity reach the right-hand side, at the better of the two points, and runs monotonically to the root.
    Slopes are bounded, so a fixed number of steps reaches the last bit.
    """
    fixed, size = s.detach(), k.detach().abs()  # not by ``no_grad``, which torch.jit does not record
    of_zero, of_infinity = size / (1 + fixed), size - fixed
    z = torch.where(fixed < 0, torch.minimum(of_zero, of_infinity), torch.maximum(of_zero, of_infinity))
    for _ in range(STEPS):
        z = _newton(z, fixed, size)
    z = torch.copysign(z, k.detach())
    return _newton(_newton(z, s, k), s, k)  # each step doubles the order of the derivatives that are right


def _newton(z: Tensor, s: Tensor, k: Tensor) -> Tensor:
    t = torch.tanh(z)
    return z - (z + s * t - k) / (1 + s * (1 - t * t))


def check_ridges(owner: str, input_dim: int, rank: int | None, reflections: int | None) -> tuple[int, int]:
    """Return the rank and the number of reflections, or raise an error that names owner, argument and value."""
    check_integers(owner, input_dim=input_dim)
    rank = min(input_dim, 8) if rank is None else rank
    fits = is_integer(rank) and 1 <= rank <= input_dim
    require(fits, owner, "rank", f"be an integer between 1 and input_dim = {input_dim}", rank)
    reflections = min(rank, input_dim - 1) if reflections is None else reflections
    check_integers(owner, 0, reflections=reflections)
    return rank, reflections


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return matrices times vectors, ``(*batch, n, m), (*batch, m) -> (*batch, n)``, and copy neither batch."""
    return torch.einsum("...nm,...m->...n", matrix, vector)
