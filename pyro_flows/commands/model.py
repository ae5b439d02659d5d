"""The user's model, a callable in a Python file, and its arguments by name, from a JSON or NumPy file.

Numbers, booleans and strings keep their type.  Lists and arrays of numbers become tensors of torch's default dtype, and
those of booleans boolean tensors.  JSON often writes whole real numbers as integers (R writes c(1, 2) as [1, 2]), so a
list of integers becomes real numbers as well.  In NumPy files an array of integers keeps its type.

Two kinds of values have a second reading, for models that do not run with the first.  A list of integers may be an
index, and becomes integers.  A single number may be an observation, and becomes a tensor.
"""

import importlib.util
import inspect
import json
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from itertools import chain, combinations, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import Refused
from .inputs import read_file, read_numpy, repeated

TRIALS = 128  # readings of the data
SHOWN = 600  # characters of an error, which may quote all data
NAMES: dict[type, str] = {type(None): "null", dict: "object", list: "lists of unequal lengths"}


def load_model(spec: str) -> Callable[..., Any]:
    """Return the model of ``FILE.py:NAME``; the file may import its neighbours.

    Raises:
        Refused: If the file or the name is missing, the file fails to import, or the name is no model.
    """
    file, _, name = spec.rpartition(":")
    if not (file and name):
        raise Refused(f"the model must be given as FILE.py:NAME, got {spec!r}")
    path = Path(file)
    if not path.is_file():
        raise Refused(f"there is no file {file!r}")
    if path.suffix != ".py":
        raise Refused(f"{file!r} is not a Python file; its name must end with .py")
    module = _import(path)
    model = getattr(module, name, None)
    if model is None:
        functions = [n for n, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]
        raise Refused(f"{file!r} has no {name!r}; its functions are {', '.join(functions) or 'none'}")
    if inspect.isclass(model) or not callable(model):
        kind = "a class" if inspect.isclass(model) else f"of type {type(model).__name__}"
        raise Refused(f"{name!r} in {file!r} is {kind}; name a function, or an instance that can be called")
    return model


def _import(path: Path) -> ModuleType:
    """Run a file as a module, under a name that shadows no other."""
    name, file = f"_pyro_flows_model_{path.stem}", path.resolve()  # now, since it may change the working directory
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # noqa: PT018  (a name that ends with .py has a loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    folder = str(file.parent)
    sys.path.insert(0, folder)  # scripts can import their neighbours, too
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise Refused(f"{str(path)!r} cannot be imported: {in_one_line(error, file)}") from error
    finally:
        sys.path.remove(folder)
    return module


def in_one_line(error: BaseException, file: Path) -> str:
    """Return an error in one line, with its kind and line number if the user's file raised it."""
    words = textwrap.shorten(str(error).partition("Trace Shapes:")[0], SHOWN) or "no reason given"
    if line := line_of(error, file):
        return f"{type(error).__name__}: {words} ({file.name}, line {line})"
    return words if isinstance(error, ValueError) else f"{type(error).__name__}: {words}"


def blames_types(error: BaseException) -> bool:
    """True if an error is about the type of a value, which another reading of the data may change."""
    return isinstance(error, TypeError | AttributeError) or bool(re.search(r"types?\b|used as indices", str(error)))


def line_of(error: BaseException, file: Path) -> int | None:
    """Return the last line of the user's file through which an error passed, or None."""
    frames, path = traceback.extract_tb(error.__traceback__), file.resolve()
    return next((frame.lineno for frame in reversed(frames) if Path(frame.filename) == path), None)


def readings(data: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the arguments as first read, then with more and more second readings in their places."""
    twofold = [name for name, values in data.items() if len(values) > 1]
    choices = chain.from_iterable(combinations(twofold, size) for size in range(len(twofold) + 1))
    for chosen in islice(choices, TRIALS):
        yield {name: values[name in chosen] for name, values in data.items()}


def read_data(path: Path | None) -> dict[str, list[Any]]:
    """Return arguments by name, each in one or two readings, in torch's default dtype; none without a file.

    Raises:
        Refused: If the file is missing or of another kind, or an argument is of no use or not finite.
    """
    data = {} if path is None else read_file("data file", path, {".json": _read_json, ".npz": _read_npz})
    for name, (value, *_) in data.items():
        numbers = torch.as_tensor(value) if isinstance(value, float | Tensor) else torch.zeros(())
        if bad := int((~numbers.isfinite()).sum()):
            raise Refused(f"argument {name!r} holds NaN or inf ({bad} of {numbers.numel()} numbers); must be finite")
    return data


def _read_json(path: Path) -> dict[str, list[Any]]:
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
    return {name: _from_json(name, value) for name, value in found.items()}


def _from_json(name: str, value: Any) -> list[Any]:
    if value is None:
        return [value]
    leaves = np.array(value, dtype=object).ravel()  # lists, where their lengths differ, or they are nested too deeply
    kinds = {type(leaf) for leaf in leaves}
    if not (kinds <= {int, float} or kinds in ({bool}, {str})):
        words = ", ".join(sorted(NAMES.get(kind, kind.__name__) for kind in kinds))
        raise Refused(f"argument {name!r} holds {words}; it must hold numbers, or booleans, or strings")
    found = _from_numpy(name, np.array(value))
    if isinstance(found[0], Tensor) and found[0].dtype == torch.int64:
        return [found[0].to(torch.get_default_dtype()), found[0]]
    return found


def _read_npz(path: Path) -> dict[str, list[Any]]:
    arrays = read_numpy("data file", path)
    if isinstance(arrays, np.ndarray):
        raise Refused(f"the data file {str(path)!r} holds one array without a name; write it with numpy.savez")
    return {name: _from_numpy(name, array) for name, array in arrays.items()}


def _from_numpy(name: str, array: np.ndarray) -> list[Any]:
    """Return the one or two readings of an array."""
    kind = array.dtype.kind
    if kind == "O" or (kind == "u" and array.size and int(array.max()) > torch.iinfo(torch.int64).max):
        raise Refused(f"argument {name!r} holds integers beyond 64 bits; write them as real numbers")
    if kind not in "biufU":
        raise Refused(f"argument {name!r} is an array of {array.dtype}; it must hold numbers, or booleans, or strings")
    if array.ndim == 0 or kind == "U":
        value = array.tolist()
        return [value, torch.tensor(float(value))] if array.ndim == 0 and kind in "iuf" else [value]
    if kind == "f":
        return [torch.from_numpy(array.astype(np.float64)).to(torch.get_default_dtype())]
    return [torch.from_numpy(array if kind == "b" else array.astype(np.int64))]  # bytes would index as masks
