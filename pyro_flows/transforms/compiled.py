"""Compiled transforms: the same parameters and answers, in fewer and larger steps.

A run of layers becomes one graph for each verb, of any batch size.  A verb that finds one feature after the other, as
the inverse of an autoregressive layer does, or asks a solver, stays as it is: its graph would grow with the number of
features, or change with the data.  What an autoregressive layer does to each feature is compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..bijectors import Bijector
from .autoregressive import Autoregressive
from .base import FlowTransform, Inverse, is_traced
from .compose import Compose

LIMIT = 32  # graphs of one verb: with and without gradients, of one event and of many, in some dimensions
Verb = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class CompiledVerb:
    """A verb that is compiled when it is first called; copies compile anew.

    Args:
        plain: The verb.
        settings: What ``torch.compile`` takes; by default a whole graph, of a batch of any size.

    Warns:
        UserWarning: Once, where the machine has no compiler or the verb cannot be compiled: it then runs as it is.
    """

    def __init__(self, plain: Verb, settings: dict[str, Any]) -> None:
        self.plain = plain
        self.settings = settings
        self._compiled: Verb | None = None

    def __call__(self, x: Tensor, theta: Tensor | None) -> tuple[Tensor, Tensor]:
        if is_traced():
            return self.plain(x, theta)
        if self._compiled is None:
            settings = {"fullgraph": True, "dynamic": True, "isolate_recompiles": True, "recompile_limit": LIMIT}
            self._compiled = torch.compile(self.plain, **{**settings, **self.settings})
        try:
            return self._compiled(x, theta)
        except Exception as error:
            from torch._dynamo.exc import TorchDynamoException  # importing it takes a second

            if not isinstance(error, TorchDynamoException):
                raise
            answer = self.plain(x, theta)  # what is wrong with the arguments is said as without a compiler
            self._compiled = self.plain
            warnings.warn(f"This flow runs uncompiled: {_first_line(error)}", stacklevel=2)
            return answer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}


class Compiled(FlowTransform):
    """A transform whose verbs are compiled, where they compile to one graph.

    Args:
        inner: The transform.
        **settings: What ``torch.compile`` takes.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import LULinear
        >>> layer = Compiled(LULinear(3), backend="eager")
        >>> layer.forward_and_log_det(torch.zeros(5, 3))[0].shape
        torch.Size([5, 3])
    """

    def __init__(self, inner: FlowTransform, **settings: Any) -> None:
        super().__init__(inner.event_shape, inner.context_dim)
        self.inner = inner
        self.domain, self.codomain = inner.domain, inner.codomain
        forward, inverse = inner.forward_and_log_det, inner.inverse_and_log_det
        self._to_y = CompiledVerb(forward, settings) if inner.compiles(inverse=False) else forward
        self._to_x = CompiledVerb(inverse, settings) if inner.compiles(inverse=True) else inverse

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(self._to_y, x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(self._to_x, y, context)

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.forward_and_score(x, score, context)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        self.inner.initialize(y, context)

    def _run(self, verb: Verb, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if context is not None or x.dim() == 1 + len(self.event_shape) or not isinstance(verb, CompiledVerb):
            return verb(x, context)
        batch, event = x.shape[: x.dim() - len(self.event_shape)], self.event_shape
        # Batches of any shape share one graph, which is told of views, and would be made anew for others.
        value, log_det = verb(x.reshape(-1, *event).clone(), None)
        return value.reshape(batch + event), log_det.reshape(batch)


class CompiledMap(Bijector):
    """A bijector whose verbs are compiled, where no gradient is asked for.

    Args:
        inner: The bijector.
        settings: What ``torch.compile`` takes.
    """

    def __init__(self, inner: Bijector, settings: dict[str, Any]) -> None:
        self.inner = inner
        self._to_y = CompiledVerb(inner.forward_and_log_det, settings)  # type: ignore[arg-type]
        self._to_x = CompiledVerb(inner.inverse_and_log_det, settings)  # type: ignore[arg-type]

    @property
    def num_params(self) -> int:
        return self.inner.num_params

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(self._to_y, x, params)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(self._to_x, y, params)

    @staticmethod
    def _run(verb: CompiledVerb, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        # Graphs are told of views, and made anew for others.
        return verb.plain(x, params) if torch.is_grad_enabled() else verb(x.clone(), params.clone())


def compiled_runs(transforms: Iterable[FlowTransform], settings: dict[str, Any]) -> list[FlowTransform]:
    """Transforms in as few parts as there are runs whose verbs compile alike."""
    maps: dict[Bijector, CompiledMap] = {}
    layers = [_compiled_steps(transform, maps, settings) for transform in transforms]
    runs = [list(run) for _, run in groupby(layers, lambda t: (t.compiles(False), t.compiles(True)))]
    return [Compiled(Compose(run), **settings) for run in runs]


def _compiled_steps(
    transform: FlowTransform, maps: dict[Bijector, CompiledMap], settings: dict[str, Any]
) -> FlowTransform:
    """A twin of an autoregressive layer whose map of each feature is compiled; affine maps are faster as they are."""
    if isinstance(transform, Inverse):
        return _compiled_steps(transform.transform, maps, settings).inv
    if isinstance(transform, Autoregressive) and (bijector := transform.bijector).num_params > 2:
        map_of = maps.setdefault(bijector, CompiledMap(bijector, settings))
        return Autoregressive(map_of, transform.conditioner, fixed_point=transform.fixed_point)
    return transform


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__
