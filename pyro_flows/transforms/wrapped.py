"""Transforms around an inner one: at a context that is kept, or whose activations are computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..arguments import TRANSFORM, check_kind
from .base import FlowTransform, TwoWay, WithScore

T = TypeVar("T")


class Wrapped(TwoWay):
    """A transform whose results are those of an inner one, perhaps of other arguments.

    Args:
        inner: The inner transform.
        event_shape: The shape of an event, by default that of the inner transform.
        context_dim: The width of contexts, by default that of the inner transform.
    """

    def __init__(
        self, inner: FlowTransform, event_shape: Sequence[int] | None = None, context_dim: int | None = None
    ) -> None:
        check_kind(type(self).__name__, FlowTransform, TRANSFORM, inner=inner)
        shape, width = (
            tuple(event_shape or inner.event_shape),
            inner.context_dim if context_dim is None else context_dim,
        )
        super().__init__(shape, width)
        self.inner = inner
        if shape == inner.event_shape:
            self.domain, self.codomain = inner.domain, inner.codomain

    def arrange(self, x: Tensor) -> Tensor:
        """Return events ``(*batch, *event_shape)`` as the inner transform takes them."""
        return x

    def put_back(self, inside: Tensor, whole: Tensor) -> Tensor:
        """Return events with the results of the inner transform in the places of its inputs.

        Args:
            inside: The results, arranged.
            whole: The whole events, of which the inner transform may take a part.
        """
        return inside

    def inner_context(self, context: Tensor | None) -> Tensor | None:
        """Return the context as the inner transform takes it."""
        return context

    def total(self, log_det: Tensor) -> Tensor:
        """Return the log-determinants ``(*batch)`` from those of the inner transform."""
        return log_det

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        image, log_det = self.inner.verb(inverse)(self.arrange(value), self.inner_context(context))
        return self.put_back(image, value), self.total(log_det)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> WithScore:
        context = self.inner_context(context)
        y, log_det, inner_score = self.inner.forward_and_score(self.arrange(x), self.arrange(score), context)
        return self.put_back(y, x), self.total(log_det), self.put_back(inner_score, score)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        self.inner.initialize(self.arrange(y), self.inner_context(context))


class Conditioned(Wrapped):
    """A transform at one context, to keep: the context is a parameter like any other.

    ``transform.condition(context)`` is the same for one use.

    Args:
        inner: A transform that takes contexts.
        context: One context, ``(context_dim,)``; its values are copied, but a ``torch.nn.Parameter`` is kept itself,
            and may be shared.

    Raises:
        ValueError: If the context is not one vector of the transform's width.

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> layer = flows.nsf(2, context_dim=3).transforms[0]
        >>> held = Conditioned(layer, torch.zeros(3))
        >>> held.context_dim, held(torch.ones(5, 2)).shape, held.context.requires_grad
        (0, torch.Size([5, 2]), True)
    """

    def __init__(self, inner: FlowTransform, context: Tensor | nn.Parameter) -> None:
        check_kind("Conditioned", Tensor, "a tensor", context=context)
        super().__init__(inner, context_dim=0)
        wanted, got = (inner.context_dim,), tuple(context.shape)
        if got != wanted:
            raise ValueError(f"Conditioned: context must have shape {wanted}, got {got}.")
        self.context = context if isinstance(context, nn.Parameter) else nn.Parameter(context.detach().clone())

    def inner_context(self, context: Tensor | None) -> Tensor | None:
        return self.context


class Recomputed(Wrapped):
    """A transform that keeps only its input for the gradient; training takes about a third more time.

    Values, log-determinants and gradients are those of the inner transform, which is run again in the backward pass.

    Training Deep Nets with Sublinear Memory Cost (Chen, Xu, Zhang, Guestrin 2016, arXiv:1604.06174).

    Args:
        inner: The transform, of events of any shape.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import LULinear
        >>> inner, x = LULinear(3), torch.randn(5, 3)
        >>> torch.equal(Recomputed(inner)(x), inner(x))
        True
    """

    def __init__(self, inner: FlowTransform) -> None:
        super().__init__(inner)

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return recomputed(self.inner.verb(inverse), value, context)


def recomputed(function: Callable[..., T], *args: Any) -> T:
    """Call a function and keep only its arguments for the gradient; the backward pass calls it again."""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function(*args)
    from torch.utils.checkpoint import checkpoint  # which loads a compiler on torch 2.4

    return checkpoint(function, *args, use_reentrant=False)
