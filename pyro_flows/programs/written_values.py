"""Programs that write into the values of their latents, such as ``epsilon[..., 0] = 0`` under ``torch.no_grad``.

Such a program gets a copy to write into.  The density counts the value that was drawn, and draws stay as they are.
Gradients do not pass what was overwritten, also if ``torch.no_grad`` is to hide the write from them.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .program import Function


class Writes(Messenger):
    """Finds the latents into whose values a program writes, in a run of it."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn: dict[str, tuple[Tensor, Tensor]] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg) and isinstance(msg["value"], Tensor):
            self._drawn[msg["name"]] = msg["value"], msg["value"].clone()

    def writable(self, program: Function) -> Function:
        """Return a program that gets copies of these latents; the program itself if it writes into no latent."""
        names = [name for name, (now, before) in self._drawn.items() if not torch.equal(now, before)]
        return _Copies(names)(program) if names else program


class _Copies(Messenger):
    """Gives a program copies of some values, while handlers outside of it keep the values."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names, self._seen = names, _SeenByGradients()

    def __enter__(self) -> _Copies:
        self._seen.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._seen.__exit__(*error)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._names:
            msg["value"] = msg["value"].clone()


class _SeenByGradients(TorchFunctionMode):
    """Lets the gradients of a run, if it has any, see writes into tensors, as it would without ``torch.no_grad``."""

    def __enter__(self) -> _SeenByGradients:
        self._keeps = torch.is_grad_enabled()
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        writes = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        with torch.enable_grad() if writes and self._keeps else nullcontext():
            return func(*args, **(kwargs or {}))
