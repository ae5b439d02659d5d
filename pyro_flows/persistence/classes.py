"""Classes that a file may name: those of pyro_flows, and a few of torch and Pyro.

A class is found in this table or not at all; a name that was read is never imported.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import nn

from .. import bijectors, conditioners, distributions, encoders, flows, guides, transforms
from ..bijectors import Bijector
from ..flows.distribution import Columns
from ..flows.mixture import FlowMixture
from ..guides.base import SavedSite
from ..guides.guide_flow import GuideFlow
from ..guides.packing import Circle
from ..transforms import Solver

DISTRIBUTIONS = {  # those that ``FixedBase`` may hold, with their arguments
    "Cauchy": ("loc", "scale"),
    "Gumbel": ("loc", "scale"),
    "Independent": ("base_distribution", "reinterpreted_batch_ndims"),
    "Laplace": ("loc", "scale"),
    "MultivariateNormal": ("loc", "scale_tril"),
    "Normal": ("loc", "scale"),
    "StudentT": ("df", "loc", "scale"),
    "Uniform": ("low", "high"),
}


def has_parts(kind: Any) -> bool:
    """True if a class takes its objects apart itself, as guides do."""
    return hasattr(kind, "from_parts")


def arguments_of(value: Any) -> dict[str, Any]:
    """Return the arguments that :func:`construct` builds an object from.

    Classes keep them as attributes of the same names, or have a method ``parts`` and a class method ``from_parts``.
    """
    kind = type(value)
    if has_parts(kind):
        return value.parts()
    if isinstance(value, torch.distributions.Distribution):
        # The attribute of Independent has another name.
        found = {name: getattr(value, name.replace("distribution", "dist")) for name in DISTRIBUTIONS[kind.__name__]}
        return {**found, "validate_args": vars(value).get("_validate_args")}
    return {name: getattr(value, name) for name in inspect.signature(kind).parameters}


def construct(name: str, arguments: dict[str, Any]) -> Any:
    """Build an object of the class of that name.

    Raises:
        Exception: Any, if the arguments do not suit the class.
    """
    kind: Any = BY_NAME[name]
    if has_parts(kind):
        return kind.from_parts(**arguments)
    signature = inspect.signature(kind)
    if unknown := arguments.keys() - signature.parameters.keys():
        raise TypeError(f"it has no argument {min(unknown)!r:.60}")
    bound = inspect.BoundArguments(signature, arguments)
    return kind(*bound.args, **bound.kwargs)


def register(name: str, kind: type) -> None:
    """Let files hold objects of a class, under a name."""
    BY_NAME.setdefault(name, kind)
    BY_TYPE.setdefault(kind, name)


def _is_abstract(found: type) -> bool:
    return any(getattr(getattr(found, name, None), "__isabstractmethod__", False) for name in dir(found))


def _classes() -> Iterator[tuple[str, type]]:
    """Yield names and classes: of several names of a class the first counts, and of several classes of a name too."""
    for package in (bijectors, conditioners, encoders, transforms, distributions, flows, guides):
        for name, found in vars(package).items():
            if isinstance(found, type) and issubclass(found, nn.Module | Bijector) and not _is_abstract(found):
                yield f"{package.__name__.rpartition('.')[2]}.{name}", found
    for inner in (FlowMixture, Columns, GuideFlow, SavedSite, Circle, Solver):
        yield f"{inner.__module__.split('.')[1]}.{inner.__name__}", inner
    for name in constraints.__all__:
        found = getattr(constraints, name)
        kind = found if isinstance(found, type) else type(found)
        known = issubclass(kind, constraints.Constraint) and kind is not constraints.Constraint
        if known and not issubclass(kind, type(constraints.dependent)):
            yield f"constraints.{name}", kind
    for library in (dist, torch.distributions):  # all come back as Pyro's
        for name in DISTRIBUTIONS:
            yield f"pyro.distributions.{name}", getattr(library, name)


BY_NAME: dict[str, type] = {}
BY_TYPE: dict[type, str] = {}
for _name, _kind in _classes():
    register(_name, _kind)
