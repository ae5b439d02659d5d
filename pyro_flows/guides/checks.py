"""Checks of the model of a guide, at setup and at each call; errors name the site or plate.

A guide draws the latents that it was built for, whatever the model draws with other arguments.  If the model lacks one,
or a mask removes it, the guide's entropy counts without the model's density, and grows without bound.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from ..programs.error_text import count_nan, failure
from ..programs.latents import is_discrete, named
from ..programs.log_density import is_breakdown
from ..programs.masks import is_masked, is_reparametrised
from ..programs.program import signature_of
from ..user_code import place_of
from .circles import bijection_onto, scalar_support
from .guide_call import Call, Found, Key, Rows, frames_of
from .masked import RowMasks, absent_of, hidden_outside, masks_of_rows, patterns_of, present_outside
from .nonfinite import DrawWatch

PLAIN = bool | int | float | complex | str | bytes | None | torch.Size | torch.dtype | torch.device


def setup_error(owner: str, error: Exception, given: dict[str, Any], *, alone: bool) -> Exception | None:
    """Return an error that says why setup runs the model, or None if the error of the setup itself is clear.

    Args:
        owner: The class of the guide.
        error: The error of the setup.
        given: The model's arguments by their names.
        alone: True if setup was called without arguments.
    """
    ours = str(error).startswith(f"{owner}: ")
    if isinstance(error, TypeError) and alone and not ours:
        fault = f"this guide is new, and to set it up the model is called with what is given here: {error}"
        return TypeError(f"{owner}: {fault}. Fit the guide first, or give the model's arguments here too.")
    broken = isinstance(error, AssertionError | IndexError | KeyError)
    if ours or not (place_of(error) or broken):
        return None  # Pyro or this package found the fault, not the model
    refused = type(error) is ValueError and is_breakdown(error)
    if not (refused or broken or type(error) in (TypeError, AttributeError) or isinstance(error, RuntimeError)):
        return None
    words = f"{owner}: the model fails where it is run to find its latents: {failure(error, given)}"
    if refused and not count_nan(given):
        words += " If it does, give the guide a start where it does: init_loc_fn=init_to_value(values={...})."
    return (type(error) if type(error) in (TypeError, AttributeError) else ValueError)(words)


def check_arguments(method: str, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TypeError if a method of a guide lacks arguments that its model requires."""
    try:
        signature = signature_of(model)
    except (TypeError, ValueError):  # Python does not know the signature
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        call = f"guide.{method.rpartition('.')[2]}(..., {', '.join(signature.parameters)})"
        raise TypeError(f"{method}: the model's arguments must be given too, got {error}. Use {call}.") from error


def check_continuous(call: Call) -> None:
    """Refuse discrete latents, and supports without volume or bijection."""
    if names := [name for name, site in call.latents.items() if is_discrete(site["fn"])]:
        which = f"sites {named(names)} are" if len(names) > 1 else f"site {named(names)} is"
        why = "values are infinitely many, more than 1000 in one event, or not listed by Pyro"
        way = "Sum out by hand (a Poisson of Gamma rate is a GammaPoisson), cut off at a Categorical, or condition"
        raise ValueError(f"{call.owner}: latent {which} discrete, and cannot be enumerated: {why}. {way}.")
    for name, site in call.latents.items():
        support = site["fn"].support
        bijection_onto(call.owner, name, support)
        bounds = [getattr(scalar_support(support), bound, None) for bound in ("lower_bound", "upper_bound")]
        if None not in bounds and (torch.as_tensor(bounds[0]) >= torch.as_tensor(bounds[1])).any():
            fault = f"the support of latent site {name!r}, {support}, has no volume: low must be below high"
            raise ValueError(f"{call.owner}: {fault}. Where they are equal, write pyro.deterministic({name!r}, value).")


def check_latents(call: Call) -> None:
    """Refuse latents that are not continuous, or lie in subsampled plates other than the guide's."""
    check_continuous(call)
    for name, site in call.latents.items():
        for frame in site["cond_indep_stack"]:
            if frame.name not in call.plates and frame.full_size is not None and frame.size < frame.full_size:
                rows = f"which is subsampled ({frame.size} of {frame.full_size} rows)"
                way = "Let it run over all rows, or use AutoStructuredFlow(model)"
                raise ValueError(f"{call.owner}: latent site {name!r} lies in plate {frame.name!r}, {rows}. {way}.")


def check_shapes(call: Call, found: Found) -> None:
    """Refuse a model that lacks a latent of the guide or has another shape, apart from the numbers of rows."""
    for name, site in call.latents.items():
        shape = list(site["value"].shape)
        for frame in frames_of(site, call.plates):
            shape[frame.dim - site["fn"].event_dim] = found.rows[frame.name].size
        now = found.latents.get(name)
        if now is not None and tuple(now["value"].shape) == tuple(shape):
            continue
        built = "" if now is not None else "one of shape "
        if now is not None:
            there = f"has shape {tuple(now['value'].shape)}"
        elif name in found.observed:
            there = "is observed"
        else:
            there = f"is not in the model, which has {named(list(found.latents)) if found.latents else 'none'}"
        fault = f"latent site {name!r} {there}, but the guide was built for {built}{tuple(shape)}"
        way = "Build another guide, pad series to one length and mask the observed sites only, or use AutoPlateFlow"
        if not call.latents.keys() & found.latents.keys():
            way = "Give the model that the guide was built for"
        raise ValueError(f"{call.owner}: with these arguments {fault}. {way}.")


def check_no_more(call: Call, found: Found, observed: Collection[str]) -> None:
    """Refuse latents that the guide was not built for, except sites that were ``observed`` then: they are predicted."""
    for name, site in found.latents.items():
        if name not in call.prototype.nodes and name not in observed:
            fault = f"the model has the latent site {name!r} of shape {tuple(site['value'].shape)}, which it had not"
            way = "Build another guide, or let the model draw the same sites for all data"
            raise ValueError(f"{call.owner}: {fault} when the guide was built. {way}.")


class Calls:
    """The calls of one guide.  The model is not run again for the very arguments of the call before.

    Attributes:
        observed: The sites that were data when the guide was built.
        reparametrised: The sites that ``poutine.reparam`` replaced.
        masked: True if some latents have a mask.
        present: The masks of the present elements of latents outside of rows that are absent in part.
        watch: The watch over the guide's draws.
    """

    def __init__(self) -> None:
        self.observed: frozenset[str] = frozenset()
        self.reparametrised: tuple[str, ...] = ()
        self.masked, self.watch = False, DrawWatch()
        self.present: dict[str, Tensor] = {}
        self._hidden: dict[str, Tensor] = {}  # the masks of latents outside of rows
        self._absent: set[tuple[Key, Key, bytes]] = set()  # patterns of hidden parts of rows that change nothing else
        self._last: list[object] | None = None  # the keys of the last arguments

    def begin(self, call: Call, *, varies: bool = False) -> Found:
        """Look at all of a model with the arguments that the guide is built for.

        Args:
            call: The call of the guide.
            varies: True for a guide of any dataset, whose vectors cannot lack what one dataset hides.
        """
        found = call.look()
        self.observed, self._hidden = frozenset(found.observed), hidden_outside(call, found)
        self.present = present_outside(call, self._hidden, found)
        if varies and self.present:
            fault = f"latent site {next(iter(self.present))!r} is masked, and other datasets may have other masks"
            raise ValueError(f"{call.owner}: {fault}. Mask the observed sites only, or fit each dataset by fit_svi.")
        self.reparametrised = tuple(name for name, site in found.observed.items() if is_reparametrised(site))
        self._settle(call, found)
        if call.plates and all(rows.size == rows.full_size for rows in found.rows.values()):
            self._checked(call, found, {})
        return found

    def rows(self, call: Call, *, needed: bool) -> dict[str, Rows]:
        """Check new arguments, and return the rows of the plates if they are needed.

        Raises:
            ValueError: Naming the site, if the model lacks a latent of the guide, has a further one or another shape,
                or masks latents that the guide cannot leave out.
        """
        known = self._knows(call)
        if call.model is None or (known and not needed):
            return {}
        found = call.look(until=() if known else call.latents)
        if not known:
            check_shapes(call, found)
            check_no_more(call, found, self.observed)
            self._settle(call, found)
        return found.rows

    def masks(self, call: Call, indices: Mapping[str, Tensor]) -> dict[Key, RowMasks]:
        """Return the masks of the latents at some rows of the plates."""
        if not self.masked or call.model is None or not call.plates:
            return {}
        return self._checked(call, call.look(indices=indices), indices)

    def _checked(self, call: Call, found: Found, rows: Mapping[str, Tensor]) -> dict[Key, RowMasks]:
        """Return the masks of the latents; new patterns must not hide what the rest of the model depends on."""
        found_masks = masks_of_rows(found)
        for key, masks in found_masks.items():
            if new := patterns_of(key, masks, found) - self._absent:
                absent_of(call, masks.hidden, found, rows)
                self._absent |= new
        return found_masks

    def _settle(self, call: Call, found: Found) -> None:
        """Refuse masks outside of the plates that were others when the guide was built, and remember the arguments."""
        self.masked = any(map(is_masked, found.latents.values()))
        self.check_hidden(call, found)
        self._last = _keys(call)

    def check_hidden(self, call: Call, found: Found) -> None:
        """Raise ValueError, naming the site, if latents outside of rows have other masks than at setup."""
        now, built = hidden_outside(call, found), self._hidden
        for name in now.keys() | built.keys():
            if not (name in now and name in built and torch.equal(now[name], built[name])):
                fault = f"the mask of latent site {name!r} differs from that which the guide was built with"
                way = "Build another guide, or use AutoPlateFlow(model, plate), whose rows take a new mask in each call"
                raise ValueError(f"{call.owner}: {fault}. {way}.")

    def _knows(self, call: Call) -> bool:
        """True if the model need not be run for the arguments of a call.

        Without arguments the guide draws again, as Pyro's guides do.  A traced program has one structure.  Iterators
        are for the model alone, which would find them used up.  A mask may change unseen.
        """
        if any(isinstance(leaf, Iterator) for leaf in tree_leaves((call.args, call.kwargs))):
            return True
        if self.masked and call.plates:
            return False
        return not (call.args or call.kwargs) or bool(torch._C._get_tracing_state()) or self._last == _keys(call)

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles hold no data
        return {**self.__dict__, "_last": None, "watch": DrawWatch()}


def _keys(call: Call) -> list[object]:
    """Return keys that two calls share only if their arguments are the same, unchanged objects."""
    leaves, spec = tree_flatten((call.args, call.kwargs))
    return [spec, *map(_key, leaves)]


def _key(leaf: Any) -> object:
    if isinstance(leaf, PLAIN):
        return type(leaf), leaf
    # The key holds the object, so that no other one takes its identity.
    if isinstance(leaf, Tensor) and not leaf.is_inference():  # inference tensors could have changed unseen
        return id(leaf), leaf._version, leaf
    return (id(leaf), leaf) if callable(leaf) else object()
