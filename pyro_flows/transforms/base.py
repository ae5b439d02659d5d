"""The contract of a transform: one verb pair with an optional context, from which Pyro's and torch's protocols follow.

They do so in this one file.  A transform keeps no state between calls.  What torch's protocol splits into two
questions, value and log-determinant, is answered from one evaluation by an ephemeral :class:`View`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from pyro.distributions import TransformModule
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..arguments import TRANSFORM, as_shape, check_integers, check_kind
from ..conditioners.base import Gradients as Gradients
from ..vjp import vjp
from .view import View

Scored = tuple[Tensor, Tensor, Tensor]  # values, log-determinants, and the scores of the values


class Carried(NamedTuple):
    """Values of a transform with their scores and derivatives, outside of autograd.

    Attributes:
        y: The values.
        log_det: The log-determinants.
        score: The scores of the values.
        pull: The vector–Jacobian product: the gradient of y -> that of x, and those of the transform's parameters.
    """

    y: Tensor
    log_det: Tensor
    score: Tensor
    pull: Callable[[Tensor], tuple[Tensor, Gradients]]


class FlowTransform(TransformModule):
    """A learnable bijection of events, y = t(x | c), with or without a context c.

    It is the abstract base class of all transforms: a ``torch.nn.Module`` and Pyro's ``TransformModule`` and
    ``ConditionalTransform`` in one.  ``t(x)``, ``t.inv``, ``t.condition(context)`` and all else follow from two verbs.

    A subclass calls ``super().__init__``, defines the verbs, may override :meth:`forward_and_score`,
    :meth:`carry`, :meth:`initialize` and :meth:`compiles` or set ``codomain``, and keeps these laws at any parameters:

    - the verbs undo each other, and log-determinants are those of autograd's Jacobian, in nats;
    - batches have any shape, also none, and broadcast with those of contexts; events do not touch one another;
    - nothing is kept between calls, or written in place; what is set and not learned is a buffer;
    - it starts at the identity, or as its paper says, with gradients that reach every parameter.

    Args:
        event_shape: The shape of an event, as ``(D,)`` of a vector.
        context_dim: The width of contexts; 0 if there are none.

    Raises:
        ValueError: If a size of an event is not positive, or ``context_dim`` is negative.

    Example::

        >>> import torch
        >>> from pyro_flows import Flow
        >>> class Stretch(FlowTransform):
        ...     def __init__(self, dim):
        ...         super().__init__((dim,))
        ...         self.s = torch.nn.Parameter(torch.zeros(dim))
        ...     def forward_and_log_det(self, x, context=None):
        ...         return x * self.s.exp(), self.s.sum().expand(x.shape[:-1])
        ...     def inverse_and_log_det(self, y, context=None):
        ...         return y * torch.exp(-self.s), -self.s.sum().expand(y.shape[:-1])
        >>> round(Flow([Stretch(2)]).log_prob(torch.zeros(2)).item(), 4)  # nats: -log 2π
        -1.8379
    """

    bijective = True
    event_shape: torch.Size
    context_dim: int = 0

    @abstractmethod
    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x to y.

        Args:
            x: Events ``(*batch, *event_shape)``.
            context: ``(*batch, context_dim)``, whose batch broadcasts with that of ``x``; None if there are none.

        Returns:
            ``(y, log|det dy/dx|)``, of shapes ``(*batch, *event_shape)`` and ``(*batch)``, the latter in nats.

        Raises:
            ValueError: If the transform takes contexts and none is given.
        """

    @abstractmethod
    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map y back to ``(x, log|det dx/dy|)``; arguments, shapes, units and errors of :meth:`forward_and_log_det`."""

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        """Map ``x`` and carry the score of its law along, which path gradients need.

        With q(y) the law of y when x follows p, ``∇_y log q`` is the Jacobian's inverse transpose times
        ``∇_x (log p - log|det dy/dx|)``; by default it is found on the way back.

        Args:
            x: ``(*batch, *event_shape)``; a tensor that requires grad.
            score: ``∇_x log p(x)``, of the shape of ``x``.
            context: As for the verb pair.

        Returns:
            ``(y, log|det dy/dx|, ∇_y log q(y))``; the score carries no gradient.
        """
        y, log_det = self.forward_and_log_det(x, context)
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            back, back_log_det = self.inverse_and_log_det(leaf, context)
            log_density = (score * back).sum() + back_log_det.sum()
            return y, log_det, torch.autograd.grad(log_density, leaf)[0]

    def carry(self, x: Tensor, score: Tensor) -> Carried:
        """Map ``x`` and carry the score along as ``forward_and_score`` does, outside of autograd.

        There is no context.  By default autograd does it for this transform alone.  A class that overrides this method
        is to look whether classes below it have changed what it knows the derivatives of (``vjp.keeps``).
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y, log_det, score = self.forward_and_score(x, score)

        def pull(g: Tensor) -> tuple[Tensor, Gradients]:
            of_x, *rest = vjp((y,), (x, *trained), (g,))
            return of_x, list(zip(trained, rest, strict=True))

        return Carried(y.detach(), log_det.detach(), score, pull)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Let data that this transform shall produce, ``(*batch, *event_shape)``, set its parameters.

        By default nothing is set.
        """

    def compiles(self, inverse: bool) -> bool:
        """Whether a verb compiles to one graph, whose size grows neither with the features nor with the data."""
        return all(child.compiles(inverse) for child in inner_transforms(self))

    def __init__(self, event_shape: torch.Size | tuple[int, ...], context_dim: int = 0) -> None:
        super().__init__()
        self.event_shape = as_shape(type(self).__name__, "event_shape", event_shape)
        check_integers(type(self).__name__, 0, context_dim=context_dim)
        self.context_dim = context_dim
        self.domain = self.codomain = constraints.independent(constraints.real, len(self.event_shape))

    @property
    def inv(self) -> FlowTransform:
        """The opposite direction, a module that owns this one; ``t.inv.inv is t`` unless t is an inverse."""
        return Inverse(self)

    def condition(self, context: Tensor) -> Transform:
        """This transform at a context ``(*batch, context_dim)``: a :class:`View`, or itself where it takes none."""
        return View(self, context) if self.context_dim else self

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """Itself: modules remember nothing, and views always keep the one pair."""
        return self

    def _batch_of(self, x: Tensor, context: Tensor | None) -> torch.Size:
        """Return the batch shape of events and contexts together."""
        batch = x.shape[: x.dim() - len(self.event_shape)]
        return batch if context is None else torch.broadcast_shapes(batch, context.shape[:-1])

    def _rows_of(self, x: Tensor, context: Tensor | None) -> tuple[torch.Size, Tensor, Tensor | None]:
        """Return the batch shape, and events and contexts as rows, ``(N, *event_shape), (N, context_dim)``."""
        batch, event = self._batch_of(x, context), x.shape[x.dim() - len(self.event_shape) :]
        if context is not None:
            context = context.expand(*batch, context.shape[-1]).reshape(batch.numel(), context.shape[-1])
        return batch, x.expand(batch + event).reshape(batch.numel(), *event), context

    def _sum_event(self, x: Tensor) -> Tensor:
        """Sum over the dimensions of an event, ``(*batch, *event_shape) -> (*batch)``."""
        return x.sum(tuple(range(-len(self.event_shape), 0)))

    def _call(self, x: Tensor) -> Tensor:
        return self.forward_and_log_det(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_log_det(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        """log|det dy/dx| alone, ``(*batch)`` in nats, as torch asks for it; y, the image of x, is not looked at."""
        return self.forward_and_log_det(x, context)[1]

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


ConditionalTransform.register(FlowTransform)


class VectorTransform(FlowTransform):
    """A transform of vectors ``(*batch, input_dim)``.

    Args:
        input_dim: The number D of features.
        context_dim: The width of contexts; 0 if there are none.
    """

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        check_integers(type(self).__name__, input_dim=input_dim)
        super().__init__((input_dim,), context_dim)
        self.input_dim = input_dim


class Inverse(FlowTransform):
    """A transform read backwards, what ``transform.inv`` is.  It owns the transform, which keeps no reference back.

    Args:
        transform: The transform.

    Example::

        >>> from pyro_flows.transforms import LULinear
        >>> layer = LULinear(3)
        >>> layer.inv.inv is layer, len(list(layer.inv.parameters()))
        (True, 2)
    """

    def __init__(self, transform: FlowTransform) -> None:
        check_kind("Inverse", FlowTransform, TRANSFORM, transform=transform)
        super().__init__(transform.event_shape, transform.context_dim)
        self.transform = transform

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_log_det(x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_log_det(y, context)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        return -self.transform.log_abs_det_jacobian(y, x, context)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Do nothing, or raise a NotImplementedError where the transform starts from data that *it* produces."""
        if type(self.transform).initialize is not FlowTransform.initialize:
            raise NotImplementedError(
                f"{type(self.transform).__name__} starts from data that it produces; initialise it, not its inverse."
            )

    def compiles(self, inverse: bool) -> bool:
        return self.transform.compiles(not inverse)

    @property
    def inv(self) -> FlowTransform:
        return self.transform


def inner_transforms(module: nn.Module) -> Iterator[FlowTransform]:
    """The transforms that a module is made of, without those that these are made of."""
    for child in module.children():
        if isinstance(child, FlowTransform):
            yield child
        else:
            yield from inner_transforms(child)
