"""Affine maps with a triangular matrix, learned or dependent on a context."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import check_integers
from ..bijectors.base import bounded
from ..conditioners import Conditioner
from .conditional import Conditional

MAX_LOG_SCALE = 8.0  # bound on each log-scale, in nats


class TriangularAffine(Conditional):
    """An affine map of a vector ``(*batch, D)`` by a triangular matrix, the identity at the start::

        y = exp(s) * (x + N x / √D) + t,    log|det dy/dx| = Σ_i s_i

    N is strictly lower triangular.  Each log-scale s is bounded smoothly to ±8.  If x is standard normal, y is normal,
    with any mean and, within the bound, any covariance.  With a conditioner both depend on the context: a last layer of
    this kind learns distributions that are nearly normal from few draws, and the layers before it learn what is left.
    The number of its functions of the context, D (D + 3) / 2, grows quadratically.

    The parameters (s, t, N by rows) are a table that starts at zero.  A conditioner adds to the table what depends on
    the context.

    Using Neural Networks to Model Conditional Multivariate Densities (Williams 1996, Neural Computation 8(4)).

    Args:
        input_dim: The number D of features.
        conditioner: A network from contexts to parameters, with ``input_dim = context_dim``, ``output_dim = 1`` and
            ``num_params = TriangularAffine.count_params(input_dim)``; by default there is no context.

    Raises:
        ValueError: If ``input_dim`` is not positive or the conditioner's sizes do not fit it.  In use, if there is a
            conditioner and no context is given.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import MLP
        >>> layer = TriangularAffine(3, MLP(4, 1, TriangularAffine.count_params(3)))
        >>> _ = torch.nn.init.normal_(layer.params)  # as if trained
        >>> y, context = torch.randn(5, 3), torch.randn(4)
        >>> x, log_det = layer.inverse_and_log_det(y, context)
        >>> torch.allclose(layer.forward_and_log_det(x, context)[0], y, atol=1e-3), log_det.shape
        (True, torch.Size([5]))
    """

    def __init__(self, input_dim: int, conditioner: Conditioner | None = None) -> None:
        start = torch.zeros(self.count_params(input_dim))
        super().__init__(input_dim, conditioner, (1, len(start)))
        self.params = nn.Parameter(start)

    @staticmethod
    def count_params(input_dim: int) -> int:
        """Return the number of parameters, D (D + 3) / 2, that a conditioner has to yield.

        Raises:
            ValueError: If ``input_dim`` is not a positive integer.
        """
        check_integers("TriangularAffine", input_dim=input_dim)
        return input_dim * (input_dim + 3) // 2

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift, below = self._parts(context)
        moved = x + torch.einsum("...ij,...j->...i", below, x)
        y = torch.addcmul(shift, moved, log_scale.exp())
        return y, log_scale.sum(-1).expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift, below = self._parts(context)
        moved = ((y - shift) * (-log_scale).exp()).unsqueeze(-1)
        x = torch.linalg.solve_triangular(below, moved, upper=False, unitriangular=True).squeeze(-1)
        return x, -log_scale.sum(-1).expand(x.shape[:-1])

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-scales and shifts ``(*batch, D)``, and N / √D, ``(*batch, D, D)``."""
        size = self.input_dim
        log_scale, shift, entries = self._params(context).split((size, size, size * (size - 1) // 2), -1)
        below = torch.ones(size, size, dtype=torch.long, device=entries.device).tril(-1)
        # The place of each entry of N in its list, from 1 by rows; 0 on the diagonal and above.
        place = below.flatten().cumsum(0).unflatten(0, (size, size)) * below
        # The factor keeps sums of order one for any number of features.
        return bounded(log_scale, MAX_LOG_SCALE), shift, F.pad(entries, (1, 0))[..., place] / size**0.5
