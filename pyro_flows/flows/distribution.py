"""A flow at a context: a distribution for one use.

It scores its own last draw without a second pass of the networks, unless a number has changed since the draw.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..distributions.normal import log_prob_of
from ..transforms import FixedAffine, FlowTransform, View
from ..transforms.base import can_be_kept, chained, unchanged_from_now
from ..transforms.carried import can_be_carried, carry_draws
from .arguments import as_size, check_value, parameter_of
from .columns import Columns


class FlowDistribution(dist.TransformedDistribution):
    """A transformed distribution over a flat list of layers, the result of ``flow(context)``.

    Base and transforms are those of the flow and keep its parameters; the context and its encoding are fixed.  Values
    are checked before they are scored, unless validation is off (``pyro.enable_validation(False)``).

    The last draw is kept until it is scored, together with a copy of all numbers that it depends on
    (``transforms.base.unchanged_from_now``).  If nothing has changed, ``log_prob`` of this very tensor runs no network.

    Args:
        base: A module that builds the base distribution.
        layers: The transforms, at least one.
        runs: The same transforms as they run, perhaps compiled into fewer and larger parts.
        context: The encoded context, or None.
        columns: The columns of the table that the flow was trained on, or None.
    """

    path_gradient = False  # True: its own draws are scored with the path gradient
    columns: Columns | None = None  # for pickles of distributions that had none
    one_step = False  # True: its draws are scored in the step that drew them

    def __init__(
        self,
        base: nn.Module,
        layers: list[FlowTransform],
        runs: list[FlowTransform],
        context: Tensor | None,
        columns: Columns | None = None,
    ) -> None:
        self.base, self.layers, self.runs, self.context, self.columns = base, layers, runs, context, columns
        self._last: _Draw | None = None
        batch = base().batch_shape
        if context is not None:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
        # The layers share one event shape, so the general class need not infer shapes.
        Distribution.__init__(self, batch, layers[0].event_shape)

    @property
    def transforms(self) -> list[View]:
        """The transforms at the context, as torch's own classes take them."""
        return [View(layer, self._context_of(layer)) for layer in self.layers]

    def _context_of(self, layer: FlowTransform) -> Tensor | None:
        return self.context if layer.context_dim else None

    @property
    def base_dist(self) -> Distribution:
        """The base distribution at its present parameters, of the batch shape of the flow."""
        base = self.base()
        return base if base.batch_shape == self.batch_shape else base.expand(self.batch_shape)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> FlowDistribution:
        return self._with(_batch_shape=torch.Size(batch_shape))

    def followed_by(self, transform: FlowTransform) -> FlowDistribution:
        """Return the distribution of this one's draws mapped by a transform without a context.

        Tensors of the transform may have a batch, which is that of the context.
        """
        return self._with(layers=[*self.layers, transform], runs=[*self.runs, transform], columns=None)

    def widened(self, by: float) -> FlowDistribution:
        """Return the distribution of vectors whose base is scaled by a number; it scores any value without a check."""
        like = self.noise()
        scale = FixedAffine(len(like), dense=False).to(like)
        scale.set(torch.zeros_like(like), torch.full_like(like, by))
        return self._with(layers=[scale, *self.layers], runs=[scale, *self.runs]).unchecked()

    def unchecked(self) -> FlowDistribution:
        """Return the same distribution, which scores values without a check."""
        return self._with(_validate_args=False)

    def with_path_gradient(self) -> FlowDistribution:
        """Return the same distribution, which scores its own draws without a gradient to the density's parameters.

        The gradient of an ELBO then vanishes draw by draw if the guide equals the posterior (Roeder, Wu, Duvenaud 2017,
        arXiv:1703.09194).  A flow carries the score along with the draw (Vaitl, Nicoli, Nakajima, Kessel 2022,
        arXiv:2207.08219; Vaitl, Winkler, Richter, Kessel 2024, arXiv:2403.15881).  The gradient has no second
        derivatives.  Other values are scored with all gradients.
        """
        return self._with(path_gradient=True)

    def for_one_step(self) -> FlowDistribution:
        """Return the same distribution for a guide's own sample statement, which an ELBO scores in the same step.

        It compares torch's version counters, not copies of the numbers, to see that nothing has changed.
        """
        return self._with(one_step=True)

    def _with(self, **changes: Any) -> FlowDistribution:
        changed = copy.copy(self)  # without the last draw, see __getstate__
        changed.__dict__.update(changes)
        return changed

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw samples without a gradient, ``(*sample_shape, *batch, *event_shape)``; see :meth:`Flow.sample`."""
        rows = chained(self.runs, self.base_dist.sample(as_size(sample_shape)), self.context)[0]
        return rows if self.columns is None else self.columns.whole(rows)

    def noise(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw samples of the base without the batch, ``(*sample_shape, *event_shape)``."""
        found: Tensor = self.base().sample(as_size(sample_shape))
        return found

    def place(self, x: Tensor) -> Tensor:
        """Map base coordinates ``(*batch, *event_shape)``, which broadcast with the context, to values."""
        return chained(self.runs, x, self.context)[0]

    def coordinates(self, value: Tensor) -> Tensor:
        """Map values ``(*batch, *event_shape)`` to base coordinates."""
        return chained(self.runs, value, self.context, inverse=True)[0]

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw reparameterised samples, ``(*sample_shape, *batch, *event_shape)``."""
        value, score = self._drawn(sample_shape)
        if can_be_kept():
            others = [value] if self.context is None else [value, self.context]
            unchanged = unchanged_from_now([*self.layers, self.base], others, by_counts=self.one_step)
            self._last = _Draw(value, score, unchanged)
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
        y = x if x.requires_grad else x.requires_grad_()  # a frozen flow too has a gradient at the draws
        if not any(layer.context_dim for layer in self.layers) and can_be_carried(self.layers):
            y, total, score = carry_draws(self.layers, y, score)
            log_prob = log_prob - total
        else:
            for layer in self.layers:
                y, log_det, score = layer.forward_and_score(y, score, self._context_of(layer))
                log_prob = log_prob - log_det.detach()
        path = (score * (y - y.detach())).flatten(-len(self.event_shape)).sum(-1)
        return y, log_prob + path

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of ``value``, ``(*batch, *event_shape)``, in nats, at the present parameters."""
        own = self._last
        if not self.path_gradient:
            self._last = None
        if own is not None and own.answers(value):
            return own.score()
        if self._validate_args:
            self._validate_sample(value)
            if self.columns is not None:
                self.columns.warn_of_integers(value)
        x, log_det = chained(self.runs, value, self.context, inverse=True)
        return log_prob_of(self.base_dist, x) + log_det

    def _validate_sample(self, value: Tensor) -> None:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return
        check_value(value, self.event_shape, parameter_of(self.layers))
        if not (value.is_meta or value.isfinite().all()):
            bad, shape = int((~value.isfinite()).sum()), tuple(value.shape)
            raise ValueError(f"log_prob: value holds NaN or inf ({bad} of {value.numel()} numbers, shape {shape}).")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


class _Draw(NamedTuple):
    """A draw, the function that scores it, and a watch over all that both depend on."""

    value: Tensor
    score: Callable[[], Tensor]
    unchanged: Callable[[], bool]

    def answers(self, value: Tensor) -> bool:
        """True for the same tensor, if nothing has changed since the draw and it is no leaf that requires grad."""
        leaf = value.is_leaf and value.requires_grad
        return self.value is value and not leaf and self.unchanged()
