"""Compiled transforms: the same parameters and answers, in fewer and larger steps.

A run of layers becomes one graph for each verb, of any batch size.  A verb that finds one feature after the other, as
the inverse of an autoregressive layer does, or asks a solver, stays as it is: its graph would grow with the number of
features, or change with the data.  What an autoregressive layer does to each feature is compiled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..bijectors import Bijector
from .autoregressive import Autoregressive
from .base import FlowTransform, Inverse
from .compose import Compose
from .tracing import COMPILE_SETTINGS, is_traced

# dynamic=True would make symbols of the numbers in bijectors, for which torch 2.13 compiles wrong code; so all is
# static but what is marked.  There are graphs with and without gradients, of one event and of many, in training or not.
DEFAULTS = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True, "recompile_limit": 32}
DEFAULTS = {name: value for name, value in DEFAULTS.items() if name in COMPILE_SETTINGS}  # those that this torch knows
FEW = 10_000  # numbers in a batch below which threads of the CPU wait for one another longer than they work
Verb = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class CompiledVerb:
    """A verb that is compiled when it is first called; copies compile anew.

    Args:
        plain: The verb, whose first argument is a batch ``(N, ...)``, and its second one too, or None.
        settings: What ``torch.compile`` takes; by default a whole graph, of a batch of any size.

    Warns:
        UserWarning: Once, where the machine has no compiler or the verb cannot be compiled: it then runs as it is.
    """

    def __init__(self, plain: Verb, settings: dict[str, Any]) -> None:
        self.plain = plain
        self.settings = settings
        self._compiled: dict[bool, Verb] = {}

    def __call__(self, x: Tensor, theta: Tensor | None) -> tuple[Tensor, Tensor]:
        if is_traced():
            return self.plain(x, theta)
        few = x.numel() < FEW and x.device.type == "cpu" and not self.settings
        if few not in self._compiled:
            settings: dict[str, Any] = {"options": {"cpp.threads": 1}} if few else self.settings
            self._compiled[few] = torch.compile(self.plain, **{**DEFAULTS, **settings})
        try:
            return self._compiled[few](_any_size(x), None if theta is None else _any_size(theta))
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            answer = self.plain(x, theta)  # what is wrong with the arguments is said as without a compiler
            self._compiled = dict.fromkeys((False, True), self.plain)
            name = getattr(self.plain, "__qualname__", repr(self.plain))
            warnings.warn(f"A part of this flow runs uncompiled, {name}: {_reason(error)}", stacklevel=4)
            return answer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}


def _any_size(batch: Tensor) -> Tensor:
    """A copy, since graphs are told of views and made anew for others, whose first size is left open."""
    copy = batch.clone()
    if len(copy) > 1:
        torch._dynamo.maybe_mark_dynamic(copy, 0)
    return copy


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

    def _run(self, verb: Verb, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if not isinstance(verb, CompiledVerb) or is_traced():
            return verb(x, context)
        # Batches of any shape share one graph.
        batch, x, context = self._rows_of(x, context)
        value, log_det = (verb if batch.numel() else verb.plain)(x, context)
        return value.reshape(batch + self.event_shape), log_det.reshape(batch)


class CompiledMap(Bijector):
    """A bijector whose inverse, asked for feature by feature, is compiled where no gradient is wanted.

    Args:
        inner: The bijector.
        settings: What ``torch.compile`` takes.
    """

    def __init__(self, inner: Bijector, settings: dict[str, Any]) -> None:
        self.inner = inner
        self._to_x = CompiledVerb(inner.inverse_and_log_det, settings)  # type: ignore[arg-type]

    @property
    def num_params(self) -> int:
        return self.inner.num_params

    def forward_and_log_det(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.forward_and_log_det(x, params)

    def inverse_and_log_det(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return (self.inner.inverse_and_log_det if torch.is_grad_enabled() else self._to_x)(y, params)


class CompiledRuns:
    """The transforms of a flow in as few parts as there are runs whose verbs compile alike.

    Args:
        settings: What ``torch.compile`` takes, but ``dynamic``.

    Raises:
        ValueError: If ``dynamic`` is among the settings, or what ``torch.compile`` does not know.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        if "dynamic" in settings:
            raise ValueError("compile: dynamic is set already, to batches of any size; leave it out.")
        known = COMPILE_SETTINGS - {"model", "dynamic"}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"compile: torch.compile knows no {unknown[0]}; it takes {', '.join(sorted(known))}.")
        self.settings = settings
        self._known: list[FlowTransform] = []
        self._runs: list[FlowTransform] = []

    def of(self, transforms: Sequence[FlowTransform]) -> list[FlowTransform]:
        """The runs of some transforms, made anew where these have changed."""
        if list(map(id, self._known)) != list(map(id, transforms)):
            maps: dict[Bijector, CompiledMap] = {}
            layers = [self._compiled_steps(transform, maps) for transform in transforms]
            runs = [list(run) for _, run in groupby(layers, lambda t: (t.compiles(False), t.compiles(True)))]
            self._known, self._runs = list(transforms), [Compiled(Compose(run), **self.settings) for run in runs]
        return self._runs

    def _compiled_steps(self, transform: FlowTransform, maps: dict[Bijector, CompiledMap]) -> FlowTransform:
        """Return a twin of an autoregressive layer whose map is compiled; affine maps are faster as they are."""
        if isinstance(transform, Inverse):
            return self._compiled_steps(transform.transform, maps).inv
        if isinstance(transform, Autoregressive) and (bijector := transform.bijector).num_params > 2:
            map_of = maps.setdefault(bijector, CompiledMap(bijector, self.settings))
            return Autoregressive(map_of, transform.conditioner, fixed_point=transform.fixed_point)
        return transform


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3]):.300}"
