"""Tensors of a module: its state, its restoration, and a check before saving that the restoration will succeed."""

from __future__ import annotations

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
    """Return the names of frozen parameters, the dtypes of buffers that the ``state_dict`` lacks, and the modes.

    The modes are the whole module's, under the name "", and those of the parts that differ: True in training.
    """
    saved = module.state_dict()
    buffers = {name: b for name, b in module.named_buffers() if name not in saved and b.is_floating_point()}
    dtypes = {name: str(buffer.dtype).rpartition(".")[2] for name, buffer in buffers.items()}
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    modes = {
        name: part.training for name, part in module.named_modules() if not name or part.training != module.training
    }
    return {"frozen": frozen, "dtypes": dtypes, "training": modes}


def restore(
    module: nn.Module,
    state: dict[str, Tensor],
    *,
    frozen: list[str],
    dtypes: dict[str, str],
    training: dict[str, bool],
) -> None:
    """Load tensors into a module, in the dtypes of the tensors, and set its modes.

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
    parts = dict(module.named_modules())
    if unknown := (dtypes.keys() - buffers.keys()) | (still - parameters.keys()) | (training.keys() - parts.keys()):
        raise ValueError(f"it has no {unknown.pop()}")
    module.train(training.get("", True))
    for name, mode in training.items():
        parts[name].training = bool(mode)
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
        difference = _difference(module, again)
    except ValueError as error:
        difference = str(error)
    if difference:
        raise ValueError(
            f"save: {name} is not as its constructor builds it, and would not come back from a file: "
            f"{difference:.300}. {WAY_OUT}"
        )


def _difference(module: nn.Module, again: nn.Module) -> str:
    """Return the first difference between two modules in their facts and their buffers, in words."""
    facts, buffers = _facts(again), dict(again.named_buffers())
    for name, fact in _facts(module).items():
        if fact != facts.get(name):
            return f"{name or 'it'} is {fact!s:.100} and not {facts.get(name)!s:.100}"
    for name, buffer in module.named_buffers():
        there = buffers.get(name)
        if there is None or there.dtype != buffer.dtype or not torch.equal(there, buffer.cpu()):
            return f"the buffer {name} differs"
    return ""


def _facts(module: nn.Module) -> dict[str, object]:
    """Return the classes, numbers and strings in a module, its hooks, and the first name of each parameter."""
    facts: dict[str, object] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        # By name, since torch makes a new class for each module that it parametrises.
        facts[name] = f"a {type(part).__module__}.{type(part).__qualname__}"
        facts[f"{name}.forward"] = "with hooks" if part._forward_hooks or part._forward_pre_hooks else "without hooks"
        for key, value in vars(part).items():
            if isinstance(value, int | float | str | bool | None):
                facts[f"{name}.{key}"] = value
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        facts[name] = f"tied to {first.setdefault(id(parameter), name)}"
    return facts
