"""Errors of a user's program in words, and warnings at the user's line."""

from __future__ import annotations

import linecache
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .. import arguments
from .masks import is_observation

# Errors of a program that get more words.  Other classes may take no message, or a user may wait for them.
BUILT_IN = ValueError, RuntimeError, TypeError, AttributeError, AssertionError, IndexError, KeyError
INNER = {"pyro", "torch", __name__.partition(".")[0], *sys.stdlib_module_names} - {"__main__"}


def quoted(error: BaseException) -> str:
    """Return an error's place, kind and message: ``models.py:7, `assert x.dim() == 1`: AssertionError``.

    An error without a line of the user's, for example from a log-density, has only kind and message.
    """
    head, mark, _ = str(error).partition("Trace Shapes:")[0].partition("invalid values")  # and not the values
    words = " ".join((head + mark).split())
    place = place_of(error)
    return f"{f'{place}: ' if place else ''}{type(error).__name__}{f': {words:.300}' if words else ''}"


def place_of(error: BaseException) -> str:
    """Return an error's innermost line outside Python's library, torch, Pyro and this package, or an empty string."""
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        if not _is_inner(frame):
            file = frame.f_code.co_filename
            line = linecache.getline(file, number, frame.f_globals).strip()
            return f"{Path(file).name}:{number}{f', `{line}`' if line else ''}"
    return ""


def failure(error: BaseException, given: dict[str, Any]) -> str:
    """Return an error of a program in words, with the arguments of the run by their names."""
    run = ", ".join(f"{name}: {_described(value)}" for name, value in given.items()) or "no arguments"
    return f"{quoted(error)}. It was run with {run}. Give it arguments with which it runs by itself."


@contextmanager
def explained(role: str, given: dict[str, Any]) -> Iterator[None]:
    """Say in an error of a program, model or guide, with which arguments it was run; the error keeps its class."""
    try:
        yield
    except Exception as error:
        if type(error) in BUILT_IN and place_of(error):
            raise type(error)(f"the {role} fails: {failure(error, given)}") from error
        if "\nTrace Shapes:" in str(error) and type(error.__cause__) is type(error):  # Pyro's copy says no more
            raise error.__cause__ from error.__cause__.__cause__
        raise


def _described(value: Any) -> str:
    """Return the class, dtype and shape of an array, with a count of NaN, or any other value in a few characters."""
    kind, lost = type(value).__name__, _count_nan(value)
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return arguments.quoted(value) if isinstance(value, bool | int | float | str | None) else f"a {kind}"
    bad = f" with {lost} NaN" if lost else ""
    return f"{kind} {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{bad}"


def _count_nan(value: Any) -> int:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
    return int(value.isnan().sum()) if dense and value.is_floating_point() else 0


def check_observed(owner: str, trace: Trace, given: dict[str, Any]) -> None:
    """Raise ValueError if data or arguments that are not finite leave an observed site without a density.

    Masks may hide such numbers, and some densities take them.

    Args:
        owner: The start of the message.
        trace: A run of a model.
        given: The model's arguments by their names.
    """
    sources = [f"argument {name!r} holds {count} NaN" for name, value in given.items() if (count := _count_nan(value))]
    for name, site in trace.nodes.items():
        if not (is_observation(site) and isinstance(site["value"], Tensor)):
            continue
        bad = int((~site["value"].isfinite()).sum())
        if (bad or sources) and not _has_density(site, finite=bool(bad)):
            fault = f"holds NaN or inf ({bad} of {site['value'].numel()} numbers)" if bad else "has a density of NaN"
            words = f"{owner}observed site {name!r} {'; '.join([fault, *sources[:1]])}"
            raise ValueError(f"{words}. Leave those rows out, or mask them with poutine.mask.")


@torch.no_grad()
def _has_density(site: dict[str, Any], *, finite: bool) -> bool:
    """True if the log-density of a site is not NaN, or is finite if that is asked for."""
    try:
        log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    except ValueError:  # under validation a distribution refuses NaN
        return False
    return bool(log_prob.isfinite().all() if finite else not log_prob.isnan().any())


def warn_user(message: str) -> None:
    """Warn at the user's line that called this package."""
    frames = enumerate(traceback.walk_stack(sys._getframe()), 1)
    warnings.warn(message, stacklevel=next((level for level, (frame, _) in frames if not _is_inner(frame)), 1))


def _is_inner(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in INNER
