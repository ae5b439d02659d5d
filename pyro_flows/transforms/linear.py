"""A dense linear map in factors: y = L U Q x + t, with L unit lower, U upper triangular and Q orthogonal and fixed.

The diagonal of U is exp(b tanh(a / b)), so the map can never become singular, the log-determinant is a sum of D
numbers and both directions cost O(D²) a vector.  Q is the identity unless a random one is asked for, which mixes all
features from the start.  Glow (Kingma, Dhariwal 2018, arXiv:1807.03039, section 3.2); Neural Spline Flows (Durkan et
al. 2019, arXiv:1906.04032).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import check_integers, check_numbers
from ..bijectors.base import bounded
from .base import VectorTransform


class Factored(VectorTransform):
    """An invertible dense matrix in two triangular factors, and a shift; the identity at the start.

    Args:
        input_dim: The number D of features.
        max_log_scale: The bound b on each log-scale b tanh(a / b), in nats.
    """

    def __init__(self, input_dim: int, max_log_scale: float) -> None:
        super().__init__(input_dim)
        check_numbers(type(self).__name__, above=0, max_log_scale=max_log_scale)
        self.max_log_scale = max_log_scale
        self.factors = nn.Parameter(torch.zeros(input_dim, input_dim))  # L below, U above, a on the diagonal
        self.shift = nn.Parameter(torch.zeros(input_dim))

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Become a multiple of the identity, or of the rotation if there is one.

        Args:
            scale: The factor, whose logarithm lies within ``max_log_scale``.

        Raises:
            ValueError: If it does not, or the factor is not positive.
        """
        caller, most = f"{type(self).__name__}.set_scale", self.max_log_scale
        check_numbers(caller, above=0, scale=scale)
        if not abs(math.log(scale)) < most:
            raise ValueError(f"{caller}: scale must have a logarithm within ±{most}, got {scale}. Raise max_log_scale.")
        self.factors.copy_(torch.eye(self.input_dim) * (most * math.atanh(math.log(scale) / most)))

    def _log_scale(self) -> Tensor:
        return bounded(self.factors.diagonal(), self.max_log_scale)


class LULinear(Factored):
    """An invertible dense matrix in factors, and a shift, of vectors ``(*batch, D)``::

        y = L U Q x + t,    log|det dy/dx| = Σ_i log U_ii,    U_ii = exp(b tanh(a_i / b))

    with L unit lower and U upper triangular, and Q orthogonal and fixed.  It starts at Q, which is the identity unless
    a random one is asked for.  Both directions cost O(D²) a vector, and no parameters make it singular.

    Glow: Generative Flow with Invertible 1×1 Convolutions (Kingma, Dhariwal 2018, arXiv:1807.03039, section 3.2);
    Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios 2019, arXiv:1906.04032).

    Args:
        input_dim: The number D of features.
        max_log_scale: The bound b on each log-pivot, in nats.
        rotation_seed: The seed of the orthogonal matrix that it starts as, as in Glow; by default the identity.

    Raises:
        ValueError: If ``input_dim`` is not positive, or ``max_log_scale`` not positive and finite.

    Example::

        >>> import torch
        >>> layer = LULinear(3)
        >>> layer.set_scale(2.0)
        >>> y, log_det = layer.forward_and_log_det(torch.ones(3))
        >>> round(y[0].item(), 4), round(log_det.item(), 4)  # nats: 3 log 2
        (2.0, 2.0794)
    """

    rotation: Tensor | None

    def __init__(self, input_dim: int, *, max_log_scale: float = 8.0, rotation_seed: int | None = None) -> None:
        super().__init__(input_dim, max_log_scale)
        check_integers("LULinear", 0, optional=True, rotation_seed=rotation_seed)
        self.rotation_seed = rotation_seed
        self.register_buffer("rotation", None if rotation_seed is None else _orthogonal(input_dim, rotation_seed))

    def _lower_upper_log_pivots(self) -> tuple[Tensor, Tensor, Tensor]:
        log_pivots = self._log_scale()
        lower = self.factors.tril(-1) + torch.eye(self.input_dim, dtype=log_pivots.dtype, device=log_pivots.device)
        return lower, self.factors.triu(1) + torch.diag(log_pivots.exp()), log_pivots

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper, log_pivots = self._lower_upper_log_pivots()
        matrix = lower @ upper
        if self.rotation is not None:
            matrix = matrix @ _polished(self.rotation)
        y = F.linear(x, matrix, self.shift)
        return y, log_pivots.sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper, log_pivots = self._lower_upper_log_pivots()
        columns = (y - self.shift).reshape(-1, self.input_dim).T  # (D, N)
        columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        columns = torch.linalg.solve_triangular(upper, columns, upper=True)
        if self.rotation is not None:
            columns = _polished(self.rotation).T @ columns
        return columns.T.reshape(y.shape), -log_pivots.sum().expand(y.shape[:-1])


@contextlib.contextmanager
def unrotated(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let all linear maps in some layers do without their rotations for a while."""
    kept = {part: part.rotation for layer in layers for part in layer.modules() if isinstance(part, LULinear)}
    for part in kept:
        part.rotation = None
    try:
        yield
    finally:
        for part, rotation in kept.items():
            part.rotation = rotation


def _orthogonal(dim: int, seed: int) -> Tensor:
    """One of all orthogonal matrices, with equal chances (Mezzadri 2006, arXiv:math-ph/0609050), ``(D, D)``."""
    source = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=source, dtype=torch.float64))
    return (q * r.diagonal().sign()).to(torch.get_default_dtype())


def _polished(rotation: Tensor) -> Tensor:
    """A matrix that is orthogonal up to rounding in a coarser dtype, up to its square: Newton's step."""
    return 1.5 * rotation - 0.5 * rotation @ (rotation.T @ rotation)
