"""Mixtures of flows with equal weights, p(y | c) = 1/K Σ_k p_k(y | c_k)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import repeat
from typing import Any, NoReturn

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ..arguments import check_kind
from .arguments import as_size
from .distribution import FlowDistribution
from .flow import Flow


class FlowMixture(nn.Module):
    """The mixture of K flows over vectors with equal weights, each with a context of its own.

    It draws and scores as a :class:`~pyro_flows.flows.Flow` does, at K times the cost.  It is no single transform of a
    base, so its draws have no gradients.

    Args:
        flows: The flows, at least two, over vectors of one size.

    Attributes:
        event_shape: The shape of a vector.
        context_dim: The width of the context, which holds those of the flows one after another.

    Raises:
        TypeError: If one of them is no flow.
        ValueError: If they are over vectors of different sizes.

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> mixture = FlowMixture([flows.nsf(3, context_dim=2), flows.realnvp(3, context_dim=4)])
        >>> q = mixture(torch.randn(5, 6))
        >>> q.sample((7,)).shape, q.log_prob(torch.randn(7, 5, 3)).shape
        (torch.Size([7, 5, 3]), torch.Size([7, 5]))
    """

    def __init__(self, flows: Sequence[Flow]) -> None:
        super().__init__()
        for flow in flows:
            check_kind("FlowMixture", Flow, "flows of pyro_flows", flows=flow)
        shapes = {tuple(flow.event_shape) for flow in flows}
        if len(shapes) != 1:
            raise ValueError(f"FlowMixture: flows must be over vectors of one size, got {sorted(shapes)}.")
        self.flows: Any = nn.ModuleList(flows)
        self.event_shape = flows[0].event_shape
        self.context_dim = sum(flow.context_dim for flow in flows)

    @property
    def transforms(self) -> NoReturn:
        """No transforms: code that needs those of a single flow ends here."""
        fault = "a mixture of flows, as in an ensemble of guides, is no single transform of a base"
        raise NotImplementedError(f"FlowMixture: {fault}. Use one of its flows, or one member of the ensemble.")

    runs = base = fixed = unscaled = transforms

    def pairs(self, context: Tensor | None) -> list[tuple[Any, Tensor | None]]:
        """Return the flows with their contexts, given one for all, ``(*batch, context_dim)``."""
        sizes = [flow.context_dim for flow in self.flows]
        parts = repeat(None) if context is None else context.split(sizes, -1)
        return [(flow, part if flow.context_dim else None) for flow, part in zip(self.flows, parts, strict=False)]

    def forward(self, context: Tensor | None = None) -> MixtureDistribution:
        """Return the distribution at a context, of its batch shape."""
        return MixtureDistribution([flow(own) for flow, own in self.pairs(context)])

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), context: Tensor | None = None, *, chunk_size: int | None = None
    ) -> Tensor:
        """Draw samples, ``(*sample_shape, *batch, *event_shape)``, as :meth:`Flow.sample` does."""
        return _picked([flow.sample(sample_shape, own, chunk_size=chunk_size) for flow, own in self.pairs(context)])

    def log_prob(self, value: Tensor, context: Tensor | None = None, *, chunk_size: int | None = None) -> Tensor:
        """Return the log-density of values, ``(*batch)`` in nats, as :meth:`Flow.log_prob` does."""
        return _mean([flow.log_prob(value, own, chunk_size=chunk_size) for flow, own in self.pairs(context)])


class MixtureDistribution(dist.TorchDistribution):
    """The mixture of distributions with equal weights.  Base coordinates are those of the first.

    Args:
        parts: The distributions, of one batch shape.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, parts: Sequence[FlowDistribution]) -> None:
        self.parts = parts
        super().__init__(parts[0].batch_shape, parts[0].event_shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> MixtureDistribution:
        return MixtureDistribution([part.expand(batch_shape) for part in self.parts])

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw samples, ``(*sample_shape, *batch, *event_shape)``."""
        return _picked([part.sample(as_size(sample_shape)) for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of ``value``, ``(*batch, *event_shape)``, in nats."""
        return _mean([part.log_prob(value) for part in self.parts])

    def for_one_step(self) -> MixtureDistribution:
        """Return the same distribution; see :meth:`FlowDistribution.for_one_step`."""
        return self

    def noise(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw samples of the first base, ``(*sample_shape, *event_shape)``."""
        return self.parts[0].noise(sample_shape)

    def place(self, x: Tensor) -> Tensor:
        """Map coordinates of the first base to values."""
        return self.parts[0].place(x)

    def coordinates(self, value: Tensor) -> Tensor:
        """Map values to coordinates of the first base."""
        return self.parts[0].coordinates(value)

    def widened(self, by: float) -> MixtureDistribution:
        """Return the mixture of the distributions with scaled bases."""
        return MixtureDistribution([part.widened(by) for part in self.parts])


def _picked(draws: list[Tensor]) -> Tensor:
    """Return for each vector that of one distribution, picked at random."""
    place = torch.randint(len(draws), draws[0].shape[:-1], device=draws[0].device)
    for number, other in enumerate(draws[1:], 1):
        draws[0] = other.where((place == number).unsqueeze(-1), draws[0])
    return draws[0]


def _mean(log_probs: list[Tensor]) -> Tensor:
    """Return the log-density of the mixture."""
    return torch.stack(log_probs).logsumexp(0) - math.log(len(log_probs))


ConditionalDistribution.register(FlowMixture)
