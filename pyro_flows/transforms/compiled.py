"""Compiled transforms: the same parameters and answers, in fewer and larger steps.

A run of layers becomes one graph for each verb, of any batch size.  A verb that finds one feature after the other, as
the inverse of an autoregressive layer does, or asks a solver, stays as it is: its graph would grow with the number of
features, or change with the data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .base import FlowTransform, is_traced
from .compose import Compose

LIMIT = 32  # graphs of one verb: with and without gradients, of one event and of many, in some dimensions
Verb = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Compiled(FlowTransform):
    """A transform whose verbs are compiled when they are first called; copies compile anew.

    Args:
        inner: The transform.
        **settings: What ``torch.compile`` takes; by default a whole graph, of a batch of any size.

    Warns:
        UserWarning: Once, where the machine has no compiler or the transform cannot be compiled: it then runs as it is.

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
        self.settings = settings
        self._verbs: dict[bool, Verb] = {}

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(self.inner.forward_and_log_det, False, x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(self.inner.inverse_and_log_det, True, y, context)

    def forward_and_score(
        self, x: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner.forward_and_score(x, score, context)

    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        self.inner.initialize(y, context)

    def compiles(self, inverse: bool) -> bool:
        return self.inner.compiles(inverse)

    def _run(self, plain: Verb, inverse: bool, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if is_traced() or not self.inner.compiles(inverse):
            return plain(x, context)
        if context is None and x.dim() != 1 + len(self.event_shape):  # batches of any shape share one graph
            batch, event = x.shape[: x.dim() - len(self.event_shape)], self.event_shape
            rows = x.reshape(-1, *event).clone()  # a graph is told of views, and made anew for others
            value, log_det = self._compiled(plain, inverse, rows, None)
            return value.reshape(batch + event), log_det.reshape(batch)
        return self._compiled(plain, inverse, x, context)

    def _compiled(self, plain: Verb, inverse: bool, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if inverse not in self._verbs:
            settings = {"fullgraph": True, "dynamic": True, "isolate_recompiles": True, "recompile_limit": LIMIT}
            self._verbs[inverse] = torch.compile(plain, **{**settings, **self.settings})
        try:
            return self._verbs[inverse](x, context)
        except Exception as error:
            from torch._dynamo.exc import TorchDynamoException  # importing it takes a second

            if not isinstance(error, TorchDynamoException):
                raise
            answer = plain(x, context)  # what is wrong with the arguments is said as without a compiler
            self._verbs[inverse] = plain
            warnings.warn(f"This flow runs uncompiled: {_first_line(error)}", stacklevel=2)
            return answer

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_verbs": {}}


def compiled_runs(transforms: Iterable[FlowTransform], settings: dict[str, Any]) -> list[FlowTransform]:
    """Transforms in as few parts as there are runs whose verbs compile alike."""
    runs = [list(run) for _, run in groupby(transforms, lambda t: (t.compiles(False), t.compiles(True)))]
    return [Compiled(Compose(run), **settings) for run in runs]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__
