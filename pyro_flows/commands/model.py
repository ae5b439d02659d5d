"""The user's model: a callable in a Python file, and the arguments that it takes."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from . import Refused


def load_model(spec: str) -> Callable[..., Any]:
    """Return the model of ``FILE.py:NAME``; the file may import its neighbours.

    Raises:
        Refused: If the file or the name is missing, the file fails to import, or the name is not callable.
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
        known = f"; its functions are {', '.join(functions)}" if functions else ""
        raise Refused(f"{file!r} has no {name!r}{known}")
    if inspect.isclass(model):
        raise Refused(f"{name!r} in {file!r} is a class and no model; name an instance of it, made in the file")
    if not callable(model):
        raise Refused(f"{name!r} in {file!r} is of type {type(model).__name__} and cannot be called")
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


def check_arguments(model: Callable[..., Any], given: list[str]) -> None:
    """Raise Refused if a model does not take an argument, or lacks one that it needs."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):
        return  # callables without a signature raise their own errors
    try:
        signature.bind(**dict.fromkeys(given))
    except TypeError as error:
        raise Refused(f"the data do not suit the model: {error}; it takes {signature!s:.200}") from error


def in_one_line(error: BaseException, file: Path) -> str:
    """Return an error in one line, with its kind and line number if the user's file raised it."""
    words = " ".join(str(error).partition("Trace Shapes:")[0].split()) or "no reason given"
    if line := line_of(error, file):
        return f"{type(error).__name__}: {words} ({file.name}, line {line})"
    return words if isinstance(error, ValueError) else f"{type(error).__name__}: {words}"


def line_of(error: BaseException, file: Path) -> int | None:
    """Return the last line of the user's file through which an error passed, or None."""
    frames, path = traceback.extract_tb(error.__traceback__), file.resolve()
    return next((frame.lineno for frame in reversed(frames) if Path(frame.filename) == path), None)
