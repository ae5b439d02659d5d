"""Recurrent encoders of time series."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .elements import pooling_weights
from .series import SeriesEncoder, Steps


class GRUEncoder(SeriesEncoder):
    """A gated recurrent network from series ``(*batch, T, num_features)`` to contexts ``(*batch, context_dim)``::

        r, u = σ(W_r f_t + U_r h_{t-1}), σ(W_u f_t + U_u h_{t-1}),    n = tanh(W_n f_t + r (U_n h_{t-1}))
        h_t = (1 - u) n + u h_{t-1},    c = ρ(h_T, mean of h_t, moments of x, log(1 + T))

    The features f_t of a step are its values, standardised by all data and by its own series, and an indicator of each
    value that is there.  They also hold the value before each, its products with the new one, the log of the gap
    between, and the standardised time.  The moments are the mean and the log standard deviation of each feature of the
    series.  So series may be of any length, at irregular times, and with missing entries.

    Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation (Cho et al. 2014,
    arXiv:1406.1078).  Indicators and gaps: Recurrent Neural Networks for Multivariate Time Series with Missing Values
    (Che, Purushotham, Cho, Sontag, Liu 2016, arXiv:1606.01865).

    Args:
        num_features: The number of features of a step.
        context_dim: The width of the context.
        hidden_dim: The width of the state h, and of the hidden layer of ρ.
        num_layers: The number of recurrent layers; each reads the states of the one before.

    Raises:
        ValueError: If a size is below 1.  In use, if data, times or mask have another shape.

    Example::

        >>> import torch
        >>> x = torch.randn(10, 25, 2)  # 10 series of 25 pairs
        >>> times = torch.rand(10, 25).cumsum(-1)
        >>> encoder = GRUEncoder(2, context_dim=8)
        >>> encoder.initialize(x, times=times)
        >>> encoder(x, times=times).shape
        torch.Size([10, 8])
        >>> lengths = torch.randint(1, 26, (10, 1))
        >>> encoder(x, torch.arange(25) < lengths, times).shape  # the first few steps of each
        torch.Size([10, 8])
        >>> missing = torch.rand(10, 25, 2) < 0.3
        >>> x[missing] = torch.nan
        >>> encoder(x, ~missing, times).isfinite().all()
        tensor(True)
    """

    def __init__(self, num_features: int, context_dim: int, hidden_dim: int = 64, *, num_layers: int = 1) -> None:
        super().__init__(num_features, context_dim, hidden_dim, num_layers=num_layers)
        self.num_layers = num_layers
        widths = (self.standardize_steps.width, *(hidden_dim,) * num_layers)
        self.layers = nn.ModuleList(_Layer(width, hidden_dim) for width in widths[:-1])
        self.finish(2)

    def pooled(self, steps: Steps) -> Tensor:
        h = steps.features
        for layer in self.layers:
            h = layer(h)
        mean = pooling_weights(h[..., :0], steps.there)  # (*batch, T, 1)
        last = steps.there & ~F.pad(steps.there[..., 1:], (0, 1))  # no step in an empty series, so that h_T is 0
        return (torch.cat((last.unsqueeze(-1), mean), -1).mT @ h).flatten(-2)


class _Layer(nn.Module):
    """A gated recurrent layer, from the features of all steps to its states after them.

    It is written out, since torch's own can neither be compiled nor mapped by ``torch.func``.
    """

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.from_input = nn.Linear(input_dim, 3 * hidden_dim)
        self.from_state = nn.Linear(hidden_dim, 3 * hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the states ``(*batch, T, hidden_dim)`` after each of the steps, ``(*batch, T, input_dim)``."""
        inputs = self.from_input(x)
        h = inputs.new_zeros(*x.shape[:-2], self.hidden_dim)
        states = []
        for given in inputs.unbind(-2):
            (a, b, c), (d, e, f) = given.chunk(3, -1), self.from_state(h).chunk(3, -1)
            update, new = (b + e).sigmoid(), (c + (a + d).sigmoid() * f).tanh()
            h = new + update * (h - new)
            states.append(h)
        return torch.stack(states, -2)
