"""Integers whose log-mass is bounded from below by a density over real numbers, of which each owns a cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.distributions import constraints

from .checks import check_tensor
from .distribution import FlowDistribution, log_prob_of
from .flow import Flow


class DequantizedDistribution(dist.TorchDistribution):
    """What ``model(context)`` returns: integers, whose log-mass is estimated by a lower bound, new at each call.

    Args:
        density: The density p over real events.
        levels: The number of integers.
        dtype: That of the density's events.
        noise: The flow that the noise is drawn from, or None where it is uniform.
        num_samples: The number K of draws of the noise.
        validate_args: As for all of Pyro's distributions.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        density: FlowDistribution,
        levels: int,
        dtype: torch.dtype,
        *,
        noise: Flow | None = None,
        num_samples: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        self.density, self.levels, self.dtype = density, levels, dtype
        self.noise, self.num_samples = noise, num_samples
        if validate_args is None:  # as Pyro has it: torch's own default goes off once anything was compiled
            validate_args = is_validation_enabled()
        super().__init__(density.batch_shape, density.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(0, self.levels - 1), len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> DequantizedDistribution:
        return DequantizedDistribution(
            self.density.expand(batch_shape),
            self.levels,
            self.dtype,
            noise=self.noise,
            num_samples=self.num_samples,
            validate_args=self._validate_args,
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw events ``(*sample_shape, *batch, *event_shape)`` of 0 … levels - 1, as uint8 if there are up to 256.

        Raises:
            ValueError: If the flow gives NaN, as of a context that holds NaN, unless validation is off.
        """
        value = self.density.sample(sample_shape)
        return to_integers(value, self.levels, checked=bool(self._validate_args))

    def log_prob(self, value: Tensor) -> Tensor:
        """A lower bound of the log-mass of ``value``, ``(*batch, *event_shape)`` of integers, in nats.

        Raises:
            ValueError: If a value has another dtype or shape or is out of range, unless validation is off
                (``pyro.enable_validation(False)``): the log-mass of what is no integer in range is then -inf.
        """
        if self._validate_args and not torch.compiler.is_compiling():
            check_levels(value, self.event_shape, self.levels)
        number = len(self.event_shape)
        batch = torch.broadcast_shapes(value.shape[:-number], self.batch_shape)
        x = value.to(self.dtype).expand(*batch, *self.event_shape)
        inside = (x >= 0) & (x < self.levels) & (x == x.floor())
        x = torch.where(inside, x, 0.0)
        u, log_q = self._draw(x)
        bound = (self.density.log_prob(x + u) - log_q).logsumexp(0) - math.log(self.num_samples)
        return torch.where(inside.flatten(-number).all(-1), bound, -math.inf)

    def _draw(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """K draws of the noise, ``(K, *x.shape)``, and their log-densities, ``(K, *batch)``."""
        if self.noise is None:
            return torch.rand((self.num_samples, *x.shape), dtype=x.dtype, device=x.device), 0.0
        context = (x + 0.5) * (2 / self.levels) - 1
        z, log_q = self.noise.rsample_and_log_prob((self.num_samples,), context)
        normal = dist.Normal(torch.zeros_like(z), 1.0, validate_args=False).to_event(len(self.event_shape))
        return torch.special.ndtr(z), log_q - log_prob_of(normal, z)


def to_integers(value: Tensor, levels: int, *, checked: bool) -> Tensor:
    """The integers whose cells hold real numbers; where they are checked, NaN raises a ValueError."""
    if checked and value.isnan().any():
        raise ValueError("sample: the flow gives NaN, of which there are no integers; look at context and weights.")
    return value.floor().clamp(0, levels - 1).to(torch.uint8 if levels <= 256 else torch.int64)


def check_levels(value: Tensor, event_shape: torch.Size, levels: int) -> None:
    """Raise one clear error unless a value is a tensor of integers in range with the event shape on the right."""
    check_tensor("log_prob", "value", value, floating=False)
    if value.is_meta:
        raise ValueError("log_prob: value must hold numbers, but lies on the meta device.")
    shape, event = tuple(value.shape), tuple(event_shape)
    if shape[max(len(shape) - len(event), 0) :] != event:
        raise ValueError(f"log_prob: value must have the event shape {event} on the right, got shape {shape}.")
    if value.is_floating_point() or value.is_complex():
        broken = "" if value.isfinite().all() else " with NaN or inf"
        raise ValueError(
            f"log_prob: value must hold integers, got {value.dtype}{broken}; use value.to(torch.uint8) where they are."
        )
    value = value if value.dtype in (torch.uint8, torch.int64) else value.to(torch.int64)
    low, high = (int(value.min()), int(value.max())) if value.numel() else (0, 0)
    if not 0 <= low <= high < levels:
        raise ValueError(f"log_prob: value must lie between 0 and {levels - 1}, got some from {low} to {high}.")
