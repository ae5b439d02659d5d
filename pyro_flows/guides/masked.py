"""Masked latents: a mask takes rows out of the model's density, so it must take them out of the guide's.

For rows that have a flow the mask is the same.  One joint density cannot leave out a part of a vector.  But
a part may be *absent* if nothing else depends on it, such as the steps that pad a series.  The guide gives it a
standard normal distribution in the unconstrained space, and takes that off its density.  A latent that is masked as a
whole, while no data are, has a flat prior.  The guide draws and scores it as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from pyro import validation_enabled
from torch import Tensor
from torch.distributions import biject_to

from ..programs.engines import Site
from ..programs.latents import named
from ..programs.masks import is_masked, is_observation, mask_of
from .guide_call import Call, Found, Key, frames_of, rows_in

FLAT = "For a flat prior write dist.ImproperUniform."


class RowMasks(NamedTuple):
    """Masks of the latents in the rows of some plates.

    Attributes:
        rows: True for the rows that count, aligned with the plates' dimensions; True itself if all do.
        parts: For each latent that is absent in part, a mask of its present parts, over its batch shape.
    """

    rows: Tensor | bool = True
    parts: dict[str, Tensor] = {}


def check_unmasked(call: Call, found: Found) -> None:
    """Raise ValueError if a mask, other than that of a flat prior, hides some of a latent outside of the plates."""
    hides_data = _hides_data(found)
    for name, site in found.latents.items():
        mask = mask_of(site)
        if mask.hides and (hides_data or not mask.is_scalar) and not frames_of(site, call.plates):
            way = f"a mask may take out rows of plate {named(call.plates)} only"
            if not call.plates:
                way = "where a mask takes out whole rows of a plate, use AutoPlateFlow(model, plate)"
            fault = f"latent site {name!r} is masked, and one joint density cannot leave out a part of itself"
            raise ValueError(f"{call.owner}: {fault}. Mask the observed sites only; {way}. {FLAT}")


def masks_of_rows(found: Found) -> dict[Key, RowMasks]:
    """Return the masks of the latents in rows, by the plates of the rows.

    Raises:
        ValueError: Naming the site, if a mask divides an event, or takes out a row but leaves its data in.
    """
    blocks: dict[Key, dict[str, Site]] = {}
    for name, site in found.latents.items():
        if key := tuple(frame.name for frame in frames_of(site, found.plates)):
            blocks.setdefault(key, {})[name] = site
    return {key: _masks_of(key, inside, found) for key, inside in blocks.items()}


def _masks_of(key: Key, inside: dict[str, Site], found: Found) -> RowMasks:
    parts = {name: torch.as_tensor(mask_of(site).every) for name, site in inside.items()}
    for name, site in inside.items():
        if not torch.equal(parts[name], torch.as_tensor(mask_of(site).some)):
            fault = f"the mask of latent site {name!r} divides an event"
            raise ValueError(f"{found.owner}: {fault}. Mask whole events, or the observed sites only.")
    hidden = [name for name, part in parts.items() if not part.all()]
    are_flat = all(mask_of(inside[name]).is_scalar for name in hidden) and not _hides_data(found)
    if are_flat or not hidden:
        return RowMasks()
    mask = torch.stack([_reduced(parts[name], site, key) for name, site in inside.items()]).any(0)
    _check_data(hidden[0], mask, key, found)
    divided = {n: part for n, part in parts.items() if not torch.equal(*torch.broadcast_tensors(part, mask))}
    return RowMasks(bool(mask.all()) or mask, divided)


def _check_data(latent: str, mask: Tensor, key: Key, found: Found) -> None:
    """Refuse data that count for masked rows, or may: with no data in the rows, those outside may depend on all rows.

    Args:
        latent: A masked latent in the rows, for errors.
        mask: True for the rows that count, aligned.
        key: The plates of the rows.
        found: The sites of the model.
    """
    data = {name: site for name, site in found.observed.items() if is_observation(site)}
    inside = {name: site for name, site in data.items() if len(frames_of(site, key)) == len(key)}
    for name, site in inside.items():
        if bool((_reduced(mask_of(site).some, site, key) & ~mask).any()):
            fault = f"observed site {name!r} in plate {named(key)} counts where latent site {latent!r} is masked"
            raise ValueError(f"{found.owner}: {fault}. Mask both alike, or the observed sites only. {FLAT}")
    for name, site in data.items():
        if not inside and bool(torch.as_tensor(mask_of(site).some).any()):
            data_lie = f"the data, such as {name!r}, lie outside of plate {named(key)}"
            fault = f"latent site {latent!r} is masked, and {data_lie}, and may count for the rows that are left out"
            raise ValueError(f"{found.owner}: {fault}. {FLAT}")


def patterns_of(key: Key, masks: RowMasks, found: Found) -> set[bytes]:
    """Return the patterns of absent parts in the rows of some plates: one word of bytes for each distinct row."""
    columns = []
    for name in sorted(masks.parts):
        site = found.latents[name]
        dims = [frame.dim for frame in frames_of(site, key)]
        batch = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
        whole = masks.parts[name].bool().expand(batch).movedim(dims, [*range(len(dims))])
        columns.append(whole.reshape(whole.shape[: len(dims)].numel(), -1))
    return {bytes(row) for row in torch.cat(columns, -1).tolist()} if columns else set()


def check_absent(call: Call, masks: RowMasks, found: Found, rows: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a mask hides a part of a latent on which the rest of the model depends.

    The part is moved, and no site's density may change.  All runs have the same random numbers.

    Args:
        call: The call of the guide.
        masks: The masks of the latents.
        found: The sites of the model.
        rows: The rows of subsampled plates, by their names.
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
                    raise ValueError(f"{call.owner}: the mask of latent site {name!r} {fault}. {way}.")


def masks_of_all(found: Found) -> dict[Key, RowMasks]:
    """Return the masks of the latents of all rows.

    Raises:
        ValueError: As :func:`masks_of_rows`, or if a plate is subsampled, which leaves other rows' masks unknown.
    """
    for name, site in found.latents.items():
        for frame in frames_of(site, found.plates):
            rows = found.rows[frame.name]
            if is_masked(site) and rows.size < rows.full_size:
                subsampled = f"plate {frame.name!r} is subsampled ({rows.size} of {rows.full_size} rows)"
                fault = f"latent site {name!r} is masked, and {subsampled}"
                raise ValueError(f"{found.owner}.log_prob: {fault}. Let the plate run over all rows.")
    return masks_of_rows(found)


def _hides_data(found: Found) -> bool:
    return any(mask_of(site).hides for site in found.observed.values() if is_observation(site))


def _reduced(mask: Tensor | bool, site: Site, key: Key) -> Tensor:
    """Return a mask of the rows of some plates, aligned: True for rows with a part that counts."""
    frames = frames_of(site, key)
    sizes = {frame.dim: frame.size if frame.size > 0 else rows_in(site, frame.dim) for frame in frames}
    whole = torch.as_tensor(mask, device=site["value"].device)
    depth = -min(sizes)
    whole = whole.reshape((1,) * (depth - whole.dim()) + whole.shape)
    others = [dim for dim in range(-whole.dim(), 0) if dim not in sizes]
    reduced = whole.any(others, keepdim=True) if others else whole
    aligned = [sizes.get(dim, 1) for dim in range(-depth, 0)]
    return reduced.reshape(reduced.shape[reduced.dim() - depth :]).expand(aligned)
