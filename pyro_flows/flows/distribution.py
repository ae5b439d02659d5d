"""A flow at a context: a distribution that lives for one use.

It remembers the pair of what it drew last (:mod:`~pyro_flows.transforms.memo`), so that scoring it costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from ..transforms import View
from ..transforms.memo import Memo, Pair
from .checks import as_size, check_value, parameter_of


class FlowDistribution(dist.TransformedDistribution):
    """What ``flow(context)`` returns: a transformed distribution over a flat list of views.

    It checks values before it scores them, unless validation is off (``pyro.enable_validation(False)``).

    Args:
        base: The base distribution.
        views: The transforms at the context, at least one.
        runs: The same map in fewer and larger parts, which draws and densities take where there are some.
        path_gradient: Whether the log-density of an own sample has, as its gradient, that by way of the sample alone.
        validate_args: As for all of Pyro's distributions.
    """

    def __init__(
        self,
        base: Distribution,
        views: list[View],
        runs: list[View] | None = None,
        *,
        path_gradient: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.base_dist = base
        self.transforms: list[View] = views
        self.runs = views if runs is None else runs
        self.path_gradient = path_gradient
        depends = [view.transform for view in views], [view.context for view in views]
        self._memo = Memo(*depends)
        self._scored = Memo(*depends)  # of path gradients: draws, and their log-densities in place of log-determinants
        # The views share one event shape, so none of the general class's inference of shapes is needed.
        super(torch.distributions.TransformedDistribution, self).__init__(  # type: ignore[misc]
            base.batch_shape, base.event_shape, validate_args=validate_args
        )

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> FlowDistribution:
        return self._with(self.base_dist.expand(as_size(batch_shape, "batch_shape")), self.path_gradient)

    def with_path_gradient(self) -> FlowDistribution:
        """The same distribution, whose own samples are scored without a gradient to the parameters of the density.

        So the gradient of an ELBO vanishes draw by draw where the guide equals the posterior (Roeder, Wu, Duvenaud
        2017, arXiv:1703.09194); for flows the score is carried along with the draw (Vaitl, Nicoli, Nakajima, Kessel
        2022, arXiv:2207.08219; Vaitl, Winkler, Richter, Kessel 2024, arXiv:2403.15881).
        """
        return self._with(self.base_dist, True)

    def _with(self, base: Distribution, path_gradient: bool) -> FlowDistribution:
        return FlowDistribution(
            base, self.transforms, self.runs, path_gradient=path_gradient, validate_args=self._validate_args
        )

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw samples without a gradient, ``(*sample_shape, *batch, *event_shape)``."""
        return self._pushed(self.base_dist.sample(as_size(sample_shape)))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw reparameterised samples, ``(*sample_shape, *batch, *event_shape)``."""
        start = self.base_dist.rsample(as_size(sample_shape))
        return self._carried(start) if self.path_gradient and torch.is_grad_enabled() else self._pushed(start)

    def _pushed(self, x: Tensor) -> Tensor:
        """What the transforms make of draws of the base, of which the memo then knows."""
        first, *others = self.runs
        y, total = first.transform.forward_and_log_det(x, first.context)
        for view in others:
            y, log_det = view.transform.forward_and_log_det(y, view.context)
            total = total + log_det
        self._memo.keep(Pair(x, y, total), forward=True)
        return y

    def _carried(self, value: Tensor) -> Tensor:
        """The same, with the score carried along."""
        if not value.requires_grad:
            value.requires_grad_()
        leaf = value.detach().requires_grad_()
        log_prob = log_prob_of(self.base_dist, leaf)
        (score,) = torch.autograd.grad(log_prob.sum(), leaf)
        log_prob = log_prob.detach()
        for view in self.transforms:
            value, log_det, score = view.transform.forward_and_score(value, score, view.context)
            log_prob = log_prob - log_det.detach()
        path = (score * (value - value.detach())).flatten(-len(self.event_shape)).sum(-1)
        self._scored.keep(Pair(leaf, value, log_prob + path), forward=True)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of ``value``, ``(*batch, *event_shape)``, in nats; no network runs twice for own samples."""
        if scored := self._scored.made(value, forward=True):
            return scored.log_det
        if self._validate_args:
            self._validate_sample(value)
        known = self._memo.made(value, forward=True)
        self._memo.forget()
        if known:
            return log_prob_of(self.base_dist, known.x) - known.log_det
        *others, last = self.runs
        value, total = last.transform.inverse_and_log_det(value, last.context)
        for view in reversed(others):
            value, log_det = view.transform.inverse_and_log_det(value, view.context)
            total = total + log_det
        return log_prob_of(self.base_dist, value) + total

    def _validate_sample(self, value: Tensor) -> None:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return
        check_value(value, self.event_shape, parameter_of(view.transform for view in self.transforms))
        if not (value.is_meta or value.isfinite().all()):
            bad, shape = int((~value.isfinite()).sum()), tuple(value.shape)
            raise ValueError(f"log_prob: value holds NaN or inf ({bad} of {value.numel()} numbers, shape {shape}).")


def log_prob_of(base: Distribution, value: Tensor) -> Tensor:
    """The log-density of values under a base, of no values too, which torch cannot sum up."""
    if value.numel():
        return base.log_prob(value)
    return value.reshape(*value.shape[: value.dim() - len(base.event_shape)], base.event_shape.numel()).sum(-1)
