"""Arguments of the user's model, by name, from a JSON or NumPy file.

Numbers, booleans and strings keep their type.  Lists and arrays of numbers become tensors of torch's default dtype, and
those of booleans boolean tensors.  JSON often writes whole real numbers as integers (R writes c(1, 2) as [1, 2]), so a
list of integers becomes real numbers as well.  In NumPy files an array of integers keeps its type.

Two kinds of values have a second reading, for models that do not run with the first.  A list of integers may be an
index, and becomes integers.  A single number may be an observation, and becomes a tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import Refused
from .inputs import read_file, read_numpy, repeated

TRIALS = 128  # readings of the data
NAMES: dict[type, str] = {type(None): "null", dict: "object", list: "lists of unequal lengths"}
INTEGERS = torch.iinfo(torch.int64)


@dataclass(frozen=True)
class Data:
    """Arguments by name, and the integers that some lists of real numbers may stand for."""

    values: dict[str, Any] = field(default_factory=dict)
    integers: dict[str, Tensor] = field(default_factory=dict)

    def readings(self) -> Iterator[dict[str, Any]]:
        """Yield the arguments, then with more and more second readings in their places."""
        numbers = {name: value for name, value in self.values.items() if type(value) in (int, float)}
        others = {**self.integers, **{name: torch.tensor(float(value)) for name, value in numbers.items()}}
        choices = (chosen for size in range(len(others) + 1) for chosen in combinations(others, size))
        for chosen in islice(choices, TRIALS):
            yield {**self.values, **{name: others[name] for name in chosen}}


def read_data(path: Path | None) -> Data:
    """Read arguments, in torch's default dtype; without a file, return no arguments.

    Raises:
        Refused: If the file is missing or of another kind, or an argument is of no use or not finite.
    """
    if path is None:
        return Data()
    data = read_file("data file", path, {".json": _read_json, ".npz": _read_npz})
    for name, value in data.values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise Refused(f"argument {name!r} is {value}; data must be finite")
        if isinstance(value, Tensor) and (bad := int((~value.isfinite()).sum())):
            raise Refused(f"argument {name!r} holds NaN or inf ({bad} of {value.numel()} numbers); data must be finite")
    return data


def _read_json(path: Path) -> Data:
    def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := repeated(name for name, _ in pairs):
            raise Refused(f"the data file {str(path)!r} gives {twice} more than once; keep one of each")
        return dict(pairs)

    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once_each)
    except ValueError as error:
        raise Refused(f"the data file {str(path)!r} is not JSON: {error}") from error
    except RecursionError as error:
        raise Refused(f"the data file {str(path)!r} is nested too deeply") from error
    if not isinstance(found, dict):
        raise Refused(f"the data file {str(path)!r} must hold an object, {{name: value, ...}}")
    values = {name: _from_json(name, value) for name, value in found.items()}
    integers = {name: x for name, x in values.items() if isinstance(x, Tensor) and x.dtype == torch.int64}
    return Data({**values, **{name: x.to(torch.get_default_dtype()) for name, x in integers.items()}}, integers)


def _from_json(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        raise Refused(f"argument {name!r} is an object; give its parts as arguments of their own")
    leaves = np.array(value, dtype=object).ravel()  # lists, where their lengths differ, or they are nested too deeply
    kinds = {type(leaf) for leaf in leaves}
    if any(isinstance(leaf, int) and not INTEGERS.min <= leaf <= INTEGERS.max for leaf in leaves):
        raise Refused(f"argument {name!r} holds integers beyond 64 bits; write them as real numbers")
    if not isinstance(value, list) or kinds == {str}:
        return value
    if not (kinds <= {int, float} or kinds == {bool}):
        words = ", ".join(sorted(NAMES.get(kind, kind.__name__) for kind in kinds))
        raise Refused(f"argument {name!r} is a list of {words}; it must hold numbers, or booleans, or strings")
    return torch.tensor(value)


def _read_npz(path: Path) -> Data:
    arrays = read_numpy("data file", path)
    if isinstance(arrays, np.ndarray):
        raise Refused(f"the data file {str(path)!r} holds one array without a name; write it with numpy.savez")
    return Data({name: _from_numpy(name, array) for name, array in arrays.items()})


def _from_numpy(name: str, array: np.ndarray) -> Any:
    if array.dtype.kind not in "biufU":
        raise Refused(f"argument {name!r} is an array of {array.dtype}; it must hold numbers, or booleans, or strings")
    if array.ndim == 0 or array.dtype.kind == "U":
        return array.tolist()
    if array.dtype.kind == "f":
        return torch.from_numpy(array.astype(np.float64)).to(torch.get_default_dtype())
    if array.size and int(array.max()) > INTEGERS.max:
        raise Refused(f"argument {name!r} holds integers beyond 64 bits")
    # Indexing takes tensors of bytes for masks.
    return torch.from_numpy(array if array.dtype.kind == "b" else array.astype(np.int64))
