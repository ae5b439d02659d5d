"""Vector fields v(t, x, context): networks whose flow along time is a continuous transform.

A field says at once where a point moves and how the Jacobian J = ∂v/∂x acts there, as the divergence tr J and products
Jᵀ v need.  Where a network does not know its Jacobian, autograd finds it.

Neural Ordinary Differential Equations (Chen, Rubanova, Bettencourt, Duvenaud 2018, arXiv:1806.07366).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..arguments import check_integers


class Derivative(Protocol):
    """What is asked of the Jacobian J of a field at each of a batch of points."""

    def trace(self) -> Tensor:
        """tr J, ``(*batch)``."""

    def pull(self, v: Tensor) -> Tensor:
        """Jᵀ v for covectors, ``(K, *batch, D)``."""


Rates = Callable[[Tensor, Tensor], tuple[Tensor, Derivative]]  # (t, x) -> v, J


class VectorField(nn.Module, ABC):
    """A field v(t, x, c) of D numbers that depends on time, on the point, and on a context where there is one.

    It is the abstract base class of what :class:`~pyro_flows.transforms.Continuous` follows, dx/dt = v(t, x, c).
    Any network may be one: define ``forward`` and call ``super().__init__(input_dim, context_dim)``.  Rows must not
    depend on one another, nor calls on chance, as batch norm and dropout make them.  Slopes should be continuous, or
    adaptive solvers stumble at each kink.  Its last layer had best start at zero, so that the transform starts at the
    identity.  By default autograd finds the Jacobian; a field that knows its own overrides :meth:`at`.

    Neural Ordinary Differential Equations (Chen, Rubanova, Bettencourt, Duvenaud 2018, arXiv:1806.07366).

    Args:
        input_dim: The number D of features, at least 1.
        context_dim: The number of context features, at least 0.

    Attributes:
        cheap_trace: Whether the divergence costs about as much as the field itself, whatever D is; by default False.

    Raises:
        ValueError: If a size is out of its range.  In use, if the velocities that ``forward`` returns do not have the
            shape and the dtype of the points.

    Example::

        >>> import torch
        >>> class Rotation(VectorField):
        ...     def forward(self, t, x, context=None):
        ...         return torch.stack((-x[..., 1], x[..., 0]), -1)
        >>> v, jacobian = Rotation(2).at()(torch.tensor(0.5), torch.randn(5, 2))
        >>> v.shape, jacobian.trace().tolist()
        (torch.Size([5, 2]), [0.0, 0.0, 0.0, 0.0, 0.0])
    """

    cheap_trace = False

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__()
        check_integers(type(self).__name__, input_dim=input_dim)
        check_integers(type(self).__name__, 0, context_dim=context_dim)
        self.input_dim, self.context_dim = input_dim, context_dim

    @abstractmethod
    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity of each point, ``(*batch, D)``.

        Args:
            t: The time, ``()``, or one for each point, ``(*batch)``; between 0 and 1.
            x: The points, ``(*batch, D)``.
            context: Contexts, ``(*batch, context_dim)``, that broadcast with x, or None if ``context_dim`` is 0.

        Returns:
            Of the shape and the dtype of x, which has the batch shape of all three when a solver asks.

        Raises:
            ValueError: If the field takes contexts and none is given.
        """

    def at(self, context: Tensor | None = None) -> Rates:
        """The field at a context, with its Jacobian J = ∂v/∂x.

        Args:
            context: Contexts, ``(*batch, context_dim)``, that broadcast with the points, or None.

        Returns:
            A function ``(t, x) -> (v, J)`` of time and points, to velocities ``(*batch, D)`` and what has the methods
            ``J.trace()``, which gives the divergence ``(*batch)``, and ``J.pull(w)``, which takes covectors
            ``(K, *batch, D)`` to Jᵀ w of the same shape.

        Raises:
            ValueError: If the field takes contexts and none is given; and, from the function that is returned, if
                velocities do not have the shape and the dtype of the points.
        """

        def rates(t: Tensor, x: Tensor) -> tuple[Tensor, Derivative]:
            lasting = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.enable_grad():
                place = x if lasting and x.requires_grad else _recordable(x).detach().requires_grad_()
                v = self(_recordable(t), place, None if context is None else _recordable(context))
                if v.shape != x.shape or v.dtype != x.dtype:
                    raise ValueError(
                        f"{type(self).__name__}: the velocity of {tuple(x.shape)} points in {x.dtype} must have their "
                        f"shape and dtype, got {tuple(v.shape)} in {v.dtype}."
                    )
            return (v if lasting else v.detach()), Differentiated(place, v, lasting)

        return rates


def _recordable(value: Tensor) -> Tensor:
    """A tensor that autograd takes, also where it was made in inference mode."""
    return value.clone() if value.is_inference() else value


class Differentiated(NamedTuple):
    """A Jacobian by autograd: all products in one batch."""

    x: Tensor
    v: Tensor
    lasting: bool  # whether what is returned can be differentiated in its turn

    def trace(self) -> Tensor:
        size = self.x.shape[-1]
        units = torch.eye(size, dtype=self.x.dtype, device=self.x.device)
        rows = self.pull(units.reshape(size, *[1] * (self.x.dim() - 1), size).expand(size, *self.x.shape))
        return torch.einsum("i...i->...", rows)

    def pull(self, v: Tensor) -> Tensor:
        if not self.v.requires_grad:  # a field of time alone, without parameters
            return torch.zeros_like(v)
        with torch.inference_mode(False):
            (found,) = torch.autograd.grad(
                self.v,
                self.x,
                _recordable(v.expand(-1, *self.v.shape)),
                retain_graph=True,
                create_graph=self.lasting,
                allow_unused=True,
                is_grads_batched=True,
            )
        return torch.zeros_like(v) if found is None else found
