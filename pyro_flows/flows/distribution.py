"""A flow at a context: a distribution that lives for one use.

Its own last draw is scored without a second pass of the networks, unless any number has changed since it was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..transforms import FlowTransform, View
from ..transforms.base import chained
from ..transforms.view import Counters, Snapshot, can_be_kept
from .arguments import as_size, check_value, parameter_of
from .path import can_be_carried, carried


class FlowDistribution(dist.TransformedDistribution):
    """A transformed distribution over a flat list of views, as ``flow(context)`` returns it.

    Base and transforms are those of the flow at each call, with the parameters that they then have; the context is
    fixed, and so is the output of the flow's encoder.  Values are checked before they are scored, unless validation is
    off (``pyro.enable_validation(False)``).

    The pair of the last draw is kept until it is scored, together with a copy of all numbers that it depends on
    (:mod:`~pyro_flows.transforms.view`).  If nothing has changed, ``log_prob`` of this very tensor runs no network.

    Args:
        base: A function, such as a module, that builds the base distribution.
        views: The transforms at the context, at least one.
        runs: The transforms of the same map as they are run, perhaps in fewer and larger parts.
        context: What the transforms take of a context, or None.
        batch_shape: The batch shape, to which that of the base is expanded.
        path_gradient: Whether its own draws are scored with the path gradient.
        one_step: Whether its draws are scored in the step that drew them, as by :meth:`for_one_step`.
        validate_args: As for all of Pyro's distributions.
    """

    def __init__(
        self,
        base: Callable[[], Distribution],
        views: list[View],
        runs: Sequence[FlowTransform],
        context: Tensor | None,
        *,
        batch_shape: torch.Size,
        path_gradient: bool = False,
        one_step: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.base = base
        self.transforms: list[View] = views
        self.runs, self.context = runs, context
        self.path_gradient, self.one_step = path_gradient, one_step
        self._last: _Draw | None = None
        # The views share one event shape, so none of the general class's inference of shapes is needed.
        event_shape = views[0].transform.event_shape
        super(torch.distributions.TransformedDistribution, self).__init__(  # type: ignore[misc]
            batch_shape, event_shape, validate_args=validate_args
        )

    @property
    def base_dist(self) -> Distribution:
        """The base distribution as its parameters are now, of the batch shape of the flow."""
        base = self.base()
        return base if base.batch_shape == self.batch_shape else base.expand(self.batch_shape)

    @cached_property
    def has_rsample(self) -> bool:
        """True if draws of the base are reparameterised."""
        return self.base_dist.has_rsample

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> FlowDistribution:
        return self._with(batch_shape=torch.Size(batch_shape))

    def with_path_gradient(self) -> FlowDistribution:
        """Return the same distribution, which scores its own draws without a gradient to the density's parameters.

        So the gradient of an ELBO vanishes draw by draw where the guide equals the posterior (Roeder, Wu, Duvenaud
        2017, arXiv:1703.09194); for flows the score is carried along with the draw (Vaitl, Nicoli, Nakajima, Kessel
        2022, arXiv:2207.08219; Vaitl, Winkler, Richter, Kessel 2024, arXiv:2403.15881).  It has no second derivatives.
        Any other value is scored with all gradients.
        """
        return self._with(path_gradient=True)

    def for_one_step(self) -> FlowDistribution:
        """Return the same distribution for a guide's own sample statement, which an ELBO scores in the same step.

        That its numbers are unchanged is read off torch's counts of changes, in place of their contents.
        """
        return self._with(one_step=True)

    def _with(self, **changes: Any) -> FlowDistribution:
        own = {name: getattr(self, name) for name in ("batch_shape", "path_gradient", "one_step")}
        kept = {**own, "validate_args": self._validate_args, **changes}
        return FlowDistribution(self.base, self.transforms, self.runs, self.context, **kept)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw samples without a gradient, ``(*sample_shape, *batch, *event_shape)``."""
        return chained(self.runs, self.base_dist.sample(as_size(sample_shape)), self.context)[0]

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw reparameterised samples, ``(*sample_shape, *batch, *event_shape)``."""
        value, score = self._drawn(sample_shape)
        if can_be_kept():
            parts = (*(view.transform for view in self.transforms), self.base)
            modules = [part for part in parts if isinstance(part, nn.Module)]
            others = [value] if self.context is None else [value, self.context]
            snapshot = (Counters if self.one_step else Snapshot)(modules, others)
            self._last = _Draw(value, score, torch.is_grad_enabled(), value.grad_fn, snapshot)
        return value

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw reparameterised samples and score them, with each network run once.

        Returns:
            Samples ``(*sample_shape, *batch, *event_shape)`` and log-densities ``(*sample_shape, *batch)`` in nats.
        """
        value, score = self._drawn(sample_shape)
        return value, score()

    def _drawn(self, sample_shape: Sequence[int]) -> tuple[Tensor, Callable[[], Tensor]]:
        """Draw, and return a function that scores the draw from the same pass."""
        base = self.base_dist
        x = base.rsample(as_size(sample_shape))
        if self.path_gradient and torch.is_grad_enabled():
            y, log_prob = self._carried(base, x)
            return y, lambda: log_prob
        y, log_det = chained(self.runs, x, self.context)
        return y, lambda: log_prob_of(base, x) - log_det

    def _carried(self, base: Distribution, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map draws of the base, carry the score along, and score the draws with the path gradient."""
        leaf = x.detach().requires_grad_()
        log_prob = log_prob_of(base, leaf)
        (score,) = torch.autograd.grad(log_prob.sum(), leaf)
        log_prob = log_prob.detach()
        layers = [view.transform for view in self.transforms]
        if all(view.context is None for view in self.transforms) and can_be_carried(layers):
            y, total, score = carried(layers, x, score)
            log_prob = log_prob - total
        else:
            y = x if x.requires_grad else x.requires_grad_()
            for view in self.transforms:
                y, log_det, score = view.transform.forward_and_score(y, score, view.context)
                log_prob = log_prob - log_det.detach()
        path = (score * (y - y.detach())).flatten(-len(self.event_shape)).sum(-1)
        return y, log_prob + path

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of ``value``, ``(*batch, *event_shape)``, in nats, at the parameters as they are."""
        own = self._last
        if not self.path_gradient:
            self._last = None
        if own is not None and own.answers(value):
            return own.score()
        if self._validate_args:
            self._validate_sample(value)
        x, log_det = chained(self.runs, value, self.context, inverse=True)
        return log_prob_of(self.base_dist, x) + log_det

    def _validate_sample(self, value: Tensor) -> None:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return
        check_value(value, self.event_shape, parameter_of(view.transform for view in self.transforms))
        if not (value.is_meta or value.isfinite().all()):
            bad, shape = int((~value.isfinite()).sum()), tuple(value.shape)
            raise ValueError(f"log_prob: value holds NaN or inf ({bad} of {value.numel()} numbers, shape {shape}).")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


class _Draw(NamedTuple):
    """A draw, the function that scores it, and all that both depend on."""

    value: Tensor
    score: Callable[[], Tensor]
    grad_mode: bool
    grad_fn: object
    snapshot: Snapshot | Counters

    def answers(self, value: Tensor) -> bool:
        """Return True for the very draw, if nothing has changed since, and it became no leaf that requires grad."""
        leaf = value.is_leaf and value.requires_grad
        same = self.value is value and self.grad_fn is value.grad_fn and self.grad_mode == torch.is_grad_enabled()
        return same and not leaf and self.snapshot.holds()


def log_prob_of(base: Distribution, value: Tensor) -> Tensor:
    """Return the log-density of values under a base, of no values too, which torch cannot sum up."""
    if value.numel():
        return base.log_prob(value)
    return value.reshape(*value.shape[: value.dim() - len(base.event_shape)], base.event_shape.numel()).sum(-1)
