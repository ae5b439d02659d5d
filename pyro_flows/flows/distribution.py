"""A flow at a context: a distribution that lives for one use.

``rsample_and_log_prob`` draws and scores in one pass, and so does a sample statement; ``log_prob`` always computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor
from torch.distributions import Distribution

from ..transforms import View
from .checks import as_size, check_value, parameter_of


class FlowDistribution(dist.TransformedDistribution):
    """A transformed distribution over a flat list of views, as ``flow(context)`` returns it.

    Base and transforms are those of the flow at each call, with the parameters that they then have; the context is
    fixed, and so is the output of the flow's encoder.  Values are checked before they are scored, unless validation is
    off (``pyro.enable_validation(False)``).

    *Sample statements.*  A Pyro handler that records ``pyro.sample(name, flow(context))`` asks for the log-density of
    the draw next.  The draw was scored in the same pass, and the handler is given this score once.  So the density in
    a trace is that of the distribution that the draw came from.

    Args:
        base: A function, such as a module, that builds the base distribution.
        views: The transforms at the context, at least one.
        runs: The same map in fewer and larger parts, which draws and densities take if there are some.
        batch_shape: The batch shape, to which that of the base is expanded.
        path_gradient: Whether draws of a sample statement are scored with the path gradient.
        validate_args: As for all of Pyro's distributions.
    """

    def __init__(
        self,
        base: Callable[[], Distribution],
        views: list[View],
        runs: list[View] | None = None,
        *,
        batch_shape: torch.Size,
        path_gradient: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.base = base
        self.transforms: list[View] = views
        self.runs = views if runs is None else runs
        self.path_gradient = path_gradient
        self._stated: _Stated | None = None
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
        return self._with(as_size(batch_shape, "batch_shape"), self.path_gradient)

    def with_path_gradient(self) -> FlowDistribution:
        """Return the same distribution, which scores its own draws without a gradient to the density's parameters.

        So the gradient of an ELBO vanishes draw by draw where the guide equals the posterior (Roeder, Wu, Duvenaud
        2017, arXiv:1703.09194); for flows the score is carried along with the draw (Vaitl, Nicoli, Nakajima, Kessel
        2022, arXiv:2207.08219; Vaitl, Winkler, Richter, Kessel 2024, arXiv:2403.15881).  This holds for
        ``rsample_and_log_prob`` and for sample statements; ``log_prob`` of any other value has all gradients.
        """
        return self._with(self.batch_shape, True)

    def _with(self, batch_shape: torch.Size, path_gradient: bool) -> FlowDistribution:
        return FlowDistribution(
            self.base,
            self.transforms,
            self.runs,
            batch_shape=batch_shape,
            path_gradient=path_gradient,
            validate_args=self._validate_args,
        )

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw samples without a gradient, ``(*sample_shape, *batch, *event_shape)``."""
        return self._pushed(self.base_dist.sample(as_size(sample_shape)))[0]

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw reparameterised samples, ``(*sample_shape, *batch, *event_shape)``."""
        return self._pushed(self.base_dist.rsample(as_size(sample_shape)))[0]

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw reparameterised samples and score them, with each network run once.

        Returns:
            Samples ``(*sample_shape, *batch, *event_shape)`` and log-densities ``(*sample_shape, *batch)`` in nats.
        """
        base = self.base_dist
        x = base.rsample(as_size(sample_shape))
        if self.path_gradient and torch.is_grad_enabled():
            return self._carried(base, x)
        y, log_det = self._pushed(x)
        return y, log_prob_of(base, x) - log_det

    def __call__(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw as a sample statement does, and keep the score of the draw for the handler that records it."""
        if torch.compiler.is_compiling() or not (am_i_wrapped() and self.has_rsample):
            return super().__call__(sample_shape)
        value, log_prob = self.rsample_and_log_prob(sample_shape)
        self._stated = _Stated(value, log_prob, torch.is_grad_enabled())
        return value

    def _pushed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map draws of the base to draws of the flow, with log|det dy/dx|."""
        first, *others = self.runs
        y, total = first.transform.forward_and_log_det(x, first.context)
        for view in others:
            y, log_det = view.transform.forward_and_log_det(y, view.context)
            total = total + log_det
        return y, total

    def _carried(self, base: Distribution, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map draws of the base, carry the score along, and score the draws with the path gradient."""
        y = x if x.requires_grad else x.requires_grad_()
        leaf = x.detach().requires_grad_()
        log_prob = log_prob_of(base, leaf)
        (score,) = torch.autograd.grad(log_prob.sum(), leaf)
        log_prob = log_prob.detach()
        for view in self.transforms:
            y, log_det, score = view.transform.forward_and_score(y, score, view.context)
            log_prob = log_prob - log_det.detach()
        path = (score * (y - y.detach())).flatten(-len(self.event_shape)).sum(-1)
        return y, log_prob + path

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of ``value``, ``(*batch, *event_shape)``, in nats, at the parameters as they are."""
        stated = self._stated
        if not self.path_gradient:
            self._stated = None
        if stated is not None and stated.answers(value):
            return stated.log_prob
        if self._validate_args:
            self._validate_sample(value)
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stated": None}


class _Stated(NamedTuple):
    """The draw of a sample statement, its log-density, and the grad mode that both were made in."""

    value: Tensor
    log_prob: Tensor
    grad_mode: bool

    def answers(self, value: Tensor) -> bool:
        """Return True for the very draw, in the grad mode that made it, unless it became a leaf that requires grad."""
        leaf = value.is_leaf and value.requires_grad
        return self.value is value and not leaf and self.grad_mode == torch.is_grad_enabled()


def log_prob_of(base: Distribution, value: Tensor) -> Tensor:
    """Return the log-density of values under a base, of no values too, which torch cannot sum up."""
    if value.numel():
        return base.log_prob(value)
    return value.reshape(*value.shape[: value.dim() - len(base.event_shape)], base.event_shape.numel()).sum(-1)
