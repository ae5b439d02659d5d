"""Errors of a user's program in words."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pyro import validation_enabled
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints
from torch.utils._pytree import tree_leaves

from .. import arguments
from ..user_code import place_of
from .latents import innermost, states_support
from .masks import is_observation, mask_of

# Errors of a program that get more words.  Other classes may take no message, or a user may wait for them.
BUILT_IN = ValueError, RuntimeError, TypeError, AttributeError, AssertionError, IndexError, KeyError


def quoted(error: BaseException) -> str:
    """Return an error's place, kind and message: ``models.py:7, `assert x.dim() == 1`: AssertionError``.

    An error without a line of the user's, for example from a log-density, has only kind and message.
    """
    head, mark, _ = str(error).partition("Trace Shapes:")[0].partition("invalid values")  # and not the values
    words = " ".join((head + mark).split()).rstrip(".")
    place = place_of(error)
    return f"{f'{place}: ' if place else ''}{type(error).__name__}{f': {words:.300}' if words else ''}"


def failure(error: BaseException, given: dict[str, Any]) -> str:
    """Return an error of a program in words, with the arguments of the run by their names."""
    run = ", ".join(f"{name}: {_described(value)}" for name, value in given.items()) or "no arguments"
    return f"{quoted(error)}. It was run with {run}. Check that it runs alone with these arguments."


@contextmanager
def explained(role: str, given: dict[str, Any]) -> Iterator[None]:
    """Say in an error of a program, model or guide, with which arguments it was run; the error keeps its class."""
    try:
        yield
    except Exception as error:
        if type(error) in BUILT_IN and place_of(error) and not _is_ours(error):
            raise type(error)(f"the {role} fails: {failure(error, given)}") from error
        if "\nTrace Shapes:" in str(error) and type(error.__cause__) is type(error):  # Pyro's copy says no more
            raise error.__cause__ from error.__cause__.__cause__
        raise


def _is_ours(error: BaseException) -> bool:
    """True if this package raised an error itself."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]


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
        if not (is_observation(site) and isinstance(site["value"], Tensor)):
            continue
        lost, outside = count_nan(site["value"]), _outside(site)
        if (lost and len(outside)) or ((lost or sources) and _is_nan(site)):
            fault = "; ".join([f"holds {lost} NaN" if lost else "has a density of NaN", *sources[:1]])
            way = "Leave those rows out, or mask them by poutine.mask and replace the NaN: y.nan_to_num()"
        elif len(outside):
            fault = f"holds data outside of the support of {type(innermost(site['fn'])).__name__}"
            first = [f"{number:g}" for number in outside[0].flatten()[:4].tolist()]
            example = first[0] if outside.dim() == 1 else f"[{', '.join(first)}{', …' * (outside[0].numel() > 4)}]"
            fault += f" ({len(outside)} of {site['fn'].batch_shape.numel()}, such as {example})"
            way = "Recode the data, or choose another distribution"
        else:
            continue
        raise ValueError(f"{owner}observed site {name!r} {fault}. {way}.")


@torch.no_grad()
def _outside(site: dict[str, Any]) -> Tensor:
    """Return the data of a site, ``(number, *event_shape)``, that Pyro's validation refuses and no mask hides."""
    fn, value = site["fn"], site["value"]
    event = value.shape[value.dim() - fn.event_dim :]
    if event != fn.event_shape or not (states_support(fn) and _is_fixed(fn.support)):
        return value.new_empty(0, *event)
    try:
        outside = ~fn.support.check(value) & mask_of(site).every
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
def _is_nan(site: dict[str, Any]) -> bool:
    """True if the log-density of a site is NaN where no mask hides it."""
    try:
        with validation_enabled(False):
            log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    except ValueError:  # a distribution that was built under validation refuses NaN, masked or not
        return False
    return bool(log_prob.isnan().any())
