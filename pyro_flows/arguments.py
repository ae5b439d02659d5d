"""Checks of arguments: each raises one clear error that names the caller, the argument, its requirement and its value.

They are for whatever a user hands over: numbers, sizes, shapes, classes.  Every part of the library may use them, and
they know nothing of any part.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

IMAGE = "(channels, height, width)"  # words for what is asked for
BIJECTOR = "a bijector such as bijectors.Affine()"
CONDITIONER = "a conditioner such as conditioners.MLP(...)"
TRANSFORM = "a transform such as transforms.LULinear(3)"
MOST = 80  # characters of a value that an error quotes


def quoted(value: object) -> str:
    """Return a value as errors show it: on one line, and not at length."""
    words = " ".join(repr(value).split())
    return words if len(words) <= MOST else f"{words[:MOST]}…"


def is_integer(value: object) -> bool:
    """True if a value is an integer, also one of numpy; a bool is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_integers(caller: str, least: int = 1, /, *, optional: bool = False, **values: object) -> None:
    """Raise a ValueError unless each value is an integer of at least ``least``, or None where that is ``optional``."""
    must = f"be an integer of at least {least}"
    _check_each(caller, values, must, lambda x: is_integer(x) and x >= least, optional=optional)


def check_numbers(
    caller: str,
    /,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    optional: bool = False,
    **values: object,
) -> None:
    """Raise a ValueError unless each value is a finite number in a range, or None where that is ``optional``.

    Args:
        caller: What the user called.
        above: What each value must exceed.
        least: What each value must reach.
        below: What no value may reach.
        optional: Whether None stands for a default.
        **values: The values by the names of their arguments.
    """
    low, high = (-math.inf if above is None else above), (math.inf if below is None else below)

    def fits(value: Any) -> bool:
        number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        return number and low < value < high and (least is None or value >= least)

    _check_each(caller, values, _range(above, least, below), fits, optional=optional)


def check_sizes(caller: str, /, **values: object) -> None:
    """Raise a ValueError unless each value is a sequence of at least one positive integer."""
    must = "be a sequence of at least one integer, each at least 1, such as (64, 64)"
    _check_each(caller, values, must, lambda x: _is_sizes(x) and len(x) > 0)


def check_flags(caller: str, /, *, optional: bool = False, **values: object) -> None:
    """Raise a ValueError unless each value is True or False, or None where that is ``optional``."""
    must = "be None, True or False" if optional else "be True or False"
    _check_each(caller, values, must, lambda x: isinstance(x, bool), optional=optional)


def check_choice(caller: str, choices: tuple[str, ...], /, **values: object) -> None:
    """Raise a ValueError unless each value is one of a few words."""
    must = f"be {' or '.join(map(repr, choices))}"
    _check_each(caller, values, must, lambda x: isinstance(x, str) and x in choices)


def _check_each(
    caller: str, values: dict[str, Any], must: str, fits: Callable[[Any], bool], *, optional: bool = False
) -> None:
    """Raise a ValueError that says what the first value that does not fit must be."""
    for argument, value in values.items():
        if not (fits(value) or (optional and value is None)):
            raise ValueError(f"{caller}: {argument} must {must}, got {quoted(value)}.")


def check_kind(caller: str, kind: type | tuple[type, ...], words: str, /, **values: object) -> None:
    """Raise a TypeError that says ``words`` unless each value is an instance of ``kind``."""
    for argument, value in values.items():
        if not isinstance(value, kind):
            given = f"the class {value.__name__}, uncalled" if isinstance(value, type) else quoted(value)
            raise TypeError(f"{caller}: {argument} must be {words}, got {given}.")


def check_program(**programs: object) -> None:
    """Raise a TypeError unless each argument can be called, as a Pyro model or guide is."""
    for argument, program in programs.items():
        if not callable(program):
            raise TypeError(f"{argument} must be a Pyro program, which can be called, got {quoted(program)}.")


def check_dense(caller: str, argument: str, value: Tensor) -> None:
    """Raise a ValueError that says the way out unless a tensor is dense and holds real numbers as they are."""
    must = "be a dense tensor"
    if value.is_nested:
        got, way = "a nested one", f"give its parts one by one, {argument}.unbind()"
    elif value.is_quantized:
        got, way = f"a quantised one, {value.dtype}", f"use {argument}.dequantize()"
    elif value.layout != torch.strided:
        got, way = f"a sparse one, {value.layout}", f"use {argument}.to_dense()"
    elif value.is_complex():
        must, got, way = "hold real numbers", f"{value.dtype}", f"use torch.view_as_real({argument}).flatten(-2)"
    else:
        return
    raise ValueError(f"{caller}: {argument} must {must}, got {got}; {way}.")


def as_file(caller: str, argument: str, value: Any) -> Path:
    """Return the path of a file.

    Raises:
        TypeError: If a value is none.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise TypeError(f"{caller}: {argument} must be the path of a file, got {quoted(value)}.")
    return Path(value)


def as_path(caller: str, argument: str, value: Any) -> Path | None:
    """Return the path of a file, or None for None; errors as in :func:`as_file`."""
    return None if value is None else as_file(caller, argument, value)


def joined(caller: str, kwargs: dict[str, Any], model_kwargs: Any) -> dict[str, Any]:
    """Return a model's keyword arguments, together with those whose names clash with those of the caller.

    Raises:
        TypeError: If the latter are no dict.
    """
    if model_kwargs is not None:
        check_kind(caller, Mapping, "a dict of the model's keyword arguments", model_kwargs=model_kwargs)
    return {**kwargs, **(model_kwargs or {})}


def as_shape(caller: str, argument: str, value: object, *, length: int | None = None, words: str = "") -> torch.Size:
    """Return a shape: a sequence of positive integers, or one of them where any length will do.

    Raises:
        ValueError: If it is no such thing, or has another ``length``; ``words`` say what is asked for instead.
    """
    found = (value,) if length is None and is_integer(value) else value
    if not _is_sizes(found) or (length is not None and len(found) != length):  # type: ignore[arg-type]
        words = words or "a tuple of positive integers such as (3,)"
        raise ValueError(f"{caller}: {argument} must be {words}, got {quoted(value)}.")
    return torch.Size(found)  # type: ignore[arg-type]


def as_image(caller: str, argument: str, value: object, words: str = "") -> tuple[int, int, int]:
    """Return the shape of an image, (channels, height, width); errors as in :func:`as_shape`."""
    channels, height, width = as_shape(caller, argument, value, length=3, words=words or IMAGE)
    return channels, height, width


def as_flags(caller: str, argument: str, value: Any, length: int | None = None) -> Tensor:
    """Return one bool for each feature, ``(D,)``.

    Raises:
        ValueError: If a value holds anything else, or not as many.
    """
    found = _listed(value)
    if not found or any(flag not in (0, 1) for flag in found) or (length is not None and len(found) != length):
        features = "each feature" if length is None else f"each of {length} features"
        raise ValueError(f"{caller}: {argument} must hold one bool for {features}, got {quoted(value)}.")
    return torch.tensor([bool(flag) for flag in found], device=getattr(value, "device", None))


def as_order(caller: str, argument: str, value: Any, length: int | None = None) -> list[int]:
    """Return the integers from 0 to D - 1 in some order.

    Raises:
        ValueError: If a value holds anything else.
    """
    found = _listed(value)
    if not found or sorted(found) != list(range(len(found) if length is None else length)):
        last = "D - 1" if length is None else length - 1
        raise ValueError(f"{caller}: {argument} must hold each of 0 … {last} once, got {quoted(value)}.")
    return [int(place) for place in found]


def activation_of(caller: str, kind: Any) -> nn.Module:
    """Return a new activation of a class.

    Raises:
        TypeError: If ``kind`` makes no module when it is called, or is a module already.
    """
    try:
        made = None if isinstance(kind, nn.Module) else kind()
    except TypeError:
        made = None
    if not isinstance(made, nn.Module):
        raise TypeError(f"{caller}: activation must be a class such as torch.nn.SiLU, got {quoted(kind)}.")
    return made


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_sizes(value: object) -> bool:
    return _is_sequence(value) and all(is_integer(size) and size > 0 for size in value)


def _listed(value: Any) -> list[Any]:
    """Return what a vector or sequence of numbers holds, or nothing of anything else."""
    found = value.tolist() if hasattr(value, "tolist") else value
    numbers = _is_sequence(found) and all(isinstance(part, int | float | np.number | np.bool_) for part in found)
    return list(found) if numbers else []


def _range(above: float | None, least: float | None, below: float | None) -> str:
    if above == 0 and below is None:
        return "be positive and finite"
    if above is not None and below is not None:
        return f"lie between {above:g} and {below:g}"
    ends = [f"above {above:g}"] if above is not None else []
    ends += [f"at least {least:g}"] if least is not None else []
    return f"be {' and '.join([*ends, 'finite' if below is None else f'below {below:g}'])}"
