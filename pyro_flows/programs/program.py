"""A Pyro program with the way to run it: its arguments, its engine and its plates in one value.

Many draws run at once under one more plate, to the left of the program's other plates.  One run shows how many
dimensions they take.  It does not show dimensions that a model makes by hand, for example to sum over components, nor
plates that other runs enter.  For such models the user gives ``Program(model, max_plate_nesting=...)``, or the
objective has it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass
from types import FunctionType, MethodType
from typing import Any, ParamSpec, TypeVar

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger, _bound_partial
from pyro.poutine.runtime import _DIM_ALLOCATOR
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..arguments import check_choice, check_integers, check_keywords, check_kind, check_program, quoted
from ..threads import using
from .sites import plates_of, rows_of

P = ParamSpec("P")
T = TypeVar("T")
Function = Callable[..., Any]  # a Pyro program
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
ENGINES = "plate", "vmap", "loop"
# Arguments of a program by the names that a user may give to a function in its place.
OF_PROGRAM = {"vectorize": "vectorize", "max_plate_nesting": "max_plate_nesting", "model_kwargs": "kwargs"}

_given: ContextVar[tuple[int, str] | None] = ContextVar("max_plate_nesting", default=None)  # with words for errors


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
        if signature := outline_of(self.model):
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
    asked = (layer.vectorize for layer in _layers_of(program) if isinstance(layer, Program))
    return next((engine for engine in asked if engine != "auto"), "auto")


def given_nesting(program: Function) -> int | None:
    """Return the number of dimensions of plates that a program is given, or None."""
    asked = (layer.max_plate_nesting for layer in _layers_of(program) if isinstance(layer, Program))
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
    parameter, empty = inspect.Parameter, inspect.Parameter.empty
    kinds = [(name, getattr(parameter, kind), empty if kind.startswith("VAR_") else None) for name, kind in arguments]
    return inspect.Signature([parameter(name, kind, default=default) for name, kind, default in kinds])


def arguments_of(program: Function, args: Args, kwargs: Kwargs) -> Kwargs:
    """Return the arguments of a call by their names, defaults included; by their places if the names are unknown."""
    args, kwargs = _bound(program, args, kwargs)
    try:
        bound = signature_of(inner_of(program)).bind(*args, **kwargs)
    except (TypeError, ValueError):  # Python does not know the signature, or the arguments do not fit it
        return {**{f"argument {place}": value for place, value in enumerate(args)}, **kwargs}
    bound.apply_defaults()
    return dict(bound.arguments)


def runs_programs(function: Callable[P, T]) -> Callable[P, T]:
    """Apply the ``max_plate_nesting`` of a function's program, or of its objective, to all programs that it runs.

    Programs run with one thread, unless they are large.  Mistyped keyword arguments are refused.
    """
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        model: Any = args[0] if args else kwargs.get("model")
        _check_keywords(function.__name__, known, model, kwargs)
        token = _given.set(_asked(function.__name__, model, kwargs.get("objective")) or _given.get())
        try:
            with using(1):
                return function(*args, **kwargs)
        finally:
            _given.reset(token)

    return call


def _check_keywords(caller: str, known: Mapping[str, Any], model: Any, given: Mapping[str, Any]) -> None:
    """Raise TypeError for a mistyped keyword argument, if the model is a function or module that does not take it.

    Other objects, such as those of ``functools.partial``, may take more than their signature shows.
    """
    inner: Any = inner_of(model)
    is_plain = isinstance(inner, nn.Module) and type(inner).__call__ in (nn.Module.__call__, PyroModule.__call__)
    program = inner.forward if is_plain else inner
    is_known = isinstance(program, FunctionType | MethodType) and not hasattr(program, "__wrapped__")
    shown = outline_of(model)
    taken = shown.parameters if shown else {}
    for name in [name for name in OF_PROGRAM if name in given and name not in {*taken, *known}]:
        must = f"{name} must be given with the model, got {quoted(given[name])} as an argument of {caller}"
        raise TypeError(f"{caller}: {must}. Give pf.Program(model, {OF_PROGRAM[name]}=...) in place of the model.")
    if is_known and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        check_keywords(caller, {**known, **taken}, given)


def _asked(caller: str, model: Any, objective: Any) -> tuple[int, str] | None:
    """Return the number of dimensions that a call asks for, with words for errors, or None."""
    own, argument = None, given_nesting(model)
    if isinstance(objective, ELBO) and not math.isinf(objective.max_plate_nesting):
        own = int(objective.max_plate_nesting) - _draws_dim(objective)
    if argument is None:
        return None if own is None else (own, f"{caller}: the objective's max_plate_nesting")
    if own not in (None, argument):
        must = f"max_plate_nesting must be that of the objective, {own}, got {argument}"
        raise ValueError(f"{caller}: {must}. Leave one of the two out.")
    return argument, f"{caller}: max_plate_nesting"


def settle(objective: Any) -> None:
    """Set the number of dimensions of an objective that would guess it to the one that is given, if any."""
    given = _given.get()
    if given is not None and isinstance(objective, ELBO) and math.isinf(objective.max_plate_nesting):
        objective.max_plate_nesting = given[0] + _draws_dim(objective)


def _draws_dim(objective: ELBO) -> int:
    """Return the number of dimensions, 0 or 1, that an objective's ``max_plate_nesting`` counts for its draws."""
    return int(objective.vectorize_particles and objective.num_particles > 1)


def nesting_of(*traces: Trace) -> int:
    """Return the number of dimensions that plates take: the one given, or the one that traces of single runs show.

    Raises:
        ValueError: If fewer are given than the traces show.
    """
    sites = [site for trace in traces for site in trace.nodes.values() if site["type"] == "sample"]
    leftmost = min((plate for site in sites for plate in plates_of(site)), key=lambda plate: plate.dim, default=None)
    shown, given = -leftmost.dim if leftmost else 0, _given.get()
    if given is None:
        return max([shown, *(len(rows_of(site)) for site in sites)])  # rows outside all plates take dimensions too
    nesting, words = given
    if leftmost and nesting < shown:
        fault = f"got {nesting}: plate {leftmost.name!r} lies at dim={leftmost.dim}"
        raise ValueError(f"{words} must be at least {shown}, {fault}. Give {shown}, or leave it out.")
    return nesting


@contextmanager
def outside_plates() -> Iterator[None]:
    """Let a program enter plates as if its caller were in none."""
    entered, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        yield
    finally:
        _DIM_ALLOCATOR._stack = entered


def trace_of(program: Function, args: Args, kwargs: Kwargs) -> Trace:
    """Return the trace of a run."""
    return poutine.trace(program).get_trace(*args, **kwargs)


def trace_at(program: Function, values: dict[str, Tensor], args: Args, kwargs: Kwargs) -> Trace:
    """Return the trace of a run at some values, without gradients and hidden from the handlers outside."""
    with poutine.block(), torch.no_grad(), outside_plates():
        return trace_of(poutine.condition(program, data=values), args, kwargs)


def leaves_of(trace: Trace, *programs: Function) -> list[Tensor]:
    """Return the tensors of a trace's param statements, unconstrained, and the parameters of modules among programs."""
    values = [site["value"] for site in trace.nodes.values() if site["type"] == "param"]
    found = [value.unconstrained() if hasattr(value, "unconstrained") else value for value in values]
    modules = [part for part in map(inner_of, programs) if isinstance(part, nn.Module)]
    return found + [parameter for module in modules for parameter in module.parameters()]


def writable(program: Function, run: Callable[[Function], T]) -> tuple[Function, T]:
    """Return a program that may write into the values of its latents, with the result of a function that runs it once.

    A program that does, such as ``epsilon[..., 0] = 0`` under ``torch.no_grad``, gets copies to write into.  The
    density counts the values that were drawn, and draws stay as they are.  Gradients do not pass what was overwritten,
    also if ``torch.no_grad`` is to hide the write from them.
    """
    copies = _Copies()
    found = run(copies(program))
    copies.names = [name for name, (now, before) in copies.drawn.items() if not torch.equal(now, before)]
    return (copies(program), run(copies(program))) if copies.names else (program, found)


class _Copies(Messenger):
    """Gives a program copies of the values of some sites, while handlers outside of it keep the values.

    Without any names, it records the values of a run, and copies of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names, self._seen = list[str](), _SeenByGradients()
        self.drawn: dict[str, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> _Copies:
        if self.names:
            self._seen.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.names:
            self._seen.__exit__(*error)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.names:
            msg["value"] = msg["value"].clone()
        elif not (self.names or msg["is_observed"] or site_is_subsample(msg)) and isinstance(msg["value"], Tensor):
            self.drawn[msg["name"]] = msg["value"], msg["value"].clone()


class _SeenByGradients(TorchFunctionMode):
    """Lets the gradients of a run, if it has any, see writes into tensors, as it would without ``torch.no_grad``."""

    def __enter__(self) -> _SeenByGradients:
        self._keeps = torch.is_grad_enabled()
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        writes = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        with torch.enable_grad() if writes and self._keeps else nullcontext():
            return func(*args, **(kwargs or {}))
