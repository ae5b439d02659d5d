"""The latents of a model and of its guide: both must have the same, or nothing can be weighed, started or searched."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch.distributions import constraints

from .events import with_values
from .matching import check_drawn


def summable(model: Trace, guide: Trace) -> list[str]:
    """Return the discrete latents of a model's trace that its guide lacks and whose support is finite."""
    return [name for name, site in _lacking(model, guide).items() if is_summable(site["fn"])]


def lacking(model: Trace, guide: Trace) -> dict[str, Any]:
    """Return the latent sites of a model's trace that its guide lacks and that cannot be summed out."""
    return {name: site for name, site in _lacking(model, guide).items() if not is_summable(site["fn"])}


def is_point(fn: Any) -> bool:
    """True if a distribution is a point mass, whose site has a value that follows from the others."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def states_support(fn: Any) -> bool:
    """True if a distribution says what its support is; the flows of other libraries do not."""
    try:
        return fn.support is not None
    except NotImplementedError:
        return False


def support_of(fn: Any) -> Any:
    """Return the support of a distribution: all real numbers where it states none."""
    return fn.support if states_support(fn) else constraints.independent(constraints.real, len(fn.event_shape))


def is_discrete(fn: Any) -> bool:
    """True if a distribution is one over integers; a point mass is not."""
    try:
        return not is_point(fn) and bool(support_of(fn).is_discrete)
    except AttributeError:  # rows of a plate have no support, say
        return False


def is_summable(fn: Any) -> bool:
    """True if a distribution is discrete and its support finite, so that its site can be summed out."""
    return is_discrete(fn) and bool(with_values(fn).has_enumerate_support)


def _lacking(model: Trace, guide: Trace) -> dict[str, Any]:
    latents = prune_subsample_sites(model).iter_stochastic_nodes()
    return {name: site for name, site in latents if name not in guide.nodes and not is_point(site["fn"])}


def ways_out(sites: dict[str, Any]) -> str:
    """Say what to do about latents that a guide lacks."""
    infinite = [name for name, site in sites.items() if is_discrete(site["fn"])]
    continuous = [name for name in sites if name not in infinite]
    ways = []
    if infinite:
        ways.append(
            f"{named(infinite)} {_are(infinite)} discrete with infinite support: sum the site out by hand (a "
            "GammaPoisson for a Poisson whose rate is Gamma), cut it off at a Categorical, or condition on it."
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
    check_guided("", model, guide)
    check_drawn("", model, guide)


def check_guided(owner: str, model: Trace, guide: Trace) -> None:
    """Refuse a guide that lacks latents of the model which cannot be summed out."""
    if missing := lacking(model, guide):
        raise ValueError(
            f"{owner}{_latent_sites(list(missing))} of the model {_are(missing)} not in the guide. {ways_out(missing)}"
        )


def _latent_sites(names: list[str]) -> str:
    return f"latent site{'s' * (len(names) > 1)} {named(names)}"


def _are(names: Any) -> str:
    return "are" if len(names) > 1 else "is"
