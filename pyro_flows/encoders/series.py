"""Encoders of time series: steps as features of networks, with missing entries, times and gaps."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import check_integers
from ..attention import AttentionLayer
from .base import Encoder, Standardize
from .rows import hidden_layers
from .sets import as_mask, pooling_weights
from .training_record import Lengths

SHORTEST = 1e-4  # of the gaps that networks tell apart, in standard deviations of times
LEAST_VARIANCE = 1e-6  # of a series, relative to that of all data
FREQUENCIES = 8  # of a step's time; the wavelengths fall from 8 standard deviations of all times by factors of 2


class SeriesEncoder(Encoder):
    """A network from series ``(*batch, T, num_features)`` to contexts: c = ρ(pooled states, moments of x, log(1 + T)).

    The features of a step are, for each of its values x_t::

        (x_t - m) / s by all data,    y_t = (x_t - m_i) / s_i by its own series,    1 if it is there and 0 if missing,
        y_r of the last step r < t where it is there,    y_t y_r,    (y_t - y_r)²,    the standardised log(t - r)

    The standardised time t is one more.  Missing values are 0, and so is all that is before the first.  Pooled products
    are autocovariances, which networks learn slowly from the values.

    A subclass calls :meth:`finish` at the end of its constructor, and defines :meth:`pooled`.

    Recurrent Neural Networks for Multivariate Time Series with Missing Values (Che, Purushotham, Cho, Sontag, Liu 2016,
    arXiv:1606.01865).

    Args:
        num_features: The number of features of a step.
        context_dim: The width of the context.
        hidden_dim: The width of the states.
        **sizes: Other sizes to check.
    """

    def __init__(self, num_features: int, context_dim: int, hidden_dim: int, **sizes: Any) -> None:
        name = type(self).__name__
        check_integers(name, num_features=num_features, context_dim=context_dim, hidden_dim=hidden_dim, **sizes)
        super().__init__((None, num_features), context_dim, Standardize((num_features,)))
        self.num_features, self.hidden_dim, self.step_dim = num_features, hidden_dim, 7 * num_features + 1
        self.standardize_times, self.standardize_gaps = Standardize((1,)), Standardize((1,))
        self.lengths = Lengths(name)

    def finish(self, number: int) -> None:
        """Build ρ, for a number of pooled states."""
        widths = number * self.hidden_dim + 2 * self.num_features + 1, self.hidden_dim
        self.rho = hidden_layers(type(self).__name__, *widths, activation=nn.SiLU)
        self.output = nn.Linear(self.hidden_dim, self.context_dim)

    @abstractmethod
    def pooled(self, features: Tensor, times: Tensor, there: Tensor) -> Tensor:
        """Return pooled states, ``(*batch, number * hidden_dim)``, of the first three results of ``steps``."""

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
        *steps, moments = self.steps(x, mask, times)
        return self.output(self.rho(torch.cat((self.pooled(*steps), moments), -1)))

    def steps(self, x: Tensor, mask: Tensor | None, times: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the steps of series, those that are there first, in their order.

        Returns:
            The features of steps, ``(*batch, T, step_dim)``, and their standardised times, ``(*batch, T)``, both 0
            where no step is there; True where a step is there, ``(*batch, T)``; and the moments of each series,
            ``(*batch, 2 * num_features + 1)``.  Moments are the mean and the log standard deviation of each feature, 0
            and a constant without values, and log(1 + T).
        """
        x, times, entries = self._ordered(x, mask, times)
        there = entries.any(-1)
        self.lengths(there)
        values = self.standardize(x, entries).masked_fill(~entries, 0.0)
        clock = self.standardize_times(times.unsqueeze(-1), there).masked_fill(~there.unsqueeze(-1), 0.0)
        weights = entries / entries.sum(-2, keepdim=True).clamp(min=1).to(values.dtype)
        mean = (weights * values).sum(-2, keepdim=True)
        spread = ((weights * (values - mean).square()).sum(-2, keepdim=True) + LEAST_VARIANCE).sqrt()
        own = ((values - mean) / spread).masked_fill(~entries, 0.0)
        before, gaps, known = self._before(own, times, entries, there)
        paired = entries & known
        products = (own * before).masked_fill(~paired, 0.0), (own - before).square().masked_fill(~paired, 0.0)
        features = torch.cat((values, own, entries.to(values.dtype), before, gaps, *products, clock), -1)
        number = there.sum(-1, keepdim=True).to(values.dtype)
        moments = torch.cat((torch.cat((mean, spread.log()), -1).squeeze(-2), number.log1p()), -1)
        return features, clock.squeeze(-1), there, moments

    def _ordered(self, x: Tensor, mask: Tensor | None, times: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return values, times and the mask of entries, the steps that are there first, with 0 for what is missing.

        The result has one step at least, since networks need one.
        """
        name = type(self).__name__
        if times is None:
            times = torch.arange(x.shape[-2], device=x.device)
        elif times.shape not in (x.shape[:-1], x.shape[-2:-1]):
            wanted = f"{tuple(x.shape[:-1])} or {tuple(x.shape[-2:-1])}, for data of shape {tuple(x.shape)}"
            raise ValueError(f"{name}: times must have shape {wanted}, got {tuple(times.shape)}.")
        times = (times if times.is_floating_point() else times.long()).expand(x.shape[:-1])
        entries = as_mask(name, x, mask, x.shape, x.shape[:-1])
        if entries.dim() < x.dim():
            entries = entries.unsqueeze(-1).expand(x.shape)
        if mask is not None:
            order = (~entries.any(-1)).to(torch.uint8).argsort(dim=-1, stable=True)  # (*batch, T)
            rows = order.unsqueeze(-1).expand(x.shape)
            x, times, entries = x.gather(-2, rows), times.gather(-1, order), entries.gather(-2, rows)
            # Filled before any arithmetic: a factor of zero would not silence a NaN.
            x, times = x.masked_fill(~entries, 0), times.masked_fill(~entries.any(-1), 0)
        if x.shape[-2] == 0:
            x, times, entries = F.pad(x, (0, 0, 0, 1)), F.pad(times, (0, 1)), F.pad(entries, (0, 0, 0, 1))
        return x, times, entries

    def _before(self, values: Tensor, times: Tensor, entries: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the value before each, the standardised log gap since then, and where there is one; 0 elsewhere."""
        places = torch.arange(times.shape[-1], device=times.device).unsqueeze(-1)
        latest = torch.where(entries, places, -1).cummax(-2).values
        latest = F.pad(latest[..., :-1, :], (0, 0, 1, 0), value=-1)  # (*batch, T, num_features)
        known, index = (latest >= 0) & there.unsqueeze(-1), latest.clamp(min=0)
        all_times = times.unsqueeze(-1).expand(values.shape)
        # Differences first: times such as seconds since 1970 are too large for the precision of a network.
        gaps = (all_times - all_times.gather(-2, index)).to(values.dtype) / self.standardize_times.scale.detach()
        logs = (gaps.clamp(min=0.0) + SHORTEST).log()
        # Series of one step have no gaps; their constant then sets the scale, to 1.
        seen = torch.where(known.any(), known, there.unsqueeze(-1))
        before, gaps = values.gather(-2, index), self.standardize_gaps(logs, seen)
        return before.masked_fill(~known, 0.0), gaps.masked_fill(~known, 0.0), known


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
        widths = (self.step_dim, *(hidden_dim,) * num_layers)
        self.layers = nn.ModuleList(_Layer(width, hidden_dim) for width in widths[:-1])
        self.finish(2)

    def pooled(self, features: Tensor, times: Tensor, there: Tensor) -> Tensor:
        h = features
        for layer in self.layers:
            h = layer(h)
        mean = pooling_weights(h[..., :0], there)  # (*batch, T, 1)
        last = there & ~F.pad(there[..., 1:], (0, 1))  # no step in an empty series, so that h_T is 0
        return (torch.cat((last.unsqueeze(-1), mean), -1).mT @ h).flatten(-2)


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
        self.embed = nn.Linear(self.step_dim + 2 * FREQUENCIES, hidden_dim)
        self.layers = nn.ModuleList(AttentionLayer(hidden_dim, num_heads, expansion=2) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.queries = nn.Linear(hidden_dim, num_heads, bias=False)  # a softmax does not depend on a bias
        self.finish(1 + num_heads)

    def pooled(self, features: Tensor, times: Tensor, there: Tensor) -> Tensor:
        frequencies = 2.0 ** torch.arange(FREQUENCIES, dtype=times.dtype, device=times.device)
        angles = (2 * math.pi / 8) * frequencies * times.unsqueeze(-1)
        h = self.embed(torch.cat((features, angles.sin(), angles.cos()), -1))
        # The lowest finite number, not -inf: the attention in a series of no steps would be NaN.
        bias = torch.zeros_like(there, dtype=h.dtype).masked_fill(~there, torch.finfo(h.dtype).min)
        for layer in self.layers:
            h = layer(h, bias[..., None, None, :])
        h = self.norm(h)
        return (pooling_weights(self.queries(h), there).mT @ h).flatten(-2)


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
