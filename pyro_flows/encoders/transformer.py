"""Attention encoders of time series."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..arguments import check_integers
from ..attention import AttentionLayer
from .base import Encoder
from .mlp import hidden_layers
from .pooling import pooling_weights
from .series import StepFeatures
from .standardize import Standardize

FREQUENCIES = 8  # of a step's time; the wavelengths fall from 8 standard deviations of all times by factors of 2


class TransformerEncoder(Encoder):
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
        name = type(self).__name__
        check_integers(name, num_features=num_features, context_dim=context_dim)
        check_integers(name, hidden_dim=hidden_dim, num_layers=num_layers, num_heads=num_heads)
        if hidden_dim % num_heads:
            must = f"be a multiple of num_heads = {num_heads}"
            raise ValueError(f"{name}: hidden_dim must {must}, got {hidden_dim}.")
        super().__init__((None, num_features), context_dim, Standardize((num_features,)))
        self.num_features, self.hidden_dim = num_features, hidden_dim
        self.num_layers, self.num_heads = num_layers, num_heads
        self.standardize_steps = StepFeatures(name, num_features)
        self.embed = nn.Linear(self.standardize_steps.width + 2 * FREQUENCIES, hidden_dim)
        self.layers = nn.ModuleList(AttentionLayer(hidden_dim, num_heads, expansion=2) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.queries = nn.Linear(hidden_dim, num_heads, bias=False)  # a softmax does not depend on a bias
        self.rho = hidden_layers(
            name, (1 + num_heads) * hidden_dim + 2 * num_features + 1, hidden_dim, activation=nn.SiLU
        )
        self.output = nn.Linear(hidden_dim, context_dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """Encode series.

        Args:
            x: Series of shape ``(*batch, T, num_features)``, in the order of time.  T may be 0.
            mask: True or 1 for steps that are there, of shape ``(*batch, T)``, or for their entries, of the shape of x.
                Other values and times are ignored, NaN included; a step without any entry is not there.
            times: The times of steps, of shape ``(*batch, T)`` or ``(T,)``; by default 0 … T - 1.  Subtract an
                origin from times such as seconds since 1970, whose differences float32 does not hold.

        Returns:
            Contexts of shape ``(*batch, context_dim)``.

        Raises:
            ValueError: If data, times or mask have another shape, or a mask holds other numbers than 0 and 1.
        """
        self.check_data(x)
        features, times, there, moments = self.standardize_steps(self.standardize, x, times, mask)
        h = self.embed(torch.cat((features, _waves(times)), -1))
        # The lowest finite number, not -inf: the attention in a series of no steps would be NaN.
        bias = torch.zeros_like(there, dtype=h.dtype).masked_fill(~there, torch.finfo(h.dtype).min)
        for layer in self.layers:
            h = layer(h, bias[..., None, None, :])
        h = self.norm(h)
        pooled = (pooling_weights(self.queries(h), there).mT @ h).flatten(-2)
        return self.output(self.rho(torch.cat((pooled, moments), -1)))


def _waves(times: Tensor) -> Tensor:
    """Return the sines and cosines of standardised times at each frequency, ``(*batch, T, 2 * FREQUENCIES)``."""
    frequencies = 2.0 ** torch.arange(FREQUENCIES, dtype=times.dtype, device=times.device)
    angles = (2 * math.pi / 8) * frequencies * times.unsqueeze(-1)
    return torch.cat((angles.sin(), angles.cos()), -1)
