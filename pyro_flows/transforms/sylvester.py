"""A Sylvester transform bends space along M ridges at once: y = x + Q R tanh(R̃ Qᵀ x + b).

Q holds M orthonormal columns, the first of a product of H Householder reflections; R and R̃ are upper triangular.  In
the coordinates z = Qᵀ x the Jacobian is triangular, so with t the tangents and s_i = R_ii R̃_ii,

    log|det dy/dx| = Σ_i log(1 + s_i (1 - t_i²)).

Two numbers choose among the paper's three kinds: M = H < D is the orthogonal, M = D the Householder one, and with H = 0
as well it is the triangular one, between whose layers the order of the features is reversed.

The map is a bijection if every s_i > -1.  So the diagonal of R̃ is a free scale, that of R is s_i / R̃_ii, and s_i
follows from a free number as for a planar transform: R = 0 is the identity.

The way back is M increasing scalar equations, from the last to the first.  With v = Qᵀ y the pre-activation k_i solves
k_i + s_i tanh k_i = R̃_ii (v_i - Σ_{j>i} R_ij t_j) + Σ_{j>i} R̃_ij z_j + b_i.

Sylvester Normalizing Flows for Variational Inference (van den Berg, Hasenclever, Tomczak, Welling 2018,
arXiv:1803.05649).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arguments import check_integers, is_integer
from ..bijectors.base import bounded
from ..conditioners import Conditioner
from .base import Scored
from .conditional import Tabled
from .orthogonal import reflect, unit
from .ridge import bounded_slope, root
from .tracing import NEW_COMPILER

MAX_LOG_SCALE = 2.0  # bound on log R̃_ii: ridges are between 1/7 and 7 wide


class Sylvester(Tabled):
    """A Sylvester transform of a vector ``(*batch, D)``, which bends space along M ridges, the identity at the start::

        y = x + Q R t,    t = tanh(R̃ Qᵀ x + b),    log|det dy/dx| = Σ_i log(1 + R_ii R̃_ii (1 - t_i²))

    Q has M orthonormal columns, R and R̃ are upper triangular, and R_ii R̃_ii > -1: a bijection at any parameters.  The
    way back is M increasing scalar equations, so any value can be scored.

    Its parameters are a table, in which only those of R start at zero: the others are random, so that gradients are
    alive and no two ridges alike.  A conditioner adds to the table what depends on the context.

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
        super().__init__(input_dim, conditioner)
        self.rank, self.reflections = rank, reflections
        square, others = torch.randn(rank, rank).tril(-1), torch.randn(sum(_sizes(input_dim, rank, reflections)[1:]))
        self._set_table(torch.cat((square.flatten(), others)))

    @staticmethod
    def count_params(input_dim: int, rank: int | None = None, reflections: int | None = None) -> int:
        """The number of parameters, M² + 2 M + H D, that a conditioner has to yield.

        Args:
            input_dim: The number D of features.
            rank: The number M of ridges, as for the class.
            reflections: The number H of reflections, as for the class.

        Raises:
            ValueError: If a size is out of its range.
        """
        return sum(_sizes(input_dim, *check_ridges("Sylvester", input_dim, rank, reflections)))

    def compiles(self, inverse: bool) -> bool:
        if not NEW_COMPILER:
            warnings.warn("Sylvester: it runs uncompiled, since torch.compile needs torch 2.13 for it.", stacklevel=2)
        return NEW_COMPILER

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ridges = self._ridges(context)
        t = ridges.tangents(x)
        return x + ridges.rise(t), ridges.log_det(t)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
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
        with torch.no_grad():  # where heights are large x has lost bits of z, which a steep ridge would multiply
            lost = ridges.back(z - ridges.coordinates(x))
        return x + lost, -ridges.log_det(t)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
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
        params = self._params(context)
        rank = self.rank
        # One square holds R above its diagonal, R̃ transposed below it, and the free numbers of s on it.
        square, scales, shift, vectors = params.split(_sizes(self.input_dim, rank, self.reflections), -1)
        square = square.unflatten(-1, (rank, rank))
        s, scale = bounded_slope(square.diagonal(dim1=-2, dim2=-1)), bounded(scales, MAX_LOG_SCALE).exp()
        # Sums over ridges are of order one whatever their number.
        outer = torch.diag_embed(s / scale) + square.triu(1) / rank**0.5
        inner = torch.diag_embed(scale) + square.tril(-1).mT / rank**0.5
        return _Ridges(s, shift, outer, inner, unit(vectors.unflatten(-1, (self.reflections, self.input_dim))))


class _Ridges(NamedTuple):
    """The parameters of a Sylvester transform at a context."""

    s: Tensor  # (*batch, M)
    shift: Tensor  # b, (*batch, M)
    outer: Tensor  # R, (*batch, M, M)
    inner: Tensor  # R̃, (*batch, M, M)
    mirrors: Tensor  # unit vectors, of whose reflections Q is the product in its first M columns, (*batch, H, D)

    def coordinates(self, x: Tensor) -> Tensor:
        """Qᵀ x, ``(*batch, D) -> (*batch, M)``."""
        return reflect(x, self.mirrors)[..., : self.s.shape[-1]]

    def back(self, z: Tensor) -> Tensor:
        """Q z, ``(*batch, M) -> (*batch, D)``."""
        return reflect(F.pad(z, (0, self.mirrors.shape[-1] - z.shape[-1])), self.mirrors.flip(-2))

    def tangents(self, x: Tensor) -> Tensor:
        """t = tanh(R̃ Qᵀ x + b), ``(*batch, D) -> (*batch, M)``."""
        return torch.tanh(_times(self.inner, self.coordinates(x)) + self.shift)

    def rise(self, t: Tensor) -> Tensor:
        """y - x = Q R t, ``(*batch, M) -> (*batch, D)``."""
        return self.back(_times(self.outer, t))

    def log_det(self, t: Tensor) -> Tensor:
        return torch.log1p(self.s * (1 - t * t)).sum(-1)


def check_ridges(owner: str, input_dim: int, rank: int | None, reflections: int | None) -> tuple[int, int]:
    """The rank and the number of reflections, or one clear error that names the owner, the argument and its value."""
    check_integers(owner, input_dim=input_dim)
    rank = max(min(input_dim, 8), 1) if rank is None else rank
    if not is_integer(rank) or not 1 <= rank <= max(input_dim, 1):
        raise ValueError(f"{owner}: rank must be an integer between 1 and input_dim = {input_dim}, got {rank!r}.")
    reflections = min(rank, max(input_dim - 1, 0)) if reflections is None else reflections
    check_integers(owner, 0, reflections=reflections)
    return rank, reflections


def _sizes(input_dim: int, rank: int, reflections: int) -> tuple[int, int, int, int]:
    """How many parameters are those of R, R̃ and s, of the diagonal of R̃, of b, and of the reflections."""
    return rank * rank, rank, rank, reflections * input_dim


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrices times vectors, ``(*batch, n, m), (*batch, m) -> (*batch, n)``; neither batch is copied for the other."""
    return torch.einsum("...nm,...m->...n", matrix, vector)
