"""Distributions over integers from flows over real numbers: P(n) is the mass of the cell [n, n + 1), bounded by

    log P(n) ≥ E log 1/K Σ_k p(n + u_k) / q(u_k | n),   u_k ~ q(· | n) on [0, 1)

With q uniform this is uniform dequantisation (Theis, van den Oord, Bethge 2015, arXiv:1511.01844).  With q a
conditional flow it is variational dequantisation (Ho, Chen, Srinivas, Duan, Abbeel 2019, Flow++, arXiv:1902.00275).
K > 1 draws give the importance-weighted bound (Burda, Grosse, Salakhutdinov 2015, arXiv:1509.00519), which is tighter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalDistribution
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import constraints

from ..arguments import check_integers, check_kind, check_numbers
from ..distributions.normal import log_prob_of
from ..transforms import Sigmoid
from .arguments import check_event, check_tensor
from .chunks import in_chunks
from .distribution import FlowDistribution
from .flow import Flow

FLOW = "a Flow, such as flows.glow((1, 28, 28))"


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
        if noise is not None and not _takes_events(noise, flow.event_shape):
            event, got = tuple(flow.event_shape), f"{tuple(noise.event_shape)} with context_dim={noise.context_dim}"
            must = f"noise must be a flow over events of shape {event} whose contexts are such events"
            raise ValueError(f"Dequantized: {must}, got one over {got}; image recipes take context_dim={event}.")
        self.flow, self.levels, self.alpha, self.noise, self.num_samples = flow, levels, alpha, noise, num_samples
        self.event_shape, self.context_dim = flow.event_shape, flow.context_dim
        self.pixels = Sigmoid(flow.event_shape, high=float(levels), alpha=alpha)

    def forward(self, context: Tensor | None = None, *, num_samples: int | None = None) -> DequantizedDistribution:
        """Return the distribution at a context, as a :class:`Flow` does; ``num_samples`` replaces that of the model."""
        return self._of(self.flow(context), num_samples)

    condition = forward  # Pyro's protocol of conditional distributions

    def _of(self, density: FlowDistribution, num_samples: int | None) -> DequantizedDistribution:
        density = density.followed_by(self.pixels).unchecked()  # the integers are checked
        number = self.num_samples if num_samples is None else num_samples
        check_integers("Dequantized", num_samples=number)
        # Pyro's setting, since torch's own default turns off once anything was compiled.
        return DequantizedDistribution(self, density, number, is_validation_enabled())

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
        value = self.flow.sample(sample_shape, context, chunk_size=chunk_size)
        return _to_integers(self.pixels(value), self.levels, checked=is_validation_enabled())

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
            return self._of(self.flow.at(context), num_samples).log_prob(value)

        return in_chunks(bound, chunk_size, value, self.flow.encode(context), len(self.event_shape))

    @torch.no_grad()
    def initialize(self, value: Tensor, context: Tensor | None = None) -> None:
        """Initialise the flow's layers such as ``ActNorm`` from data ``(*batch, *event_shape)``."""
        self.flow.initialize(self.unbounded(value), context)

    def unbounded(self, value: Tensor) -> Tensor:
        """Return the logits, on which the flow acts, of events ``(*batch, *event_shape)`` with uniform noise."""
        value = value.to(self.dtype)
        return self.pixels.inverse_and_log_det(value + torch.rand_like(value))[0]


ConditionalDistribution.register(Dequantized)


class DequantizedDistribution(dist.TorchDistribution):
    """A distribution over integers, the result of ``model(context)``; its log-mass is a new random bound at each call.

    Args:
        model: The model.
        density: Its density p over real events, at the context.
        num_samples: The number K of draws of the noise.
        validate_args: True to check values.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, model: Dequantized, density: FlowDistribution, num_samples: int, validate_args: bool) -> None:
        self.model, self.density, self.num_samples = model, density, num_samples
        super().__init__(density.batch_shape, density.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(0, self.model.levels - 1), len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> DequantizedDistribution:
        density = self.density.expand(batch_shape)
        return DequantizedDistribution(self.model, density, self.num_samples, self._validate_args)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw events ``(*sample_shape, *batch, *event_shape)`` of 0 … levels - 1, as uint8 if there are up to 256.

        Raises:
            ValueError: If the flow returns NaN, for example at a context with NaN, unless validation is off.
        """
        value = self.density.sample(sample_shape)
        return _to_integers(value, self.model.levels, checked=bool(self._validate_args))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return a lower bound of the log-mass of ``value``, ``(*batch, *event_shape)`` of integers, in nats.

        Raises:
            ValueError: If a value has another dtype or shape or is out of range, unless validation is off
                (``pyro.enable_validation(False)``).  Values that are no integers in range then have a log-mass of -inf.
        """
        if self._validate_args and not torch.compiler.is_compiling():
            _check_levels(value, self.event_shape, self.model.levels)
        number = len(self.event_shape)
        batch = torch.broadcast_shapes(value.shape[:-number], self.batch_shape)
        x = value.to(self.model.dtype).expand(*batch, *self.event_shape)
        inside = (x >= 0) & (x < self.model.levels) & (x == x.floor())
        x = torch.where(inside, x, 0.0)
        u, log_q = self._draw(x)
        bound = (self.density.log_prob(x + u) - log_q).logsumexp(0) - math.log(self.num_samples)
        return torch.where(inside.flatten(-number).all(-1), bound, -math.inf)

    def _draw(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """Draw the noise K times, ``(K, *x.shape)``, and return it with its log-densities, ``(K, *batch)``."""
        if self.model.noise is None:
            return torch.rand((self.num_samples, *x.shape), dtype=x.dtype, device=x.device), 0.0
        context = (x + 0.5) * (2 / self.model.levels) - 1
        z, log_q = self.model.noise.rsample_and_log_prob((self.num_samples,), context)
        normal = dist.Normal(torch.zeros_like(z), 1.0, validate_args=False).to_event(len(self.event_shape))
        return torch.special.ndtr(z), log_q - log_prob_of(normal, z)


def _to_integers(value: Tensor, levels: int, *, checked: bool) -> Tensor:
    """Return the integers whose cells hold real numbers; NaN raises ValueError if ``checked``."""
    if checked and value.isnan().any():
        raise ValueError("sample: the flow gives NaN, which is no integer; look at context and weights.")
    return value.floor().clamp(0, levels - 1).to(torch.uint8 if levels <= 256 else torch.int64)


def _check_levels(value: Tensor, event_shape: torch.Size, levels: int) -> None:
    """Raise an error unless a value is a tensor ``(*batch, *event_shape)`` of integers in range."""
    check_tensor("log_prob", "value", value, floating=False)
    if value.is_meta:
        raise ValueError("log_prob: value must hold numbers, but lies on the meta device.")
    check_event("log_prob", "value", value, event_shape)
    if value.is_floating_point():
        got = f"{value.dtype}{'' if value.isfinite().all() else ' with NaN or inf'}"
        raise ValueError(f"log_prob: value must hold integers, got {got}; use value.to(torch.uint8) for whole numbers.")
    low, high = map(int, value.to(torch.int64).aminmax()) if value.numel() else (0, 0)
    if not 0 <= low <= high < levels:
        raise ValueError(f"log_prob: value must lie between 0 and {levels - 1}, got some from {low} to {high}.")


@torch.no_grad()
def _takes_events(noise: Flow, event_shape: torch.Size) -> bool:
    """True if a flow is over events of a shape and takes such an event as its context."""
    if noise.event_shape != event_shape or not noise.context_dim:
        return False
    like = next(noise.parameters())
    try:
        return noise(torch.zeros(event_shape, dtype=like.dtype, device=like.device)).batch_shape == ()
    except (ValueError, RuntimeError):
        return False
