"""Steps of time series as features of networks: values, missing entries, times and gaps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .masks import as_mask
from .standardize import Standardize

SHORTEST = 1e-4  # of the gaps that networks tell apart, in standard deviations of times


class Steps(NamedTuple):
    """The steps of series, those that are there first, in their order.

    Attributes:
        features: The features of steps, ``(*batch, T, StepFeatures.width)``, 0 where no step is there.
        times: Their standardised times, ``(*batch, T)``, 0 where no step is there.
        there: True where a step is there, ``(*batch, T)``.
    """

    features: Tensor
    times: Tensor
    there: Tensor

    @property
    def log_number(self) -> Tensor:
        """The logarithm of 1 plus the number of steps, ``(*batch, 1)``."""
        return self.there.sum(-1, keepdim=True).to(self.features.dtype).log1p()


class StepFeatures(nn.Module):
    """The features of the steps of time series::

        standardised values, 0 where one is missing,    1 where a value is there and 0 where it is missing,
        for each value the one before it that is there, 0 before the first,    the standardised log of the gap between,
        the standardised time

    Recurrent Neural Networks for Multivariate Time Series with Missing Values (Che, Purushotham, Cho, Sontag, Liu 2016,
    arXiv:1606.01865).

    Args:
        owner: The name of the encoder, for errors.
        num_features: The number of values of a step.
    """

    def __init__(self, owner: str, num_features: int) -> None:
        super().__init__()
        self.owner, self.width = owner, 4 * num_features + 1
        self.times, self.gaps = Standardize((1,)), Standardize((1,))

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
        values = standardize(x, entries).masked_fill(~entries, 0.0)
        clock = self.times(times.unsqueeze(-1), there).masked_fill(~there.unsqueeze(-1), 0.0)
        before, gaps = self._before(values, times, entries, there)
        features = torch.cat((values, entries.to(values.dtype), before, gaps, clock), -1)
        return Steps(features, clock.squeeze(-1), there)

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

    def _before(self, values: Tensor, times: Tensor, entries: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value before each that is there, and the standardised log gap since then, 0 before the first."""
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
        return values.gather(-2, index).masked_fill(~known, 0.0), self.gaps(logs, seen).masked_fill(~known, 0.0)
