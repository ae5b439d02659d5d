"""What a flow is at a context: a Pyro distribution that lives for one use."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from ..transforms import View
from .checks import check_value


class FlowDistribution(dist.TransformedDistribution):
    """What ``flow(context)`` returns: a transformed distribution over a flat list of views.

    It checks values before it scores them, unless validation is off (``pyro.enable_validation(False)``).

    Args:
        base: The base distribution.
        views: The transforms at the context.
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
        self._drawn: tuple[Tensor, Tensor] | None = None
        # The views share one event shape, so none of the general class's inference of shapes is needed.
        super(torch.distributions.TransformedDistribution, self).__init__(  # type: ignore[misc]
            base.batch_shape, base.event_shape, validate_args=validate_args
        )

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> FlowDistribution:
        base = self.base_dist.expand(torch.Size(batch_shape))
        return self._with(base, self.path_gradient)

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

    def _to_data(self, value: Tensor) -> Tensor:
        for view in self.runs:
            value = view(value)
        return value

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw samples without a gradient, ``(*sample_shape, *batch, *event_shape)``."""
        return self._to_data(self.base_dist.sample(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw reparameterised samples, ``(*sample_shape, *batch, *event_shape)``."""
        if not (self.path_gradient and torch.is_grad_enabled()):
            return self._to_data(self.base_dist.rsample(torch.Size(sample_shape)))
        value = self.base_dist.rsample(torch.Size(sample_shape))
        if not value.requires_grad:
            value.requires_grad_()
        leaf = value.detach().requires_grad_()
        log_prob = self.base_dist.log_prob(leaf)
        (score,) = torch.autograd.grad(log_prob.sum(), leaf)
        log_prob = log_prob.detach()
        for view in self.transforms:
            value, log_det, score = view.transform.forward_and_score(value, score, view.context)
            log_prob = log_prob - log_det.detach()
        path = (score * (value - value.detach())).flatten(-len(self.event_shape)).sum(-1)
        self._drawn = value, log_prob + path
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of ``value``, ``(*batch, *event_shape)``, in nats; no network runs twice for own samples."""
        if self._drawn is not None and value is self._drawn[0]:
            return self._drawn[1]
        if self._validate_args:
            self._validate_sample(value)
        total: Tensor | None = None
        for view in reversed(self.runs):
            value, log_det = view.inverse_and_log_det(value)
            total = log_det if total is None else total + log_det
        log_prob = self.base_dist.log_prob(value)
        return log_prob if total is None else log_prob + total

    def _validate_sample(self, value: Tensor) -> None:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return
        check_value(value, self.event_shape)
        if not value.isfinite().all():
            bad, shape = int((~value.isfinite()).sum()), tuple(value.shape)
            raise ValueError(f"log_prob: value holds NaN or inf ({bad} of {value.numel()} numbers, shape {shape}).")
