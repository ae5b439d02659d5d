"""Distributions over vectors with real, positive and categorical entries, made of a flow and of classifiers::

    log p(k, y | c) = Σ_j log p(k_j | k_<j, c) + log p_flow(y | k, c)

Categories come first, each given those before it.  The flow is the density of the other entries given all categories.
Flexible and Efficient Simulation-Based Inference for Models of Decision-Making (Boelts, Lueckmann, Gao, Macke 2022,
eLife 11:e77220).
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

from ..arguments import check_integers, check_kind, check_sizes
from ..conditioners.base import zero_
from ..encoders import Standardize
from ..encoders.rows import hidden_layers
from .arguments import as_size, check_context, check_event, check_tensor
from .flow import Flow

REAL_OR_POSITIVE = constraints.real, constraints.positive


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
        hidden_dims: Sequence[int] = (64, 64),
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

    def forward(self, context: Tensor | None = None) -> MixedDistribution:
        """Return the distribution at a context ``(*batch, context_dim)``, of batch shape ``batch``; None without one.

        Raises:
            TypeError: If the context is not a tensor.
            ValueError: If it is missing, unexpected or of another width.
        """
        return MixedDistribution(self, self._checked(context), validate_args=is_validation_enabled())

    condition = forward  # Pyro's protocol of conditional distributions

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log-density of vectors ``(*batch, D)``, which broadcast with the contexts, in nats."""
        return self(context).log_prob(value)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Draw vectors, ``(*sample_shape, *batch, D)``."""
        return self(context).sample(torch.Size(as_size(sample_shape)))

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

    def log_prob_at(self, value: Tensor, context: Tensor | None) -> Tensor:
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

    def draw_at(self, context: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
        """Draw vectors ``(*shape, D)`` at a standardised context that broadcasts with ``shape``."""
        seen, found = like.new_zeros(0) if context is None else context, dict[int, Tensor]()
        for place, network in zip(self._discrete, self.classifiers, strict=True):
            logits = network(_wide(seen)).expand(*shape, -1)
            some = logits.numel() > 0  # torch cannot check a batch without rows
            index = dist.Categorical(logits=logits, validate_args=None if some else False).sample()
            found[place] = index.to(like.dtype)
            seen = self._joined(seen, place, index)
        if self.flow is not None:
            q = self.flow(seen.expand(*shape, -1)) if seen.shape[-1] else self.flow()
            y = q.sample(shape[: len(shape) - len(q.batch_shape)])
            for place, column in zip(self._real, y.unbind(-1), strict=True):
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

    def _checked(self, context: Tensor | None) -> Tensor | None:
        """Return the standardised context."""
        if context is None or self.standardize is None:
            if (context is None) != (self.standardize is None):
                fault = "is missing" if context is None else "is unexpected"
                raise ValueError(f"Mixed: context {fault}; this distribution has context_dim={self.context_dim}.")
            return None
        check_tensor("Mixed", "context", context)
        check_context("Mixed", context, self.context_dim)
        return self.standardize(context)


class MixedDistribution(dist.TorchDistribution):
    """The distribution of vectors of a :class:`Mixed` at a standardised context."""

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(
        self, mixed: Mixed, context: Tensor | None, batch_shape: Any = None, validate_args: bool | None = None
    ) -> None:
        self.mixed, self.context = mixed, context
        own = torch.Size() if context is None else context.shape[:-1]
        batch = own if batch_shape is None else torch.Size(batch_shape)
        super().__init__(batch, mixed.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers, positive numbers and categories, each in its entry."""
        return self.mixed.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> MixedDistribution:
        return MixedDistribution(self.mixed, self.context, batch_shape, validate_args=self._validate_args)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        like = next(self.mixed.parameters())
        return self.mixed.draw_at(self.context, torch.Size((*sample_shape, *self.batch_shape)), like)

    def log_prob(self, value: Tensor) -> Tensor:
        check_event("Mixed", "value", value, self.mixed.event_shape)
        if self._validate_args and value.numel():  # torch cannot check the support of no values
            self._validate_sample(value)
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self.mixed.log_prob_at(value, self.context).expand(batch)


def _wide(seen: Tensor) -> Tensor:
    """Return the inputs of a classifier, or a constant if it depends on nothing."""
    return seen if seen.shape[-1] else seen.new_zeros(*seen.shape[:-1], 1)


ConditionalDistribution.register(Mixed)
