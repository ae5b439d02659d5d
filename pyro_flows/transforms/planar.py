"""A planar transform bends space along one ridge: y = x + û tanh(z), with z = w·x + b.

The Jacobian is the identity plus a matrix of rank one, so log|det dy/dx| = log(1 + s (1 - tanh² z)) with s = w·û.  The
map is a bijection if s > -1.  So, as in the paper, the part of the free vector u along w is replaced,

    û = u + (s - w·u) w / |w|²,   here with   log(1 + s) = B tanh(w·u / B):

u = 0 is the identity, and no layer stretches or squeezes space by more than exp(B).

The way back is one increasing scalar equation, z + s tanh z = w·y + b.

Variational Inference with Normalizing Flows (Rezende, Mohamed 2015, arXiv:1505.05770, section 4.1 and appendix A).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..conditioners import Conditioner
from .base import Scored
from .conditional import Tabled
from .ridge import bounded_slope, root


class Planar(Tabled):
    """A planar transform of a vector ``(*batch, D)``, which bends space along one ridge, the identity at the start::

        y = x + û tanh(z),    z = w·x + b,    log|det dy/dx| = log(1 + w·û (1 - tanh² z))

    where û is u with its part along w bounded, so that w·û > -1: a bijection at any parameters.  The way back is one
    increasing scalar equation, so any value can be scored.

    Its 2 D + 1 parameters (u, w, b) are a table, in which only u starts at zero: w and b are random, so that
    gradients are alive and no two layers alike.  A conditioner adds to the table what depends on the context.

    Variational Inference with Normalizing Flows (Rezende, Mohamed 2015, arXiv:1505.05770).

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
        super().__init__(input_dim, conditioner)
        w = torch.randn(input_dim) / input_dim**0.5  # w·x is of order one
        self._set_table(torch.cat((torch.zeros(input_dim), w, torch.randn(1))))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w, b, s = self._ridge(context)
        t = torch.tanh((x * w).sum(-1) + b)
        return x + u * t.unsqueeze(-1), torch.log1p(s * (1 - t * t))

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w, b, s = self._ridge(context)
        t = torch.tanh(root(s, (y * w).sum(-1) + b))
        return y - u * t.unsqueeze(-1), -torch.log1p(s * (1 - t * t))

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        # The inverse of the identity plus a matrix of rank one (Sherman, Morrison 1950): no way back is needed.
        u, w, b, s = self._ridge(context)
        t = torch.tanh((x * w).sum(-1) + b)
        bend = 1 - t * t
        slope = 1 + s * bend
        y, log_det = x + u * t.unsqueeze(-1), torch.log1p(s * bend)
        along = bend / slope * (2 * s * t / slope - (u * score).sum(-1))
        return y, log_det, (score + along.unsqueeze(-1) * w).detach()

    def _ridge(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The vectors û and w, ``(*batch, D)``, and the numbers b and s = w·û, ``(*batch)``."""
        params = self._params(context)
        u, w, b = params.split((self.input_dim, self.input_dim, 1), -1)
        dot = (w * u).sum(-1, keepdim=True)
        s = bounded_slope(dot)
        # s - w·u vanishes like (w·u)², and so does the whole correction where w does.
        norm = w.square().sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        return u + (s - dot) / norm * w, w, b.squeeze(-1), s.squeeze(-1)
