"""Checks of the model of a guide, at setup and at each call, and of its draws; errors name the site or plate.

A guide draws the latents that it was built for, whatever the model draws with other arguments.  If the model lacks one,
or a mask removes it, the guide's entropy counts without the model's density, and grows without bound.

Errors for draws that are not finite name the site, the cause and the way out, and end the step.  Pyro itself would go
on to ``Delta(v: nan)`` and the names of all parameters or, without validation, to losses that stay NaN.  A gradient
that is not finite shows in the next draw only.  So the last finite draw is kept, to find out where the model broke.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from pyro import poutine, validation_enabled
from pyro.distributions import is_validation_enabled
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from ..compiler_state import is_traced
from ..flows.distribution import FlowDistribution
from ..programs.engines import Values, is_weighing
from ..programs.latents import is_discrete, named
from ..programs.log_density import NonFiniteDraw
from ..programs.masks import is_masked, is_reparametrised
from ..programs.program import signature_of
from ..programs.traces import trace_of
from .contexts import remoteness
from .guide_call import (
    Call,
    Found,
    Key,
    RowMasks,
    Rows,
    absent_of,
    frames_of,
    hidden_outside,
    masks_of_rows,
    patterns_of,
    present_outside,
)
from .packing import bijection_onto, scalar_support

ANEW = (
    "Build the guide anew and train it with a smaller step size, pyro.optim.ClippedAdam, more particles, or fit_svi, "
    "which skips such steps"
)


Seen = dict[str, tuple[Tensor, Mapping[str, Tensor]]]  # draws, and the rows that they are of


class _Broken(NonFiniteDraw):
    """A draw that is not finite: its sites, the value and the likely cause.

    It is explained once the guide has left all plates, which the model enters too.
    """


class DrawWatch:
    """The watch over one guide's draws, which remembers the last finite ones.

    The guide's ``packings`` hold the layout of the vector at each of its sample statements.
    """

    def __init__(self) -> None:
        self._now: Seen = {}
        self._last: Seen = {}

    @contextmanager
    def over(self, guide: Any, call: Call) -> Iterator[None]:
        """Explain the error if a call of the guide ends because a draw is not finite.

        If parameters are lost, a distribution or an equation may raise its own error first.
        """
        self._now = {}
        try:
            yield
        except (ValueError, RuntimeError, FloatingPointError) as error:
            own, lost = isinstance(error, _Broken), not is_traced() and _number_lost(guide)
            if is_traced() or not (own or lost):  # numbers of a traced program cannot be looked at
                raise
            sites, got, cause = error.args if own else (list(call.latents), math.nan, "")
            way = ANEW
            if lost:
                when = "the last step" if self._last else "an earlier step"
                cause = (
                    f"{lost} of the guide's {len(list(guide.parameters()))} parameters are lost, since the gradient "
                )
                cause += f"of {when} was not{self._fault(guide, call)}"
            elif far := remoteness(call, guide.data_encoders):
                cause, way = far, "Correct the data, or train on data that reach as far"
            draw = f"the draw of latent site {sites[0]!r}" + (f" and of {len(sites) - 1} more" if sites[1:] else "")
            words = f"{call.owner}: {draw} must be finite, got {got}: {cause}. {way}."
            raise NonFiniteDraw(words) from (None if own else error)
        self._last = self._now or self._last

    def see(self, guide: Any, name: str, q: FlowDistribution, z: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Refuse a packed draw that is not finite, or whose constrained value is not.

        Without gradients, for example if draws are weighed, the draw is refused only if it is one of an encoder's data
        and not finite itself, or if parameters of the guide are not finite and validation is on.
        """
        if is_traced():
            return
        plain = z.detach()
        size = torch.linalg.vector_norm(plain, math.inf).item()
        training = z.requires_grad and not is_weighing()
        in_range = size < math.log(torch.finfo(plain.dtype).max)  # so that its exponential is finite; False for NaN
        remote = not math.isfinite(size) and guide.data_encoders
        if not in_range and (training or remote or (is_validation_enabled() and _number_lost(guide))):
            self._judge(guide, name, q, plain, size)
        if training:
            self._now[name] = plain, rows

    def checked(self, guide: Any, call: Call, values: Values) -> Values:
        """Return draws ``(N, *site_shape)`` given an encoder's data; refuse them if some are not finite."""
        if guide.data_encoders and (sites := [name for name, value in values.items() if not value.isfinite().all()]):
            with self.over(guide, call):
                value = values[sites[0]]
                raise _Broken(sites, worst(value), _overflow(value))
        return values

    @torch.no_grad()
    def _judge(self, guide: Any, name: str, q: FlowDistribution, z: Tensor, size: float) -> None:
        packing = guide.packings[name]
        if math.isfinite(size):
            for site, _, value, _ in packing.unpack(z):
                if not value.isfinite().all():
                    far = z[..., [own == site for own in packing.coordinates]].max()
                    kind = str(z.dtype).removeprefix("torch.")
                    cause = f"an unconstrained draw of {far:.4g} overflows {kind} where it is constrained"
                    raise _Broken([site], worst(value), cause)
            return
        bad = (~z.isfinite()).reshape(-1, z.shape[-1]).any(0).tolist()
        contexts, cause = [view.context for view in q.transforms if view.context is not None], _overflow(z)
        if contexts and not contexts[0].isfinite().all():
            cause = "the encoder returned NaN or infinite numbers, as of data that are not finite"
        sites = dict.fromkeys(site for site, is_bad in zip(packing.coordinates, bad, strict=True) if is_bad)
        raise _Broken(list(sites), worst(z[..., bad.index(True)]), cause)

    def _fault(self, guide: Any, call: Call) -> str:
        """Name the model's first site whose log-density at the last draws, or its gradient, was not finite."""
        if not self._last or call.model is None:
            return ""
        # A user's program may raise anything, and the step has its error already.
        with suppress(Exception), call.same_draws(), poutine.block(), torch.enable_grad(), validation_enabled(False):
            draws = {  # each (particles, [rows, *1s,] size)
                name: z.reshape(-1, *z.shape[z.dim() - 1 - guide.packings[name].depth :])
                for name, (z, _) in self._last.items()
            }
            for particle in range(min(100, max(map(len, draws.values())))):
                draw = {name: z[min(particle, len(z) - 1)] for name, z in draws.items()}
                if found := self._fault_at(draw, guide, call):
                    return f": there the log-density of the model's site {found}"
        return ""

    def _fault_at(self, draw: dict[str, Tensor], guide: Any, call: Call) -> str:
        leaves, data = [z.clone().requires_grad_() for z in draw.values()], dict[str, Tensor]()
        for name, leaf in zip(draw, leaves, strict=True):
            data.update((site, value) for site, _, value, _ in guide.packings[name].unpack(leaf))
            data.update({p: rows for p, rows in self._last[name][1].items() if p not in guide._given_plates})
        trace = trace_of(poutine.condition(call.model, data=data), call.args, call.kwargs)
        trace.compute_log_prob()
        found = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        for name, site in found.items():
            if not site["log_prob"].isfinite().all():
                return f"{name!r} was {worst(site['log_prob'])}"
        for name, site in found.items():
            if (total := site["log_prob_sum"]).requires_grad:
                gradients = torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True)
                if not all(gradient.isfinite().all() for gradient in gradients):
                    return f"{name!r} had a gradient that is not finite"
        return ""


def worst(value: Tensor) -> float:
    """Return the first number that is not finite."""
    return value[~value.isfinite()].flatten()[0].item()


def _overflow(value: Tensor) -> str:
    """Return words for the cause if a draw is not finite though all parameters are."""
    dtype = str(value.dtype).removeprefix("torch.")
    return f"the guide's parameters are finite, but so large that the draw overflows {dtype}"


def _number_lost(guide: nn.Module) -> int:
    """Return the number of a guide's parameters that are not finite."""
    return sum(not bool(parameter.isfinite().all()) for parameter in guide.parameters())


PLAIN = bool | int | float | complex | str | bytes | None | torch.Size | torch.dtype | torch.device


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
        for name in {**built, **now}:
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
