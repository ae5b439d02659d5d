"""A flow: transforms over a base, p(y) = p_base(x) |det dx/dy| with x = t_1⁻¹(… t_n⁻¹(y)).

A flow is a module with parameters; ``flow(context)`` is a Pyro distribution for one use.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalDistribution
from torch import Tensor, nn
from torch.distributions import Distribution

from ..arguments import check_kind, quoted
from ..distributions import FixedBase, StandardNormal
from ..distributions.normal import log_prob_of
from ..encoders import Standardize
from ..transforms import Compose, FlowTransform
from ..transforms.base import chained
from ..transforms.compiled import CompiledRuns
from ..transforms.wrapped import checked_chain
from .arguments import as_size, check_context, check_like, check_precision, check_tensor, check_value, parameter_of
from .distribution import Columns, FlowDistribution, T, in_chunks


class Flow(nn.Module):
    """A distribution over events, with or without a context, made of transforms over a base::

        log p(y) = log p_base(x) + log|det dx/dy|,    x = t₁⁻¹(… tₙ⁻¹(y))

    Args:
        transforms: From base to data, at least one; all share one event shape, and those that take a context share one
            context size.
        base: The base distribution, by default the standard normal: a module that builds it when called without
            arguments, or a distribution.  A distribution stays in its dtype and on its device.
        encoder: A network through which contexts pass first, such as those of ``pyro_flows.encoders``; by default the
            transforms take the vectors themselves.
        columns: The columns of the table that the flow was trained on, which ``fit_density`` sets.

    Attributes:
        event_shape: The shape of an event.
        context_dim: The number of context features that the transforms take, 0 without a context.
        base: The base, a module that builds the base distribution when called.
        transforms: The transforms, a flat list.
        encoder: The network before them, or None.
        columns: The names of the columns of a table, and which of them hold integers; None without training on one.

    Raises:
        TypeError: If one of ``transforms`` is not a transform.
        ValueError: If transforms, base, encoder and columns do not fit together.

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> flow = flows.nsf(3, context_dim=2)
        >>> q = flow(torch.randn(5, 2))
        >>> q.batch_shape, q.event_shape, q.rsample((7,)).shape
        (torch.Size([5]), torch.Size([3]), torch.Size([7, 5, 3]))
    """

    transforms: Sequence[FlowTransform]
    base: nn.Module
    encoder: nn.Module | None
    columns: Columns | None = None  # for pickles of flows that had none

    def __init__(
        self,
        transforms: Iterable[FlowTransform],
        base: nn.Module | Distribution | None = None,
        *,
        encoder: nn.Module | None = None,
        columns: Columns | None = None,
    ) -> None:
        super().__init__()
        transforms, self.context_dim = checked_chain("Flow", transforms)
        self.event_shape = transforms[0].event_shape
        self.transforms = nn.ModuleList(transforms)  # type: ignore[assignment]
        base = StandardNormal(self.event_shape) if base is None else base
        check_kind("Flow", (nn.Module, Distribution), "a distribution, or a module that builds one", base=base)
        self.base = FixedBase(base) if isinstance(base, Distribution) else base
        shape = self.base().event_shape
        if shape != self.event_shape:
            got = f"base has event shape {tuple(shape)}, but the transforms act on {tuple(self.event_shape)}"
            raise ValueError(f"Flow: {got}; use base.to_event(n) to make batch dimensions part of the event.")
        if encoder is not None and not (isinstance(encoder, nn.Module) and self.context_dim):
            why = f"got {quoted(encoder)}" if self.context_dim else "it is of no use, as no transform takes a context"
            raise ValueError(f"Flow: encoder must be a network from contexts to vectors; {why}.")
        self.encoder = encoder
        if columns is not None:
            columns.check(self.event_shape)
        self.columns = columns
        self._compiled: CompiledRuns | None = None

    def __repr__(self) -> str:
        """Return shapes, base and the kinds of transforms in a few lines; ``modules()`` has every layer."""
        size = sum(parameter.numel() for parameter in self.parameters())
        kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(map(_kind_of, self.transforms)).items())
        encoder = "" if self.encoder is None else f"\n  encoder: {type(self.encoder).__name__}"
        head = f"{type(self).__name__}({tuple(self.event_shape)}, context_dim={self.context_dim}, {size} parameters)"
        return f"{head}{encoder}\n  base: {_kind_of(self.base)}\n  transforms: {kinds}"

    def compile(self, **settings: Any) -> None:
        """Compile the transforms by ``torch.compile`` into fewer and larger steps, in all later uses of the flow.

        Values, densities, gradients and random numbers stay the same, up to round-off.  The first calls take seconds to
        minutes: one for each direction, with and without gradients, for all batch sizes.  Encoders, bases and ODE
        solvers are not compiled.  In the direction of autoregressive flows that goes feature by feature, only splines
        are.  Copies and pickles compile again; flows built by ``pyro_flows.load`` do not.

        Args:
            **settings: Arguments of ``torch.compile``, such as ``backend``; ``dynamic`` is set, and refused.

        Raises:
            ValueError: If a setting is ``dynamic``, or not an argument of ``torch.compile``.

        Warns:
            UserWarning: Once, at the first call, if the machine has no compiler: the flow then runs uncompiled.

        Example::

            >>> import torch
            >>> from pyro_flows import flows
            >>> flow = flows.realnvp(2, num_transforms=2)
            >>> flow.compile(backend="eager")  # leave the backend out for faster code
            >>> flow.log_prob(torch.zeros(5, 2)).shape
            torch.Size([5])
        """
        self._compiled = CompiledRuns(settings)

    @property
    def is_compiled(self) -> bool:
        """True if the transforms run compiled (:meth:`compile`)."""
        return self._compiled is not None

    @contextlib.contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Run the transforms uncompiled within this context."""
        self._compiled, compiled = None, self._compiled
        try:
            yield
        finally:
            self._compiled = compiled

    @property
    def runs(self) -> list[FlowTransform]:
        """The transforms, one by one or in compiled runs."""
        return list(self.transforms) if self._compiled is None else self._compiled.of(self.transforms)

    def encode(self, context: Tensor | None, like: Tensor | None = None) -> Tensor | None:
        """Return the context that the transforms take, ``(*batch, context_dim)``, or None; errors as for the call."""
        like = parameter_of(self.transforms) if like is None else like
        check_precision("Flow", like)
        if context is None:
            if self.context_dim:
                raise ValueError(f"Flow: context is missing; this flow takes {self._contexts()}.")
            return None
        check_tensor("Flow", "context", context, floating=not hasattr(self.encoder, "num_classes"))
        if not self.context_dim:
            shape = tuple(context.shape)
            raise ValueError(f"Flow: context of shape {shape} is unexpected; build the flow with context_dim > 0.")
        argument = "context"
        if isinstance(self.encoder, Standardize):  # which keeps the shape
            check_context("Flow", context, self.context_dim)
        if self.encoder is not None:
            context, argument = self.encoder(context), "what the encoder makes of the context"
        if context.shape[-1:] != (self.context_dim,):
            got = f"got shape {tuple(context.shape)}"
            raise ValueError(f"Flow: {argument} must have width {self.context_dim} on the right, {got}.")
        check_like("Flow", argument, context, like)
        return context

    def _contexts(self) -> str:
        """Return a description of the contexts that this flow takes."""
        if classes := getattr(self.encoder, "num_classes", None):
            return f"labels of {classes} classes, (*batch,) of integers"
        if shape := getattr(self.encoder, "data_shape", None):
            return f"contexts of shape (*batch, {', '.join('n' if size is None else str(size) for size in shape)})"
        if self.encoder is not None:
            return f"contexts that {type(self.encoder).__name__} encodes"
        return f"contexts of width {self.context_dim}"

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """Return the distribution at a context.

        Args:
            context: ``(*batch, context_dim)``, or an input of the encoder; None if the flow takes no context.

        Returns:
            A Pyro distribution with ``batch_shape == context.shape[:-1]`` (after the encoder, if there is one) and
            densities in nats.

        Raises:
            TypeError: If a context is not a tensor.
            ValueError: If it is missing, unexpected, of the wrong width or not floating.
        """
        return self.at(self.encode(context))

    def at(self, context: Tensor | None) -> FlowDistribution:
        """Return the distribution at an encoded context, the result of ``encode``, or None."""
        return FlowDistribution(self.base, list(self.transforms), self.runs, context, self.columns)

    condition = forward  # Pyro's protocol of conditional distributions

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), context: Tensor | None = None, *, chunk_size: int | None = None
    ) -> Tensor:
        """Draw samples without a gradient, ``(*sample_shape, *batch, *event_shape)``: ``flow(context).sample(...)``.

        Columns of integers that ``fit_density`` trained with noise hold integers, from the smallest to the largest that
        it saw.  ``rsample`` keeps the noise.

        With ``chunk_size`` so many pass through the transforms at a time; the draws are the same.
        """
        context = self.encode(context)
        value = self.at(context).base_dist.sample(as_size(sample_shape))
        rows = self._in_chunks(lambda v, c: chained(self.runs, v, c)[0], chunk_size, value, context)
        return rows if self.columns is None else self.columns.whole(rows)

    def rsample_and_log_prob(
        self, sample_shape: Sequence[int] = (), context: Tensor | None = None, *, chunk_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw reparameterised samples and score them, with each network run once.

        ``chunk_size`` bounds the memory as for ``log_prob``; the draws are the same.

        Returns:
            Samples ``(*sample_shape, *batch, *event_shape)`` and log-densities ``(*sample_shape, *batch)`` in nats.
        """
        context = self.encode(context)
        value = self.at(context).base_dist.rsample(as_size(sample_shape))

        def run(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
            y, log_det = chained(self.runs, x, context)
            return y, log_prob_of(self.base(), x) - log_det

        return self._in_chunks(run, chunk_size, value, context)

    def log_prob(self, value: Tensor, context: Tensor | None = None, *, chunk_size: int | None = None) -> Tensor:
        """Return the log-density of values, ``(*batch)`` in nats; one graph, unless transforms are ``Continuous``.

        Args:
            value: ``(*batch, *event_shape)``.
            context: A context as for the call, or None; it broadcasts with the values.
            chunk_size: The number of events that pass through the transforms at a time, by default all.  It bounds the
                memory of the activations.  With gradients a chunk is computed again in the backward pass, which takes a
                third more time.  An encoder sees all contexts at once.

        Raises:
            TypeError: If one of them is not a tensor.
            ValueError: If value or context do not fit, or ``chunk_size`` is not a positive integer.

        Warns:
            UserWarning: If columns that were trained as integers with noise hold integers; see
                :func:`~pyro_flows.dequantize`.
        """
        check_value(value, self.event_shape, like := parameter_of(self.transforms))
        if self.columns is not None:
            self.columns.warn_of_integers(value)

        def run(y: Tensor, context: Tensor | None) -> Tensor:
            x, log_det = chained(self.runs, y, context, inverse=True)
            return log_prob_of(self.base(), x) + log_det

        return self._in_chunks(run, chunk_size, value, self.encode(context, like))

    def _in_chunks(self, run: Callable[..., T], chunk_size: int | None, value: Tensor, context: Tensor | None) -> T:
        if chunk_size is not None and (batch := self.base().batch_shape):
            raise ValueError(f"Flow: chunk_size needs a base without a batch, got one of {tuple(batch)}.")
        return in_chunks(run, chunk_size, value, context, len(self.event_shape))

    def initialize(self, value: Tensor, context: Tensor | None = None) -> None:
        """Initialise layers such as ``ActNorm`` from data ``(*batch, *event_shape)``."""
        check_value(value, self.event_shape, parameter_of(self.transforms), "Flow.initialize")
        with torch.no_grad():
            Compose(self.transforms).initialize(value, self.encode(context))

    @property
    def inv(self) -> Flow:
        """The flow with all transforms inverted, fast where this one is slow; it shares the parameters."""
        layers = [transform.inv for transform in reversed(self.transforms)]
        inverse = Flow(layers, self.base, encoder=self.encoder)
        if self._compiled is not None:
            inverse.compile(**self._compiled.settings)
        return inverse


def _kind_of(part: Any) -> str:
    """Return the class of a part of a flow, with that of the transform or bijector in it."""
    inner = getattr(part, "transform", getattr(part, "bijector", None))
    return type(part).__name__ + ("" if inner is None else f"({_kind_of(inner)})")


ConditionalDistribution.register(Flow)
