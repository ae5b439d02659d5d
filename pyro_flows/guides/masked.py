"""Masked latents: a mask takes rows out of the model's density, so it must take them out of the guide's.

For rows of a plate that have a flow each this is the same mask.  One joint density cannot leave out a part of itself,
but a part that nothing else depends on, as the steps that pad a series, is *absent*: the guide gives it the law of a
standard normal, unconstrained, and takes that off its density.  A latent that is masked as a whole while no data are
has a flat prior, and is drawn and scored as ever.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from pyro import poutine, validation_enabled
from torch import Tensor
from torch.distributions import biject_to

from ..programs.masks import is_masked, is_observation, mask_of
from .guide_call import Call
from .prototype import Found, frame_of, rows_in

FLAT = "For a flat prior write dist.ImproperUniform."


def hides_outside(plate: str | None, found: Found) -> bool:
    """True if a mask hides some of a latent outside of a plate."""
    return any(frame_of(site, plate) is None and mask_of(site).hides for site in found.latents.values())


def check_unmasked(call: Call, found: Found) -> None:
    """Refuse masks on latents outside of a plate.

    Raises:
        ValueError: Naming the site.
    """
    for name, site in found.latents.items():
        mask = mask_of(site)
        is_flat = mask.is_scalar and not _hides_data(found)
        if frame_of(site, call.plate) is None and mask.hides and not is_flat:
            way = f"a mask may take out rows of plate {call.plate!r} only"
            if call.plate is None:
                way = "where a mask takes out whole rows of a plate, use AutoPlateFlow(model, plate)"
            fault = f"latent site {name!r} is masked, and one joint density cannot leave out a part of itself"
            raise ValueError(f"{call.owner}: {fault}. Mask the observed sites only; {way}. {FLAT}")


class RowMasks(NamedTuple):
    """The parts of a plate's latents that count.

    Attributes:
        rows: The rows that count, ``(rows, *1s)`` to the plate's dimension; None where all do.
        parts: For each latent that is absent in part, a mask of what counts, over the latent's batch shape.
    """

    rows: Tensor | None = None
    parts: dict[str, Tensor] = {}

    @property
    def context(self) -> Any:
        """A context in which the rows count that do."""
        return nullcontext() if self.rows is None else poutine.mask(mask=self.rows)


def masks_of_rows(plate: str | None, found: Found) -> RowMasks:
    """Return what counts of the latents in a plate.

    Raises:
        ValueError: Naming the site, if a mask leaves in the data of a row that it takes out, or divides an event.
    """
    inside = {name: site for name, site in found.latents.items() if frame_of(site, plate)}
    rows = {name: _rows_of(name, site, plate) for name, site in inside.items()}
    parts = {name: torch.as_tensor(mask_of(site).every) for name, site in inside.items()}
    hidden = [name for name, part in parts.items() if not part.all()]
    are_flat = all(mask_of(inside[name]).is_scalar for name in hidden) and not _hides_data(found)
    if are_flat or not hidden:
        return RowMasks()
    first, mask = hidden[0], torch.stack([*rows.values()]).any(0)
    for name, site in found.observed.items():
        counts = frame_of(site, plate) and is_observation(site)
        if counts and bool((_reduced(mask_of(site).some, site, plate) & ~mask).any()):
            fault = f"observed site {name!r} in plate {plate!r} counts where latent site {first!r} is masked"
            raise ValueError(f"AutoPlateFlow: {fault}. Mask both alike, or the observed sites only. {FLAT}")
    _check_data_inside(plate, first, found)
    frame = frame_of(inside[first], plate)
    shown = mask.reshape(-1, *(1,) * (-1 - frame.dim))
    divided = {n: part for n, part in parts.items() if not torch.equal(*torch.broadcast_tensors(part, shown))}
    return RowMasks(None if bool(mask.all()) else shown, divided)


def patterns_of(plate: str | None, masks: RowMasks, found: Found) -> set[bytes]:
    """Return what of a row is absent, for each row of a plate: which of its numbers count, in one word."""
    if not masks.parts:
        return set()
    columns = []
    for name in sorted(masks.parts):
        site = found.latents[name]
        dim, batch = frame_of(site, plate).dim, site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
        columns.append(masks.parts[name].bool().expand(batch).movedim(dim, 0).reshape(batch[dim], -1))
    return {bytes(row) for row in torch.cat(columns, -1).tolist()}


def check_absent(call: Call, masks: RowMasks, found: Found, rows: dict[str, Tensor]) -> None:
    """Refuse masks that hide a part of a latent on which the rest of the model depends.

    The part is moved, and no site's density may change; sites that are drawn are drawn alike each time.

    Args:
        call: The call of the guide.
        masks: What counts of the latents.
        found: The latents.
        rows: The rows of the plate, by its name, where it is subsampled.

    Raises:
        ValueError: Naming the latent and the site that depends on it.
    """
    values = {name: site["value"].detach() for name, site in found.latents.items()}

    def densities(name: str, shift: float) -> dict[str, Tensor]:
        fn, here = found.latents[name]["fn"], values[name]
        bijection = biject_to(fn.support)
        counts = masks.parts[name].bool()
        there = bijection(bijection.inv(here) + shift)
        moved = torch.where(counts.reshape(counts.shape + (1,) * fn.event_dim), here, there)
        with torch.random.fork_rng(), validation_enabled(False):
            torch.manual_seed(0)
            trace = call.trace_at({**values, **rows, name: moved})
            trace.compute_log_prob()
        return {key: site["log_prob"] for key, site in trace.nodes.items() if site["type"] == "sample"}

    for name in masks.parts:
        known = densities(name, 0.0)
        for shift in (-3.0, -1.0, 1.0, 3.0):
            for site, log_prob in densities(name, shift).items():
                if not torch.allclose(log_prob, known[site], rtol=1e-5, atol=1e-6, equal_nan=True):
                    fault = f"hides a part of it that the rest of the model depends on, as site {site!r}"
                    way = "Mask whole rows, with one mask around all of the plate, or the observed sites only"
                    raise ValueError(f"AutoPlateFlow: the mask of latent site {name!r} {fault}. {way}.")


def _check_data_inside(plate: str | None, latent: str, found: Found) -> None:
    """Refuse masked rows of a plate without data: what is observed outside may depend on them all the same."""
    data = {name: site for name, site in found.observed.items() if is_observation(site)}
    if not any(frame_of(site, plate) for site in data.values()):
        for name, site in data.items():
            if bool(torch.as_tensor(mask_of(site).some).any()):
                fault = (
                    f"latent site {latent!r} is masked, and the data, such as {name!r}, lie outside of plate {plate!r}"
                )
                raise ValueError(f"AutoPlateFlow: {fault}, and may count for the rows that are left out. {FLAT}")


def masks_of_all(plate: str, found: Found) -> RowMasks:
    """Return what counts of the latents of all rows of a plate.

    Raises:
        ValueError: As :func:`masks_of_rows`, or if the plate is subsampled, so that the others' masks are not known.
    """
    inside = [name for name, site in found.latents.items() if frame_of(site, plate) and is_masked(site)]
    if inside and found.rows and found.rows.size < found.rows.full_size:
        subsampled = f"plate {plate!r} is subsampled ({found.rows.size} of {found.rows.full_size} rows)"
        fault = f"latent site {inside[0]!r} is masked, and {subsampled}"
        raise ValueError(f"AutoPlateFlow.log_prob: {fault}. Let the plate run over all rows.")
    return masks_of_rows(plate, found)


def _hides_data(found: Found) -> bool:
    return any(mask_of(site).hides for site in found.observed.values() if is_observation(site))


def _rows_of(name: str, site: dict[str, Any], plate: str | None) -> Tensor:
    """Return the rows in which some of a latent counts, ``(rows,)``."""
    mask = mask_of(site)
    if not torch.equal(*(torch.as_tensor(part) for part in mask)):
        fault = f"the mask of latent site {name!r} divides an event"
        raise ValueError(f"AutoPlateFlow: {fault}. Mask whole events, or the observed sites only.")
    return _reduced(mask.every, site, plate)


def _reduced(mask: Tensor | bool, site: dict[str, Any], plate: str | None) -> Tensor:
    """A mask, reduced to the rows of a plate, ``(rows,)``."""
    frame = frame_of(site, plate)
    number = frame.size if frame.size > 0 else rows_in(site, frame.dim)
    whole = torch.as_tensor(mask, device=site["value"].device)
    if whole.dim() < -frame.dim:
        return whole.any().expand(number)
    return whole.movedim(frame.dim, 0).reshape(whole.shape[frame.dim], -1).any(-1).expand(number)
