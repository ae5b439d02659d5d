"""Classes that a file may name: those of pyro_flows, and a few of torch and Pyro.

A class is found in this table or not at all; a name that was read is never imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import nn

from .. import bijectors, conditioners, distributions, encoders, transforms
from ..bijectors import Bijector
from ..flows import Dequantized, Flow, Mixed
from ..flows.columns import Columns
from ..flows.mixture import FlowMixture
from ..guides import AutoFlow, AutoPlateFlow, AutoStructuredFlow
from ..guides.circles import Circle
from ..guides.guide_flow import GuideFlow
from ..guides.loaded import Site


class Kind(NamedTuple):
    """Class of objects, with functions that take an object apart and build it again."""

    type: type
    name: str
    arguments: Callable[[Any], dict[str, Any]]
    build: Callable[..., Any]


ROOTS = (
    "flows.Flow",
    "guides.GuideFlow",
    "flows.Dequantized",
    "flows.Mixed",
    "guides.AutoFlow",
    "guides.AutoPlateFlow",
    "guides.AutoStructuredFlow",
)
BASES = {  # distributions that ``FixedBase`` may hold, with the attributes that define them
    "Cauchy": ("loc", "scale"),
    "Gumbel": ("loc", "scale"),
    "Laplace": ("loc", "scale"),
    "MultivariateNormal": ("loc", "scale_tril"),
    "Normal": ("loc", "scale"),
    "StudentT": ("df", "loc", "scale"),
    "Uniform": ("low", "high"),
}


def arguments_of(value: Any) -> dict[str, Any]:
    """Return the arguments that an object was built from; our classes keep them as attributes of the same names."""
    return {name: getattr(value, name) for name in inspect.signature(type(value)).parameters}


def _own() -> Iterator[Kind]:
    """Yield the public classes of pyro_flows, also those that are added later."""
    for package in (bijectors, conditioners, encoders, transforms, distributions):
        part = package.__name__.rpartition(".")[2]
        for name, found in vars(package).items():
            if found is encoders.Arguments:
                yield Kind(found, f"{part}.{name}", _parts_of_choice, _choice)
            elif isinstance(found, type) and issubclass(found, nn.Module | Bijector) and not _is_abstract(found):
                yield Kind(found, f"{part}.{name}", arguments_of, found)
    for part, found in (
        ("flows", Flow),
        ("flows", Dequantized),
        ("flows", Mixed),
        ("flows", FlowMixture),
        ("flows", Columns),
        ("guides", GuideFlow),
        ("guides", Site),
        ("guides", Circle),
    ):
        yield Kind(found, f"{part}.{found.__name__}", arguments_of, found)
    for guide in (AutoFlow, AutoPlateFlow, AutoStructuredFlow):
        yield Kind(guide, f"guides.{guide.__name__}", guide.parts, guide.from_parts)


def _parts_of_choice(value: encoders.Arguments) -> dict[str, Any]:
    return {"network": value.network, "positions": value.positions, "named": tuple(value.named.items())}


def _choice(network: Any, positions: Any, named: Any) -> encoders.Arguments:
    return encoders.Arguments(network, *positions, **dict(named))


def _is_abstract(found: type) -> bool:
    return any(getattr(getattr(found, name, None), "__isabstractmethod__", False) for name in dir(found))


def _constraints() -> Iterator[Kind]:
    """Yield the supports of torch and Pyro, under their public names."""
    for name in constraints.__all__:
        found = getattr(constraints, name)
        kind = found if isinstance(found, type) else type(found)
        known = issubclass(kind, constraints.Constraint) and kind is not constraints.Constraint
        if known and not issubclass(kind, type(constraints.dependent)):
            yield Kind(kind, f"constraints.{name}", arguments_of, kind)


def _bases() -> Iterator[Kind]:
    """Yield a few distributions of Pyro and of torch; all come back as Pyro's."""
    for name, attributes in {**BASES, "Independent": ("base_dist", "reinterpreted_batch_ndims")}.items():
        build = _independent if name == "Independent" else getattr(dist, name)
        for library in (dist, torch.distributions):
            arguments = partial(_parts_of_base, attributes)
            yield Kind(getattr(library, name), f"pyro.distributions.{name}", arguments, build)


def _independent(base_dist: Any, **settings: Any) -> dist.Independent:
    return dist.Independent(base_dist, **settings)


def _parts_of_base(attributes: tuple[str, ...], value: Any) -> dict[str, Any]:
    parts = {attribute: getattr(value, attribute) for attribute in attributes}
    return {**parts, "validate_args": vars(value).get("_validate_args")}


_ALL = [*_own(), *_constraints(), *_bases()]
BY_TYPE = {kind.type: kind for kind in reversed(_ALL)}  # of several names the first
BY_NAME = {kind.name: kind for kind in _ALL}
