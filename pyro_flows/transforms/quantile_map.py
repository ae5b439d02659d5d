"""Fixed map of each feature from a normal distribution to that of some draws, through their quantiles."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import check_integers
from ..bijectors.spline import rational_quadratic
from .base import TwoWay, VectorTransform

DRAWS_PER_BIN = 50  # draws for each bin
DRAWS_BEYOND = 3  # draws beyond the outer knots
MIN_SLOPE = 1e-3  # of the slope across the quartiles, or of all bins if these are equal: the least slope of a bin


class QuantileMap(TwoWay, VectorTransform):
    """The fixed map of the features of a vector ``(*batch, D)`` from N(0, 1) to the distribution of some draws::

        y_i = Q_i(x_i),    log|det dy/dx| = Σ_i log Q_i'(x_i)

    Each Q is a monotone rational-quadratic spline through quantiles of the draws, with straight lines beyond the outer
    ones.  Until it is set, Q is the identity.  Amortised guides set it to draws of the prior before training.  Then the
    layers before it work in coordinates in which the prior is normal.  So tails of a posterior stay in proportion to
    those of the prior.  The exponential of a wide normal, for a scale parameter, would have huge draws.

    The slopes at the knots are as by Fritsch, Butland 1984, A method for constructing local monotone piecewise cubic
    interpolants.

    Args:
        input_dim: The number D of features.
        bins: The number K of bins between the outer quantiles.

    Attributes:
        table: Knots along x, knots along y, and slopes at the knots, ``(3, K + 1, D)``.

    Raises:
        ValueError: If ``input_dim`` is not positive, or ``bins`` is below 2.

    Example::

        >>> import torch
        >>> layer = QuantileMap(1)
        >>> layer.set(torch.linspace(0.0, 1.0, 10_001)[:, None])  # a uniform distribution
        >>> [round(y, 2) for y in layer(torch.tensor([[-1.0], [0.0], [1.0]])).flatten().tolist()]  # its quantiles
        [0.16, 0.5, 0.84]
    """

    def __init__(self, input_dim: int, bins: int = 16) -> None:
        super().__init__(input_dim)
        check_integers("QuantileMap", 2, bins=bins)
        self.bins = bins
        # A parameter, so that parameter stores hold it, but no gradient reaches it.
        self.table = nn.Parameter(_identity(bins).unsqueeze(-1).repeat(1, 1, input_dim))

    @torch.no_grad()
    def set(self, draws: Tensor | None, fixed: Tensor | None = None) -> None:
        """Set the map from N(0, 1) to the distribution of each feature of some draws, or to the identity.

        Fewer than 100 draws leave the identity, and few draws get few bins.  A bin of equal draws gets a small slope,
        which moves the quantiles above it.

        Args:
            draws: Draws ``(N, D)``, or None for the identity.
            fixed: For each feature, True if its map is the identity, ``(D,)``.
        """
        identity = _identity(self.bins).to(self.table).unsqueeze(-1)
        if draws is None or len(draws) < 2 * DRAWS_PER_BIN:
            self.table.copy_(identity.expand_as(self.table))
            return
        table = _through(draws.double(), min(self.bins, len(draws) // DRAWS_PER_BIN), self.bins).to(self.table)
        self.table.copy_(table if fixed is None else torch.where(fixed, identity, table))

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        table = self.table.detach()
        knots, images, slopes = table[int(inverse)], table[int(not inverse)], 1 / table[2] if inverse else table[2]
        inside = value.clamp(knots[0], knots[-1])
        image, log_det = rational_quadratic(inside, table, int(inverse))
        above = value > knots[-1]
        slope = torch.where(above, slopes[-1], slopes[0])
        line = torch.addcmul(torch.where(above, images[-1], images[0]), slope, value - inside)
        outside = value != inside
        return torch.where(outside, line, image), torch.where(outside, slope.log(), log_det).sum(-1)


def _identity(bins: int) -> Tensor:
    """Return the table of the identity, ``(3, K + 1)``."""
    knots = torch.linspace(-3.0, 3.0, bins + 1)
    return torch.stack((knots, knots, torch.ones_like(knots)))


def _through(draws: Tensor, used: int, bins: int) -> Tensor:
    """Return the table of a spline through ``used + 1`` quantiles of each column of draws, ``(3, bins + 1, D)``.

    Further knots lie on its last line.
    """
    number = len(draws)
    outer = torch.special.ndtri(draws.new_tensor(1 - DRAWS_BEYOND / number))
    x = torch.linspace(-1.0, 1.0, used + 1, dtype=draws.dtype, device=draws.device) * outer
    place = torch.special.ndtr(x) * (number - 1)
    ordered, low = draws.sort(0).values, place.floor().long()
    y = torch.lerp(ordered[low], ordered[(low + 1).clamp(max=number - 1)], (place - low).unsqueeze(-1))
    step = x[1] - x[0]
    rises = y.diff(dim=0) / step
    # Not the slope of all bins together: that of heavy tails would be the least one of the bins between them.
    width = ordered[round(0.75 * (number - 1))] - ordered[round(0.25 * (number - 1))]
    middle = width / (2 * torch.special.ndtri(draws.new_tensor(0.75)))
    usual = torch.where(middle > 0, middle, (y[-1:] - y[:1]) / (2 * outer))
    rises = torch.maximum(rises, MIN_SLOPE * torch.where(usual > 0, usual, 1.0))
    y = torch.cat((y[:1], y[:1] + step * rises.cumsum(0)))
    # The harmonic mean keeps each bin monotone, and is smooth where slopes differ.
    inner = 2 / (1 / rises[1:] + 1 / rises[:-1])
    slopes = torch.cat((rises[:1], inner, rises[-1:]))
    more = torch.arange(1, bins - used + 1, dtype=x.dtype, device=x.device).unsqueeze(-1) * step
    x = x.unsqueeze(-1).expand_as(y)
    further = x[-1:] + more, y[-1:] + more * slopes[-1:], slopes[-1:].expand(len(more), -1)
    return torch.stack([torch.cat(pair) for pair in zip((x, y, slopes), further, strict=True)])
