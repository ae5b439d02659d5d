"""The latents of a model and of its guide: both must have the same, or nothing can be weighed, started or searched."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites

from .matching import check_drawn


def lacking(model: Trace, guide: Trace, *, enumerated: bool = False) -> dict[str, Any]:
    """Return the latent sites of a model's trace that its guide's trace lacks.

    Args:
        model: The model's trace.
        guide: The guide's.
        enumerated: True to leave out sites that are marked for enumeration in the model.
    """
    latents = prune_subsample_sites(model).iter_stochastic_nodes()
    found = {name: site for name, site in latents if name not in guide.nodes}
    marked = [name for name, site in found.items() if site["infer"].get("enumerate") == "parallel"]
    return {name: site for name, site in found.items() if not (enumerated and name in marked)}


def ways_out(sites: dict[str, Any], enumerate_by: str) -> str:
    """Say what to do about latents that a guide lacks.

    Args:
        sites: The latents.
        enumerate_by: What to do about discrete ones that can be enumerated.
    """
    finite: list[str] = []
    infinite: list[str] = []
    continuous: list[str] = []
    for name, site in sites.items():
        fn = site["fn"]
        (finite if fn.has_enumerate_support else infinite if fn.support.is_discrete else continuous).append(name)
    ways = []
    if finite:
        ways.append(f"{named(finite)} {_are(finite)} discrete: {enumerate_by}.")
    if infinite:
        ways.append(
            f"{named(infinite)} {_are(infinite)} discrete with infinite support: sum the site out by hand (a "
            "GammaPoisson for a Poisson whose rate is Gamma), or condition on it."
        )
    if continuous:
        data = ", ".join(f"{name!r}: ..." for name in continuous)
        ways.append(
            f"{named(continuous)} {_are(continuous)} continuous: give the guide the whole model, or hold the site at a "
            f"value by poutine.condition(model, data={{{data}}})."
        )
    return " ".join(ways)


def named(names: list[str]) -> str:
    """Return names as a list in words: ``'a', 'b'``."""
    return ", ".join(map(repr, names))


def check_match(model: Trace, guide: Trace) -> None:
    """Refuse a guide that is a point, latents of only one of the two, and other masks: their weights mean nothing."""
    drawn = dict(prune_subsample_sites(guide).iter_stochastic_nodes())
    if drawn and all(isinstance(site["fn"], dist.Delta) for site in drawn.values()):
        raise ValueError("the guide is a point (every site is a Delta) and not a distribution; it cannot be weighed.")
    if missing := lacking(model, guide):
        out = ways_out(missing, "sum the site out of the model by hand, as a mixture's log_prob does")
        raise ValueError(f"{_latent_sites(list(missing))} of the model {_are(missing)} not in the guide. {out}")
    check_drawn("", model, guide)


def check_guided(caller: str, missing: dict[str, Any], nesting: int, search: str) -> None:
    """Refuse to train a guide that lacks latents of the model.

    Args:
        caller: The public function that trains.
        missing: The latents that the guide lacks.
        nesting: The number of dimensions that the plates take.
        search: The argument by which a place to start from is searched for among all latents, if any.
    """
    if missing:
        by_objective = f"objective=objectives.PathEnumELBO(max_plate_nesting={nesting})"
        way = f"sum the site out, with {by_objective} and the model marked by config_enumerate"
        raise ValueError(
            f"{caller}: {_latent_sites(list(missing))} of the model {_are(missing)} not in the guide. "
            f"{ways_out(missing, way)}{f' Leave {search} out, which needs all latents.' if search else ''}"
        )


def _latent_sites(names: list[str]) -> str:
    return f"latent site{'s' * (len(names) > 1)} {named(names)}"


def _are(names: Any) -> str:
    return "are" if len(names) > 1 else "is"
