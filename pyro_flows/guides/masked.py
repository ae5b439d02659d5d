"""Masked latents: a mask takes rows out of the model's density, so it must take them out of the guide's.

For rows of a plate that have a flow the mask is the same.  One joint density cannot leave out a part of a vector.  But
a part may be *absent* if nothing else depends on it, such as the steps that pad a series.  The guide gives it a
standard normal distribution in the unconstrained space, and takes that off its density.  A latent that is masked as a
whole, while no data are, has a flat prior.  The guide draws and scores it as any other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import validation_enabled
from torch import Tensor
from torch.distributions import biject_to

from ..programs.masks import is_masked, is_observation, mask_of
from .guide_call import Call, Found, frame_of, rows_in

FLAT = "For a flat prior write dist.ImproperUniform."


class RowMasks(NamedTuple):
    """Masks of a plate's latents.

    Attributes:
        rows: True for the rows that count, ``(rows, *1s)`` to the plate's dimension; True itself if all do.
        parts: For each latent that is absent in part, a mask of its present parts, over its batch shape.
    """

    rows: Tensor | bool = True
    parts: dict[str, Tensor] = {}


def check_unmasked(call: Call, found: Found) -> None:
    """Raise ValueError if a mask, other than that of a flat prior, hides some of a latent outside of the plate."""
    hides_data = _hides_data(found)
    for name, site in found.latents.items():
        mask = mask_of(site)
        if mask.hides and (hides_data or not mask.is_scalar) and not frame_of(site, call.plate):
            way = f"a mask may take out rows of plate {call.plate!r} only"
            if call.plate is None:
                way = "where a mask takes out whole rows of a plate, use AutoPlateFlow(model, plate)"
            fault = f"latent site {name!r} is masked, and one joint density cannot leave out a part of itself"
            raise ValueError(f"{call.owner}: {fault}. Mask the observed sites only; {way}. {FLAT}")


def masks_of_rows(found: Found) -> RowMasks:
    """Return the masks of the latents in a plate.

    Raises:
        ValueError: Naming the site, if a mask divides an event, or takes out a row but leaves its data in.
    """
    inside = {name: site for name, site in found.latents.items() if frame_of(site, found.plate)}
    parts = {name: torch.as_tensor(mask_of(site).every) for name, site in inside.items()}
    for name, site in inside.items():
        if not torch.equal(parts[name], torch.as_tensor(mask_of(site).some)):
            fault = f"the mask of latent site {name!r} divides an event"
            raise ValueError(f"AutoPlateFlow: {fault}. Mask whole events, or the observed sites only.")
    hidden = [name for name, part in parts.items() if not part.all()]
    are_flat = all(mask_of(inside[name]).is_scalar for name in hidden) and not _hides_data(found)
    if are_flat or not hidden:
        return RowMasks()
    rows = [_reduced(parts[name], site, found.plate) for name, site in inside.items()]
    first, mask = hidden[0], torch.stack(rows).any(0)
    _check_data(first, mask, found)
    shown = mask.reshape(-1, *(1,) * (-1 - frame_of(inside[first], found.plate).dim))
    divided = {n: part for n, part in parts.items() if not torch.equal(*torch.broadcast_tensors(part, shown))}
    return RowMasks(bool(mask.all()) or shown, divided)


def _check_data(latent: str, mask: Tensor, found: Found) -> None:
    """Refuse data that count for masked rows, or may: with no data in the plate, those outside may depend on all rows.

    Args:
        latent: A masked latent in it, for errors.
        mask: True for the rows that count, ``(rows,)``.
        found: The sites of the model.
    """
    data = {name: site for name, site in found.observed.items() if is_observation(site)}
    inside = {name: site for name, site in data.items() if frame_of(site, found.plate)}
    for name, site in inside.items():
        if bool((_reduced(mask_of(site).some, site, found.plate) & ~mask).any()):
            fault = f"observed site {name!r} in plate {found.plate!r} counts where latent site {latent!r} is masked"
            raise ValueError(f"AutoPlateFlow: {fault}. Mask both alike, or the observed sites only. {FLAT}")
    for name, site in data.items():
        if not inside and bool(torch.as_tensor(mask_of(site).some).any()):
            data_lie = f"the data, such as {name!r}, lie outside of plate {found.plate!r}"
            fault = f"latent site {latent!r} is masked, and {data_lie}, and may count for the rows that are left out"
            raise ValueError(f"AutoPlateFlow: {fault}. {FLAT}")


def patterns_of(masks: RowMasks, found: Found) -> set[bytes]:
    """Return the patterns of absent parts in the rows of a plate: one word of bytes for each distinct row."""
    columns = []
    for name in sorted(masks.parts):
        site = found.latents[name]
        dim, batch = frame_of(site, found.plate).dim, site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
        columns.append(masks.parts[name].bool().expand(batch).movedim(dim, 0).reshape(batch[dim], -1))
    return {bytes(row) for row in torch.cat(columns, -1).tolist()} if columns else set()


def check_absent(call: Call, masks: RowMasks, found: Found, rows: dict[str, Tensor]) -> None:
    """Raise ValueError if a mask hides a part of a latent on which the rest of the model depends.

    The part is moved, and no site's density may change.  All runs have the same random numbers.

    Args:
        call: The call of the guide.
        masks: The masks of the latents.
        found: The sites of the model.
        rows: The rows of a subsampled plate, by its name.
    """
    values = {name: site["value"].detach() for name, site in found.latents.items()}
    for name, mask in masks.parts.items():
        fn, here = found.latents[name]["fn"], values[name]
        bijection, counts = biject_to(fn.support), mask.bool().reshape(mask.shape + (1,) * fn.event_dim)
        known: dict[str, Tensor] = {}
        for shift in (0.0, -3.0, -1.0, 1.0, 3.0):
            moved = torch.where(counts, here, bijection(bijection.inv(here) + shift))
            with call.same_draws(), validation_enabled(False):
                torch.manual_seed(0)
                trace = call.trace_at({**values, **rows, name: moved})
                trace.compute_log_prob()
            densities = {key: site["log_prob"] for key, site in trace.nodes.items() if site["type"] == "sample"}
            known = known or densities
            for key, log_prob in densities.items():
                if not torch.allclose(log_prob, known[key], rtol=1e-5, atol=1e-6, equal_nan=True):
                    fault = f"hides a part of it that the rest of the model depends on, as site {key!r}"
                    way = "Mask whole rows, with one mask around all of the plate, or the observed sites only"
                    raise ValueError(f"AutoPlateFlow: the mask of latent site {name!r} {fault}. {way}.")


def masks_of_all(found: Found) -> RowMasks:
    """Return the masks of the latents of all rows of a plate.

    Raises:
        ValueError: As :func:`masks_of_rows`, or if the plate is subsampled, which leaves other rows' masks unknown.
    """
    inside = [name for name, site in found.latents.items() if frame_of(site, found.plate) and is_masked(site)]
    if inside and found.rows and found.rows.size < found.rows.full_size:
        subsampled = f"plate {found.plate!r} is subsampled ({found.rows.size} of {found.rows.full_size} rows)"
        fault = f"latent site {inside[0]!r} is masked, and {subsampled}"
        raise ValueError(f"AutoPlateFlow.log_prob: {fault}. Let the plate run over all rows.")
    return masks_of_rows(found)


def _hides_data(found: Found) -> bool:
    return any(mask_of(site).hides for site in found.observed.values() if is_observation(site))


def _reduced(mask: Tensor | bool, site: dict[str, Any], plate: str | None) -> Tensor:
    """Return a mask, reduced to the rows of a plate, ``(rows,)``."""
    frame = frame_of(site, plate)
    dim, number = frame.dim, frame.size if frame.size > 0 else rows_in(site, frame.dim)
    whole = torch.as_tensor(mask, device=site["value"].device)
    if whole.dim() < -dim:
        return whole.any().expand(number)
    return whole.movedim(dim, 0).reshape(whole.shape[dim], -1).any(-1).expand(number)
