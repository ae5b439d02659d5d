"""Plain descriptions of objects: the class, and the arguments that it was built from, at every level.

A spec consists of dicts, lists, tuples, numbers, strings and tensors:

    {"class": "transforms.Permute", "arguments": {"permutation": tensor([1, 0])}}

A module or tensor may stand in two places, for example in a layer and in its inverse.  Its first place describes it,
and the other refers to that by ``{"same": "transforms[0]"}``, so that it is shared again after loading.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .allowed_classes import BY_NAME, BY_TYPE

UNSIZED = (
    "flows.Dequantized",
    "flows.Mixed",
    "guides.AutoPlateFlow",
    "guides.AutoStructuredFlow",
    "guides.Site",
)  # their numbers may count levels, or rows
WAY_OUT = (
    "Keep its tensors instead, torch.save(x.state_dict(), path), and load them into what your own code builds, "
    "x.load_state_dict(torch.load(path)); a fitted flow ends with the FixedAffine that fit_density has put there."
)


def describe(value: object) -> Any:
    """Return the spec of an object.

    Raises:
        ValueError: If it, or a part of it, is of a class that files may not name.
    """
    return _describe(value, "", {})


def _describe(value: Any, place: str, seen: dict[int, tuple[Any, str]]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple, nn.ModuleList, torch.Size):
        parts = [_describe(part, f"{place}[{i}]", seen) for i, part in enumerate(value)]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, type) and _of_torch(value.__name__) is value:
        return {"torch.nn": value.__name__}
    if isinstance(value, nn.Module | Tensor):
        if id(value) in seen:
            return {"same": seen[id(value)][1]}
        seen[id(value)] = value, place  # a reference, so that no other object gets its id
    if isinstance(value, Tensor):
        data = value.detach().cpu().clone()  # a view would be saved with all the memory that it views
        return {"parameter": data} if isinstance(value, nn.Parameter) else data
    if (kind := BY_TYPE.get(type(value))) is None:
        raise ValueError(
            f"save: {place} is {named(value)}, which files do not hold: they name classes of "
            "pyro_flows, activations of torch.nn and supports of torch and Pyro, exactly, so that opening one runs no "
            f"other code. {WAY_OUT}"
        )
    inner = kind.arguments(value).items()
    arguments = {name: _describe(part, f"{place}.{name}".lstrip("."), seen) for name, part in inner}
    return {"class": kind.name, "arguments": arguments}


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


def build(spec: Any, limit: float = math.inf) -> Any:
    """Build the object that a spec describes, with newly initialised tensors; your random numbers stay the same.

    Args:
        spec: The spec.
        limit: The largest size in it.  The rows of a plate and the levels of integers are not sizes.

    Raises:
        ValueError: If it is no spec, names an unknown class, or holds a larger size: loops would count to it.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return _Builder(limit).build(spec, "", "")


class _Builder:
    """Builder of objects that remembers the modules and tensors of each place."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._made: dict[str, Any] = {}

    def build(self, spec: Any, place: str, owner: str) -> Any:
        """Build an object for a place among the arguments of a class."""
        keys = list(spec) if isinstance(spec, dict) else []
        if isinstance(spec, int) and (spec < -self._limit or (spec > self._limit and owner not in UNSIZED)):
            shown = spec if abs(spec) < 2**63 else f"a number of {spec.bit_length()} bits"
            raise ValueError(f"{place} holds {shown}, far beyond the bytes of tensors in the file")
        if spec is None or isinstance(spec, bool | int | float | str):
            return spec
        if isinstance(spec, list | tuple):
            return type(spec)(self.build(part, f"{place}[{i}]", owner) for i, part in enumerate(spec))
        if keys == ["same"]:
            if spec["same"] not in self._made:
                raise ValueError(f"{place} is to be the same as {spec['same']!r:.60}, which is not there")
            return self._made[spec["same"]]
        if keys == ["torch.nn"]:
            if (found := _of_torch(spec["torch.nn"])) is None:
                raise ValueError(f"{place} names torch.nn.{spec['torch.nn']}, which is no network of this torch")
            return found
        if isinstance(spec, Tensor):
            self._made[place] = spec
        elif keys == ["parameter"]:
            self._made[place] = nn.Parameter(spec["parameter"])
        elif keys == ["class", "arguments"]:
            self._made[place] = self._object(spec["class"], spec["arguments"], place)
        else:
            raise ValueError(f"{place or 'the spec'} holds {spec!r:.60}, which describes nothing")
        return self._made[place]

    def _object(self, name: str, arguments: dict[str, Any], place: str) -> Any:
        if name not in BY_NAME:
            of = f"{place or 'it'} is of a class {name!r:.60}"
            raise ValueError(f"{of}, which this pyro_flows does not have; perhaps another version does")
        parts = {key: self.build(part, f"{place}.{key}".lstrip("."), name) for key, part in arguments.items()}
        try:
            return BY_NAME[name].build(**parts)
        except Exception as error:
            raise ValueError(f"{name} refuses its arguments: {error!s:.300}") from error
