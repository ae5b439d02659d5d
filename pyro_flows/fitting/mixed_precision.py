"""Mixed precision: networks compute in bfloat16, transforms and log-determinants keep their precision.

Mixed Precision Training (Micikevicius et al. 2017, arXiv:1710.03740).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioners import Conditioner
from ..flows import Flow


def check_single(caller: str, module: nn.Module) -> None:
    """Raise ValueError unless all parameters of a module are in float32."""
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if wrong := [*(dtypes - {torch.float32})]:
        raise ValueError(f"{caller}: mixed_precision is for flows in float32, got one in {wrong[0]}. Use flow.float().")


@contextlib.contextmanager
def networks_in_bfloat16(flow: nn.Module) -> Iterator[None]:
    """Let the conditioners of a flow compute in bfloat16; their weights and outputs keep their dtype."""
    with contextlib.ExitStack() as stack:
        for part in flow.modules():
            if isinstance(part, Flow):
                stack.enter_context(part.uncompiled())  # a compiled graph would keep the networks as they were
            elif isinstance(part, Conditioner):
                stack.callback(_restore, part, vars(part).get("forward"))
                part.forward = _in_bfloat16(part.forward)  # type: ignore[assignment, method-assign]
        yield


def _restore(part: nn.Module, forward: Any) -> None:
    del part.forward
    if forward is not None:  # set by the user on this object
        part.forward = forward


def _in_bfloat16(forward: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        with torch.autocast(x.device.type, torch.bfloat16):
            params = forward(x, *args, **kwargs)
        return None if params is None else params.to(x.dtype)

    return call
