"""An object as a spec and tensors, and back: its modules come back with their state, and a check proves it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .classes import arguments_of, has_parts
from .spec import ARGUMENTS, WAY_OUT, build, describe


def pack(value: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the spec of an object with the marks of its modules, and copies of all its tensors, on the CPU.

    A tensor that has two names is there once, under the first.

    Raises:
        ValueError: If a part is of a class that files do not hold.
    """
    module = _module_of(value)
    state = module.state_dict(keep_vars=True)
    marks = _marks_of(module)
    own = {name: tensor for name, tensor in state.items() if name not in marks["shared"]}
    spec, named = describe(value, own)
    # Clones, since a view would be saved with all the memory that it views.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in {**own, **named}.items()}
    return {**spec, **marks}, tensors


def unpack(content: dict[str, Any], tensors: Mapping[str, Tensor], limit: float = math.inf) -> Any:
    """Build the object that :func:`pack` has taken apart.

    Raises:
        KeyError: If the marks are not those of its modules.
        ValueError: If the spec is none, or the tensors do not belong to it.
    """
    value = build({name: content[name] for name in ("class", "arguments")}, tensors, limit)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(ARGUMENTS)}
    _restore(_module_of(value), own, **{name: content[name] for name in ("shared", "frozen", "dtypes", "training")})
    return value


def _module_of(value: Any) -> nn.Module:
    """Return an object that is a module, or the modules among its parts."""
    if isinstance(value, nn.Module):
        return value
    return nn.ModuleDict({name: part for name, part in arguments_of(value).items() if isinstance(part, nn.Module)})


def _marks_of(module: nn.Module) -> dict[str, Any]:
    """Return what neither the tensors nor the constructors of a module tell.

    These are the first names of tensors that it shares, the names of frozen parameters, the dtypes of buffers that the
    ``state_dict`` lacks, and the modes: the whole module's, under the name "", and those of the parts that differ.
    """
    saved, first = module.state_dict(keep_vars=True), dict[int, str]()
    shared = {name: first.setdefault(id(value), name) for name, value in saved.items()}
    buffers = {name: b for name, b in module.named_buffers() if name not in saved and b.is_floating_point()}
    parts = module.named_modules()
    return {
        "shared": {name: other for name, other in shared.items() if name != other},
        "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
        "dtypes": {name: str(buffer.dtype).removeprefix("torch.") for name, buffer in buffers.items()},
        "training": {name: part.training for name, part in parts if not name or part.training != module.training},
    }


def _restore(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    shared: dict[str, str],
    frozen: list[str],
    dtypes: dict[str, str],
    training: dict[str, bool],
) -> None:
    """Load tensors into a module, in the dtypes of the tensors, and set its modes.

    Raises:
        KeyError: If the marks name something that the module lacks.
        ValueError: If the tensors do not belong to it.
    """
    state = {**tensors, **{name: tensors[other] for name, other in shared.items()}}
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
    parts, buffers = dict(module.named_modules()), dict(module.named_buffers())
    module.train(training[""])
    for name, mode in training.items():
        parts[name].training = bool(mode)
    for name, dtype in dtypes.items():
        buffers[name].data = buffers[name].data.to(getattr(torch, dtype))
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)


def check_comes_back(name: str, value: Any) -> None:
    """Raise ValueError if a module was changed after its construction, so that its file would lose the change."""
    if has_parts(type(value)):
        for inner, part in value.parts().items():
            check_comes_back(inner, part)
    elif isinstance(value, nn.Module):
        try:
            again = _facts(unpack(*pack(value)))
            changes = (
                f"{k or 'it'} is {v} and not {again.get(k)}" for k, v in _facts(value).items() if v != again.get(k)
            )
            difference = next(changes, "")
        except (KeyError, ValueError) as error:
            difference = str(error)
        if difference:
            raise ValueError(
                f"save: {name} is not as its constructor builds it, and would not come back from a file: "
                f"{difference:.300}. {WAY_OUT}"
            )


def _facts(module: nn.Module) -> dict[str, object]:
    """Return the classes, numbers and strings in a module, its hooks and buffers, and each parameter's first name."""
    facts: dict[str, object] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        # By name, since torch makes a new class for each module that it parametrises.
        facts[name] = f"a {type(part).__module__}.{type(part).__qualname__}"
        facts[f"{name}.forward"] = "with hooks" if part._forward_hooks or part._forward_pre_hooks else "without hooks"
        facts |= {f"{name}.{k}": v for k, v in vars(part).items() if isinstance(v, int | float | str | None)}
    facts |= {name: f"of {b.dtype}, with sum {checksum('', {name: b.cpu()})}" for name, b in module.named_buffers()}
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        facts[name] = f"tied to {first.setdefault(id(parameter), name)}"
    return facts


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of a text and of the bits of tensors."""
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        bits = tensors[name].contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(bits.numpy().tobytes(), found)
    return f"{found:08x}"
