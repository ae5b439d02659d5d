"""Encoders of time series: steps as features of networks, with missing entries, times and gaps."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import check_integers
from .base import Encoder
from .elements import Lengths, as_mask
from .mlp import hidden_layers
from .standardize import Standardize

SHORTEST = 1e-4  # of the gaps that networks tell apart, in standard deviations of times
LEAST_VARIANCE = 1e-6  # of a series, relative to that of all data


class Steps(NamedTuple):
    """The steps of series, those that are there first, in their order.

    Attributes:
        features: The features of steps, ``(*batch, T, StepFeatures.width)``, 0 where no step is there.
        times: Their standardised times, ``(*batch, T)``, 0 where no step is there.
        there: True where a step is there, ``(*batch, T)``.
        moments: The mean and the log standard deviation of each feature of a series, 0 and a constant without values,
            and log(1 + T), ``(*batch, 2 * num_features + 1)``.
    """

    features: Tensor
    times: Tensor
    there: Tensor
    moments: Tensor


class StepFeatures(nn.Module):
    """The features of the steps of time series, for each value x_t of a step::

        (x_t - m) / s by all data,    y_t = (x_t - m_i) / s_i by its own series,    1 if it is there and 0 if missing,
        y_r of the last step r < t where it is there,    y_t y_r,    (y_t - y_r)²,    the standardised log(t - r)

    The standardised time t is one more.  Missing values are 0, and so is all that is before the first.  Pooled products
    are autocovariances, which networks learn slowly from the values.

    Recurrent Neural Networks for Multivariate Time Series with Missing Values (Che, Purushotham, Cho, Sontag, Liu 2016,
    arXiv:1606.01865).

    Args:
        owner: The name of the encoder, for errors.
        num_features: The number of values of a step.
    """

    def __init__(self, owner: str, num_features: int) -> None:
        super().__init__()
        self.owner, self.width = owner, 7 * num_features + 1
        self.times, self.gaps = Standardize((1,)), Standardize((1,))
        self.lengths = Lengths(owner, "step")

    def forward(self, standardize: Standardize, x: Tensor, times: Tensor | None, mask: Tensor | None) -> Steps:
        """Return the steps of series.

        Args:
            standardize: The layer that standardises values.
            x: The series, ``(*batch, T, num_features)``.
            times: The times of steps, ``(*batch, T)`` or ``(T,)``; by default 0 … T - 1.
            mask: True for steps that are there, ``(*batch, T)``, or for their entries, of the shape of x.

        Raises:
            ValueError: If times or mask have another shape.
        """
        x, times, entries = self._ordered(x, self._times(x, times), mask)
        there = entries.any(-1)
        self.lengths(there)
        values = standardize(x, entries).masked_fill(~entries, 0.0)
        clock = self.times(times.unsqueeze(-1), there).masked_fill(~there.unsqueeze(-1), 0.0)
        own, moments = _own_scale(values, entries)
        before, gaps, known = self._before(own, times, entries, there)
        paired = entries & known
        products = (own * before).masked_fill(~paired, 0.0), (own - before).square().masked_fill(~paired, 0.0)
        features = torch.cat((values, own, entries.to(values.dtype), before, gaps, *products, clock), -1)
        number = there.sum(-1, keepdim=True).to(values.dtype)
        return Steps(features, clock.squeeze(-1), there, torch.cat((moments, number.log1p()), -1))

    def _times(self, x: Tensor, times: Tensor | None) -> Tensor:
        """Return the times of all steps, ``(*batch, T)``."""
        if times is None:
            return torch.arange(x.shape[-2], device=x.device).expand(x.shape[:-1])
        if times.shape not in (x.shape[:-1], x.shape[-2:-1]):
            wanted = f"{tuple(x.shape[:-1])} or {tuple(x.shape[-2:-1])}, for data of shape {tuple(x.shape)}"
            raise ValueError(f"{self.owner}: times must have shape {wanted}, got {tuple(times.shape)}.")
        return (times if times.is_floating_point() else times.long()).expand(x.shape[:-1])

    def _ordered(self, x: Tensor, times: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return values, times and the mask of entries, the steps that are there first, with 0 for what is missing.

        The result has one step at least, since networks need one.
        """
        entries = as_mask(self.owner, x, mask, x.shape, x.shape[:-1])
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
        gaps = (all_times - all_times.gather(-2, index)).to(values.dtype) / self.times.scale.detach()
        logs = (gaps.clamp(min=0.0) + SHORTEST).log()
        # Series of one step have no gaps; their constant then sets the scale, to 1.
        seen = torch.where(known.any(), known, there.unsqueeze(-1))
        before, gaps = values.gather(-2, index), self.gaps(logs, seen)
        return before.masked_fill(~known, 0.0), gaps.masked_fill(~known, 0.0), known


def _own_scale(values: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Return values in the scale of each series, 0 where one is missing, and the moments of each series."""
    weights = entries / entries.sum(-2, keepdim=True).clamp(min=1).to(values.dtype)
    mean = (weights * values).sum(-2, keepdim=True)
    spread = ((weights * (values - mean).square()).sum(-2, keepdim=True) + LEAST_VARIANCE).sqrt()
    own = ((values - mean) / spread).masked_fill(~entries, 0.0)
    return own, torch.cat((mean, spread.log()), -1).squeeze(-2)


class SeriesEncoder(Encoder):
    """A network from series ``(*batch, T, num_features)`` to contexts: c = ρ(pooled states, moments of x, log(1 + T)).

    A subclass calls :meth:`finish` at the end of its constructor, and defines :meth:`pooled`.

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
        self.num_features, self.hidden_dim = num_features, hidden_dim
        self.standardize_steps = StepFeatures(name, num_features)

    def finish(self, number: int) -> None:
        """Build ρ, for a number of pooled states."""
        widths = number * self.hidden_dim + 2 * self.num_features + 1, self.hidden_dim
        self.rho = hidden_layers(type(self).__name__, *widths, activation=nn.SiLU)
        self.output = nn.Linear(self.hidden_dim, self.context_dim)

    @abstractmethod
    def pooled(self, steps: Steps) -> Tensor:
        """Return pooled states, ``(*batch, number * hidden_dim)``."""

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
        steps = self.standardize_steps(self.standardize, x, times, mask)
        return self.output(self.rho(torch.cat((self.pooled(steps), steps.moments), -1)))
