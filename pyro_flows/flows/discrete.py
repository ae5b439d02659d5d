"""Distributions over events with integer entries: of integers alone, from flows over real numbers, and mixed ones.

P(n) is the mass of the cell [n, n + 1) of a flow (dequantisation), bounded by

    log P(n) ≥ E log 1/K Σ_k p(n + u_k) / q(u_k | n),   u_k ~ q(· | n) on [0, 1)

With q uniform this is uniform dequantisation (Theis, van den Oord, Bethge 2015, arXiv:1511.01844).  With q a
conditional flow it is variational dequantisation (Ho, Chen, Srinivas, Duan, Abbeel 2019, Flow++, arXiv:1902.00275).
K > 1 draws give the importance-weighted bound (Burda, Grosse, Salakhutdinov 2015, arXiv:1509.00519), which is tighter.

Mixed vectors have categories and real entries.  Categories come first, each given those before it.  A flow is the
density of the other entries given all categories.  Flexible and Efficient Simulation-Based Inference for Models of
Decision-Making (Boelts, Lueckmann, Gao, Macke 2022, eLife 11:e77220).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalDistribution
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import constraints

from ..arguments import Widths, check_integers, check_kind, check_numbers, check_sizes
from ..conditioners.base import zero_
from ..distributions.normal import log_prob_of
from ..encoders import Standardize
from ..encoders.rows import hidden_layers
from ..transforms import Sigmoid
from .arguments import as_size, check_context, check_event, check_tensor
from .distribution import in_chunks
from .flow import Flow

FLOW = "a Flow, such as flows.glow((1, 28, 28))"
REAL_OR_POSITIVE = constraints.real, constraints.positive


class Dequantized(nn.Module):
    """A distribution over images, or other events, of integers, made of a flow over real numbers.

    P(n) is the mass of the cell [n, n + 1), and bounded from below (dequantisation)::

        log P(n) ≥ E log 1/K Σ_k p(n + u_k) / q(u_k),    u_k ~ q on [0, 1)

    The flow ends with a sigmoid onto the range of the integers, whose inverse is the logit preprocessing of Real NVP.
    The cells at both ends include all numbers beyond them, so that the masses add up to one.  Samples are exact.

    Args:
        flow: A flow over real events, such as ``flows.glow((1, 28, 28))``.
        levels: The number of integers: events hold 0 … levels - 1.
        alpha: The share, at least 1e-6, by which the interval of the sigmoid is wider than that of the integers: see
            :class:`~pyro_flows.transforms.Sigmoid`.
        noise: A flow over the same events whose contexts are such events, such as
            ``flows.realnvp_image((1, 28, 28), context_dim=(1, 28, 28))``.  The normal distribution function maps its
            draws to the noise u in a cell, which is uniform before training.  By default the noise is uniform.
        num_samples: The number K of draws in the bound of a log-mass.

    Attributes:
        event_shape: The shape of an event.
        context_dim: The number of context features that the flow's transforms take, 0 without a context.

    Raises:
        TypeError: If ``flow`` or ``noise`` is not a :class:`~pyro_flows.flows.Flow`.
        ValueError: If an argument is out of its range, or the noise does not fit the flow.

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> model = Dequantized(flows.glow((1, 8, 8), num_steps=2, hidden_dim=8), levels=17)
        >>> images = model().sample((5,))
        >>> images.dtype, images.shape, model().log_prob(images).shape
        (torch.uint8, torch.Size([5, 1, 8, 8]), torch.Size([5]))
    """

    def __init__(
        self, flow: Flow, *, levels: int = 256, alpha: float = 0.05, noise: Flow | None = None, num_samples: int = 1
    ) -> None:
        super().__init__()
        check_kind("Dequantized", Flow, FLOW, flow=flow)
        check_kind("Dequantized", (Flow, type(None)), FLOW, noise=noise)
        check_integers("Dequantized", 2, levels=levels)
        check_integers("Dequantized", num_samples=num_samples)
        check_numbers("Dequantized", least=1e-6, below=0.5, alpha=alpha)
        if noise is not None:
            event = tuple(flow.event_shape)
            taken = (noise.context_dim,) if noise.encoder is None else getattr(noise.encoder, "data_shape", event)
            if noise.event_shape != event or taken != event:
                must = f"noise must be a flow over events of shape {event} whose contexts are such events"
                got = f"{tuple(noise.event_shape)} with contexts of shape {taken}"
                raise ValueError(f"Dequantized: {must}, got one over {got}; image recipes take context_dim={event}.")
        self.flow, self.levels, self.alpha, self.noise, self.num_samples = flow, levels, alpha, noise, num_samples
        self.event_shape, self.context_dim = flow.event_shape, flow.context_dim
        self.pixels = Sigmoid(flow.event_shape, high=float(levels), alpha=alpha)
        self.support = constraints.independent(constraints.integer_interval(0, levels - 1), len(flow.event_shape))

    def forward(self, context: Tensor | None = None, *, num_samples: int | None = None) -> ModelDistribution:
        """Return the distribution at a context, as a :class:`Flow` does; ``num_samples`` replaces that of the model.

        Its log-mass is a new random bound at each call.
        """
        return self._at(self.flow.encode(context), num_samples)

    condition = forward  # Pyro's protocol of conditional distributions

    def _at(self, context: Tensor | None, num_samples: int | None) -> ModelDistribution:
        number = self.num_samples if num_samples is None else num_samples
        check_integers("Dequantized", num_samples=number)
        return ModelDistribution(self, context, self.flow.at(context).batch_shape, num_samples=number)

    def compile(self, **settings: Any) -> None:
        """Compile the flow and the flow of the noise; see :meth:`Flow.compile`."""
        for flow in filter(None, (self.flow, self.noise)):
            flow.compile(**settings)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype in which the flow calculates."""
        found = (parameter.dtype for parameter in self.flow.parameters() if parameter.is_floating_point())
        return next(found, torch.get_default_dtype())

    def sample(
        self, sample_shape: Sequence[int] = (), context: Tensor | None = None, *, chunk_size: int | None = None
    ) -> Tensor:
        """Draw events ``(*sample_shape, *batch, *event_shape)``, as uint8 up to 256 levels; see :meth:`Flow.sample`."""
        return self._cells(self.flow.sample(sample_shape, context, chunk_size=chunk_size))

    def draw(self, context: Tensor | None, shape: torch.Size) -> Tensor:
        """Draw events ``(*shape, *event_shape)`` at an encoded context."""
        return self._cells(self.flow.at(context).expand(shape).sample())

    def _cells(self, value: Tensor) -> Tensor:
        """Return the integers in whose cells draws of the flow lie."""
        value = self.pixels(value)
        if is_validation_enabled() and value.isnan().any():
            raise ValueError("sample: the flow gives NaN, which is no integer; look at context and weights.")
        return value.floor().clamp(0, self.levels - 1).to(torch.uint8 if self.levels <= 256 else torch.int64)

    def log_prob(
        self,
        value: Tensor,
        context: Tensor | None = None,
        *,
        num_samples: int | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Return the lower bound of the log-mass of events: ``model(context).log_prob(value)``.

        Args:
            value: Integers ``(*batch, *event_shape)``.
            context: A context as for the call, or None.
            num_samples: The number K of draws of the noise; by default that of the model.
            chunk_size: The number of events that are scored at a time, as for :meth:`Flow.log_prob`.

        Returns:
            The bound, ``(*batch)`` in nats.

        Raises:
            TypeError: If ``value`` or ``context`` is not a tensor.
            ValueError: If ``value`` does not hold integers in range, the context does not fit, or a number is below 1.
        """

        def bound(value: Tensor, context: Tensor | None) -> Tensor:
            return self._at(context, num_samples).log_prob(value)

        return in_chunks(bound, chunk_size, value, self.flow.encode(context), len(self.event_shape))

    def check(self, value: Tensor) -> None:
        """Raise an error unless a value is a tensor ``(*batch, *event_shape)`` of integers in range."""
        if value.is_meta:
            raise ValueError("log_prob: value must hold numbers, but lies on the meta device.")
        must = f"log_prob: value must hold integers from 0 to {self.levels - 1}"
        if value.is_floating_point():
            got = f"{value.dtype}{'' if value.isfinite().all() else ' with NaN or inf'}"
            raise ValueError(f"{must}, got {got}; use value.to(torch.uint8) for whole numbers.")
        low, high = map(int, value.to(torch.int64).aminmax()) if value.numel() else (0, 0)
        if not 0 <= low <= high < self.levels:
            raise ValueError(f"{must}, got some from {low} to {high}.")

    def score(self, value: Tensor, context: Tensor | None, num_samples: int) -> Tensor:
        """Return a lower bound of the log-mass of integers at an encoded context; -inf for values out of range."""
        x = value.to(self.dtype)
        inside = (x >= 0) & (x < self.levels) & (x == x.floor())
        x = torch.where(inside, x, 0.0)
        u, log_q = self._noise(x, num_samples)
        density = self.flow.at(context).followed_by(self.pixels).unchecked()  # the integers are checked
        bound = (density.log_prob(x + u) - log_q).logsumexp(0) - math.log(num_samples)
        return torch.where(inside.flatten(-len(self.event_shape)).all(-1), bound, -math.inf)

    def _noise(self, x: Tensor, number: int) -> tuple[Tensor, Tensor | float]:
        """Draw the noise K times, ``(K, *x.shape)``, and return it with its log-densities, ``(K, *batch)``."""
        if self.noise is None:
            return torch.rand((number, *x.shape), dtype=x.dtype, device=x.device), 0.0
        z, log_q = self.noise.rsample_and_log_prob((number,), (x + 0.5) * (2 / self.levels) - 1)
        normal = dist.Normal(torch.zeros_like(z), 1.0, validate_args=False).to_event(len(self.event_shape))
        return torch.special.ndtr(z), log_q - log_prob_of(normal, z)

    @torch.no_grad()
    def initialize(self, value: Tensor, context: Tensor | None = None) -> None:
        """Initialise the flow's layers such as ``ActNorm`` from data ``(*batch, *event_shape)``."""
        self.flow.initialize(self.unbounded(value), context)

    def unbounded(self, value: Tensor) -> Tensor:
        """Return the logits, on which the flow acts, of events ``(*batch, *event_shape)`` with uniform noise."""
        value = value.to(self.dtype)
        return self.pixels.inverse_and_log_det(value + torch.rand_like(value))[0]


class Mixed(nn.Module):
    """A distribution over vectors, some of whose entries are categories and some are positive.

    With categories k, the other entries y and the context c, in nats for y and k together::

        log p(k, y | c) = Σ_j log p(k_j | k_<j, c) + log p_flow(y | k, c)

    Positive entries are modelled by their logarithm.  A vector is outside of the support if a category is no integer in
    its range, or a positive entry is not positive.  Its log-density is -inf; if Pyro's validation is enabled, as it is
    by default, it raises ValueError.

    Args:
        flow: A flow over the entries that are no categories, in their order.  Its contexts have the width
            ``context_dim + sum(categories)``.  None if all entries are categories.
        categories: For each entry of a vector the number of its categories 0 … K - 1, or 0 for a real entry.
        context_dim: The width of the context.
        positive: The real entries that are positive, by index.
        hidden_dims: The widths of the hidden layers of the classifiers.

    Attributes:
        event_shape: The shape of a vector.
        support: The constraint of a vector.
        standardize: The layer that standardises contexts.

    Raises:
        TypeError: If ``flow`` is not a :class:`~pyro_flows.flows.Flow`.
        ValueError: If there are no categories and no positive entries, a size is out of its range, or the flow does not
            fit.

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> flow = flows.nsf(1, context_dim=3 + 2)  # reaction times, given three parameters and one of two choices
        >>> model = Mixed(flow, categories=(0, 2), context_dim=3, positive=(0,))
        >>> x = model(torch.randn(5, 3)).sample()
        >>> x.shape, bool((x[:, 0] > 0).all()), model(torch.randn(5, 3)).log_prob(x).shape
        (torch.Size([5, 2]), True, torch.Size([5]))
    """

    def __init__(
        self,
        flow: Flow | None,
        categories: Sequence[int],
        context_dim: int = 0,
        *,
        positive: Sequence[int] = (),
        hidden_dims: Widths = (64, 64),
    ) -> None:
        super().__init__()
        check_kind("Mixed", (Flow, type(None)), "a Flow, such as flows.nsf(1, context_dim=5)", flow=flow)
        for number in categories:
            check_integers("Mixed", 0, categories=number)
        check_integers("Mixed", 0, context_dim=context_dim)
        check_sizes("Mixed", hidden_dims=hidden_dims)
        self.flow, self.categories, self.context_dim = flow, tuple(categories), context_dim
        self.positive, self.hidden_dims = tuple(positive), tuple(hidden_dims)
        self.event_shape = torch.Size((len(self.categories),))
        self._discrete = [place for place, number in enumerate(self.categories) if number]
        self._real = [place for place, number in enumerate(self.categories) if not number]
        if wrong := [place for place in self.positive if place not in self._real]:
            must = f"positive must hold indices of real entries, which are {self._real}"
            raise ValueError(f"Mixed: {must}, got {wrong[0]}. Leave it out.")
        if not (self._discrete or self.positive):
            raise ValueError(f"Mixed: {self.categories} are all real, and none positive. Use the flow alone.")
        width = context_dim + sum(self.categories)
        wanted = ((len(self._real),), width) if self._real else None
        if (None if flow is None else (tuple(flow.event_shape), flow.context_dim)) != wanted:
            must = f"a flow over {len(self._real)} entries with contexts of width {width}" if self._real else "None"
            raise ValueError(f"Mixed: flow must be {must}, got {flow!r:.80}.")
        entries = [
            constraints.integer_interval(0, number - 1) if number else REAL_OR_POSITIVE[place in self.positive]
            for place, number in enumerate(self.categories)
        ]
        self.support = constraints.independent(constraints.cat(entries, -1), 1)
        self.standardize = Standardize((context_dim,)) if context_dim else None
        self.classifiers = nn.ModuleList()  # from the context and the earlier categories to the logits of each category
        width = context_dim
        for place in self._discrete:
            layers = hidden_layers("Mixed", max(1, width), *self.hidden_dims, activation=nn.SiLU)
            self.classifiers.append(layers.append(zero_(nn.Linear(self.hidden_dims[-1], self.categories[place]))))
            width += self.categories[place]

    def forward(self, context: Tensor | None = None) -> ModelDistribution:
        """Return the distribution at a context ``(*batch, context_dim)``, of batch shape ``batch``; None without one.

        Raises:
            TypeError: If the context is not a tensor.
            ValueError: If it is missing, unexpected or of another width.
        """
        if (context is None) != (self.standardize is None):
            fault = "is missing" if context is None else "is unexpected"
            raise ValueError(f"Mixed: context {fault}; this distribution has context_dim={self.context_dim}.")
        if context is None or self.standardize is None:
            return ModelDistribution(self, None, ())
        check_tensor("Mixed", "context", context)
        check_context("Mixed", context, self.context_dim)
        return ModelDistribution(self, self.standardize(context), context.shape[:-1])

    condition = forward  # Pyro's protocol of conditional distributions

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log-density of vectors ``(*batch, D)``, which broadcast with the contexts, in nats."""
        return self(context).log_prob(value)

    def sample(self, sample_shape: Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Draw vectors, ``(*sample_shape, *batch, D)``."""
        return self(context).sample(sample_shape)

    def check(self, value: Tensor) -> None:
        """Raise ValueError unless vectors lie in the support."""
        if value.numel() and not (inside := self.support.check(value)).all():  # torch cannot check no values
            got = f"{int((~inside).sum())} vectors outside, such as {value[~inside][0].tolist()}"
            raise ValueError(f"Mixed: value must lie in the support, got {got}.")

    def real(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the real entries on the scale of the flow.

        Returns:
            The entries ``(*batch, R)``, log|det| of the map to them ``batch``, and True for vectors in the support.
        """
        inside = value.new_ones(value.shape[:-1], dtype=torch.bool)
        log_det = value.new_zeros(value.shape[:-1])
        columns = []
        for place in self._real:
            column = value[..., place]
            if place in self.positive:
                inside = inside & (column > 0)
                column = column.where(column > 0, 1.0).log()  # before the logarithm, so that no gradient is NaN
                log_det = log_det - column
            columns.append(column)
        return torch.stack(columns, -1) if columns else value[..., :0], log_det, inside

    def inputs(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Return the contexts of the flow: the standardised context, and one-hot vectors of all categories."""
        seen = value.new_zeros(0) if context is None else context
        for place in self._discrete:
            seen = self._joined(seen, place, self._index(value, place))
        return seen

    def score(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Return the log-density of vectors at a standardised context, both checked."""
        y, total, inside = self.real(value)
        seen = value.new_zeros(0) if context is None else context
        for place, network in zip(self._discrete, self.classifiers, strict=True):
            index = self._index(value, place)
            inside = inside & (value[..., place] == index)
            log_p = network(_wide(seen)).log_softmax(-1)
            batch = torch.broadcast_shapes(log_p.shape[:-1], index.shape)
            total = total + log_p.expand(*batch, -1).gather(-1, index.expand(batch)[..., None]).squeeze(-1)
            seen = self._joined(seen, place, index)
        if self.flow is not None:
            total = total + self._log_density(self.flow, y, value, seen, context)
        return total.where(inside, -torch.inf)

    def _log_density(self, flow: Flow, y: Tensor, value: Tensor, seen: Tensor, context: Tensor | None) -> Tensor:
        """Return the flow's log-density of the real entries, given the categories.

        If many vectors share a context, the networks see it once for each combination of categories.
        """
        combinations = math.prod(self.categories[place] for place in self._discrete)
        pairs = 0 if context is None else math.prod(torch.broadcast_shapes(context.shape[:-1], value.shape[:-1]))
        if context is None or not self._discrete or combinations * context[..., 0].numel() >= pairs:
            return flow.log_prob(y, seen if seen.shape[-1] else None)
        found = value.new_zeros(())
        for chosen in itertools.product(*(range(self.categories[place]) for place in self._discrete)):
            row = value.new_zeros(len(self.categories))
            row[self._discrete] = row.new_tensor(chosen)
            log_p = flow.log_prob(y, self.inputs(row, context))
            found = torch.where((value == row)[..., self._discrete].all(-1), log_p, found)
        return found

    def draw(self, context: Tensor | None, shape: torch.Size) -> Tensor:
        """Draw vectors ``(*shape, D)`` at a standardised context that broadcasts with ``shape``."""
        like = next(self.parameters())
        seen, found = like.new_zeros(0) if context is None else context, dict[int, Tensor]()
        for place, network in zip(self._discrete, self.classifiers, strict=True):
            logits = network(_wide(seen)).expand(*shape, -1)
            some = logits.numel() > 0  # torch cannot check a batch without rows
            index = dist.Categorical(logits=logits, validate_args=None if some else False).sample()
            found[place] = index.to(like.dtype)
            seen = self._joined(seen, place, index)
        if self.flow is not None:
            q = self.flow(seen.expand(*shape, -1) if seen.shape[-1] else None)
            for place, column in zip(self._real, q.expand(shape).sample().unbind(-1), strict=True):
                found[place] = column.exp() if place in self.positive else column
        return torch.stack([found[place] for place in range(len(self.categories))], -1)

    def _index(self, value: Tensor, place: int) -> Tensor:
        """Return the category of an entry, moved into its range."""
        return value[..., place].long().clamp(0, self.categories[place] - 1)

    def _joined(self, seen: Tensor, place: int, index: Tensor) -> Tensor:
        """Return inputs of networks followed by the one-hot vector of a category."""
        more = nn.functional.one_hot(index, self.categories[place]).to(seen.dtype)
        batch = torch.broadcast_shapes(seen.shape[:-1], more.shape[:-1])
        return torch.cat((seen.expand(*batch, -1), more.expand(*batch, -1)), -1)


class ModelDistribution(dist.TorchDistribution):
    """A distribution over events with integer entries, the result of ``model(context)``.

    Args:
        model: The model, which draws and scores events.
        context: Its encoded context, or None.
        batch_shape: The batch shape.
        **settings: Further arguments of ``model.score``.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self, model: Dequantized | Mixed, context: Tensor | None, batch_shape: Sequence[int], **settings: Any
    ) -> None:
        self.model, self.context, self.settings = model, context, settings
        # Pyro's setting, since torch's own default turns off once anything was compiled.
        super().__init__(torch.Size(batch_shape), model.event_shape, validate_args=is_validation_enabled())

    @property
    def support(self) -> constraints.Constraint:
        """The integers in their range; the real numbers or positive numbers for other entries."""
        return self.model.support

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> ModelDistribution:
        return ModelDistribution(self.model, self.context, batch_shape, **self.settings)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw events ``(*sample_shape, *batch, *event_shape)``."""
        return self.model.draw(self.context, as_size(sample_shape) + self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-mass or log-density of ``value``, ``(*batch, *event_shape)``, in nats.

        Raises:
            ValueError: If a value has another dtype or shape or lies outside of the support, unless validation is off
                (``pyro.enable_validation(False)``).  Values outside of the support then have -inf.
        """
        if not torch.compiler.is_compiling():
            check_tensor("log_prob", "value", value, floating=False)
            check_event("log_prob", "value", value, self.event_shape)
            if self._validate_args:
                self.model.check(value)
        batch = torch.broadcast_shapes(value.shape[: value.dim() - len(self.event_shape)], self.batch_shape)
        return self.model.score(value.expand(*batch, *self.event_shape), self.context, **self.settings)


def _wide(seen: Tensor) -> Tensor:
    """Return the inputs of a classifier, or a constant if it depends on nothing."""
    return seen if seen.shape[-1] else seen.new_zeros(*seen.shape[:-1], 1)


ConditionalDistribution.register(Dequantized)
ConditionalDistribution.register(Mixed)
