"""Vector fields v(t, x, context): networks whose flow along time is a continuous transform.

A field returns its velocity at a point together with its Jacobian J = ∂v/∂x there.  The Jacobian gives the divergence
tr J and the products Jᵀ v.  If a network does not know its Jacobian, autograd finds it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import check_integers, check_sizes
from .base import share_of
from .jacobian import SMOOTH, Jacobian
from .pace import Linear, Network


class Differentiated(NamedTuple):
    """A Jacobian by autograd: all products in one batch."""

    x: Tensor
    v: Tensor
    lasting: bool  # True if the results can be differentiated again

    def trace(self) -> Tensor:
        """Return tr J, ``(*batch)``."""
        size = self.x.shape[-1]
        units = torch.eye(size, dtype=self.x.dtype, device=self.x.device)
        rows = self.pull(units.reshape(size, *[1] * (self.x.dim() - 1), size).expand(size, *self.x.shape))
        return torch.einsum("i...i->...", rows)

    def pull(self, v: Tensor) -> Tensor:
        """Return Jᵀ v for covectors v, ``(K, *batch, D)``."""
        if not self.v.requires_grad:  # a field of time alone, without parameters
            return torch.zeros_like(v)
        with torch.inference_mode(False):
            settings = {"retain_graph": True, "create_graph": self.lasting, "is_grads_batched": True}
            seeds = _recordable(v.expand(-1, *self.v.shape))
            (found,) = torch.autograd.grad(self.v, self.x, seeds, allow_unused=True, **settings)
        return torch.zeros_like(v) if found is None else found


Rates = Callable[[Tensor, Tensor], tuple[Tensor, Jacobian | Differentiated]]  # (t, x) -> v, J


class VectorField(nn.Module):
    """A field v(t, x, c) of D numbers that depends on time, on the point, and optionally on a context.

    It is the abstract base class of the fields that :class:`~pyro_flows.transforms.Continuous` integrates, dx/dt =
    v(t, x, c).  To make a field of any network, define ``forward`` and call ``super().__init__(input_dim,
    context_dim)``.  Rows must be independent of one another and calls deterministic, unlike with batch norm and
    dropout.  Slopes should be continuous, since adaptive solvers take small steps at each kink.  The last layer should
    start at zero, so that the transform starts at the identity.  By default autograd finds the Jacobian.  A field that
    knows its own overrides :meth:`at`.

    Neural Ordinary Differential Equations (Chen, Rubanova, Bettencourt, Duvenaud 2018, arXiv:1806.07366).

    Args:
        input_dim: The number D of features, at least 1.
        context_dim: The number of context features, at least 0.

    Attributes:
        cheap_trace: True if the divergence costs about as much as the field itself, whatever D is; by default False.

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
        """Return the velocity of each point, ``(*batch, D)``.

        Args:
            t: The time, ``()``, or one for each point, ``(*batch)``; between 0 and 1.
            x: The points, ``(*batch, D)``.
            context: Contexts, ``(*batch, context_dim)``, that broadcast with x, or None if ``context_dim`` is 0.

        Returns:
            Of the shape and the dtype of x.  Solvers pass points x of the batch shape of all three arguments.

        Raises:
            ValueError: If the field takes contexts and none is given.
        """

    def at(self, context: Tensor | None = None) -> Rates:
        """Return the field at a context, with its Jacobian J = ∂v/∂x.

        Args:
            context: Contexts, ``(*batch, context_dim)``, that broadcast with the points, or None.

        Returns:
            A function ``(t, x) -> (v, J)`` of time and points, with velocities v, ``(*batch, D)``.  J has two methods.
            ``J.trace()`` returns the divergence ``(*batch)``.  ``J.pull(w)`` returns Jᵀ w for covectors w,
            ``(K, *batch, D)``.

        Raises:
            ValueError: If the field takes contexts and none is given.  The returned function raises it if velocities do
                not have the shape and the dtype of the points.
        """

        def rates(t: Tensor, x: Tensor) -> tuple[Tensor, Jacobian | Differentiated]:
            lasting = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.enable_grad():
                place = x if lasting and x.requires_grad else _recordable(x).detach().requires_grad_()
                v = self(_recordable(t), place, None if context is None else _recordable(context))
                if v.shape != x.shape or v.dtype != x.dtype:
                    fault = f"the velocity of {tuple(x.shape)} points in {x.dtype} must have their shape and dtype"
                    raise ValueError(f"{type(self).__name__}: {fault}, got {tuple(v.shape)} in {v.dtype}.")
            return (v if lasting else v.detach()), Differentiated(place, v, lasting)

        return rates


def _recordable(value: Tensor) -> Tensor:
    """Return a tensor that autograd can record, also if it was made in inference mode."""
    return value.clone() if value.is_inference() else value


class MLPField(Network, VectorField):
    """A multilayer perceptron as a vector field, zero at the start::

        v(t, x, c) = W_L h_{L-1} + b_L,    h_l = a(W_l h_{l-1} + b_l),    h_1 = a(W_1 x + b_1 + U τ(t) + V c)

    Time enters by its first Fourier modes τ, cos kπt and sin kπt.  Time and context are added to the first hidden
    layer.  The field knows its Jacobian: with one or two hidden layers the exact divergence costs at most as much as
    the field.

    FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models (Grathwohl, Chen, Bettencourt,
    Sutskever, Duvenaud 2018, arXiv:1810.01367).

    Args:
        input_dim: The number D of features, at least 1.
        context_dim: The number of context features.
        hidden_dims: The widths of the hidden layers, at least one.
        frequencies: The number of Fourier modes of time, at least 1.
        activation: The class of the nonlinearity, with continuous slopes: ``torch.nn``'s ``ELU``, ``SiLU``,
            ``Softplus`` or ``Tanh``.

    Raises:
        ValueError: If a size is out of its range, or ``activation`` is not one of the four.  In use, if the
            field takes contexts and none is given.

    Example::

        >>> import torch
        >>> field = MLPField(2, context_dim=4)
        >>> t, x = torch.rand(7), torch.randn(7, 2)
        >>> v, jacobian = field.at(torch.randn(4))(t, x)
        >>> v.shape, jacobian.trace().shape
        (torch.Size([7, 2]), torch.Size([7]))
    """

    hidden: Sequence[Linear]

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        *,
        frequencies: int = 3,
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(input_dim, context_dim)
        check_sizes("MLPField", hidden_dims=hidden_dims)
        check_integers("MLPField", frequencies=frequencies)
        if not isinstance(activation, type) or activation not in SMOOTH:
            names = ", ".join(known.__name__ for known in SMOOTH)
            fault = f"activation must be one of {names}, of torch.nn, with continuous slopes, got {activation!r}"
            raise ValueError(f"MLPField: {fault}. For others, write a subclass of VectorField.")
        self.hidden_dims, self.frequencies, self.activation = tuple(hidden_dims), frequencies, activation
        self.cheap_trace = len(self.hidden_dims) <= 2
        layers = nn.ModuleList(Linear(n, m) for n, m in pairwise((input_dim, *self.hidden_dims)))
        self.hidden = layers  # type: ignore[assignment]
        self.output = Linear(self.hidden_dims[-1], input_dim, zero=True)
        self.act = activation()
        self.from_time = Linear(2 * frequencies, self.hidden_dims[0], bias=False)
        self.from_context = Linear(context_dim, self.hidden_dims[0], bias=False) if context_dim else None

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        first, *others = self.hidden
        h = self.act(first(x) + self._shift(t, share_of(self, context)))
        for layer in others:
            h = self.act(layer(h))
        return self.output(h)

    def at(self, context: Tensor | None = None) -> Rates:
        weights = [layer.matrix() for layer in (*self.hidden, self.output)]
        share = share_of(self, context)
        slope_of = SMOOTH[self.activation]

        def rates(t: Tensor, x: Tensor) -> tuple[Tensor, Jacobian | Differentiated]:
            h, slopes = x, []
            for number, layer in enumerate(self.hidden):
                a = layer(h) if number else layer(h) + self._shift(t, share)
                h = self.act(a)
                slopes.append(slope_of(a, h))
            return self.output(h), Jacobian(weights, slopes)

        return rates

    def _shift(self, t: Tensor, share: Tensor | None) -> Tensor:
        """Return the terms of the time and of the context in the first hidden layer."""
        modes = math.pi * torch.arange(1, self.frequencies + 1, dtype=t.dtype, device=t.device)
        phases = modes * t.unsqueeze(-1)
        of_time = self.from_time(torch.cat((phases.cos(), phases.sin()), -1))
        return of_time if share is None else of_time + share
