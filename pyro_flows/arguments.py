"""Checks of arguments: each raises one error that names the caller, the argument, its requirement and its value.

They cover numbers, sizes, shapes and classes from users.  Every part of the library may use them, and they depend on
no part.
"""

import difflib
import functools
import inspect
import math
import os
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, ParamSpec, TypeGuard, TypeVar

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")
Activation = type[nn.Module]
Widths = Sequence[int]  # of the hidden layers of networks
IMAGE = "(channels, height, width)"  # words for error messages
BIJECTOR = "a bijector such as bijectors.Affine()"
CONDITIONER = "a conditioner such as conditioners.MLP(...)"
TRANSFORM = "a transform such as transforms.LULinear(3)"
MOST = 80  # characters of a value that an error quotes


class _Brief(reprlib.Repr):
    """Representations in which tensors and arrays have a dtype and a shape in place of their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = self.maxstring = self.maxlong = self.maxother = 4 * MOST

    def repr1(self, x: Any, level: int) -> str:
        if not isinstance(x, Tensor | np.ndarray) or (isinstance(x, Tensor) and x.is_nested):
            return super().repr1(x, level)
        shape = tuple(x.shape)
        return f"{type(x).__name__} {str(x.dtype).removeprefix('torch.')} {shape}" if shape else repr(x)


_brief = _Brief()


def quoted(value: object) -> str:
    """Return a value for error messages: on one line, cut off if it is long, and without the numbers of tensors."""
    words = " ".join(_brief.repr(value).split())
    return words if len(words) <= MOST else f"{words[:MOST]}…"


def is_integer(value: object, least: float = -math.inf) -> bool:
    """True if a value is an integer of at least ``least``, of Python or numpy, but not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)


def check_integers(caller: str, least: int = 1, /, *, optional: bool = False, **values: object) -> None:
    """Raise ValueError unless each value is an integer of at least ``least``, or None if that is ``optional``."""
    _check_each(caller, values, f"be an integer of at least {least}", lambda x: is_integer(x, least), optional=optional)


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
    """Raise ValueError unless each value is a finite number in a range, or None if that is ``optional``.

    Args:
        caller: The public name that the user called.
        above: A lower bound, excluded.
        least: A lower bound, included.
        below: An upper bound, excluded.
        optional: True if None stands for a default.
        **values: The values by the names of their arguments.
    """
    low, high = (-math.inf if above is None else above), (math.inf if below is None else below)

    def fits(value: Any) -> bool:
        number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        return number and low < value < high and (least is None or value >= least)

    if above == 0 and below is None:
        must = "be positive and finite"
    elif above is not None and below is not None:
        must = f"lie between {above:g} and {below:g}"
    else:
        ends = [f"{words} {bound:g}" for words, bound in (("above", above), ("at least", least)) if bound is not None]
        must = f"be {' and '.join([*ends, 'finite' if below is None else f'below {below:g}'])}"
    _check_each(caller, values, must, fits, optional=optional)


def check_sizes(caller: str, /, **values: object) -> None:
    """Raise ValueError unless each value is a sequence of at least one positive integer."""
    must = "be a sequence of at least one integer, each at least 1, such as (64, 64)"
    _check_each(caller, values, must, lambda x: _are_sizes(x) and len(x) > 0)


def check_flags(caller: str, /, *, optional: bool = False, **values: object) -> None:
    """Raise ValueError unless each value is True or False, or None if that is ``optional``."""
    must = "be None, True or False" if optional else "be True or False"
    _check_each(caller, values, must, lambda x: isinstance(x, bool), optional=optional)


def check_choice(caller: str, choices: tuple[str, ...], /, **values: object) -> None:
    """Raise ValueError unless each value is one of a few strings."""
    must = f"be {' or '.join(map(repr, choices))}"
    _check_each(caller, values, must, lambda x: isinstance(x, str) and x in choices)


def _check_each(
    caller: str, values: dict[str, Any], must: str, fits: Callable[[Any], bool], *, optional: bool = False
) -> None:
    """Raise ValueError for the first value that does not fit."""
    for argument, value in values.items():
        require(fits(value) or (optional and value is None), caller, argument, must, value)


def require(fits: object, caller: str, argument: str, must: str, value: object) -> None:
    """Raise ValueError unless a value fits; the error says what it must be."""
    if not fits:
        raise ValueError(f"{caller}: {argument} must {must}, got {quoted(value)}.")


def check_kind(caller: str, kind: type | tuple[type, ...], words: str, /, **values: object) -> None:
    """Raise TypeError with ``words`` unless each value is an instance of ``kind``."""
    for argument, value in values.items():
        if not isinstance(value, kind):
            name = getattr(value, "__name__", "") if isinstance(value, type | FunctionType) else ""
            given = f"{'the class ' * isinstance(value, type)}{name}, uncalled" if name else quoted(value)
            raise TypeError(f"{caller}: {argument} must be {words}, got {given}.")


def check_tensors(caller: str, argument: str, values: Any) -> None:
    """Raise TypeError unless a value is a dict of tensors."""
    check_kind(caller, Mapping, "a dict of tensors by name", **{argument: values})
    for name, value in values.items():
        if not isinstance(value, Tensor):
            fault = f"{argument}[{name!r}] must be a tensor, got {type(value).__name__}"
            raise TypeError(f"{caller}: {fault}. Use torch.as_tensor(...).")


def check_program(**programs: object) -> None:
    """Raise TypeError unless each argument is callable, as a Pyro model or guide is, and ``model`` is no guide.

    Classes are refused too, since an instance is meant.
    """
    for argument, program in programs.items():
        if isinstance(program, type):
            call = f"{program.__name__}({'model' if argument == 'guide' else '...'})"
            got = f"the class {program.__name__}, uncalled"
            raise TypeError(f"{argument} must be a Pyro program, got {got}. Give an instance, {call}.")
        if not callable(program):
            raise TypeError(f"{argument} must be a Pyro program, which can be called, got {quoted(program)}.")
        if argument == "model" and isinstance(program, AutoGuide):
            got = f"a guide, {type(program).__name__}"
            raise TypeError(f"model must be a Pyro model, got {got}. Give the model itself, before its guide.")


def check_keywords(caller: str, known: Collection[str], given: Collection[str]) -> None:
    """Raise TypeError for a keyword argument that neither a function nor its model takes; suggest a close name.

    Args:
        caller: The public name that the user called, which passes on unknown keyword arguments to its model.
        known: The names of the parameters of both.
        given: The names of the keyword arguments.
    """
    for name in given:
        if name not in known:
            _check_close(caller, known, name)
            must = f"keyword arguments must name parameters of {caller} or of the model, got {name!r}"
            raise TypeError(f"{caller}: {must}, which would be passed on to the model. Leave it out.")


def _check_close(caller: str, known: Collection[str], name: str) -> None:
    """Raise TypeError with a suggestion if an unknown name is close to a known one."""
    if close := difflib.get_close_matches(name, known, 1):
        raise TypeError(f"{caller}: keyword arguments must name parameters, got {name!r}. Did you mean {close[0]!r}?")


def suggests_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function without ``**kwargs`` suggest the name of a parameter for a mistyped one."""
    return suggests_recipes()(function)


def suggests_recipes(*recipes: Callable[..., Any]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator as :func:`suggests_keywords`, which also knows the parameters of recipes.

    Args:
        *recipes: The recipes of flows to suggest, in this order, for their own parameters.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        known, caller = inspect.signature(function).parameters, function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in [name for name in kwargs if name not in known]:
                for recipe in recipes:
                    if name in inspect.signature(recipe).parameters:
                        way = f"functools.partial(flows.{recipe.__name__}, {name}={quoted(kwargs[name])})"
                        must = f"keyword arguments must name parameters, got {name!r}, which a recipe takes"
                        raise TypeError(f"{caller}: {must}. Give a recipe with it, {way}.")
                _check_close(caller, known, name)
            return function(*args, **kwargs)

        return call

    return decorate


def as_file(caller: str, argument: str, value: Any) -> Path:
    """Return the path of a file.

    Raises:
        TypeError: If a value is not a path.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise TypeError(f"{caller}: {argument} must be the path of a file, got {quoted(value)}.")
    return Path(value)


def as_shape(caller: str, argument: str, value: object, *, length: int | None = None, words: str = "") -> torch.Size:
    """Return a shape: a sequence of positive integers, or a single one if no ``length`` is given.

    Raises:
        ValueError: If it is not a shape, or has another length; ``words`` replace the requirement in the message.
    """
    found = (value,) if length is None and is_integer(value) else value
    must = f"be {words or 'a tuple of positive integers such as (3,)'}"
    require(_are_sizes(found) and length in (None, len(found)), caller, argument, must, value)
    return torch.Size(found)  # type: ignore[arg-type]


def as_image(caller: str, argument: str, value: object, words: str = "") -> tuple[int, int, int]:
    """Return the shape of an image, (channels, height, width); errors as in :func:`as_shape`."""
    channels, height, width = as_shape(caller, argument, value, length=3, words=words or IMAGE)
    return channels, height, width


def as_flags(caller: str, argument: str, value: Any, length: int | None = None) -> Tensor:
    """Return one bool for each feature, ``(D,)``.

    Raises:
        ValueError: If a value holds anything else, or another number of bools.
    """
    found = _listed(value)
    fits = found and all(flag in (0, 1) for flag in found) and length in (None, len(found))
    must = f"hold one bool for {'each feature' if length is None else f'each of {length} features'}"
    require(bool(fits), caller, argument, must, value)
    return torch.tensor([bool(flag) for flag in found], device=getattr(value, "device", None))


def as_order(caller: str, argument: str, value: Any, length: int | None = None) -> list[int]:
    """Return the integers from 0 to D - 1 in the order of a value.

    Raises:
        ValueError: If the value holds anything else.
    """
    found = _listed(value)
    fits = found and sorted(found) == list(range(len(found) if length is None else length))
    require(bool(fits), caller, argument, f"hold each of 0 … {'D - 1' if length is None else length - 1} once", value)
    return [int(place) for place in found]


def activation_of(caller: str, kind: Any) -> nn.Module:
    """Return a new activation of a class.

    Raises:
        TypeError: If calling ``kind`` does not return a module, or it is a module already.
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


def _are_sizes(value: object) -> TypeGuard[Sequence[int]]:
    return _is_sequence(value) and all(is_integer(size, 1) for size in value)


def _listed(value: Any) -> list[Any]:
    """Return the numbers in a vector or sequence, or an empty list for other values."""
    found = value.tolist() if hasattr(value, "tolist") else value
    numbers = _is_sequence(found) and all(isinstance(part, int | float | np.number | np.bool_) for part in found)
    return list(found) if numbers else []
