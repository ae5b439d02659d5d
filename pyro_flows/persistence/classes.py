"""The classes that a file may name: those of pyro_flows, and a few values of torch and Pyro.  There are no others.

A class is found in this table or not at all; nothing is ever imported by a name that was read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import nn

from .. import bijectors, conditioners, distributions, encoders, transforms
from ..bijectors import Bijector
from ..flows import Dequantized, Flow
from ..guides import AutoFlow, AutoPlateFlow
from ..guides.stored import Site
from ..guides.supports import Circle


class Kind(NamedTuple):
    """How objects of a class are taken apart and put together."""

    type: type
    name: str
    arguments: Callable[[Any], dict[str, Any]]
    build: Callable[..., Any]


ROOTS = "flows.Flow", "flows.Dequantized", "guides.AutoFlow", "guides.AutoPlateFlow"
BASES = {  # distributions that ``FixedBase`` may hold, and which of their attributes tell all about them
    "Cauchy": ("loc", "scale"),
    "Gumbel": ("loc", "scale"),
    "Laplace": ("loc", "scale"),
    "MultivariateNormal": ("loc", "scale_tril"),
    "Normal": ("loc", "scale"),
    "StudentT": ("df", "loc", "scale"),
    "Uniform": ("low", "high"),
}


def arguments_of(value: Any) -> dict[str, Any]:
    """The arguments that an object was built from, which our classes keep as attributes of the same names."""
    return {name: getattr(value, name) for name in inspect.signature(type(value)).parameters}


def _own() -> Iterator[Kind]:
    """The public classes of pyro_flows; one that is added to a package is among them."""
    for package in (bijectors, conditioners, encoders, transforms, distributions):
        part = package.__name__.rpartition(".")[2]
        for name, found in vars(package).items():
            if isinstance(found, type) and issubclass(found, nn.Module | Bijector) and not _is_abstract(found):
                yield Kind(found, f"{part}.{name}", arguments_of, found)
    yield Kind(Flow, "flows.Flow", arguments_of, Flow)
    yield Kind(Dequantized, "flows.Dequantized", arguments_of, Dequantized)
    yield Kind(AutoFlow, "guides.AutoFlow", AutoFlow.parts, AutoFlow.from_parts)
    yield Kind(AutoPlateFlow, "guides.AutoPlateFlow", AutoPlateFlow.parts, AutoPlateFlow.from_parts)
    yield Kind(Site, "guides.Site", arguments_of, Site)
    yield Kind(Circle, "guides.Circle", arguments_of, Circle)


def _is_abstract(found: type) -> bool:
    return any(getattr(getattr(found, name, None), "__isabstractmethod__", False) for name in dir(found))


def _constraints() -> Iterator[Kind]:
    """The supports of torch and Pyro, under their public names."""
    for name in constraints.__all__:
        found = getattr(constraints, name)
        kind = found if isinstance(found, type) else type(found)
        known = issubclass(kind, constraints.Constraint) and kind is not constraints.Constraint
        if known and not issubclass(kind, type(constraints.dependent)):
            yield Kind(kind, f"constraints.{name}", arguments_of, kind)


def _bases() -> Iterator[Kind]:
    """A few distributions, Pyro's and torch's alike; they come back as Pyro's."""
    for name, attributes in {**BASES, "Independent": ("base_dist", "reinterpreted_batch_ndims")}.items():

        def arguments(value: Any, attributes: tuple[str, ...] = attributes) -> dict[str, Any]:
            found = {attribute: getattr(value, attribute) for attribute in attributes}
            return {**found, "validate_args": vars(value).get("_validate_args")}

        build = _independent if name == "Independent" else getattr(dist, name)
        for library in (dist, torch.distributions):
            yield Kind(getattr(library, name), f"pyro.distributions.{name}", arguments, build)


def _independent(base_dist: Any, reinterpreted_batch_ndims: int, validate_args: bool | None) -> dist.Independent:
    return dist.Independent(base_dist, reinterpreted_batch_ndims, validate_args=validate_args)


_ALL = [*_own(), *_constraints(), *_bases()]
BY_TYPE = {kind.type: kind for kind in reversed(_ALL)}  # of several names the first
BY_NAME = {kind.name: kind for kind in _ALL}
