"""Maps of each number on its own: a bijector with learned or conditional parameters, and fixed maps."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from ..arguments import BIJECTOR, CONDITIONER, as_shape, check_integers, check_kind, check_numbers, require
from ..bijectors import Bijector
from ..bijectors.spline import rational_quadratic
from ..conditioners import Conditioner
from ..conditioners.base import Paced
from .base import FlowTransform, TwoWay, VectorTransform


class Conditional(VectorTransform):
    """A transform of vectors whose parameters are learned or, with a conditioner, depend on a context.

    A conditioner replaces the table of parameters, or adds to it: θ(c) = table + network(c).  Conditioners start at
    zero, and a table can start with random parts, which a network alone cannot give.

    Args:
        input_dim: The number D of features.
        conditioner: A network from contexts to parameters, or None.
        outputs: The numbers ``(output_dim, num_params)`` that the conditioner must have.

    Attributes:
        params: The table, which a subclass may set: of the shape of ``outputs``, or ``(num_params)`` if it stays with a
            conditioner.
    """

    params: nn.Parameter

    def __init__(
        self, input_dim: int, conditioner: Conditioner | None, outputs: tuple[int, int], start: Tensor | None = None
    ) -> None:
        if conditioner is not None:
            check_conditioner(type(self).__name__, conditioner, outputs)
        super().__init__(input_dim, 0 if conditioner is None else conditioner.input_dim)
        self.conditioner = conditioner
        self.register_parameter("params", None if start is None else nn.Parameter(start))

    def _params(self, context: Tensor | None) -> Tensor:
        """Return the parameters at a context: the table, ``(*batch, *outputs)``, or ``(*batch, num_params)``."""
        if self.conditioner is None:
            return self.params
        if context is None:
            raise ValueError(f"{type(self).__name__}: context is missing; its width is {self.context_dim}.")
        found: Tensor = self.conditioner(context)
        return found if self.params is None else self.params + found.squeeze(-2)


def check_conditioner(owner: str, conditioner: Conditioner, wanted: tuple[int, int]) -> None:
    """Raise TypeError unless a network is a conditioner, and ValueError unless it has ``(output_dim, num_params)``."""
    check_kind(owner, Conditioner, CONDITIONER, conditioner=conditioner)
    got = conditioner.output_dim, conditioner.num_params
    require(got == wanted, owner, "conditioner", f"have (output_dim, num_params) = {wanted}", got)


class Elementwise(Paced, TwoWay, Conditional):
    """Independent maps of the features of a vector ``(*batch, D)``, with parameters that are learned, or computed::

        y_i = f(x_i; θ_i(c)),    log|det dy/dx| = Σ_i log f'(x_i; θ_i)

    Args:
        bijector: The map.
        input_dim: The number D of features.
        conditioner: A network from contexts to parameters, with ``input_dim = context_dim`` and ``output_dim = D``; by
            default the parameters are a table ``params`` of shape ``(D, P)`` that starts at zero.

    Raises:
        ValueError: If ``input_dim`` is not positive, or the conditioner's sizes do not fit it or the bijector.  In use,
            if there is a conditioner and no context is given.

    Example::

        >>> import torch
        >>> from pyro_flows.bijectors import RationalQuadraticSpline
        >>> layer, x = Elementwise(RationalQuadraticSpline(), 3), torch.randn(5, 3)
        >>> y, log_det = layer.forward_and_log_det(x)
        >>> torch.allclose(y, x, atol=1e-5), log_det.shape, layer.params.shape
        (True, torch.Size([5]), torch.Size([3, 23]))
    """

    def __init__(self, bijector: Bijector, input_dim: int, conditioner: Conditioner | None = None) -> None:
        check_kind("Elementwise", Bijector, BIJECTOR, bijector=bijector)
        super().__init__(input_dim, conditioner, (input_dim, bijector.num_params))
        self.bijector = bijector
        if conditioner is None:
            self.params = nn.Parameter(torch.zeros(input_dim, bijector.num_params))
            self.stored = ("params",)

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        image, log_det = self.bijector.verb(inverse)(value, self._params(context))
        return image, log_det.sum(-1)

    def _params(self, context: Tensor | None) -> Tensor:
        return self.paced(super()._params(context))


class Sigmoid(FlowTransform):
    """The fixed elementwise map from R onto an interval that is slightly wider than ``[low, high]``::

        y = low + (high - low) (σ(x) - α) / (1 - 2 α)

    It ends a flow, whose events then lie in the interval.  A value outside has no logit, and its inverse is NaN.  With
    a small α > 0 the ends of the interval lie at finite x, so that data there, such as black pixels, do no harm.

    Density Estimation Using Real NVP (Dinh, Sohl-Dickstein, Bengio 2016, arXiv:1605.08803, section 4.1), where it is
    the preprocessing by a logit.

    Args:
        event_shape: The shape of an event.
        low: The lower end.
        high: The upper end.
        alpha: The share α by which the interval is wider, from 0 up to but below 1/2: its ends lie
            ``α (high - low) / (1 - 2 α)`` beyond ``low`` and ``high``.

    Raises:
        ValueError: If a size is not positive, the interval is empty or infinite, or α is out of its range.

    Example::

        >>> import torch
        >>> pixels = Sigmoid((1, 2, 2), high=256.0)
        >>> pixels(torch.zeros(1, 2, 2)).unique().item()
        128.0
    """

    def __init__(self, event_shape: Sequence[int], *, low: float = 0.0, high: float = 1.0, alpha: float = 0.05) -> None:
        super().__init__(as_shape("Sigmoid", "event_shape", event_shape))
        check_numbers("Sigmoid", low=low, high=high)
        check_numbers("Sigmoid", least=0, below=0.5, alpha=alpha)
        require(low < high, "Sigmoid", "low", f"lie below high = {high}", low)
        self.low, self.high, self.alpha = low, high, alpha
        self._stretch = (high - low) / (1 - 2 * alpha)
        ends = constraints.interval(low - alpha * self._stretch, high + alpha * self._stretch)
        self.codomain = constraints.independent(ends, len(self.event_shape))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.low + self._stretch * (torch.sigmoid(x) - self.alpha), self._log_det(x)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = torch.logit(self.alpha + (y - self.low) / self._stretch)
        return x, -self._log_det(x)

    def _log_det(self, x: Tensor) -> Tensor:
        return self.sum_event(F.logsigmoid(x) + F.logsigmoid(-x) + math.log(self._stretch))


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
