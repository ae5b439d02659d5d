"""Latents of a model and of its guide: draws can be weighed only if both have the same, under the same masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import validation_enabled
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch.distributions import constraints

from .finite_supports import with_values
from .masks import Mask, is_observation, mask_of

FREE = dist.ImproperUniform, dist.Delta  # distributions without a prior density to mask
KEEPS_MASK = "_keeps_mask"  # marks a guide's site whose density leaves out what the model masks


def summable(model: Trace, guide: Trace) -> list[str]:
    """Return the discrete latents of a model's trace that its guide lacks and whose support is finite."""
    return [name for name, site in _lacking(model, guide).items() if is_summable(site["fn"])]


def lacking(model: Trace, guide: Trace) -> dict[str, Any]:
    """Return the latent sites of a model's trace that its guide lacks and that cannot be summed out."""
    return {name: site for name, site in _lacking(model, guide).items() if not is_summable(site["fn"])}


def _lacking(model: Trace, guide: Trace) -> dict[str, Any]:
    latents = _drawn(model).items()
    return {name: site for name, site in latents if name not in guide.nodes and not is_point(site["fn"])}


def _drawn(trace: Trace) -> dict[str, Any]:
    """Return the sites that a program draws, without the rows of its plates."""
    return dict(prune_subsample_sites(trace).iter_stochastic_nodes())


def innermost(fn: Any) -> Any:
    """Return a distribution without its masks and without declarations of events."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def is_point(fn: Any) -> bool:
    """True if a distribution is a point mass, whose site has a value that follows from the others."""
    return isinstance(_base_of(fn), dist.Delta)


def _base_of(fn: Any) -> Any:
    """Return the distribution in all wrappers."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def states_support(fn: Any) -> bool:
    """True if a distribution states its support; the flows of other libraries do not."""
    try:
        return fn.support is not None
    except NotImplementedError:
        return False


def support_of(fn: Any) -> Any:
    """Return the support of a distribution, or all real numbers if it states none."""
    return fn.support if states_support(fn) else constraints.independent(constraints.real, len(fn.event_shape))


def is_discrete(fn: Any) -> bool:
    """True if a distribution is over integers; a point mass is not."""
    try:
        return not is_point(fn) and bool(support_of(fn).is_discrete)
    except AttributeError:  # for example, the rows of a plate have no support
        return False


def is_summable(fn: Any) -> bool:
    """True if a distribution is discrete and its support finite, so that its site can be summed out."""
    return is_discrete(fn) and bool(with_values(fn).has_enumerate_support)


def flat_by_mask(model: Trace, guide: Trace) -> str:
    """Return in words which latents have priors that a mask hides, and draws that count; or an empty string."""
    sites = {name: site for name, site in _drawn(model).items() if not isinstance(innermost(site["fn"]), FREE)}
    masks = {name: mask_of(site) for name, site in sites.items()}
    hidden = [name for name, mask in masks.items() if mask.is_scalar and mask.hides]
    names = [name for name in hidden if name not in guide.nodes or not mask_of(guide.nodes[name]).hides]
    if not names:
        return ""
    priors = f"prior{'s' * (len(names) > 1)} of {_sites('latent site', names)}"
    way = "Take the mask off, or write dist.ImproperUniform for a flat prior"
    return f"the {priors} {_are(names)} masked, and so flat. {way}"


def check_match(model: Trace, guide: Trace, left_out: Sequence[str] = ()) -> None:
    """Raise ValueError for a guide that is a point, lacks latents, or has other latents or masks than the model."""
    drawn = _drawn(guide).values()
    if drawn and all(isinstance(site["fn"], dist.Delta) for site in drawn):
        raise ValueError("the guide is a point (every site is a Delta) and not a distribution; it cannot be weighed.")
    check_guided("", model, guide, left_out)
    check_drawn("", model, guide)


def check_guided(owner: str, model: Trace, guide: Trace, left_out: Sequence[str] = ()) -> None:
    """Raise ValueError for a guide that lacks latents of the model which cannot be summed out.

    Args:
        owner: The start of the message.
        model: The trace of the model.
        guide: The trace of the guide.
        left_out: The model's arguments that are None, which may hold the data of these sites.
    """
    missing = lacking(model, guide)
    if not missing:
        return
    infinite = [name for name, site in missing.items() if is_discrete(site["fn"])]
    continuous = [name for name in missing if name not in infinite]
    data = ", ".join(f"{name!r}: ..." for name in continuous)
    ways = {
        "discrete with infinite support: sum the site out by hand (a GammaPoisson for a Poisson whose rate is Gamma), "
        "cut it off at a Categorical, or condition on it.": infinite,
        "continuous: give the guide the whole model, or hold the site at a value by "
        f"poutine.condition(model, data={{{data}}}).": continuous,
    }
    way_out = " ".join(f"{named(names)} {_are(names)} {way}" for way, names in ways.items() if names)
    sites = _sites("latent site", list(missing))
    if left_out:
        data = ", ".join(f"{name}=..." for name in [name for name in missing if name in left_out] or left_out)
        way_out = f"Perhaps data are missing here: give {data}, as in the fit. {way_out}"
    raise ValueError(f"{owner}{sites} of the model {_are(missing)} not in the guide. {way_out}")


def check_drawn(owner: str, model: Trace, guide: Trace) -> None:
    """Raise ValueError for a guide that draws other sites than the model, or counts rows that the model masks.

    Either adds an entropy to the objective that nothing in the model bounds.

    Raises:
        ValueError: If the guide draws a site that the model lacks or observes.  If a mask leaves out rows of a latent
            and of the data in the model, but not in the guide.
    """
    nodes = model.nodes
    drawn = {name: site for name, site in _drawn(guide).items() if not site["infer"].get("is_auxiliary")}
    unknown = [name for name in drawn if name not in nodes]
    observed = [name for name in drawn if name in nodes and nodes[name]["is_observed"]]
    ways = {
        "not in": "Where sites come and go with the data, pad the data and mask the observed sites only",
        "observed in": "Build the guide from this very model: if it is conditioned, from the conditioned one",
    }
    for (what, way), names in zip(ways.items(), (unknown, observed), strict=True):
        if names:
            fault = f"{_sites('site', names)} of the guide {_are(names)} {what} the model"
            raise ValueError(f"{owner}{fault}; is it the guide of another model? {way}.")
    for name, site in drawn.items():
        mask = mask_of(nodes[name])
        if not mask.hides or site["infer"].get(KEEPS_MASK) or are_equal(mask, mask_of(site)):
            continue
        # A mask on latents alone is a flat prior, whose rows the guide counts.
        hides_data = any(mask_of(node).hides for node in nodes.values() if is_observation(node))
        if hides_data and not _is_bare_point(site, guide):
            raise ValueError(
                f"{owner}latent site {name!r} is masked in the model, and not in the guide, whose entropy would count "
                "where the model has no density. Build the guide from the masked model, as in "
                "AutoPlateFlow(poutine.mask(model, mask=...), plate), or mask the observed sites only. For a flat "
                "prior write dist.ImproperUniform."
            )


def check_likelihood(caller: str, model: Trace) -> None:
    """Raise ValueError if an observed site of a model is a point away from its data, where no draw has a density.

    A point at the data is a constant factor: ``pyro.sample("f", dist.Delta(x, log_density=f), obs=x)``.
    """
    sites = {name: site for name, site in model.nodes.items() if is_observation(site)}
    points = [name for name, site in sites.items() if is_point(site["fn"])]
    elsewhere = [name for name in points if _is_elsewhere(sites[name])]
    if elsewhere and sites.keys() == {*points}:
        got = f"only Delta distributions at {_sites('observed site', points)}"
        way = (
            "Judge a guide of a simulator by calibrate(model, guide), and near one observation by local_c2st and "
            "misspecification"
        )
        raise ValueError(f"{caller}: model must have a likelihood, got {got}. {way}.")
    if elsewhere:
        name = elsewhere[0]
        fault = f"observed site {name!r} is a Delta at other values than its data, so that no draw has a density"
        way = "If the model draws it itself, let it take what is given: value = draw() if given is None else given"
        raise ValueError(f"{caller}: {fault}. {way}.")


@torch.no_grad()
def _is_elsewhere(site: dict[str, Any]) -> bool:
    """True if an observed site is a point mass at other values than the data, unless a mask hides them."""
    with validation_enabled(False):
        log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    return bool((log_prob == -torch.inf).any()) and not bool((_base_of(site["fn"]).v == site["value"]).all())


def _is_bare_point(site: dict[str, Any], guide: Trace) -> bool:
    """True if a site is a point without entropy, in a guide without auxiliary draws whose entropy it might carry."""
    samples = [node for node in guide.nodes.values() if node["type"] == "sample"]
    return is_point(site["fn"]) and not any(node["infer"].get("is_auxiliary") for node in samples)


def are_equal(one: Mask, other: Mask) -> bool:
    """True if two masks hide the same elements."""
    pairs = [[torch.as_tensor(part) for part in pair] for pair in zip(one, other, strict=True)]
    return all(bool((a.to(b.device) == b).all()) for a, b in pairs)


def named(names: Iterable[str]) -> str:
    """Return names as a list in words: ``'a', 'b'``."""
    return ", ".join(map(repr, names))


def _sites(kind: str, names: list[str]) -> str:
    return f"{kind}{'s' * (len(names) > 1)} {named(names)}"


def _are(names: Any) -> str:
    return "are" if len(names) > 1 else "is"
