"""The contract of a transform: one verb pair with an optional context, from which Pyro's and torch's protocols follow.

A transform keeps no state between calls.  Torch's protocol asks for value and log-determinant in two calls; an
ephemeral :class:`View` answers both from one evaluation.  Inverses and compositions of transforms are transforms too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from pyro.distributions import TransformModule
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..arguments import TRANSFORM, as_shape, check_integers, check_kind, quoted
from ..conditioners.pace import Gradients as Gradients
from ..vjp import keeps, vjp
from .torch_view import View

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

    A subclass calls ``super().__init__`` and defines the verbs.  It may override :meth:`forward_and_score`,
    :meth:`carry`, :meth:`initialize` and :meth:`compiles`, or set ``codomain``.  It keeps these rules at any
    parameters:

    - the verbs undo each other, and log-determinants are those of autograd's Jacobian, in nats;
    - batches have any shape, including none, and broadcast with those of contexts; events are independent;
    - nothing is kept between calls, or written in place; what is set and not learned is a buffer;
    - it starts at the identity, or as its paper says, with gradients that reach every parameter.

    Args:
        event_shape: The shape of an event, as ``(D,)`` of a vector.
        context_dim: The width of contexts; 0 for a transform without contexts.

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
            context: ``(*batch, context_dim)``, whose batch broadcasts with that of ``x``; None if ``context_dim`` is 0.

        Returns:
            ``(y, log|det dy/dx|)``, of shapes ``(*batch, *event_shape)`` and ``(*batch)``, the latter in nats.

        Raises:
            ValueError: If the transform takes contexts and none is given.
        """

    @abstractmethod
    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map y back to ``(x, log|det dx/dy|)``.

        Arguments, shapes, units and errors are those of ``forward_and_log_det``.
        """

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        """Map ``x`` and carry the score of its distribution along, as path gradients need it.

        Let y follow q when x follows p.  Then ``∇_y log q`` is the inverse transpose of the Jacobian times
        ``∇_x (log p - log|det dy/dx|)``.  By default it is found on the way back.

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
        """Map ``x`` without a context and carry the score along, outside of autograd.

        By default autograd finds the derivatives, of this transform alone.  An override that knows the derivatives of
        some methods must check that no subclass has changed these methods (``vjp.keeps``).
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
        """Set the parameters from data ``(*batch, *event_shape)`` that this transform shall produce.

        By default nothing is set.
        """

    def compiles(self, inverse: bool) -> bool:
        """Return True if a verb compiles to one graph, whose size grows neither with the features nor with the data."""
        return all(child.compiles(inverse) for child in _inner_transforms(self))

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

    @property
    def sign(self) -> int:
        """The sign of the derivative, which only maps of numbers have; AttributeError."""
        raise AttributeError("sign")  # torch's NotImplementedError would stop torch.jit, which lists the attributes

    def condition(self, context: Tensor) -> Transform:
        """Return a :class:`View` at a context ``(*batch, context_dim)``, or the transform itself if it takes none."""
        return View(self, context) if self.context_dim else self

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """Return the transform itself: modules cache nothing, and views always keep one pair."""
        return self

    def _batch_of(self, x: Tensor, context: Tensor | None) -> torch.Size:
        """Return the batch shape of events and contexts together."""
        batch = x.shape[: x.dim() - len(self.event_shape)]
        return batch if context is None else torch.broadcast_shapes(batch, context.shape[:-1])

    def _rows_of(self, x: Tensor, context: Tensor | None) -> tuple[torch.Size, Tensor, Tensor | None]:
        """Return the batch shape, and events and contexts as rows, ``(N, *event_shape), (N, context_dim)``."""
        batch, event = self._batch_of(x, context), x.shape[x.dim() - len(self.event_shape) :]
        if context is not None:
            context = context.expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1])
        return batch, x.expand(batch + event).reshape(-1, *event), context

    def _sum_event(self, x: Tensor) -> Tensor:
        """Sum over the dimensions of an event, ``(*batch, *event_shape) -> (*batch)``."""
        return x.sum(tuple(range(-len(self.event_shape), 0)))

    def _call(self, x: Tensor) -> Tensor:
        return self.forward_and_log_det(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_log_det(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log|det dy/dx| alone, ``(*batch)`` in nats, as torch asks for it; y, the image of x, is not used."""
        return self.forward_and_log_det(x, context)[1]

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


ConditionalTransform.register(FlowTransform)


class VectorTransform(FlowTransform):
    """A transform of vectors ``(*batch, input_dim)``.

    Args:
        input_dim: The number D of features.
        context_dim: The width of contexts; 0 for a transform without contexts.
    """

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        check_integers(type(self).__name__, input_dim=input_dim)
        super().__init__((input_dim,), context_dim)
        self.input_dim = input_dim


class Inverse(FlowTransform):
    """The opposite direction of a transform, as ``transform.inv`` returns it.

    It owns the transform, which keeps no reference back.

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
        self.domain, self.codomain = transform.codomain, transform.domain
        self.transform = transform

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_log_det(x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_log_det(y, context)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        return -self.transform.log_abs_det_jacobian(y, x, context)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Do nothing, or raise NotImplementedError if the transform starts from data that *it* produces."""
        if type(self.transform).initialize is not FlowTransform.initialize:
            raise NotImplementedError(
                f"{type(self.transform).__name__} starts from data that it produces; initialise it, not its inverse."
            )

    def compiles(self, inverse: bool) -> bool:
        return self.transform.compiles(not inverse)

    @property
    def inv(self) -> FlowTransform:
        return self.transform


class Compose(FlowTransform):
    """A chain of transforms, y = t_n(… t_1(x)), whose log-determinants add up; each network is run once.

    A context reaches the transforms that take one.

    Args:
        transforms: At least one transform; all share one event shape, and those with contexts one ``context_dim``.

    Raises:
        TypeError: If an element is not a transform of this library, such as one of torch's.
        ValueError: If ``transforms`` is empty, or they differ in event shape or in ``context_dim``.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import ActNorm, Permute
        >>> chain = Compose([Permute([1, 0]), ActNorm(2)])
        >>> y, log_det = chain.forward_and_log_det(torch.tensor([[1.0, 2.0]]))
        >>> y.tolist(), log_det.tolist()
        ([[2.0, 1.0]], [0.0])
    """

    transforms: Sequence[FlowTransform]

    def __init__(self, transforms: Iterable[FlowTransform]) -> None:
        transforms, context_dim = checked_chain("Compose", transforms)
        super().__init__(transforms[0].event_shape, context_dim)
        self.domain, self.codomain = transforms[0].domain, transforms[-1].codomain
        self.transforms = nn.ModuleList(transforms)  # type: ignore[assignment]

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return chained(self.transforms, x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return chained(self.transforms, y, context, inverse=True)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        if not keeps(self, Compose, "forward_and_log_det"):
            return super().forward_and_score(x, score, context)
        total = torch.zeros(())
        for transform in self.transforms:
            x, log_det, score = transform.forward_and_score(x, score, context if transform.context_dim else None)
            total = total + log_det
        return x, total, score

    def carry(self, x: Tensor, score: Tensor) -> Carried:
        if not keeps(self, Compose, "forward_and_log_det", "forward_and_score"):
            return super().carry(x, score)
        return carried_along(self.transforms, x, score)

    @torch.no_grad()
    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Initialise each transform from what reaches it when the data ``y`` go back to the base."""
        for transform in reversed(self.transforms):
            own = context if transform.context_dim else None
            transform.initialize(y, own)
            y, _ = transform.inverse_and_log_det(y, own)


class Conditioned(FlowTransform):
    """A transform at one context, to keep: the context is a parameter like any other.

    ``transform.condition(context)`` is the same for one use.

    Args:
        transform: A transform that takes contexts.
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

    def __init__(self, transform: FlowTransform, context: Tensor | nn.Parameter) -> None:
        check_kind("Conditioned", FlowTransform, TRANSFORM, transform=transform)
        check_kind("Conditioned", Tensor, "a tensor", context=context)
        super().__init__(transform.event_shape)
        self.domain, self.codomain = transform.domain, transform.codomain
        wanted, got = (transform.context_dim,), tuple(context.shape)
        if got != wanted:
            raise ValueError(f"Conditioned: context must have shape {wanted}, got {got}.")
        self.transform = transform
        self.context = context if isinstance(context, nn.Parameter) else nn.Parameter(context.detach().clone())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_log_det(x, self.context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_log_det(y, self.context)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        return self.transform.forward_and_score(x, score, self.context)


def chained(
    transforms: Sequence[FlowTransform], value: Tensor, context: Tensor | None, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Map a value by transforms, at least one, in their order or back; return it and the total log-determinant."""
    log_dets = []
    for transform in reversed(transforms) if inverse else transforms:
        verb = transform.inverse_and_log_det if inverse else transform.forward_and_log_det
        value, log_det = verb(value, context if transform.context_dim else None)
        log_dets.append(log_det)
    return value, sum(log_dets[1:], log_dets[0])


def carried_along(transforms: Sequence[FlowTransform], x: Tensor, score: Tensor) -> Carried:
    """Map ``x`` by transforms without contexts and carry its score along, outside of autograd."""
    pulls, total = [], torch.zeros(())
    for transform in transforms:
        x, log_det, score, pull = transform.carry(x, score)
        pulls.append(pull)
        total = total + log_det

    def pull_all(g: Tensor) -> tuple[Tensor, Gradients]:
        found: Gradients = []
        for pull in reversed(pulls):
            g, gradients = pull(g)
            found += gradients
        return g, found

    return Carried(x, total, score, pull_all)


def checked_chain(owner: str, transforms: Iterable[FlowTransform]) -> tuple[list[FlowTransform], int]:
    """Return transforms that fit together, and the context size that they share, 0 if none takes a context."""
    if not isinstance(transforms, Iterable) or isinstance(transforms, str | bytes):
        raise TypeError(f"{owner}: transforms must be a list of transforms, got {quoted(transforms)}.")
    transforms = list(transforms)
    if not transforms:
        raise ValueError(f"{owner}: transforms must not be empty.")
    for number, transform in enumerate(transforms):
        check_kind(owner, FlowTransform, "a pyro_flows transform", **{f"transforms[{number}]": transform})
        if transform.event_shape != transforms[0].event_shape:
            raise ValueError(
                f"{owner}: transforms[{number}] must act on events of shape {tuple(transforms[0].event_shape)}, as "
                f"transforms[0] does, got {tuple(transform.event_shape)}."
            )
    sizes = {transform.context_dim for transform in transforms} - {0}
    if len(sizes) > 1:
        raise ValueError(f"{owner}: transforms must share one context_dim, got {sorted(sizes)}.")
    return transforms, sizes.pop() if sizes else 0


def _inner_transforms(module: nn.Module) -> Iterator[FlowTransform]:
    """Yield the transforms that a module is made of, without the transforms inside these."""
    for child in module.children():
        if isinstance(child, FlowTransform):
            yield child
        else:
            yield from _inner_transforms(child)
