"""An affine map that is set and not trained: y = t + L x, with L lower triangular or diagonal.

Before it the coordinates are whitened: what is learned in them moves at one pace however ill-conditioned the target.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import check_flags
from .base import Scored, VectorTransform


class FixedAffine(VectorTransform):
    """A shift and a matrix of vectors ``(*batch, D)``, y = t + L x, that are set and not trained.

    Until they are set it is the identity, afterwards log|det dy/dx| = Σ_i log L_ii.  Both are parameters, so that
    parameter stores and checkpoints hold them, but no gradient reaches them.

    Args:
        input_dim: The number D of features.
        dense: Whether the matrix is lower triangular; else it is diagonal, and takes D numbers.

    Attributes:
        loc: The shift t, ``(D,)``.
        scale: The matrix L, ``(D, D)``, or its diagonal, ``(D,)``.

    Raises:
        ValueError: If ``input_dim`` is not positive.

    Example::

        >>> import torch
        >>> layer = FixedAffine(2)
        >>> layer.set(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
        >>> layer.forward_and_log_det(torch.ones(2))[0].tolist()
        [3.0, 4.0]
    """

    def __init__(self, input_dim: int, *, dense: bool = True) -> None:
        super().__init__(input_dim)
        check_flags("FixedAffine", dense=dense)
        self.dense = dense
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.scale = nn.Parameter(torch.eye(input_dim) if dense else torch.ones(input_dim))

    @torch.no_grad()
    def set(self, loc: Tensor, scale: Tensor) -> None:
        """Become the map of N(0, I) to N(t, L Lᵀ), or to its marginals where the matrix is diagonal.

        Args:
            loc: The shift t, ``(D,)``.
            scale: The lower triangular L with a positive diagonal, ``(D, D)``, or the diagonal alone, ``(D,)``.
        """
        self.loc.copy_(loc)
        if self.dense:
            self.scale.copy_(scale if scale.dim() == 2 else torch.diag(scale))
        else:
            self.scale.copy_(scale.norm(dim=-1) if scale.dim() == 2 else scale)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale, log_det = self._scale_and_log_det()
        y = self.loc.detach() + (x @ scale.T if self.dense else x * scale)
        return y, log_det.expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale, log_det = self._scale_and_log_det()
        x = y - self.loc.detach()
        if self.dense:
            x = torch.linalg.solve_triangular(scale.T, x.reshape(-1, self.input_dim), upper=True, left=False)
            x = x.reshape(y.shape)
        else:
            x = x / scale
        return x, -log_det.expand(y.shape[:-1])

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        y, log_det = self.forward_and_log_det(x)
        scale, _ = self._scale_and_log_det()
        if not self.dense:
            return y, log_det, score / scale
        rows = torch.linalg.solve_triangular(scale, score.reshape(-1, self.input_dim), upper=False, left=False)
        return y, log_det, rows.reshape(score.shape)

    def _scale_and_log_det(self) -> tuple[Tensor, Tensor]:
        scale = self.scale.detach().tril() if self.dense else self.scale.detach()
        return scale, (scale.diagonal() if self.dense else scale).abs().log().sum()
