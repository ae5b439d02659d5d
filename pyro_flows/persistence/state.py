"""The tensors of a module: taken out, put back, and a proof beforehand that they will go back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .spec import WAY_OUT, build, describe


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict``, on the CPU; tensors that are one in the module are one here."""
    kept: dict[int, Tensor] = {}
    for value in (own := module.state_dict(keep_vars=True)).values():
        if id(value) not in kept:
            kept[id(value)] = value.detach().cpu().clone()  # a view would be saved with all that it is a view of
    return {name: kept[id(value)] for name, value in own.items()}


def marks_of(module: nn.Module) -> dict[str, Any]:
    """What a ``state_dict`` does not tell: which parameters are frozen, and the dtypes of the tensors that it lacks."""
    rest = set(module.state_dict())
    buffers = {name: buffer for name, buffer in module.named_buffers() if name not in rest}
    dtypes = {name: str(b.dtype).rpartition(".")[2] for name, b in buffers.items() if b.is_floating_point()}
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return {"frozen": frozen, "dtypes": dtypes}


def restore(module: nn.Module, state: dict[str, Tensor], *, frozen: list[str], dtypes: dict[str, str]) -> None:
    """Give a module its tensors back, in their dtypes.

    Raises:
        ValueError: If they are not those of this module.
    """
    mine = module.state_dict(keep_vars=True)
    for name in mine.keys() & state.keys():
        if mine[name].is_floating_point() != state[name].is_floating_point():
            raise ValueError(f"{name} is of {state[name].dtype} and not {mine[name].dtype}")
        mine[name].data = mine[name].data.to(state[name].dtype)  # so that what is loaded is not rounded
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # Afterwards, as loading may have derived some of them anew.
    buffers, still = dict(module.named_buffers()), set(frozen)
    if unknown := (dtypes.keys() - buffers.keys()) | (still - dict(module.named_parameters()).keys()):
        raise ValueError(f"it has no {unknown.pop()}")
    for name, dtype in dtypes.items():
        buffers[name].data = buffers[name].data.to(_dtype(dtype))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in still)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{name!r:.60} is no floating dtype of torch")
    return found


def check_comes_back(name: str, module: nn.Module) -> None:
    """Refuse a module that was changed, since it was built, in ways that its constructor's arguments do not tell."""
    again = build(describe(module))
    try:
        restore(again, state_of(module), **marks_of(module))
        difference = _difference(module, again)
    except ValueError as error:
        difference = str(error)
    if difference:
        raise ValueError(
            f"save: {name} is not as its constructor builds it, and would not come back from a file: "
            f"{difference:.300}. {WAY_OUT}"
        )


def _difference(module: nn.Module, again: nn.Module) -> str:
    """The first difference between two modules in their parts, in which parameters are one, and in their buffers."""
    parts, others = (dict(m.named_modules(remove_duplicate=False)) for m in (module, again))
    for name, part in parts.items():
        got, wanted = (f"{type(m).__module__}.{type(m).__qualname__}" for m in (part, others.get(name)))
        if got != wanted:  # by name, since torch makes a class for each module that it parametrises
            return f"{name} is a {got} and not a {wanted}"
        if part._forward_hooks or part._forward_pre_hooks:
            return f"{name or 'it'} has forward hooks"
        for key, value in _plain(part).items():
            if value != (there := _plain(others[name]).get(key)):
                return f"{name}.{key} is {value!r:.50} and not {there!r:.50}"
    ties, wanted_ties = _ties(module), _ties(again)
    for name, first in ties.items():
        if wanted_ties.get(name) != first:
            return f"{name} is {'tied to ' + first if first != name else 'a parameter of its own'}"
    buffers = dict(again.named_buffers())
    for name, buffer in module.named_buffers():
        there = buffers.get(name)
        if there is None or there.dtype != buffer.dtype or not torch.equal(there, buffer.cpu()):
            return f"the buffer {name} differs"
    return ""


def _plain(module: nn.Module) -> dict[str, object]:
    """What a module holds beside tensors and modules, as far as it is numbers and words."""
    kinds = int, float, str, bool, type(None)
    return {name: value for name, value in vars(module).items() if name != "training" and isinstance(value, kinds)}


def _ties(module: nn.Module) -> dict[str, str]:
    """For each name of a parameter the first of its names."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}
