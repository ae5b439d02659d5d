"""A model run at given draws of its latents: what follows from them, and what it would observe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .alongside import room_of, rows_of, side_by_side
from .draws import Draws


class Held(NamedTuple):
    """Draws of a model's latents.

    Attributes:
        latents: The values of each latent site, ``(N, *site_shape)``.
        log_p: The model's log-density at them, ``(N,)`` in nats.
        log_q: The guide's.
        single: The model's trace of one draw, which shows what shape each site has.
        nesting: The number of dimensions that the plates take; None to run one draw at a time.
    """

    latents: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor
    single: Trace
    nesting: int | None

    def take(self, index: Tensor) -> Held:
        """The draws of some numbers, ``(K,)``."""
        latents = {name: value[index] for name, value in self.latents.items()}
        return self._replace(latents=latents, log_p=self.log_p[index], log_q=self.log_q[index])


def hold(batches: Iterable[Draws]) -> Held:
    """Gather the latents of all batches."""
    parts = list(map(_latents_only, batches))
    latents = {name: torch.cat([part.latents[name] for part in parts]) for name in parts[0].latents}
    log_p, log_q = torch.cat([part.log_p for part in parts]), torch.cat([part.log_q for part in parts])
    return parts[0]._replace(latents=latents, log_p=log_p, log_q=log_q)


def _latents_only(batch: Draws) -> Held:
    latents = {
        name: rows_of(name, site["value"], batch.single.nodes[name]["value"].shape, len(batch.log_p))
        for name, site in batch.model.iter_stochastic_nodes()
    }
    return Held(latents, batch.log_p, batch.log_q, batch.single, batch.nesting)


def group_of(site: dict[str, Any]) -> str | None:
    """What a site of a model's trace is: ``"posterior"`` (latent or deterministic), ``"observed"``, or neither."""
    if site["type"] != "sample" or site_is_subsample(site) or not isinstance(site["value"], Tensor):
        return None
    if not site["is_observed"] or site["infer"].get("_deterministic", False):
        return "posterior"
    return None if type(site["fn"]).__name__ == "Unit" else "observed"


def sites_of(trace: Trace, group: str) -> dict[str, dict[str, Any]]:
    """The sites of a trace that belong to a group, by name."""
    return {name: site for name, site in trace.nodes.items() if group_of(site) == group}


def read(
    model: Callable[..., Any],
    held: Held,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: dict[str, torch.Size],
    what: Callable[[dict[str, Any]], Tensor] = lambda site: site["value"],
    *,
    batch_size: int = 1000,
    forget: bool = False,
) -> dict[str, Tensor]:
    """Run a model at the latents, and read off some of its sites: for each a tensor ``(N, *shape)``.

    Args:
        model: The model that the latents are of.
        held: The latents.
        args: The model's arguments.
        kwargs: Its keyword arguments.
        shapes: The sites, and the shape of what is read for a single draw.
        what: What to read off a site; by default its value.
        batch_size: How many draws are run at once, where the model runs vectorised over them.
        forget: Whether to draw the observed sites anew, in place of the data; deterministic sites cannot be read then.
    """
    if forget:
        # To Pyro what is deterministic is observed too: drawn anew in a plate, it would grow by the plate's size.
        model = poutine.uncondition(_AllRows()(poutine.block(model, hide_fn=_is_derived)))
    found: dict[str, list[Tensor]] = {name: [] for name in shapes}
    step = 1 if held.nesting is None else batch_size
    for start in range(0, len(held.log_p), step):
        size = min(step, len(held.log_p) - start)
        placed = {
            name: value[start : start + size].reshape((*_room(held, name, size), *value.shape[1:]))
            for name, value in held.latents.items()
        }
        beside = model if held.nesting is None else side_by_side(model, size, held.nesting)
        with pyro.validation_enabled(False), poutine.block(), torch.no_grad():
            trace = poutine.trace(poutine.condition(beside, data=placed)).get_trace(*args, **kwargs)
            for name, shape in shapes.items():
                found[name].append(rows_of(name, what(trace.nodes[name]), shape, size))
    return {name: torch.cat(parts) for name, parts in found.items()}


def values_of(
    model: Callable[..., Any], held: Held, args: tuple[Any, ...], kwargs: dict[str, Any], batch_size: int
) -> dict[str, Tensor]:
    """The latents and what the model derives from them by ``pyro.deterministic``: for each ``(N, *site_shape)``."""
    shapes = {name: site["value"].shape for name, site in sites_of(held.single, "posterior").items()}
    return read(model, held, args, kwargs, shapes, batch_size=batch_size)


def _room(held: Held, name: str, size: int) -> tuple[int, ...]:
    """The draws' dimension, and one for each plate that a latent does not lie in; none for a single draw."""
    if held.nesting is None:
        return ()
    return size, *room_of(held.single.nodes[name], held.nesting)


def _is_derived(message: dict[str, Any]) -> bool:
    return message["type"] == "sample" and message["is_observed"] and group_of(message) != "observed"


class _AllRows(Messenger):
    """Draws as many rows anew as a site observes, also where its distribution is one for all of them."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if group_of(msg) == "observed":
            rows = msg["value"].shape[: msg["value"].dim() - msg["fn"].event_dim]
            msg["fn"] = msg["fn"].expand(torch.broadcast_shapes(msg["fn"].batch_shape, rows))
