"""Compiled transforms: the same parameters and answers, in fewer and larger steps.

A run of layers becomes one graph for each verb, of any batch size.  A verb that finds one feature after the other stays
uncompiled, since its graph would grow with the number of features.  A verb that calls a solver stays uncompiled too,
since its graph would change with the data.  In an autoregressive layer, the map of each feature is compiled.
"""

import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..bijectors import Bijector
from ..compiler_state import COMPILE_SETTINGS, is_traced
from .autoregressive import Autoregressive
from .base import FlowTransform, Inverse
from .wrapped import Compose, Wrapped

# dynamic=True would make symbols of the numbers in bijectors, for which torch 2.13 compiles wrong code; so all is
# static but what is marked.  There are graphs with and without gradients, of one event and of many, in training or not.
DEFAULTS = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True, "recompile_limit": 32}
DEFAULTS = {name: value for name, value in DEFAULTS.items() if name in COMPILE_SETTINGS}  # those that this torch knows
SMALL_BATCH = 10_000  # numbers in a batch below which threads of the CPU wait for one another longer than they work
Verb = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class CompiledVerb:
    """A verb that is compiled when it is first called; copies compile anew.

    Args:
        plain: The verb, whose first argument is a batch ``(N, ...)``, and its second one too, or None.
        settings: The arguments of ``torch.compile``; by default a whole graph, of a batch of any size.

    Warns:
        UserWarning: Once, if the machine has no compiler or the verb cannot be compiled: it then runs uncompiled.
    """

    def __init__(self, plain: Verb, settings: dict[str, Any]) -> None:
        self.plain, self.settings = plain, settings
        self._compiled: dict[bool, Verb] = {}

    def __call__(self, x: Tensor, theta: Tensor | None) -> tuple[Tensor, Tensor]:
        if is_traced():
            return self.plain(x, theta)
        few = x.numel() < SMALL_BATCH and x.device.type == "cpu" and not self.settings
        if few not in self._compiled:
            settings: dict[str, Any] = {"options": {"cpp.threads": 1}} if few else self.settings
            self._compiled[few] = torch.compile(self.plain, **{**DEFAULTS, **settings})
        try:
            return self._compiled[few](_any_size(x), None if theta is None else _any_size(theta))
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            answer = self.plain(x, theta)  # errors in the arguments are reported as without a compiler
            self._compiled = dict.fromkeys((False, True), self.plain)
            name = f"{type(getattr(self.plain, '__self__', None)).__name__}.{self.plain.__name__}"
            reason = " ".join(str(error).split())
            said = f"A part of this flow runs uncompiled, {name}: {type(error).__name__}: {reason:.300}"
            warnings.warn(said, stacklevel=5)
            return answer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}


def _any_size(batch: Tensor) -> Tensor:
    """Return a copy whose first size is left open; a copy, since graphs differ for views and for other tensors."""
    copy = batch.clone()
    if len(copy) > 1:
        torch._dynamo.maybe_mark_dynamic(copy, 0)
    return copy


class Compiled(Wrapped):
    """A transform whose verbs are compiled, if they compile to one graph.

    Args:
        inner: The transform.
        **settings: The arguments of ``torch.compile``.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import LULinear
        >>> layer = Compiled(LULinear(3), backend="eager")
        >>> layer.forward_and_log_det(torch.zeros(5, 3))[0].shape
        torch.Size([5, 3])
    """

    def __init__(self, inner: FlowTransform, **settings: Any) -> None:
        super().__init__(inner)
        verbs = [(inner.verb(inverse), inner.compiles(inverse)) for inverse in (False, True)]
        self._verbs = [CompiledVerb(verb, settings) if compiles else verb for verb, compiles in verbs]

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        verb = self._verbs[inverse]
        if not isinstance(verb, CompiledVerb) or is_traced():
            return verb(value, context)
        # Batches of any shape share one graph.
        batch, value, context = self._rows_of(value, context)
        image, log_det = (verb if batch.numel() else verb.plain)(value, context)
        return image.reshape(batch + self.event_shape), log_det.reshape(batch)


class CompiledMap(Bijector):
    """A bijector whose inverse, called feature by feature, is compiled if no gradient is wanted.

    Args:
        inner: The bijector.
        settings: The arguments of ``torch.compile``.
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
    """The transforms of a flow in runs whose verbs compile alike, as few as possible.

    Args:
        settings: The arguments of ``torch.compile``, without ``dynamic``.

    Raises:
        ValueError: If ``dynamic`` is among the settings, or a setting that ``torch.compile`` does not know.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        known = COMPILE_SETTINGS - {"model", "dynamic"}  # batches of any size are set already
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"compile: {unknown[0]} cannot be set. Use {', '.join(sorted(known))}.")
        self.settings = settings
        self._known: list[FlowTransform] = []
        self._runs: list[FlowTransform] = []

    def of(self, transforms: Sequence[FlowTransform]) -> list[FlowTransform]:
        """Return the runs of some transforms, built anew if these have changed."""
        if list(map(id, self._known)) != list(map(id, transforms)):
            maps: dict[Bijector, CompiledMap] = {}
            layers = [self._compiled_steps(transform, maps) for transform in transforms]
            runs = [list(run) for _, run in groupby(layers, lambda t: (t.compiles(False), t.compiles(True)))]
            self._known, self._runs = list(transforms), [Compiled(Compose(run), **self.settings) for run in runs]
        return self._runs

    def _compiled_steps(self, transform: FlowTransform, maps: dict[Bijector, CompiledMap]) -> FlowTransform:
        """Return a copy of an autoregressive layer whose map is compiled; affine maps are faster uncompiled."""
        if isinstance(transform, Inverse):
            return self._compiled_steps(transform.transform, maps).inv
        if isinstance(transform, Autoregressive) and (bijector := transform.bijector).num_params > 2:
            map_of = maps.setdefault(bijector, CompiledMap(bijector, self.settings))
            return Autoregressive(map_of, transform.conditioner, fixed_point=transform.fixed_point)
        return transform
