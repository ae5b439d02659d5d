"""Discrete distributions with finitely many values that Pyro does not list.

Events of several numbers, ``Bernoulli(p).to_event(1)``, have all joint values.  A binomial whose number of trials
differs between rows, for example because it is a latent, has the counts up to the largest number of trials.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Binomial, ExtendedBinomial, Independent
from pyro.poutine.messenger import Messenger
from torch import Tensor

MOST = 1000  # joint values


class JointEvent(Independent):
    """Independent discrete numbers whose joint values are the support."""

    has_enumerate_support = True

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all joint values, ``(number, *batch_shape, *event_shape)``, with 1 for the batch unless expanded."""
        one = self.base_dist.enumerate_support(expand=False).flatten()
        joint = torch.cartesian_prod(*[one] * self.event_shape.numel())
        joint = joint.reshape(-1, *(1,) * len(self.batch_shape), *self.event_shape)
        return joint.expand(-1, *self.batch_shape, *self.event_shape) if expand else joint


class AnyCount(ExtendedBinomial):
    """Binomial whose support reaches up to the largest number of trials; counts above a row's own are impossible.

    Args:
        fn: The binomial.
    """

    def __init__(self, fn: Binomial) -> None:
        super().__init__(fn.total_count, logits=fn.logits)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return the counts, ``(number, *batch_shape)``, with 1 for the batch unless expanded."""
        counts = torch.arange(1 + int(self.total_count.max())).to(self._param)
        counts = counts.reshape(-1, *(1,) * len(self.batch_shape))
        return counts.expand(-1, *self.batch_shape) if expand else counts


def with_values(fn: Any) -> Any:
    """Return a distribution that lists its values if they are finitely many, or else the distribution unchanged."""
    if isinstance(fn, Binomial) and bool((fn.total_count != fn.total_count.flatten()[0]).any()):
        return AnyCount(fn)
    if not isinstance(fn, Independent) or not fn.reinterpreted_batch_ndims:
        return fn
    base = with_values(fn.base_dist)
    if not base.has_enumerate_support or base.event_shape or not fn.event_shape.numel():
        return fn
    values = len(base.enumerate_support(expand=False)) ** fn.event_shape.numel()
    return JointEvent(base, fn.reinterpreted_batch_ndims) if values <= MOST else fn


class WithValues(Messenger):
    """Lets sites list their values, and marks them for Pyro's enumeration unless ``marked`` is False."""

    def __init__(self, names: tuple[str, ...], *, marked: bool = True) -> None:
        super().__init__()
        self._names = names
        self._marks = {"enumerate": "parallel", "expand": False, "num_samples": None} if marked else {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._names:
            msg["fn"] = with_values(msg["fn"])
            msg["infer"] = {**msg["infer"], **self._marks}
