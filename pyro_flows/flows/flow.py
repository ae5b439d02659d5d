"""A flow: transforms over a base, p(y) = p_base(x) |det dx/dy| with x = t_1⁻¹(… t_n⁻¹(y)).

The flow is a module that lasts; ``flow(context)`` is a Pyro distribution that lives for one use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConditionalDistribution
from torch import Tensor, nn
from torch.distributions import Distribution

from ..distributions import FixedBase, StandardNormal
from ..transforms import Compose, FlowTransform, View
from ..transforms.compose import check_chain
from .checks import check_context, check_tensor, check_value, taken_by


class FlowDistribution(dist.TransformedDistribution):
    """What ``flow(context)`` returns: a transformed distribution over a flat list of views.

    It checks values before it scores them, unless validation is off (``pyro.enable_validation(False)``).

    Args:
        base: The base distribution.
        views: The transforms at the context.
        path_gradient: Whether the log-density of an own sample has, as its gradient, that by way of the sample alone.
        validate_args: As for all of Pyro's distributions.
    """

    def __init__(
        self,
        base: Distribution,
        views: list[View],
        *,
        path_gradient: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.base_dist = base
        self.transforms: list[View] = views
        self.path_gradient = path_gradient
        self._drawn: tuple[Tensor, Tensor] | None = None
        # The views share one event shape, so none of the general class's inference of shapes is needed.
        super(torch.distributions.TransformedDistribution, self).__init__(  # type: ignore[misc]
            base.batch_shape, base.event_shape, validate_args=validate_args
        )

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> FlowDistribution:
        base = self.base_dist.expand(torch.Size(batch_shape))
        return FlowDistribution(
            base, self.transforms, path_gradient=self.path_gradient, validate_args=self._validate_args
        )

    def with_path_gradient(self) -> FlowDistribution:
        """The same distribution, whose own samples are scored without a gradient to the parameters of the density.

        So the gradient of an ELBO vanishes draw by draw where the guide equals the posterior (Roeder, Wu, Duvenaud
        2017, arXiv:1703.09194); for flows the score is carried along with the draw (Vaitl, Nicoli, Nakajima, Kessel
        2022, arXiv:2207.08219; Vaitl, Winkler, Richter, Kessel 2024, arXiv:2403.15881).
        """
        return FlowDistribution(self.base_dist, self.transforms, path_gradient=True, validate_args=self._validate_args)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw reparameterised samples, ``(*sample_shape, *batch, *event_shape)``."""
        if not (self.path_gradient and torch.is_grad_enabled()):
            return super().rsample(torch.Size(sample_shape))
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
        for view in reversed(self.transforms):
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


class Flow(nn.Module):
    """A distribution over events, with or without a context, made of transforms over a base.

    Args:
        transforms: From base to data, at least one; all share one event shape, and one context size where they have
            a context.
        base: The base distribution: a module that builds it when called without arguments, or a distribution (which
            then stays in its dtype and on its device); by default the standard normal.
        encoder: A network that contexts pass through first, such as those of ``pyro_flows.encoders``; by default
            contexts are vectors that the transforms take as they are.

    Attributes:
        event_shape: The shape of an event.
        context_dim: The number of context features that the transforms take, 0 without a context.
        base: The base, a module that builds the base distribution when called.
        transforms: The transforms, a flat list.
        encoder: The network before them, or None.

    Raises:
        ValueError: If transforms, base and encoder do not fit together.

    Example::

        >>> import torch
        >>> from pyro_flows import flows
        >>> flow = flows.nsf(3, context_dim=2)
        >>> q = flow(torch.randn(5, 2))
        >>> q.batch_shape, q.event_shape, q.rsample((7,)).shape
        (torch.Size([5]), torch.Size([3]), torch.Size([7, 5, 3]))
    """

    transforms: Sequence[FlowTransform]
    base: nn.Module
    encoder: nn.Module | None

    def __init__(
        self,
        transforms: Iterable[FlowTransform],
        base: nn.Module | Distribution | None = None,
        *,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        transforms = list(transforms)
        if not transforms:
            raise ValueError("Flow: transforms must not be empty.")
        self.context_dim = check_chain("Flow", transforms)
        self.event_shape = transforms[0].event_shape
        self.transforms = nn.ModuleList(transforms)  # type: ignore[assignment]
        base = StandardNormal(self.event_shape) if base is None else base
        self.base = FixedBase(base) if isinstance(base, Distribution) else base
        shape = self.base().event_shape
        if shape != self.event_shape:
            raise ValueError(
                f"Flow: base has event shape {tuple(shape)}, but the transforms act on {tuple(self.event_shape)}; "
                "use base.to_event(n) to make batch dimensions part of the event."
            )
        if encoder is not None and not (isinstance(encoder, nn.Module) and self.context_dim):
            no = (
                "it is of no use, as no transform takes a context" if self.context_dim == 0 else f"got {encoder!r:.100}"
            )
            raise ValueError(f"Flow: encoder must be a network from contexts to vectors; {no}.")
        self.encoder = encoder

    def encode(self, context: Tensor | None) -> Tensor | None:
        """What the transforms take of a context, ``(*batch, context_dim)``; raises as calling the flow does."""
        if context is not None:
            check_tensor("Flow", "context", context, floating=not hasattr(self.encoder, "num_classes"))
        elif self.encoder is not None:
            raise ValueError(f"Flow: context is missing; this flow takes {taken_by(self.encoder)}.")
        if self.encoder is None or context is None:
            check_context(context, self.context_dim)
            return context
        context = self.encoder(context)
        check_context(context, self.context_dim, "what the encoder makes of the context")
        return context

    def _base(self, context: Tensor | None) -> Distribution:
        base = self.base()
        if context is not None:
            base = base.expand(torch.broadcast_shapes(base.batch_shape, context.shape[:-1]))
        return base

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """The distribution at a context.

        Args:
            context: ``(*batch, context_dim)``, or what the encoder takes, or None where the flow takes none.

        Returns:
            A Pyro distribution with ``batch_shape == context.shape[:-1]``, of the encoded one where there is an
            encoder, and densities in nats.

        Raises:
            ValueError: If a context is missing, unexpected, of the wrong width or not floating.
        """
        context = self.encode(context)
        base = self._base(context)
        parameters = list(self.parameters())
        views = [View(t, context if t.context_dim else None, parameters) for t in self.transforms]
        return FlowDistribution(base, views)

    def condition(self, context: Tensor | None) -> FlowDistribution:
        """The same as calling the flow: Pyro's protocol of conditional distributions."""
        return self(context)

    def rsample_and_log_prob(
        self, sample_shape: Sequence[int] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw reparameterised samples and score them, with each network run once.

        Returns:
            Samples ``(*sample_shape, *batch, *event_shape)`` and log-densities ``(*sample_shape, *batch)`` in nats.
        """
        context = self.encode(context)
        base = self._base(context)
        value = base.rsample(torch.Size(sample_shape))
        log_prob = base.log_prob(value)
        for transform in self.transforms:
            value, log_det = transform.forward_and_log_det(value, context if transform.context_dim else None)
            log_prob = log_prob - log_det
        return value, log_prob

    def log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """The log-density of values ``(*batch, *event_shape)`` in nats: ``flow(context).log_prob(value)``, no views.

        It has no data-dependent control flow, so it compiles as a whole, unless transforms are ``Continuous``.
        """
        check_value(value, self.event_shape)
        context = self.encode(context)
        base = self._base(context)
        total = torch.zeros((), dtype=value.dtype, device=value.device)
        for transform in reversed(self.transforms):
            value, log_det = transform.inverse_and_log_det(value, context if transform.context_dim else None)
            total = total + log_det
        return base.log_prob(value) + total

    def initialize(self, value: Tensor, context: Tensor | None = None) -> None:
        """Let data ``(*batch, *event_shape)`` set the layers that start from data, such as ``ActNorm``."""
        with torch.no_grad():
            Compose(self.transforms).initialize(value, self.encode(context))

    @property
    def inv(self) -> Flow:
        """The flow whose transforms run the opposite way: fast where this one is slow.  It shares the parameters."""
        layers = [transform.inv for transform in reversed(self.transforms)]
        return Flow(layers, self.base, encoder=self.encoder)


ConditionalDistribution.register(Flow)
