"""The base class of bijectors: increasing maps y = f(x; θ) of one number, whose parameters θ come from a transform."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Bijector(ABC):
    """An increasing map of the real line onto itself, y = f(x; θ), with P real parameters θ for each scalar.

    It is the abstract base class of all elementwise maps.  A bijector holds hyper-parameters and no tensors.  Its
    parameters θ come from a transform: from the table of an :class:`~pyro_flows.transforms.Elementwise`, or from the
    network of a :class:`~pyro_flows.transforms.Coupling`.

    A subclass is a frozen dataclass of hyper-parameters, which makes it hashable.  It defines :attr:`num_params` and
    the two directions.  It satisfies these conditions at any parameters, in float32 and in float64:

    - zero parameters are the identity;
    - the two directions are inverse to each other, and the log-determinant is the logarithm of autograd's derivative;
    - the map is defined, finite and strictly increasing on all of R, for example by linear tails: a map of a box alone
      would lose the mass outside;
    - values, log-determinants and their gradients are finite.  Clamp inputs *before* a formula that holds in a part of
      R only: a gradient through the branch that ``torch.where`` discards could be NaN;
    - nothing is written in place, and no branch depends on data, so that ``torch.compile`` and ``torch.func.vmap``
      work.

    Maps without an inverse in closed form derive from :class:`Continued`.

    Example::

        >>> import torch
        >>> from dataclasses import dataclass
        >>> from pyro_flows.transforms import Elementwise
        >>> @dataclass(frozen=True)
        ... class Scale(Bijector):
        ...     num_params = 1
        ...     def forward_and_log_det(self, x, params):
        ...         y = x * params[..., 0].exp()
        ...         return y, params[..., 0].expand_as(y)
        ...     def inverse_and_log_det(self, y, params):
        ...         x = y * torch.exp(-params[..., 0])
        ...         return x, -params[..., 0].expand_as(x)
        >>> layer = Elementwise(Scale(), 3)  # a transform that learns three scales
        >>> torch.nn.init.constant_(layer.params, 0.5)[:, 0].tolist()
        [0.5, 0.5, 0.5]
        >>> layer.forward_and_log_det(torch.ones(3))[1].item()  # the sum of three log-scales, in nats
        1.5
    """

    @property
    @abstractmethod
    def num_params(self) -> int:
        """The number P of parameters for each scalar; it follows from the hyper-parameters."""

    @abstractmethod
    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Map x to y.

        Args:
            x: Values of shape ``(*s)``.
            params: Parameters of shape ``(*s, P)``, or of any shape whose leading dimensions broadcast with ``x``.

        Returns:
            ``(y, log|dy/dx|)``, each of the shape to which ``x`` and the leading dimensions of ``params`` broadcast.
            The log-determinant is in nats.
        """

    @abstractmethod
    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Map y back to x.

        Args:
            y: Values of shape ``(*s)``.
            params: As for ``forward_and_log_det``.

        Returns:
            ``(x, log|dx/dy|)``, of the shapes of ``forward_and_log_det``.  The log-determinant is in nats, with the
            opposite sign of the forward direction.
        """

    def verb(self, inverse: bool) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return one of the two directions."""
        return self.inverse_and_log_det if inverse else self.forward_and_log_det


def bounded(raw: Tensor, limit: float) -> Tensor:
    """Return real numbers bounded smoothly to (-limit, limit), with slope 1 at zero."""
    return limit * torch.tanh(raw / limit)


def as_column(values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """Return n values as ``(n, 1, …, 1)``, with as many dimensions as ``like``, whose first are parameters."""
    return torch.as_tensor(values, dtype=like.dtype, device=like.device).view(-1, *(1,) * (like.dim() - 1))


def evenly_spaced(low: float, high: float, count: int, like: Tensor) -> Tensor:
    """Return evenly spaced numbers, both ends included, in the shape of :func:`as_column`."""
    return as_column(torch.linspace(low, high, count, dtype=like.dtype, device=like.device), like)
