"""Tensors of a module: its state, its restoration, and a check before saving that the restoration will succeed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .spec import WAY_OUT, build, describe


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the ``state_dict`` on the CPU; tensors that the module shares are shared here."""
    own = module.state_dict(keep_vars=True)
    # Clones, since a view would be saved with all the memory that it views.
    kept = {id(value): value.detach().cpu().clone() for value in own.values()}
    return {name: kept[id(value)] for name, value in own.items()}


def marks_of(module: nn.Module) -> dict[str, Any]:
    """Return the names of frozen parameters, and the dtypes of buffers that the ``state_dict`` lacks."""
    saved = module.state_dict()
    buffers = {name: b for name, b in module.named_buffers() if name not in saved and b.is_floating_point()}
    dtypes = {name: str(buffer.dtype).rpartition(".")[2] for name, buffer in buffers.items()}
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return {"frozen": frozen, "dtypes": dtypes}


def restore(module: nn.Module, state: dict[str, Tensor], *, frozen: list[str], dtypes: dict[str, str]) -> None:
    """Load tensors into a module, in the dtypes of the tensors.

    Raises:
        ValueError: If they do not belong to this module.
    """
    mine = module.state_dict(keep_vars=True)
    for name in mine.keys() & state.keys():
        if mine[name].is_floating_point() != state[name].is_floating_point():
            raise ValueError(f"{name} is of {state[name].dtype} and not {mine[name].dtype}")
        mine[name].data = mine[name].data.to(state[name].dtype)  # so that loading does not round
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # After loading, which may derive some buffers anew.
    buffers, parameters, still = dict(module.named_buffers()), dict(module.named_parameters()), set(frozen)
    if unknown := (dtypes.keys() - buffers.keys()) | (still - parameters.keys()):
        raise ValueError(f"it has no {unknown.pop()}")
    for name, dtype in dtypes.items():
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"{dtype!r:.60} is no floating dtype of torch")
        buffers[name].data = buffers[name].data.to(found)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in still)


def check_comes_back(name: str, module: nn.Module) -> None:
    """Raise ValueError if a module was changed after its construction, so that its file would lose the change."""
    again = build(describe(module))
    try:
        restore(again, state_of(module), **marks_of(module))
        difference = next(_differences(module, again), "")
    except ValueError as error:
        difference = str(error)
    if difference:
        raise ValueError(
            f"save: {name} is not as its constructor builds it, and would not come back from a file: "
            f"{difference:.300}. {WAY_OUT}"
        )


def _differences(module: nn.Module, again: nn.Module) -> Iterator[str]:
    """Yield the differences between two modules in their parts, in shared parameters, and in buffers."""
    parts, others = (dict(m.named_modules(remove_duplicate=False)) for m in (module, again))
    for name, part in parts.items():
        # By name, since torch makes a new class for each module that it parametrises.
        got, wanted = (f"{type(m).__module__}.{type(m).__qualname__}" for m in (part, others.get(name)))
        if got != wanted:
            yield f"{name} is a {got} and not a {wanted}"
        if part._forward_hooks or part._forward_pre_hooks:
            yield f"{name or 'it'} has forward hooks"
        settings = _settings(others[name])
        for key, value in _settings(part).items():
            if value != settings.get(key):
                yield f"{name}.{key} is {value!r:.50} and not {settings.get(key)!r:.50}"
    wanted_ties = _ties(again)
    for name, first in _ties(module).items():
        if wanted_ties.get(name) != first:
            yield f"{name} is {'tied to ' + first if first != name else 'a parameter of its own'}"
    buffers = dict(again.named_buffers())
    for name, buffer in module.named_buffers():
        there = buffers.get(name)
        if there is None or there.dtype != buffer.dtype or not torch.equal(there, buffer.cpu()):
            yield f"the buffer {name} differs"


def _settings(module: nn.Module) -> dict[str, object]:
    """Return the numbers and strings that a module holds."""
    kinds = int, float, str, bool, type(None)
    return {name: value for name, value in vars(module).items() if name != "training" and isinstance(value, kinds)}


def _ties(module: nn.Module) -> dict[str, str]:
    """Return, for each name of a parameter, the first of its names."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}
