"""Images of integers from a flow over real numbers: P(n) is the mass of the cell [n, n + 1), and bounded from below by

    log P(n) ≥ E log 1/K Σ_k p(n + u_k) / q(u_k | n),   u_k ~ q(· | n) on [0, 1)

With q uniform this is uniform dequantisation (Theis, van den Oord, Bethge 2015, arXiv:1511.01844); with a conditional
flow, variational dequantisation (Ho, Chen, Srinivas, Duan, Abbeel 2019, Flow++, arXiv:1902.00275); K > 1 draws make the
importance-weighted bound (Burda, Grosse, Salakhutdinov 2015, arXiv:1509.00519), which is tighter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalDistribution
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from ..checks import check_integers, check_numbers
from ..transforms import Sigmoid, View
from .chunks import in_chunks
from .distribution import FlowDistribution
from .flow import Flow
from .integers import DequantizedDistribution, to_integers


class Dequantized(nn.Module):
    """A distribution over images of integers, or over other events of them, made of a flow over real numbers.

    P(n) is the mass of the cell [n, n + 1), and bounded from below (dequantisation: Theis, van den Oord, Bethge 2015,
    arXiv:1511.01844; Ho et al. 2019, arXiv:1902.00275; Burda, Grosse, Salakhutdinov 2015, arXiv:1509.00519)::

        log P(n) ≥ E log 1/K Σ_k p(n + u_k) / q(u_k),    u_k ~ q on [0, 1)

    The flow ends with a sigmoid onto the range of the integers, whose inverse is the logit preprocessing of Real NVP.
    The cells at both ends own what lies beyond, so that all masses add up to one, and samples are drawn exactly.

    Args:
        flow: A flow over real events, such as ``flows.glow((1, 28, 28))``.
        levels: The number of integers: events hold 0 … levels - 1.
        alpha: By what share the interval of the sigmoid is wider than that of the integers, at least 1e-6: see
            :class:`~pyro_flows.transforms.Sigmoid`.
        noise: A flow over the same events whose contexts are such events, such as
            ``flows.realnvp_image((1, 28, 28), context_dim=(1, 28, 28))``: through the normal distribution function it
            gives the noise u in a cell, uniform at the start.  By default the noise is uniform.
        num_samples: The number K of draws that the bound of a log-mass takes.

    Attributes:
        event_shape: The shape of an event.
        context_dim: The number of context features that the flow's transforms take, 0 without a context.

    Raises:
        TypeError: If ``flow`` or ``noise`` is no :class:`~pyro_flows.flows.Flow`.
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
        for argument, part in (("flow", flow), ("noise", noise)):
            if not isinstance(part, Flow) and (part is not None or argument == "flow"):
                raise TypeError(
                    f"Dequantized: {argument} must be a Flow, such as flows.glow((1, 28, 28)), got {part!r:.60}."
                )
        check_integers("Dequantized", 2, levels=levels)
        check_integers("Dequantized", num_samples=num_samples)
        check_numbers("Dequantized", least=1e-6, below=0.5, alpha=alpha)
        if noise is not None and not _takes_events(noise, flow.event_shape):
            raise ValueError(
                f"Dequantized: noise must be a flow over events of shape {tuple(flow.event_shape)} whose contexts are "
                f"such events, got one over {tuple(noise.event_shape)} with context_dim={noise.context_dim}; image "
                f"recipes take context_dim={tuple(flow.event_shape)}."
            )
        self.flow, self.levels, self.alpha, self.noise, self.num_samples = flow, levels, alpha, noise, num_samples
        self.event_shape, self.context_dim = flow.event_shape, flow.context_dim
        self.pixels = Sigmoid(flow.event_shape, high=float(levels), alpha=alpha)

    def forward(self, context: Tensor | None = None, *, num_samples: int | None = None) -> DequantizedDistribution:
        """The distribution at a context, as for a :class:`Flow`; ``num_samples`` may differ from that of the model."""
        return self._of(self.flow(context), num_samples)

    def _of(self, density: FlowDistribution, num_samples: int | None) -> DequantizedDistribution:
        last = View(self.pixels)
        parts = [*density.transforms, last], [*density.runs, last]
        # Integers are what is checked, so the density of real numbers checks nothing.
        density = FlowDistribution(density.base, *parts, batch_shape=density.batch_shape, validate_args=False)
        number = self.num_samples if num_samples is None else num_samples
        check_integers("Dequantized", num_samples=number)
        return DequantizedDistribution(density, self.levels, self.dtype, noise=self.noise, num_samples=number)

    def compile(self, **settings: Any) -> None:
        """Compile the flow, and that of the noise; see :meth:`Flow.compile`."""
        for flow in filter(None, (self.flow, self.noise)):
            flow.compile(**settings)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that the flow calculates in."""
        found = (parameter.dtype for parameter in self.flow.parameters() if parameter.is_floating_point())
        return next(found, torch.get_default_dtype())

    def condition(self, context: Tensor | None) -> DequantizedDistribution:
        """The same as calling it: Pyro's protocol of conditional distributions."""
        return self(context)

    def sample(
        self, sample_shape: Sequence[int] = (), context: Tensor | None = None, *, chunk_size: int | None = None
    ) -> Tensor:
        """Draw events ``(*sample_shape, *batch, *event_shape)``, as uint8 up to 256 levels; as :meth:`Flow.sample`."""
        value = self.flow.sample(sample_shape, context, chunk_size=chunk_size)
        return to_integers(self.pixels(value), self.levels, checked=is_validation_enabled())

    def log_prob(
        self,
        value: Tensor,
        context: Tensor | None = None,
        *,
        num_samples: int | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """The lower bound of the log-mass of events: ``model(context).log_prob(value)``.

        Args:
            value: Integers ``(*batch, *event_shape)``.
            context: As for the call, or None.
            num_samples: The number of draws of the noise, K; by default the model's own.
            chunk_size: How many events are scored at a time, as for :meth:`Flow.log_prob`.

        Returns:
            The bound, ``(*batch)`` in nats.

        Raises:
            TypeError: If ``value`` or ``context`` is no tensor.
            ValueError: If ``value`` does not hold integers in range, the context does not fit, or a number is below 1.
        """

        def bound(value: Tensor, context: Tensor | None) -> Tensor:
            return self._of(self.flow.at(context), num_samples).log_prob(value)

        return in_chunks(bound, chunk_size, value, self.flow.encode(context), len(self.event_shape))

    @torch.no_grad()
    def initialize(self, value: Tensor, context: Tensor | None = None) -> None:
        """Let data ``(*batch, *event_shape)`` set the layers of the flow that start from data, such as ``ActNorm``."""
        self.flow.initialize(self.unbounded(value), context)

    def unbounded(self, value: Tensor) -> Tensor:
        """Events ``(*batch, *event_shape)``, with uniform noise, where the flow sees them: their logits."""
        value = value.to(self.dtype)
        return self.pixels.inverse_and_log_det(value + torch.rand_like(value))[0]


ConditionalDistribution.register(Dequantized)


@torch.no_grad()
def _takes_events(noise: Flow, event_shape: torch.Size) -> bool:
    """Whether a flow is over events of a shape, given one such event."""
    if noise.event_shape != event_shape or not noise.context_dim:
        return False
    like = next(noise.parameters())
    try:
        return noise(torch.zeros(event_shape, dtype=like.dtype, device=like.device)).batch_shape == ()
    except (ValueError, RuntimeError):
        return False
