"""A Pyro program with the way to run it: its arguments, its engine and its plates in one value."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from pyro.poutine.messenger import _bound_partial
from torch import nn

from ..arguments import check_choice, check_integers, check_kind, check_program

Function = Callable[..., Any]  # a Pyro program
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
ENGINES = "plate", "vmap", "loop"


@dataclass(frozen=True, eq=False)
class Program:
    """A Pyro model with some of its arguments, and the way to run it.

    Every function of this package takes it in place of the model, and so do Pyro's own.  It is called as the model is,
    without the arguments that it holds, as with ``functools.partial``.  A guide is called with the same arguments as
    the program.  So build it from the program, ``AutoFlow(program)``, or give another program of a guide written by
    hand.

    Attributes:
        model: A Pyro model.
        args: Its first arguments.
        kwargs: Some of its keyword arguments, for example those whose names clash with the arguments of a function.
        vectorize: The way to run many draws: ``"plate"``, ``"vmap"`` or ``"loop"``; by default the first of these whose
            results agree with single runs (*Any Pyro program* in the docs).
        max_plate_nesting: The number of dimensions that the plates of the model and of its guide take; by default one
            run shows it.  That is too few if a model has undeclared dimensions to the left of its plates.

    Raises:
        TypeError: If the model is no program, ``args`` is no tuple, ``kwargs`` no dictionary, or the model does not
            take them.
        ValueError: If ``vectorize`` or ``max_plate_nesting`` is out of its range.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import psis
        >>> def model(y, num_samples):
        ...     x = pyro.sample("x", dist.Normal(0.0, num_samples**-0.5))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("x", dist.Normal(0.4, 0.5))
        >>> program = Program(model, kwargs={"num_samples": 4.0}, vectorize="vmap")
        >>> psis(program, guide, torch.tensor(2.0), num_samples=100).reliable
        True
    """

    model: Function
    args: Args = ()
    kwargs: Kwargs | None = None
    _: KW_ONLY
    vectorize: str = "auto"
    max_plate_nesting: int | None = None

    def __post_init__(self) -> None:
        check_program(model=self.model)
        check_kind("Program", (tuple, list), "a tuple of arguments", args=self.args)
        check_kind("Program", (Mapping, type(None)), "a dict of keyword arguments", kwargs=self.kwargs)
        check_choice("Program", ("auto", *ENGINES), vectorize=self.vectorize)
        check_integers("Program", 0, optional=True, max_plate_nesting=self.max_plate_nesting)
        object.__setattr__(self, "args", tuple(self.args))
        object.__setattr__(self, "kwargs", dict(self.kwargs or {}))
        self._check_fit()

    def _check_fit(self) -> None:
        """Raise TypeError if the model does not take the arguments that are held; unknown signatures take all."""
        try:
            signature = signature_of(self.model)
        except (TypeError, ValueError):
            return
        try:
            signature.bind_partial(*self.args, **(self.kwargs or {}))
        except TypeError as error:
            must = f"args and kwargs must fit the model, which takes ({', '.join(signature.parameters)})"
            held = ", ".join([f"{len(self.args)} in args", *(self.kwargs or {})])
            raise TypeError(f"Program: {must}, got {held}: {error}.") from None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the arguments that are held, followed by others."""
        return self.model(*self.args, *args, **{**(self.kwargs or {}), **kwargs})


def _layers_of(program: Function) -> Iterator[Function]:
    """Iterate over a program, and over the programs inside of its handlers and of :class:`Program`."""
    yield program
    if isinstance(program, _bound_partial):  # a handler around a program
        yield from _layers_of(program.func.args[1])
    elif isinstance(program, Program):
        yield from _layers_of(program.model)


def inner_of(program: Function) -> Function:
    """Return the function or module inside of handlers and of :class:`Program`."""
    return list(_layers_of(program))[-1]


def vectorize_of(program: Function) -> str:
    """Return the engine that a program asks for, or ``"auto"``."""
    asked = [layer.vectorize for layer in _layers_of(program) if isinstance(layer, Program)]
    return next((engine for engine in asked if engine != "auto"), "auto")


def given_nesting(program: Function) -> int | None:
    """Return the number of dimensions of plates that a program is given, or None."""
    asked = [layer.max_plate_nesting for layer in _layers_of(program) if isinstance(layer, Program)]
    return next((nesting for nesting in asked if nesting is not None), None)


def _bound(program: Function, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Return all arguments of a call, those that a :class:`Program` holds included."""
    for layer in _layers_of(program):
        if isinstance(layer, Program):
            args, kwargs = (*layer.args, *args), {**(layer.kwargs or {}), **kwargs}
    return args, kwargs


def bound_values(program: Function, args: Args, kwargs: Kwargs) -> Args:
    """Return the values of all arguments of a call, those that a :class:`Program` holds included."""
    args, kwargs = _bound(program, args, kwargs)
    return *args, *kwargs.values()


def signature_of(program: Function) -> inspect.Signature:
    """Return the signature of a program without the handlers around it; errors as for ``inspect.signature``."""
    if isinstance(program, _bound_partial):
        return signature_of(program.func.args[1])
    if not isinstance(program, Program):
        return inspect.signature(program.forward if isinstance(program, nn.Module) else program)

    def model() -> None:
        """Stand in for the program's model."""

    model.__signature__ = signature_of(program.model)  # type: ignore[attr-defined]
    return inspect.signature(functools.partial(model, *program.args, **(program.kwargs or {})))


def outline_of(program: Function) -> inspect.Signature | None:
    """Return the names and kinds of a program's arguments, all of them optional; None if Python does not know them."""
    try:
        return outline((p.name, p.kind.name) for p in signature_of(program).parameters.values())
    except (TypeError, ValueError):
        return None


def outline(arguments: Iterable[tuple[str, str]]) -> inspect.Signature:
    """Return a signature of optional arguments from their names and kinds, such as ``"KEYWORD_ONLY"``."""
    found = []
    for name, kind in arguments:
        default = inspect.Parameter.empty if kind.startswith("VAR_") else None
        found.append(inspect.Parameter(name, getattr(inspect.Parameter, kind), default=default))
    return inspect.Signature(found)


def arguments_of(program: Function, args: Args, kwargs: Kwargs) -> Kwargs:
    """Return the arguments of a call by their names, defaults included; by their places if the names are unknown."""
    args, kwargs = _bound(program, args, kwargs)
    try:
        bound = signature_of(inner_of(program)).bind(*args, **kwargs)
    except (TypeError, ValueError):  # Python does not know the signature, or the arguments do not fit it
        return {**{f"argument {place}": value for place, value in enumerate(args)}, **kwargs}
    bound.apply_defaults()
    return dict(bound.arguments)
