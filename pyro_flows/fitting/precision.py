"""Mixed precision where it is safe: networks calculate in bfloat16, maps and log-determinants stay as they are.

Mixed Precision Training (Micikevicius et al. 2017, arXiv:1710.03740).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioners import Conditioner
from ..flows import Flow


@contextlib.contextmanager
def networks_in_bfloat16(flow: nn.Module) -> Iterator[None]:
    """Let the conditioners of a flow calculate in bfloat16; their weights, and what they return, keep their dtype."""
    entered: list[tuple[torch.autocast, torch.dtype]] = []

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        cast = torch.autocast(inputs[0].device.type, torch.bfloat16)
        cast.__enter__()
        entered.append((cast, inputs[0].dtype))

    def leave(_: nn.Module, inputs: tuple[Any, ...], params: Tensor | None) -> Tensor | None:
        cast, dtype = entered.pop()
        cast.__exit__(None, None, None)
        return None if params is None else params.to(dtype)

    networks = [part for part in flow.modules() if isinstance(part, Conditioner)]
    hooks = [net.register_forward_pre_hook(enter) for net in networks]
    hooks += [net.register_forward_hook(leave, always_call=True) for net in networks]
    try:
        with contextlib.ExitStack() as stack:
            for part in flow.modules():
                if isinstance(part, Flow):
                    stack.enter_context(part.uncompiled())  # a graph would not see the hooks
            yield
    finally:
        for hook in hooks:
            hook.remove()
