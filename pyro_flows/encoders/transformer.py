"""Attention encoders of time series."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..attention import AttentionLayer
from .elements import pooling_weights
from .series import SeriesEncoder, Steps

FREQUENCIES = 8  # of a step's time; the wavelengths fall from 8 standard deviations of all times by factors of 2


class TransformerEncoder(SeriesEncoder):
    """A transformer from series ``(*batch, T, num_features)`` to contexts ``(*batch, context_dim)``::

        h ← h + attention(norm(h)),    h ← h + V a(W norm(h))
        c = ρ(mean of h_t, Σ_t w_qt h_t, moments of x, log(1 + T)),    w_qt ∝ exp(u_q · h_t) for each learned query u_q

    It begins with the features of :class:`GRUEncoder`, and with the sines and cosines of the times of steps.  A step
    attends to all steps that are there, before and after it.

    Attention Is All You Need (Vaswani et al. 2017, arXiv:1706.03762).  Learned queries: Set Transformer (Lee et al.
    2019, arXiv:1810.00825).

    Args:
        num_features: The number of features of a step.
        context_dim: The width of the context.
        hidden_dim: The width, a multiple of ``num_heads``.
        num_layers: The number of layers.
        num_heads: The number of attention heads in each layer, and of queries.

    Raises:
        ValueError: If a size is below 1, or ``hidden_dim`` is not a multiple of ``num_heads``.  In use, if data, times
            or mask have another shape.

    Example::

        >>> import torch
        >>> x = torch.randn(10, 25, 2)  # 10 series of 25 pairs
        >>> times = torch.rand(10, 25).cumsum(-1)
        >>> encoder = TransformerEncoder(2, context_dim=8)
        >>> encoder.initialize(x, times=times)
        >>> encoder(x, times=times).shape
        torch.Size([10, 8])
        >>> lengths = torch.randint(1, 26, (10, 1))
        >>> encoder(x, torch.arange(25) < lengths, times).shape  # the first few steps of each
        torch.Size([10, 8])
    """

    def __init__(
        self, num_features: int, context_dim: int, hidden_dim: int = 64, *, num_layers: int = 2, num_heads: int = 4
    ) -> None:
        super().__init__(num_features, context_dim, hidden_dim, num_layers=num_layers, num_heads=num_heads)
        if hidden_dim % num_heads:
            must = f"be a multiple of num_heads = {num_heads}"
            raise ValueError(f"{type(self).__name__}: hidden_dim must {must}, got {hidden_dim}.")
        self.num_layers, self.num_heads = num_layers, num_heads
        self.embed = nn.Linear(self.standardize_steps.width + 2 * FREQUENCIES, hidden_dim)
        self.layers = nn.ModuleList(AttentionLayer(hidden_dim, num_heads, expansion=2) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.queries = nn.Linear(hidden_dim, num_heads, bias=False)  # a softmax does not depend on a bias
        self.finish(1 + num_heads)

    def pooled(self, steps: Steps) -> Tensor:
        h, there = self.embed(torch.cat((steps.features, _waves(steps.times)), -1)), steps.there
        # The lowest finite number, not -inf: the attention in a series of no steps would be NaN.
        bias = torch.zeros_like(there, dtype=h.dtype).masked_fill(~there, torch.finfo(h.dtype).min)
        for layer in self.layers:
            h = layer(h, bias[..., None, None, :])
        h = self.norm(h)
        return (pooling_weights(self.queries(h), there).mT @ h).flatten(-2)


def _waves(times: Tensor) -> Tensor:
    """Return the sines and cosines of standardised times at each frequency, ``(*batch, T, 2 * FREQUENCIES)``."""
    frequencies = 2.0 ** torch.arange(FREQUENCIES, dtype=times.dtype, device=times.device)
    angles = (2 * math.pi / 8) * frequencies * times.unsqueeze(-1)
    return torch.cat((angles.sin(), angles.cos()), -1)
