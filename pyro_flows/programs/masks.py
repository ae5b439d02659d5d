"""Which sites count in a log-density, and which of their elements: masks, observations, and deterministic values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta, Independent, MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

Bools = Tensor | bool


class Mask(NamedTuple):
    """The mask of a site, over its batch shape.

    Attributes:
        some: True where some part of an element counts.
        every: True where all of it counts; it differs from ``some`` if a mask divides an event.
    """

    some: Bools
    every: Bools

    @property
    def hides(self) -> bool:
        """True if some of the site does not count."""
        return self.every is not True and not bool(torch.as_tensor(self.every).all())

    @property
    def is_scalar(self) -> bool:
        """True if one number masks all of the site, as ``mask=False`` does."""
        return not any(isinstance(part, Tensor) and part.dim() for part in self)


def mask_of(site: dict[str, Any]) -> Mask:
    """Return the mask of a site in a trace, from its handlers and from its distribution."""
    own = True if site["mask"] is None else site["mask"]
    return Mask(*(_both(part, own) for part in _of_distribution(site["fn"])))


def is_masked(site: dict[str, Any]) -> bool:
    """True if a site has a mask, even one that hides nothing."""
    return any(part is not True for part in mask_of(site))


def is_observation(site: dict[str, Any]) -> bool:
    """True if a site is observed data or a factor, but no deterministic value."""
    return site["type"] == "sample" and site["is_observed"] and not is_deterministic(site)


def is_deterministic(site: dict[str, Any]) -> bool:
    """True if a site names a value: by ``pyro.deterministic``, or in place of a reparametrised latent."""
    return bool(site["type"] == "sample" and (site["infer"].get("_deterministic") or is_reparametrised(site)))


def is_reparametrised(site: dict[str, Any]) -> bool:
    """True if a site was a latent before ``poutine.reparam``, which observes its value as a point that is masked out.

    A point at data is not masked out.
    """
    fn, is_marked = site["fn"], site["infer"].get("_deterministic")
    is_point = isinstance(fn, MaskedDistribution) and isinstance(fn.base_dist, Delta) and fn._mask is False
    return bool(site["is_observed"] and is_point and not is_marked)


def present_of(values: Tensor, counts: Tensor | None) -> Tensor:
    """Return the numbers that count, ``(*batch, n)``, of ``(*batch, N)``; None stands for all."""
    return values if counts is None else values[..., counts.to(values.device)]


def among_absent(values: Tensor, counts: Tensor | None) -> Tensor:
    """Return numbers ``(*batch, n)`` at their places among zeros, ``(*batch, N)``, as :func:`present_of` took them."""
    if counts is None:
        return values
    counts = counts.to(values.device)
    padded = torch.cat((values, values.new_zeros(*values.shape[:-1], 1)), -1)
    return padded.index_select(-1, torch.where(counts, counts.cumsum(0) - 1, values.shape[-1]))


def hides_nan(trace: Trace) -> bool:
    """True if a mask hides data of an observed site that are NaN."""
    sites = (site for site in trace.nodes.values() if is_observation(site) and isinstance(site["value"], Tensor))
    return any(is_masked(site) and bool(site["value"].isnan().any()) for site in sites)


def counted_data(site: dict[str, Any]) -> Tensor:
    """Return the data of an observed site, with others in place of those that are NaN and that a mask hides."""
    value, depth = torch.as_tensor(site["value"]), site["fn"].event_dim
    counts = torch.as_tensor(mask_of(site).some, device=value.device)
    events = value.reshape(-1, *value.shape[value.dim() - depth :])
    whole = ~events.isnan().reshape(len(events), -1).any(-1)
    other = events[whole.long().argmax()]  # in the support, whatever that is
    hidden = value.isnan() & ~counts.reshape(counts.shape + (1,) * depth)
    return torch.where(hidden, other.nan_to_num(), value)


class WithoutHiddenNaN(Messenger):
    """Handler that scores no NaN behind a mask, since 0 times the NaN in its gradient is NaN."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_observation(msg) and isinstance(msg["value"], Tensor) and is_masked(msg):
            msg["value"] = counted_data(msg)


def _of_distribution(fn: Any) -> Mask:
    if not isinstance(fn, MaskedDistribution | Independent):
        return Mask(True, True)
    some, every = _of_distribution(fn.base_dist)
    if isinstance(fn, MaskedDistribution):
        return Mask(_both(some, fn._mask), _both(every, fn._mask))
    number = fn.reinterpreted_batch_ndims
    return Mask(_last(some, number, torch.any), _last(every, number, torch.all))


def _both(one: Bools, other: Bools) -> Bools:
    """Return the elements that both masks keep; a tensor that the JIT traces takes no Python bool."""
    return other if one is True else one if other is True else one & other


def _last(mask: Bools, number: int, reduce: Any) -> Bools:
    """Reduce a mask over its last dimensions."""
    if not isinstance(mask, Tensor) or not number or not mask.dim():
        return mask
    return reduce(mask.flatten(max(mask.dim() - number, 0)), -1)
