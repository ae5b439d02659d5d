"""An object as a spec and tensors, and back: its modules come back with their state, and a check proves it.

A spec is a plain description for JSON: the class, and the arguments that it was built from, at every level.  It names
tensors, which lie beside it:

    {"class": "transforms.Permute", "arguments": {"permutation": {"tensor": "transforms.0.permutation"}}}

A module may stand in two places, for example in a layer and in its inverse.  Its first place describes it, and the
other refers to that by ``{"same": "transforms[0]"}``, so that it is shared again after loading.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .classes import BY_NAME, BY_TYPE, arguments_of, construct, has_parts

ARGUMENTS = "arguments/"  # the beginning of the names of tensors that belong to no state
# Classes whose integers may count levels or rows, not sizes.
UNSIZED = {"flows.Dequantized", "flows.Mixed", "guides.AutoPlateFlow", "guides.AutoStructuredFlow", "guides.SavedSite"}
WAY_OUT = (
    "Keep its tensors instead, torch.save(x.state_dict(), path), and load them into what your own code builds, "
    "x.load_state_dict(torch.load(path)); a fitted flow ends with the FixedAffine that fit_density has put there."
)


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


def describe(value: object, state: Mapping[str, Tensor] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Return the spec of an object, and the tensors that it names.

    Args:
        value: The object.
        state: Tensors with names already, such as those of a ``state_dict``.

    Raises:
        ValueError: If it, or a part of it, is of a class that files may not name, or a tensor that they cannot hold.
    """
    describer = _Describer(state or {})
    return describer.describe(value, ""), describer.tensors


class _Describer:
    """Describer of objects that remembers the place of each module and the name of each tensor."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names = {id(tensor): name for name, tensor in state.items()}
        self._places: dict[int, tuple[nn.Module, str]] = {}  # with the module, so that no other object gets its id

    def describe(self, value: Any, place: str) -> Any:
        """Return the spec of an object at a place among the arguments of a class."""
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) in (list, tuple, nn.ModuleList, torch.Size):
            return [self.describe(part, f"{place}[{i}]") for i, part in enumerate(value)]
        if type(value) is dict:
            return {"dict": [[key, self.describe(part, f"{place}[{key!r}]")] for key, part in value.items()]}
        if isinstance(value, type) and _of_torch(value.__name__) is value:
            return {"torch.nn": value.__name__}
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.dtype is torch.complex128:
                kind = f"{value.layout}, {value.dtype}".replace("torch.", "")
                raise ValueError(
                    f"save: {place} is a tensor ({kind}), which files do not hold. Use .to_dense() or .cfloat()."
                )
            name = self._names.setdefault(id(value), f"{ARGUMENTS}{place}")
            self.tensors[name] = value
            return {"parameter" if isinstance(value, nn.Parameter) else "tensor": name}
        if (found := BY_TYPE.get(type(value))) is None:
            raise ValueError(
                f"save: {place} is {named(value)}, which files do not hold: they name classes of "
                "pyro_flows, activations of torch.nn and supports of torch and Pyro, exactly, so that opening one runs "
                f"no other code. {WAY_OUT}"
            )
        if isinstance(value, nn.Module):
            if id(value) in self._places:
                return {"same": self._places[id(value)][1]}
            self._places[id(value)] = value, place
        inner = arguments_of(value).items()
        arguments = {name: self.describe(part, f"{place}.{name}".lstrip(".")) for name, part in inner}
        return {"class": found, "arguments": arguments}


def _of_torch(name: str) -> type | None:
    """Return the class of ``torch.nn`` of that name, or None."""
    found = getattr(nn, name, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def named(value: object) -> str:
    """Return a description of an object for error messages: its own qualified name, or the name of its class."""
    if isinstance(value, type):
        return f"the class {value.__module__}.{value.__qualname__}"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"the function {getattr(value, '__module__', '?')}.{value.__qualname__}"
    return f"of the class {type(value).__module__}.{type(value).__qualname__}"


def build(spec: Any, tensors: Mapping[str, Tensor], limit: float = math.inf) -> Any:
    """Build the object that a spec describes, with newly initialised parameters; your random numbers stay the same.

    Args:
        spec: The spec; its sequences become tuples.
        tensors: The tensors that it names.
        limit: The largest size in it.  The rows of a plate and the levels of integers are not sizes.

    Raises:
        ValueError: If it is no spec, names an unknown class, or holds a larger size: loops would count to it.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return _Builder(tensors, limit).build(spec, "", "")


class _Builder:
    """Builder of objects that remembers the modules of each place and the parameters of each name."""

    def __init__(self, tensors: Mapping[str, Tensor], limit: float) -> None:
        self._tensors, self._limit = tensors, limit
        self._made: dict[str, tuple[Any, int]] = {}  # with the number of objects in it
        self._count = 0
        self._parameters: dict[str, nn.Parameter] = {}

    def build(self, spec: Any, place: str, owner: str) -> Any:
        """Build an object for a place among the arguments of a class."""
        if isinstance(spec, int) and (spec < -self._limit or (spec > self._limit and owner not in UNSIZED)):
            raise ValueError(f"{place} holds {spec!r:.40}, far beyond the bytes of tensors in the file")
        if spec is None or isinstance(spec, bool | int | float | str):
            return spec
        if isinstance(spec, list):
            return tuple(self.build(part, f"{place}[{i}]", owner) for i, part in enumerate(spec))
        match spec:
            case {"class": str(name), "arguments": dict(arguments)}:
                before = self._count
                made = self._object(name, arguments, place)
                self._add(1)
                self._made[place] = made, self._count - before
                return made
            case {"same": str(name)} if name in self._made:
                made, number = self._made[name]
                self._add(number)
                return made
            case {"tensor": str(name)} if name in self._tensors:
                return self._tensors[name]
            case {"parameter": str(name)} if name in self._tensors:
                return self._parameters.setdefault(name, nn.Parameter(self._tensors[name]))
            case {"torch.nn": str(name)} if found := _of_torch(name):
                return found
            case {"dict": list(pairs)}:
                return {key: self.build(part, f"{place}[{key!r:.60}]", owner) for key, part in pairs}
        raise ValueError(f"{place or 'the spec'} holds {spec!r:.60}, which describes nothing")

    def _add(self, number: int) -> None:
        """Count objects, the shared ones repeatedly, since that is how torch walks through modules."""
        self._count += number
        if self._count > self._limit:
            raise ValueError(f"its spec unfolds to more than {self._limit} objects")

    def _object(self, name: str, arguments: dict[str, Any], place: str) -> Any:
        if name not in BY_NAME:
            of = f"{place or 'it'} is of a class {name!r:.60}"
            raise ValueError(f"{of}, which this pyro_flows does not have; perhaps another version does")
        parts = {key: self.build(part, f"{place}.{key}".lstrip("."), name) for key, part in arguments.items()}
        try:
            return construct(name, parts)
        except Exception as error:
            raise ValueError(f"{name} refuses its arguments: {error!s:.300}") from error
