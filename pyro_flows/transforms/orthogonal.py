"""Permutations and rotations, y = Q x with Qᵀ Q = 1: the log-determinant is zero, and the inverse is the transpose."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..arguments import as_order, check_integers
from .base import TwoWay, VectorTransform, WithScore


class Isometry(TwoWay, VectorTransform):
    """A map of vectors ``(*batch, D)`` by an orthogonal matrix Q, which maps values and scores alike."""

    @abstractmethod
    def _turn(self, x: Tensor, back: bool) -> Tensor:
        """Return Q x, or Qᵀ x if ``back``."""

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return self._turn(value, inverse), value.new_zeros(value.shape[:-1])

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> WithScore:
        return *self.forward_and_log_det(x), self._turn(score, False).detach()


class Permute(Isometry):
    """A fixed permutation π of the features of a vector ``(*batch, D)``, y_i = x_{π(i)}, with log-determinant zero.

    It is a buffer: it is saved, loaded and moved with the flow.

    Args:
        permutation: ``permutation[i]`` is the feature of x that becomes feature i of y.

    Raises:
        ValueError: If ``permutation`` is empty or not a permutation of 0 … D - 1.

    Example::

        >>> import torch
        >>> Permute([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0])).tolist()
        [30.0, 10.0, 20.0]
    """

    permutation: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor) -> None:
        order = as_order("Permute", "permutation", permutation)
        super().__init__(len(order))
        self.register_buffer("permutation", torch.tensor(order, device=getattr(permutation, "device", None)))

    def _turn(self, x: Tensor, back: bool) -> Tensor:
        places = torch.argsort(self.permutation) if back else self.permutation
        return x.index_select(-1, places)


class Householder(Isometry):
    """A rotation of vectors ``(*batch, D)``, a product of an even number of reflections, the identity at the start::

        y = Q x,    Q = Π_k (1 - 2 v_k v_kᵀ / |v_k|²),    log|det dy/dx| = 0

    The vectors v start in pairs of two equal random vectors: gradients are not zero, and all pairs differ.  Each
    reflection costs O(D) per vector.

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

    def _turn(self, x: Tensor, back: bool) -> Tensor:
        units = unit(self.vectors)
        pairs = (units.flip(0) if back else units).unflatten(0, (-1, 2)).unbind(0)
        for first, second in pairs:
            x = _turn_plane(x, first, second)
        return x


class Orthogonal(Isometry):
    """Any rotation of vectors ``(*batch, D)``, the identity at the start::

        y = Q x,    Q = exp(A - Aᵀ),    log|det dy/dx| = 0

    It costs O(D³) per batch and O(D²) per vector.

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

    def _turn(self, x: Tensor, back: bool) -> Tensor:
        rows, columns = torch.tril_indices(self.input_dim, self.input_dim, -1, device=self.params.device)
        lower = self.params.new_zeros(self.input_dim, self.input_dim).index_put((rows, columns), self.params)
        matrix = torch.linalg.matrix_exp(lower - lower.T)
        return x @ (matrix if back else matrix.T)


def unit(vectors: Tensor) -> Tensor:
    """Scale vectors ``(*, D)`` to length one; vectors too short to have a direction become zero and reflect nothing.

    The division by the largest entry comes first, since squares of small numbers underflow, and a vector that is too
    short reflects by too little.
    """
    tiny = torch.finfo(vectors.dtype).tiny
    vectors = vectors / vectors.detach().abs().amax(-1, keepdim=True).clamp_min(tiny)
    return vectors * vectors.square().sum(-1, keepdim=True).clamp_min(tiny).rsqrt()


def reflect(x: Tensor, units: Tensor) -> Tensor:
    """Reflect along unit vectors, the first one first, ``(*batch, D), (*batch, H, D) -> (*batch, D)``."""
    for v in units.unbind(-2):
        x = torch.addcmul(x, (x * v).sum(-1, keepdim=True), v, value=-2)
    return x


def _turn_plane(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Reflect along ``first``, then along ``second``, ``(*batch, D), (D), (D) -> (*batch, D)``.

    Two reflections turn the plane of their vectors.  With unit vectors v, v' and d = v' - v, 2 v·v' = 2 - |d|², so

        (1 - 2 v vᵀ)(1 - 2 v' v'ᵀ) = 1 + 2 v dᵀ - 2 (d + |d|² v) v'ᵀ:

    in this form two equal vectors are the identity to the last bit.
    """
    gap = first - second
    of_gap, of_first = (x * gap).sum(-1, keepdim=True), (x * first).sum(-1, keepdim=True)
    return x + 2 * (of_gap * second - of_first * (gap + gap.square().sum() * second))
