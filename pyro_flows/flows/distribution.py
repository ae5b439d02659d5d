"""A flow at a context: a distribution for one use.

It scores its own last draw without a second pass of the networks, unless a number has changed since the draw.

:func:`in_chunks` evaluates many events, f(x_1 … x_N) = f(x_1 … x_n), f(x_{n+1} … x_{2n}), …, which bounds the memory of
the networks in between.  With gradients only the inputs of a chunk are kept, and the chunk is computed again in the
backward pass: Training Deep Nets with Sublinear Memory Cost (Chen, Xu, Zhang, Guestrin 2016, arXiv:1604.06174).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..arguments import check_integers
from ..distributions.normal import log_prob_of
from ..encoders.training_record import judges
from ..transforms import FixedAffine, FlowTransform, View
from ..transforms.base import can_be_kept, chained, unchanged_from_now
from ..transforms.carried import can_be_carried, carry_draws
from ..transforms.wrapped import recomputed
from ..user_code import warn_user
from .arguments import as_size, check_value, parameter_of

T = TypeVar("T", Tensor, tuple[Tensor, Tensor])


@dataclass(frozen=True)
class Columns:
    """The columns of the table that a flow was trained on, for its draws and the rows that it scores.

    Integers were trained with noise, k + u with u ~ U[0, 1), so a draw in the cell [k, k + 1) stands for the integer k.
    ``sample`` returns it.  ``rsample`` keeps the noise, and so do ``pyro.sample`` and ``Predictive``, which call it.

    Args:
        names: The names, or None if the table had none.
        integers: For each column of integers its index, the smallest integer and the largest.
    """

    names: tuple[str, ...] | None = None
    integers: tuple[tuple[int, float, float], ...] = ()

    def check(self, event_shape: torch.Size) -> None:
        """Raise ValueError unless these are the columns of vectors of a shape."""
        places = {place for place, _, _ in self.integers}
        fits = len(event_shape) == 1 and places <= {*range(event_shape[0])}
        if not fits or (self.names is not None and len(self.names) != event_shape[0]):
            raise ValueError(f"Flow: columns must be those of events of shape {tuple(event_shape)}, got {self!r:.80}.")

    def whole(self, rows: Tensor) -> Tensor:
        """Return draws ``(*batch, D)`` with the integers in whose cells they lie, from the smallest to the largest."""
        if not self.integers:
            return rows
        columns = list(rows.unbind(-1))
        for place, low, high in self.integers:
            columns[place] = columns[place].floor().clamp(low, high)
        return torch.stack(columns, -1)

    def warn_of_integers(self, rows: Tensor) -> None:
        """Warn if more than a few of the rows ``(*batch, D)`` hold integers without noise."""
        if not (self.integers and rows.numel() and judges()) or rows.is_meta:
            return
        share = (rows == rows.floor()).reshape(-1, rows.shape[-1]).float().mean(0)
        whole = (share > 0.01).tolist()  # by chance uniform noise is 0 in one of 16 million numbers
        if found := [place for place, _, _ in self.integers if whole[place]]:
            labels = ", ".join(repr(self.names[place] if self.names else place) for place in found)
            must = f"value must hold integers with noise in columns {labels}, as the flow was trained"
            warn_user(f"log_prob: {must}, got integers. Use pyro_flows.dequantize(value, {found}).")


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
        self._last: tuple[Tensor, Callable[[], Tensor], Callable[[], bool]] | None = None  # a draw, its score, a watch
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
            self._last = value, score, unchanged_from_now([*self.layers, self.base], others, by_counts=self.one_step)
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
        if own is not None and own[0] is value and not (value.is_leaf and value.requires_grad) and own[2]():
            return own[1]()
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


def in_chunks(
    function: Callable[..., T], chunk_size: int | None, value: Tensor, context: Tensor | None, event_dim: int
) -> T:
    """Apply a function to values and contexts, at most ``chunk_size`` of them at a time.

    The sizes of chunks differ by at most one.

    Args:
        function: ``(value, context) -> result``, a tensor ``(*batch, ...)`` with one row per event, or a tuple of such.
        chunk_size: The number of events in a chunk; None calls the function once.
        value: ``(*batch, *event_shape)``.
        context: ``(*batch, context_dim)``, or None; it broadcasts with the values.
        event_dim: The number of dimensions of an event.

    Raises:
        ValueError: If ``chunk_size`` is not a positive integer.
    """
    if chunk_size is None or torch._C._get_tracing_state():  # a trace would repeat the number of chunks
        return function(value, context)
    check_integers("Flow", chunk_size=chunk_size)
    batch = value.shape[: value.dim() - event_dim]
    if context is not None:
        batch = torch.broadcast_shapes(batch, context.shape[:-1])
    pieces = math.ceil(batch.numel() / chunk_size)
    if pieces < 2:
        return function(value, context)
    contexts = repeat(None, pieces) if context is None else _split(context, 1, batch, pieces)
    chunks = zip(_split(value, event_dim, batch, pieces), contexts, strict=True)
    found = [recomputed(function, *chunk) for chunk in chunks]

    def whole(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat(tuple(parts)).unflatten(0, batch)

    if isinstance(found[0], Tensor):
        return whole(found)
    return tuple(map(whole, zip(*found, strict=True)))  # type: ignore[return-value]


def chunk_for(numbers: int) -> int:
    """Return a chunk size for events of so many numbers: the activations of networks of usual widths fit the cache."""
    return max(1, min(5000, 1_000_000 // max(1, numbers)))


def _split(tensor: Tensor, trailing: int, batch: torch.Size, pieces: int) -> Iterable[Tensor]:
    """Split a tensor that broadcasts with a batch into the parts of consecutive chunks of its rows.

    A tensor of one row broadcasts with each chunk; other rows are repeated for one chunk at a time.
    """
    own = tensor.shape[: tensor.dim() - trailing]
    flat = tensor.reshape(-1, *tensor.shape[tensor.dim() - trailing :])
    if own.numel() == batch.numel():
        return flat.tensor_split(pieces)
    if own.numel() == 1:
        return repeat(flat[0], pieces)
    place = torch.arange(own.numel(), device=tensor.device).reshape(own).expand(batch).reshape(-1)
    return (flat.index_select(0, chosen) for chosen in place.tensor_split(pieces))
