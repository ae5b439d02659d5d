"""The contract of a transform: one verb pair with an optional context, from which Pyro's and torch's protocols follow.

A transform keeps no state between calls.  Torch's protocol asks for value and log-determinant in two calls; an
ephemeral :class:`View` answers both from one evaluation.  Inverses and compositions of transforms are transforms too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from pyro.distributions import TransformModule
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..arguments import TRANSFORM, as_shape, check_integers, check_kind
from ..compiler_state import is_recording

WithScore = tuple[Tensor, Tensor, Tensor]  # values, log-determinants, and the scores of the values


class FlowTransform(TransformModule):
    """A learnable bijection of events, y = t(x | c), with or without a context c.

    It is the abstract base class of all transforms: a ``torch.nn.Module`` and Pyro's ``TransformModule`` and
    ``ConditionalTransform`` in one.  ``t(x)``, ``t.inv``, ``t.condition(context)`` and all else follow from two verbs.

    A subclass calls ``super().__init__`` and defines the verbs.  It may override :meth:`forward_and_score`,
    :meth:`initialize` and :meth:`compiles`, or set ``codomain``.  It keeps these rules at any
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

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> WithScore:
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

    def verb(self, inverse: bool) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
        """Return one of the two verbs."""
        return self.inverse_and_log_det if inverse else self.forward_and_log_det

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

    def sum_event(self, x: Tensor) -> Tensor:
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


class TwoWay(FlowTransform):
    """A transform whose verbs are alike, but for the verbs of its parts that they call."""

    @abstractmethod
    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """Map x to y, or y to x if ``inverse``; return also the log-determinant."""

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(x, context, False)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(y, context, True)


def chained(
    transforms: Sequence[FlowTransform], value: Tensor, context: Tensor | None, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Map a value by transforms, at least one, in their order or back; return it and the total log-determinant."""
    log_dets = []
    for transform in reversed(transforms) if inverse else transforms:
        value, log_det = transform.verb(inverse)(value, context if transform.context_dim else None)
        log_dets.append(log_det)
    return value, sum(log_dets[1:], log_dets[0])


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


class Inverse(TwoWay):
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

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return self.transform.verb(not inverse)(value, context)

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


State = tuple[list[Any], list[Tensor]]  # facts, and copies of numbers


def unchanged_from_now(
    modules: Iterable[nn.Module], others: Sequence[Tensor], *, by_counts: bool = False
) -> Callable[[], bool]:
    """Return a function that returns True while tensors, their graphs and the grad mode are as they are now.

    By default it compares copies of all numbers, which show every change.  Copying and comparing take some tenths of a
    millisecond for a guide of 50 tensors.

    Args:
        modules: Modules with the tensors.
        others: Other tensors.
        by_counts: True to compare torch's counts of changes: fast, for a value that is scored in the same step.  Fused
            optimisers and assignments to ``.data`` leave no count.
    """
    parts = [part for module in modules for part in module.modules()]

    def state() -> State:
        slots = [part._parameters for part in parts] + [part._buffers for part in parts]
        tensors = [*(tensor for slot in slots for tensor in slot.values() if tensor is not None), *others]
        if by_counts or is_recording():  # a graph cannot read numbers
            facts: State = [(id(t), -1 if t.is_inference() else t._version, t.requires_grad) for t in tensors], []
        else:
            facts = _contents(parts, tensors)
        return [torch.is_grad_enabled(), *(tensor.grad_fn for tensor in others), *facts[0]], facts[1]

    def holds() -> bool:
        facts, numbers = state()
        return facts == before[0] and all(map(torch.equal, numbers, before[1]))

    before = state()
    return holds


def _contents(parts: list[nn.Module], tensors: list[Tensor]) -> State:
    """Return the modes of modules with the kinds of tensors, and the numbers of each kind in one tensor.

    Nothing is compared while ``torch.jit`` traces a program, since its one run is not interrupted.
    """
    if torch._C._get_tracing_state():
        return [], []
    found: dict[tuple[torch.dtype, torch.device, bool], list[Tensor]] = {}
    for t in tensors:
        found.setdefault((t.dtype, t.device, t.requires_grad), []).append(t.detach().reshape(-1))
    return [[part.training for part in parts], *found], [torch.cat(of_kind) for of_kind in found.values()]


def can_be_kept() -> bool:
    """Return False while compiling, or mapping under ``torch.func``: tensors have no contents to compare."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


class View(Transform):
    """A transform at a context, as torch's :class:`~torch.distributions.TransformedDistribution` wants it.

    torch asks for a value and then for the log-determinant of the pair (x, y).  So a view keeps the log-determinant of
    its last pair.  It returns this once, if asked about the same two tensors while every number that it depends on is
    unchanged.  Values are always computed.

    Args:
        transform: The transform.
        context: ``(*batch, context_dim)``, or None.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import LULinear
        >>> view, x = View(LULinear(3)), torch.ones(5, 3)
        >>> y = view(x)
        >>> view.log_abs_det_jacobian(x, y).shape  # without a second evaluation
        torch.Size([5])
    """

    bijective = True

    def __init__(self, transform: FlowTransform, context: Tensor | None = None) -> None:
        super().__init__()
        self.domain, self.codomain = transform.domain, transform.codomain
        self.transform = transform
        self.context = context
        # The last pair y = t(x), its log|det dy/dx|, and True while nothing has changed that it depends on.
        self._pair: tuple[Tensor, Tensor, Tensor, Callable[[], bool]] | None = None

    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self.transform.forward_and_log_det(x, self.context)
        self._keep(x, y, log_det)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, log_det = self.transform.inverse_and_log_det(y, self.context)
        self._keep(x, y, -log_det)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        pair, self._pair = self._pair, None
        if pair is not None:
            of_x, of_y, log_det, unchanged = pair
            if of_x is x and of_y is y and unchanged():
                return log_det
        return self.transform.log_abs_det_jacobian(x, y, self.context)

    def with_cache(self, cache_size: int = 1) -> View:
        """Return the view itself: it always keeps the log-determinant of one pair."""
        return self

    def _keep(self, x: Tensor, y: Tensor, log_det: Tensor) -> None:
        if can_be_kept():
            depends = [x, y] if self.context is None else [x, y, self.context]
            self._pair = x, y, log_det, unchanged_from_now([self.transform], depends)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pair": None}


def _inner_transforms(module: nn.Module) -> Iterator[FlowTransform]:
    """Yield the transforms that a module is made of, without the transforms inside these."""
    for child in module.children():
        if isinstance(child, FlowTransform):
            yield child
        else:
            yield from _inner_transforms(child)
