"""The number of dimensions that the plates of a model and its guide take: found by one run, unless it is given.

Many draws run at once under one more plate, to the left of those dimensions.  One run shows the plates.  It does not
show dimensions that a model makes by hand, for example to sum over components, nor plates that other runs enter.  For
such models the user gives ``Program(model, max_plate_nesting=...)``, or the objective has it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from itertools import zip_longest
from types import FunctionType, MethodType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from pyro.infer import ELBO
from pyro.nn import PyroModule
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ..arguments import check_keywords, quoted
from ..threads import using
from .latents import innermost
from .program import given_nesting, inner_of, outline_of

P = ParamSpec("P")
T = TypeVar("T")


# Arguments of a program by the names that a user may give to a function in its place.
OF_PROGRAM = {"vectorize": "vectorize", "max_plate_nesting": "max_plate_nesting", "model_kwargs": "kwargs"}


class _Given(NamedTuple):
    nesting: int
    words: str  # the argument in an error


_given: ContextVar[_Given | None] = ContextVar("max_plate_nesting", default=None)


def runs_programs(function: Callable[P, T]) -> Callable[P, T]:
    """Apply the ``max_plate_nesting`` of a function's program, or of its objective, to all programs that it runs.

    Programs run with one thread, unless they are large.  Mistyped keyword arguments are refused.
    """
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        model: Any = args[0] if args else kwargs.get("model")
        _check_keywords(function.__name__, known, model, kwargs)
        given = _asked(function.__name__, model, kwargs.get("objective"))
        token = _given.set(given or _given.get())
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


def nesting_of(*traces: Trace) -> int:
    """Return the number of dimensions that plates take: the one given, or the one that traces of single runs show.

    Raises:
        ValueError: If fewer are given than the traces show.
    """
    sites = [site for trace in traces for site in trace.nodes.values() if site["type"] == "sample"]
    leftmost = min((plate for site in sites for plate in plates_of(site)), key=lambda plate: plate.dim, default=None)
    shown, given = -leftmost.dim if leftmost else 0, _given.get()
    if given is None:
        return max([shown, *(len(_rows(site)) for site in sites)])  # rows outside all plates take dimensions too
    if leftmost and given.nesting < shown:
        raise ValueError(
            f"{given.words} must be at least {shown}, got {given.nesting}: plate {leftmost.name!r} lies at "
            f"dim={leftmost.dim}. Give {shown}, or leave it out."
        )
    return given.nesting


def has_bare_dimensions(trace: Trace) -> bool:
    """True if a site of a trace has rows that neither plates nor events declare, which Pyro's checks refuse."""
    for site in trace.nodes.values():
        if site["type"] == "sample":
            dims, shape = {plate.dim for plate in plates_of(site)}, _rows(site)
            if any(size > 1 and place - len(shape) not in dims for place, size in enumerate(shape)):
                return True
    return False


def check_crossed(owner: str, trace: Trace) -> None:
    """Raise an error unless data are tensors that broadcast with their distribution.

    Raises:
        TypeError: If data are not a tensor.
        ValueError: If data and distribution do not broadcast, or to more rows than either of them has.
    """
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"] or site_is_subsample(site):
            continue
        fn, value = site["fn"], site["value"]
        if type(innermost(fn)).__module__.partition(".")[0] not in ("torch", "pyro"):
            continue  # a distribution of the user's own may take data of any kind and shape
        if not isinstance(value, Tensor):
            must = f"{owner}observed site {name!r} must hold a tensor, got {type(value).__name__}"
            raise TypeError(f"{must}. Use torch.as_tensor(value), or torch.as_tensor(frame.to_numpy()).")
        rows = [fn.batch_shape, value.shape[: value.dim() - fn.event_dim]]
        pairs = list(zip_longest(*map(reversed, rows), fillvalue=1))
        shapes = f"data of shape {tuple(value.shape)}, but a distribution of batch shape {tuple(fn.batch_shape)}"
        found = f"{owner}observed site {name!r} has {shapes}"
        if any(one != other and 1 not in (one, other) for one, other in pairs):
            raise ValueError(f"{found}. Give the model arguments with the same number of rows.")
        if math.prod(map(max, pairs)) > max(map(math.prod, rows)):
            raise ValueError(
                f"{found}: each row would meet every other. Give both one shape, as by y[:, 0] "
                "or y[:, None], or declare the dimensions of both by plates."
            )


def plates_of(site: dict[str, Any]) -> list[Any]:
    """Return the frames of the plates whose rows are dimensions of a site."""
    return [frame for frame in site.get("cond_indep_stack", ()) if frame.vectorized]


def is_subsampled(frame: Any) -> bool:
    """True if a plate runs over a part of its rows."""
    return frame.full_size is not None and frame.size < frame.full_size


def _rows(site: dict[str, Any]) -> torch.Size:
    """Return the shape of a site's rows, or that of its data's rows if it has more dimensions."""
    fn, value = site["fn"], site["value"]
    if not isinstance(value, Tensor) or site_is_subsample(site):
        return torch.Size()
    of_value = value.shape[: value.dim() - getattr(fn, "event_dim", 0)]
    return max(getattr(fn, "batch_shape", torch.Size()), of_value, key=len)


def settle(objective: Any) -> None:
    """Set the number of dimensions of an objective that would guess it to the one that is given, if any."""
    given = _given.get()
    if given is not None and isinstance(objective, ELBO) and math.isinf(objective.max_plate_nesting):
        objective.max_plate_nesting = given.nesting + _draws_dim(objective)


def _asked(caller: str, model: Any, objective: Any) -> _Given | None:
    """Return the number of dimensions that a call asks for, or None."""
    own, argument = None, given_nesting(model)
    if isinstance(objective, ELBO) and not math.isinf(objective.max_plate_nesting):
        own = int(objective.max_plate_nesting) - _draws_dim(objective)
    if argument is None:
        return None if own is None else _Given(own, f"{caller}: the objective's max_plate_nesting")
    if own is not None and own != argument:
        raise ValueError(
            f"{caller}: max_plate_nesting must be that of the objective, {own}, got {argument}. Leave one of the two "
            "out."
        )
    return _Given(argument, f"{caller}: max_plate_nesting")


def _draws_dim(objective: ELBO) -> int:
    """Return the number of dimensions, 0 or 1, that an objective's ``max_plate_nesting`` counts for its draws."""
    return int(objective.vectorize_particles and objective.num_particles > 1)
