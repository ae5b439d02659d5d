"""The contract of an elementwise map: one verb pair, no tensors of its own.

A bijector is a strictly increasing map of the real line onto itself whose shape is set by ``num_params`` real
numbers for each scalar.  A transform supplies these numbers: from a network (coupling, autoregressive) or from a
table of its own (elementwise).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..vjp import vjp


class Pulled(NamedTuple):
    """Values of a bijector with their derivatives, outside of autograd.

    Attributes:
        y: The values.
        log_det: The log-determinants.
        bend: The derivative of the log-determinant in x, ``(*s)``; None if it is zero.
        pull: The vector–Jacobian product: the gradients of y and of the log-determinant, None for zero -> those of x
            and of the parameters.
    """

    y: Tensor
    log_det: Tensor
    bend: Tensor | None
    pull: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Bijector(ABC):
    """An increasing map of the real line onto itself, y = f(x; θ), with P real parameters θ for each scalar.

    It is the abstract base class of all elementwise maps.  A bijector holds numbers and no tensors: the parameters come
    from outside, such as from the table of an :class:`~pyro_flows.transforms.Elementwise` or the network of a
    :class:`~pyro_flows.transforms.Coupling`.

    A subclass is a frozen dataclass of hyper-parameters, which makes it hashable, and defines :attr:`num_params` and
    the two verbs.  It keeps these laws, at any parameters, in float32 and in float64:

    - zero parameters are the identity;
    - the two verbs undo each other, and the log-determinant is the logarithm of autograd's derivative;
    - the map is defined, finite and strictly increasing on all of R, as by straight tails: mass that leaves a box
      would be lost;
    - values, log-determinants and their gradients are finite, so inputs are clamped *before* a formula that holds in a
      part of R only: the branch that ``torch.where`` leaves out would make a gradient NaN;
    - nothing is written in place, and no branch depends on data, so that ``torch.compile`` and ``torch.func.vmap`` see
      through it.

    Maps without an inverse in closed form need not find one: see :class:`Continued`.

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
            params: Parameters of shape ``(*s, P)``, or any shape whose leading part broadcasts with ``x``.

        Returns:
            ``(y, log|dy/dx|)``, each of shape ``(*s)``, or what ``x`` and the leading part of ``params`` broadcast to;
            the log-determinant is in nats.
        """

    @abstractmethod
    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Map y back to x.

        Args:
            y: Values of shape ``(*s)``.
            params: As in :meth:`forward_and_log_det`.

        Returns:
            ``(x, log|dx/dy|)``, of the shapes of :meth:`forward_and_log_det`; the log-determinant is in nats, and minus
            that of the way forward.
        """

    def forward_and_pull(self, x: Tensor, params: Tensor) -> Pulled:
        """Map x to y, with the derivatives that path gradients take.

        By default autograd finds them.

        Args:
            x: Values of shape ``(*s)``.
            params: Parameters of shape ``(*s, P)``.
        """
        with torch.enable_grad():
            x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
            y, log_det = self.forward_and_log_det(x, params)

        def pull(of_y: Tensor, of_log_det: Tensor | None) -> tuple[Tensor, Tensor]:
            if of_log_det is None:
                of_x, of_params = vjp((y,), (x, params), (of_y,))
            else:
                of_x, of_params = vjp((y, log_det), (x, params), (of_y, of_log_det))
            return of_x, of_params

        (bend,) = vjp((log_det,), (x,), (torch.ones_like(log_det),))
        return Pulled(y.detach(), log_det.detach(), bend, pull)


def split_params(params: Tensor) -> tuple[Tensor, ...]:
    """The P parameters of shape ``(*s)`` each, so that their gradients are put together in the conditioners' order."""
    return params.mT.unbind(-2) if params.dim() > 1 else params.unbind(-1)


def bounded(raw: Tensor, limit: float) -> Tensor:
    """A real number as one between -limit and limit, smoothly; near zero it stays what it is."""
    return limit * torch.tanh(raw / limit)
