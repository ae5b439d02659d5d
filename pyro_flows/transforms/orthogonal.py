"""Rotations, y = Q x with Qᵀ Q = 1: the log-determinant is zero, and the way back is the transpose.

``Householder``: Q is a product of reflections 1 - 2 v vᵀ / |v|², at a price of O(D) each.  They come in pairs,
which turn the plane of their two vectors.  With unit vectors v, v' and d = v' - v, for which 2 v·v' = 2 - |d|²,

    (1 - 2 v vᵀ)(1 - 2 v' v'ᵀ) = 1 + 2 v dᵀ - 2 (d + |d|² v) v'ᵀ:

two equal vectors are the identity to the last bit.

``Orthogonal``: Q = exp(A - Aᵀ), which is every rotation, at a price of O(D³) for a batch and O(D²) a vector.

Improving Variational Auto-Encoders using Householder Flow (Tomczak, Welling 2016, arXiv:1611.09630).
Cheap Orthogonal Constraints in Neural Networks (Lezcano-Casado, Martínez-Rubio 2019, arXiv:1901.08428).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import check_integers
from .base import Scored, VectorTransform


class Householder(VectorTransform):
    """A rotation of vectors ``(*batch, D)``, a product of an even number of reflections, the identity at the start::

        y = Q x,    Q = Π_k (1 - 2 v_k v_kᵀ / |v_k|²),    log|det dy/dx| = 0

    The vectors v start in pairs of two equal random ones, so that gradients are alive and no two pairs alike.  Each
    reflection costs O(D) a vector.

    Improving Variational Auto-Encoders using Householder Flow (Tomczak, Welling 2016, arXiv:1611.09630).

    Args:
        input_dim: The number D of features.
        reflections: The number of reflections, even; some D of them reach every rotation.

    Raises:
        ValueError: If ``input_dim`` is not positive, or ``reflections`` not positive and even.

    Example::

        >>> import torch
        >>> layer = Householder(3, reflections=2)
        >>> layer(torch.ones(3)).tolist()
        [1.0, 1.0, 1.0]
        >>> _ = torch.nn.init.normal_(layer.vectors)
        >>> round(layer(torch.tensor([0.0, 3.0, 4.0])).norm().item(), 4)  # lengths stay
        5.0
    """

    def __init__(self, input_dim: int, reflections: int = 8) -> None:
        super().__init__(input_dim)
        check_integers("Householder", reflections=reflections)
        if reflections % 2:
            raise ValueError(f"Householder: reflections must be positive and even, got {reflections}.")
        self.reflections = reflections
        self.vectors = nn.Parameter(torch.randn(reflections // 2, input_dim).repeat_interleave(2, 0))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._turn(x), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        for first, second in unit(self.vectors).unflatten(0, (-1, 2)).flip(0).unbind(0):
            y = _turn_plane(y, second, first)
        return y, y.new_zeros(y.shape[:-1])

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        return self._turn(x), x.new_zeros(x.shape[:-1]), self._turn(score).detach()

    def _turn(self, x: Tensor) -> Tensor:
        for first, second in unit(self.vectors).unflatten(0, (-1, 2)).unbind(0):
            x = _turn_plane(x, first, second)
        return x


class Orthogonal(VectorTransform):
    """Any rotation of vectors ``(*batch, D)``, the identity at the start::

        y = Q x,    Q = exp(A - Aᵀ),    log|det dy/dx| = 0

    Its price is O(D³) for a batch and O(D²) a vector.

    Cheap Orthogonal Constraints in Neural Networks (Lezcano-Casado, Martínez-Rubio 2019, arXiv:1901.08428).

    Args:
        input_dim: The number D of features; the D (D - 1) / 2 parameters are the entries of A below its diagonal.

    Raises:
        ValueError: If ``input_dim`` is not positive.

    Example::

        >>> import torch
        >>> layer = Orthogonal(2)
        >>> layer(torch.tensor([1.0, 0.0])).tolist()
        [1.0, 0.0]
        >>> _ = torch.nn.init.constant_(layer.params, torch.pi / 2)  # a quarter of a turn
        >>> layer(torch.tensor([1.0, 0.0])).round(decimals=4).abs().tolist()
        [0.0, 1.0]
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim)
        self.params = nn.Parameter(torch.zeros(input_dim * (input_dim - 1) // 2))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x @ self._matrix().T, x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y @ self._matrix(), y.new_zeros(y.shape[:-1])

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        matrix = self._matrix()
        return x @ matrix.T, x.new_zeros(x.shape[:-1]), (score @ matrix.T).detach()

    def _matrix(self) -> Tensor:
        """Q, ``(D, D)``."""
        rows, columns = torch.tril_indices(self.input_dim, self.input_dim, -1, device=self.params.device)
        lower = self.params.new_zeros(self.input_dim, self.input_dim).index_put((rows, columns), self.params)
        return torch.linalg.matrix_exp(lower - lower.T)


def unit(vectors: Tensor) -> Tensor:
    """Vectors ``(*, D)`` of length one; those too short to have a direction become zero, which reflects nothing.

    The largest entry comes first, lest squares of small numbers vanish: half a length would be half a reflection.
    """
    tiny = torch.finfo(vectors.dtype).tiny
    vectors = vectors / vectors.detach().abs().amax(-1, keepdim=True).clamp_min(tiny)
    return vectors * vectors.square().sum(-1, keepdim=True).clamp_min(tiny).rsqrt()


def reflect(x: Tensor, units: Tensor) -> Tensor:
    """Reflections along unit vectors, the first one first, ``(*batch, D), (*batch, H, D) -> (*batch, D)``."""
    for v in units.unbind(-2):
        x = torch.addcmul(x, (x * v).sum(-1, keepdim=True), v, value=-2)
    return x


def _turn_plane(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The reflection along ``first``, then that along ``second``, ``(*batch, D), (D), (D) -> (*batch, D)``."""
    gap = first - second
    of_gap, of_first = (x * gap).sum(-1, keepdim=True), (x * first).sum(-1, keepdim=True)
    return x + 2 * (of_gap * second - of_first * (gap + gap.square().sum() * second))
