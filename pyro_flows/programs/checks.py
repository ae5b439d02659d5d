"""Checks of a model, its data and its guide, and errors of a user's program in words.

Draws can be weighed only if model and guide have the same latents, under the same masks.
"""

import math
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import validation_enabled
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import constraints
from torch.utils._pytree import tree_leaves

from .. import arguments
from ..user_code import place_of, warn_user
from . import sites
from .sites import Site

# Errors of a program that get more words.  Other classes may take no message, or a user may wait for them.
BUILT_IN = ValueError, RuntimeError, TypeError, AttributeError, AssertionError, IndexError, KeyError
FREE = dist.ImproperUniform, dist.Delta  # distributions without a prior density to mask
KEEPS_MASK = "_keeps_mask"  # marks a guide's site whose density leaves out what the model masks


def quoted(error: BaseException) -> str:
    """Return an error's place, kind and message: ``models.py:7, `assert x.dim() == 1`: AssertionError``.

    An error without a line of the user's, for example from a log-density, has only kind and message.
    """
    head, mark, _ = str(error).partition("Trace Shapes:")[0].partition("invalid values")  # and not the values
    words = " ".join((head + mark).split()).rstrip(".")
    place = place_of(error)
    return f"{f'{place}: ' if place else ''}{type(error).__name__}{f': {words:.300}' if words else ''}"


@contextmanager
def explained(role: str, given: dict[str, Any]) -> Iterator[None]:
    """Say in an error of a program, model or guide, with which arguments it was run; the error keeps its class."""
    try:
        yield
    except Exception as error:
        frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
        is_ours = frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]
        if type(error) in BUILT_IN and place_of(error) and not is_ours:
            run = ", ".join(f"{name}: {_described(value)}" for name, value in given.items()) or "no arguments"
            fault = f"the {role} fails: {quoted(error)}. It was run with {run}"
            raise type(error)(f"{fault}. Check that it runs alone with these arguments.") from error
        if "\nTrace Shapes:" in str(error) and type(error.__cause__) is type(error):  # Pyro's copy says no more
            raise error.__cause__ from error.__cause__.__cause__
        raise


def _described(value: Any) -> str:
    """Return the class, dtype and shape of an array, with a count of NaN, or any other value in a few characters."""
    kind, lost = type(value).__name__, count_nan(value)
    bad = f" with {lost} NaN" if lost else ""
    if isinstance(value, bool | int | float | str | None):
        return arguments.quoted(value)
    try:
        shape = tuple(value.shape)
    except (AttributeError, TypeError, RuntimeError):  # no array, or a nested tensor
        return f"a {kind}{bad}"
    return f"{kind} {str(getattr(value, 'dtype', '')).removeprefix('torch.')} {shape}{bad}"


def count_nan(value: Any) -> int:
    """Return the number of NaN in an array, or in the arrays of nested tuples, lists and dictionaries."""
    leaves = tree_leaves(value)
    arrays = [leaf for leaf in leaves if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f"]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    dense = [leaf for leaf in tensors if leaf.layout == torch.strided and not (leaf.is_nested or leaf.is_meta)]
    return sum(int(np.isnan(array).sum()) for array in arrays) + sum(int(tensor.isnan().sum()) for tensor in dense)


def check_observed(owner: str, trace: Trace, given: dict[str, Any]) -> None:
    """Raise ValueError if the data of an observed site are outside of its support, or have a density of NaN.

    A mask may hide such data, and Pyro's validation may be off, in all programs or for the distribution.  Supports with
    a tensor for a bound may depend on latents; they are not compared with the data.

    Args:
        owner: The start of the message.
        trace: A run of a model.
        given: The model's arguments by their names.
    """
    sources = [f"argument {name!r} holds {count} NaN" for name, value in given.items() if (count := count_nan(value))]
    for name, site in trace.nodes.items():
        if not (sites.is_observation(site) and isinstance(site["value"], Tensor)):
            continue
        lost, outside = count_nan(site["value"]), _outside(site)
        if (lost and len(outside)) or ((lost or sources) and _log_prob_of(site).isnan().any()):
            fault = "; ".join([f"holds {lost} NaN" if lost else "has a density of NaN", *sources[:1]])
            way = "Leave those rows out, or mask them by poutine.mask and replace the NaN: y.nan_to_num()"
        elif len(outside):
            fault = f"holds data outside of the support of {type(sites.innermost(site['fn'])).__name__}"
            first = [f"{number:g}" for number in outside[0].flatten()[:4].tolist()]
            example = first[0] if outside.dim() == 1 else f"[{', '.join(first)}{', …' * (outside[0].numel() > 4)}]"
            fault += f" ({len(outside)} of {site['fn'].batch_shape.numel()}, such as {example})"
            way = "Recode the data, or choose another distribution"
        else:
            continue
        raise ValueError(f"{owner}observed site {name!r} {fault}. {way}.")


@torch.no_grad()
def _outside(site: Site) -> Tensor:
    """Return the data of a site, ``(number, *event_shape)``, that Pyro's validation refuses and no mask hides."""
    fn, value = site["fn"], site["value"]
    event = value.shape[value.dim() - fn.event_dim :]
    if event != fn.event_shape or not (sites.states_support(fn) and _is_fixed(fn.support)):
        return value.new_empty(0, *event)
    try:
        outside = ~fn.support.check(value) & sites.mask_of(site).every
        if outside.any():
            fn.log_prob(value)
    except ValueError:
        return value.expand((*outside.shape, *event))[outside]
    return value.new_empty(0, *event)


def _is_fixed(support: constraints.Constraint) -> bool:
    """True if no bound of a support is a tensor."""
    parts = tree_leaves(list(vars(support).values()))
    nested = [part for part in parts if isinstance(part, constraints.Constraint)]
    return not any(isinstance(part, Tensor) for part in parts) and all(map(_is_fixed, nested))


@torch.no_grad()
def _log_prob_of(site: Site) -> Tensor:
    """Return the log-density of the data of a site, 0 where a mask hides them."""
    try:
        with validation_enabled(False):
            return scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    except ValueError:  # a distribution that was built under validation refuses NaN, masked or not
        return torch.zeros(())


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
        if type(sites.innermost(fn)).__module__.partition(".")[0] not in ("torch", "pyro"):
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
            way = "Give both one shape, as by y[:, 0] or y[:, None], or declare the dimensions of both by plates"
            raise ValueError(f"{found}: each row would meet every other. {way}.")


def _drawn(trace: Trace) -> dict[str, Any]:
    """Return the sites that a program draws, without the rows of its plates."""
    return dict(prune_subsample_sites(trace).iter_stochastic_nodes())


def lacking(model: Trace, guide: Trace, *, summable: bool = False) -> dict[str, Any]:
    """Return the latent sites of a model's trace that its guide lacks: those that can be summed out, or the others."""
    latents = _drawn(model).items()
    missing = {name: site for name, site in latents if name not in guide.nodes and not sites.is_point(site["fn"])}
    return {name: site for name, site in missing.items() if sites.is_summable(site["fn"]) is summable}


def flat_by_mask(model: Trace, guide: Trace) -> str:
    """Return in words which latents have priors that a mask hides, and draws that count; or an empty string."""
    masks = {
        name: sites.mask_of(s) for name, s in _drawn(model).items() if not isinstance(sites.innermost(s["fn"]), FREE)
    }
    hidden = [name for name, mask in masks.items() if mask.is_scalar and mask.hides]
    names = [name for name in hidden if name not in guide.nodes or not sites.mask_of(guide.nodes[name]).hides]
    if not names:
        return ""
    way = "Take the mask off, or write dist.ImproperUniform for a flat prior"
    return f"the prior{'s' * (len(names) > 1)} of {_are('latent site', names)} masked, and so flat. {way}"


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
    infinite = [name for name, site in missing.items() if sites.is_discrete(site["fn"])]
    continuous = [name for name in missing if name not in infinite]
    data = ", ".join(f"{name!r}: ..." for name in continuous)
    by_hand = "sum the site out by hand (a GammaPoisson for a Poisson whose rate is Gamma), cut it off at a Categorical"
    held = f"give the guide the whole model, or hold the site at a value by poutine.condition(model, data={{{data}}})"
    discrete = "discrete with infinite support", f"{by_hand}, or condition on it", infinite
    ways = discrete, ("continuous", held, continuous)
    way_out = " ".join(f"{_are('', names)} {kind}: {way}." for kind, way, names in ways if names)
    if left_out:
        data = ", ".join(f"{name}=..." for name in [name for name in missing if name in left_out] or left_out)
        way_out = f"Perhaps data are missing here: give {data}, as in the fit. {way_out}"
    fault = _are("latent site", list(missing), " of the model")
    raise ValueError(f"{owner}{fault} not in the guide. {way_out}")


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
            fault = f"{_are('site', names, ' of the guide')} {what} the model; is it the guide of another model?"
            raise ValueError(f"{owner}{fault} {way}.")
    # A mask on latents alone is a flat prior, whose rows the guide counts.
    hides_data = any(sites.mask_of(node).hides for node in nodes.values() if sites.is_observation(node))
    is_bare = not any(node["type"] == "sample" and node["infer"].get("is_auxiliary") for node in guide.nodes.values())
    for name, site in drawn.items():
        mask = sites.mask_of(nodes[name])
        if not mask.hides or site["infer"].get(KEEPS_MASK) or sites.are_equal(mask, sites.mask_of(site)):
            continue
        # A point has no entropy, unless the guide has auxiliary draws.
        if hides_data and not (sites.is_point(site["fn"]) and is_bare):
            fault = f"latent site {name!r} is masked in the model, and not in the guide, whose entropy would count"
            way = "Build the guide from the masked model, as in AutoPlateFlow(poutine.mask(model, mask=...), plate), or"
            way += " mask the observed sites only. For a flat prior write dist.ImproperUniform."
            raise ValueError(f"{owner}{fault} where the model has no density. {way}")


def check_likelihood(caller: str, model: Trace) -> None:
    """Raise ValueError if an observed site of a model is a point away from its data, where no draw has a density.

    A point at the data is a constant factor: ``pyro.sample("f", dist.Delta(x, log_density=f), obs=x)``.
    """
    observed = {name: site for name, site in model.nodes.items() if sites.is_observation(site)}
    points = [name for name, site in observed.items() if sites.is_point(site["fn"])]
    elsewhere = [name for name in points if _is_elsewhere(observed[name])]
    if not elsewhere:
        return
    if observed.keys() == {*points}:
        got = f"only Delta distributions at observed site{'s' * (len(points) > 1)} {sites.named(points)}"
        way = "Judge a guide of a simulator by calibrate(model, guide), and near one observation by local_c2st and "
        raise ValueError(f"{caller}: model must have a likelihood, got {got}. {way}misspecification.")
    fault = f"observed site {elsewhere[0]!r} is a Delta at other values than its data, so that no draw has a density"
    way = "If the model draws it itself, let it take what is given: value = draw() if given is None else given"
    raise ValueError(f"{caller}: {fault}. {way}.")


def _is_elsewhere(site: Site) -> bool:
    """True if an observed site is a point mass at other values than the data, unless a mask hides them."""
    is_outside = bool((_log_prob_of(site) == -torch.inf).any())
    return is_outside and not bool((sites.base_of(site["fn"]).v == site["value"]).all())


def _are(kind: str, names: list[str], of: str = "") -> str:
    """Return sites by name as the subject of a sentence: ``sites 'a', 'b' of the model are``."""
    plural = f"{kind}{'s' * (len(names) > 1)} " if kind else ""
    return f"{plural}{sites.named(names)}{of} {'are' if len(names) > 1 else 'is'}"


def check_trained(caller: str, guide: Any) -> None:
    """Raise ValueError for a guide that is known to be untrained, and TypeError for what is no guide."""
    arguments.check_program(guide=guide)
    if way := _way_to_train(guide):
        raise ValueError(f"{caller}: the {type(guide).__name__} was never trained; {way}.")


def warn_untrained(caller: str, guide: Any) -> None:
    """Warn of a guide that is known to be untrained."""
    if way := _way_to_train(guide):
        fault = f"the {type(guide).__name__} was never trained, so its draws are not those of a posterior"
        warn_user(f"{caller}: {fault}; {way}.")


def _way_to_train(guide: Any) -> str:
    """Return words if a guide was not set up or has the parameters of its start, as far as it says, or nothing."""
    if getattr(guide, "prototype_trace", guide) is not None and not getattr(guide, "is_fresh", False):
        return ""
    amortised = getattr(guide, "encoder", None) is not None
    return f"fit it first: {'fit_amortized(model, guide)' if amortised else 'fit_svi(model, guide, ...)'}"
