"""Plain descriptions of objects: the class, and the arguments that it was built from, at every level.

A spec is made for JSON.  It names tensors, which lie beside it:

    {"class": "transforms.Permute", "arguments": {"permutation": {"tensor": "transforms.0.permutation"}}}

A module may stand in two places, for example in a layer and in its inverse.  Its first place describes it, and the
other refers to that by ``{"same": "transforms[0]"}``, so that it is shared again after loading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .classes import BY_NAME, BY_TYPE, arguments_of, construct

ARGUMENTS = "arguments/"  # the beginning of the names of tensors that belong to no state
# Classes whose integers may count levels or rows, not sizes.
UNSIZED = {"flows.Dequantized", "flows.Mixed", "guides.AutoPlateFlow", "guides.AutoStructuredFlow", "guides.SavedSite"}
WAY_OUT = (
    "Keep its tensors instead, torch.save(x.state_dict(), path), and load them into what your own code builds, "
    "x.load_state_dict(torch.load(path)); a fitted flow ends with the FixedAffine that fit_density has put there."
)


def describe(value: object, state: Mapping[str, Tensor] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Return the spec of an object, and the tensors that it names.

    Args:
        value: The object.
        state: Tensors with names already, such as those of a ``state_dict``.

    Raises:
        ValueError: If it, or a part of it, is of a class that files may not name.
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
