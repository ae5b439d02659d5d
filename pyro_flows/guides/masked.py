"""Masked latents: a mask takes rows out of the model's density, so it must take them out of the guide's.

For rows of a plate that have a flow each this is the same mask.  One joint density cannot leave out a part of itself.
A latent that is masked as a whole while no data are has a flat prior, and is drawn and scored as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..programs.masks import is_masked, is_observation, mask_of
from .look import Found, rows_in

FLAT = "For a flat prior write dist.ImproperUniform."


def hides_outside(plate: str | None, found: Found) -> bool:
    """True if a mask hides some of a latent outside of a plate."""
    return any(_frame(site, plate) is None and mask_of(site).hides for site in found.latents.values())


def check_unmasked(owner: str, plate: str | None, found: Found) -> None:
    """Refuse masks on latents outside of a plate.

    Raises:
        ValueError: Naming the site.
    """
    for name, site in found.latents.items():
        mask = mask_of(site)
        if _frame(site, plate) is None and mask.hides and not (mask.is_scalar and not _hides_data(found)):
            way = (
                "where a mask takes out whole rows of a plate, use AutoPlateFlow(model, plate)"
                if plate is None
                else f"a mask may take out rows of plate {plate!r} only"
            )
            raise ValueError(
                f"{owner}: latent site {name!r} is masked, and one joint density cannot leave out a part of itself. "
                f"Mask the observed sites only, so that the prior of {name!r} stays in; {way}. {FLAT}"
            )


def mask_of_rows(plate: str, found: Found) -> Tensor | None:
    """The mask that all latents in a plate have in common, ``(rows, *1s)`` to the plate's dimension.

    None where all rows count.

    Raises:
        ValueError: Naming the sites, if masks divide a row, or leave in the data of a row that they take out.
    """
    inside = {name: site for name, site in found.latents.items() if _frame(site, plate)}
    rows = {name: _rows_of(name, site, plate) for name, site in inside.items()}
    if not rows or all(bool(mask.all()) for mask in rows.values()):
        return None
    (first, mask), *others = rows.items()
    for name, other in others:
        if not torch.equal(mask, other):
            raise ValueError(
                f"AutoPlateFlow: latent sites {first!r} and {name!r} in plate {plate!r} have different masks, so that "
                f"rows are left out in part. {_way_out(plate)}"
            )
    if mask_of(inside[first]).is_scalar and not _hides_data(found):
        return None  # a flat prior
    for name, site in found.observed.items():
        if not (_frame(site, plate) and is_observation(site)):
            continue
        if bool((_reduced(mask_of(site).some, site, plate, torch.any) & ~mask).any()):
            raise ValueError(
                f"AutoPlateFlow: observed site {name!r} in plate {plate!r} counts where latent site {first!r} is "
                f"masked. Mask both alike, or the observed sites only. {FLAT}"
            )
    _check_data_inside(plate, first, found)
    frame = _frame(inside[first], plate)
    return mask.reshape(-1, *(1,) * (-1 - frame.dim))


def _check_data_inside(plate: str, latent: str, found: Found) -> None:
    """Refuse masked rows of a plate without data: what is observed outside may depend on them all the same."""
    data = {name: site for name, site in found.observed.items() if is_observation(site)}
    if not any(_frame(site, plate) for site in data.values()):
        for name, site in data.items():
            if bool(torch.as_tensor(mask_of(site).some).any()):
                raise ValueError(
                    f"AutoPlateFlow: latent site {latent!r} is masked, and the data, such as {name!r}, lie outside of "
                    f"plate {plate!r}, where they may count for the rows that are left out. {FLAT}"
                )


def mask_of_all(plate: str, found: Found) -> Tensor | None:
    """The mask of all rows of a plate, ``(rows,)``; None where all of them count.

    Raises:
        ValueError: As :func:`mask_of_rows`, or if the plate is subsampled, so that the others' masks are not known.
    """
    inside = [name for name, site in found.latents.items() if _frame(site, plate) and is_masked(site)]
    if inside and found.rows and found.rows.size < found.rows.full_size:
        raise ValueError(
            f"AutoPlateFlow.log_prob: latent site {inside[0]!r} is masked, and plate {plate!r} is subsampled "
            f"({found.rows.size} of {found.rows.full_size} rows), so that the masks of the other rows are not known. "
            "Let the plate run over all rows."
        )
    mask = mask_of_rows(plate, found)
    return None if mask is None else mask.flatten()


def _hides_data(found: Found) -> bool:
    return any(mask_of(site).hides for site in found.observed.values() if is_observation(site))


def _rows_of(name: str, site: dict[str, Any], plate: str) -> Tensor:
    """The rows of a latent that count, ``(rows,)``."""
    mask = mask_of(site)
    some, every = (_reduced(part, site, plate, how) for part, how in zip(mask, (torch.any, torch.all), strict=True))
    if not torch.equal(some, every):
        raise ValueError(
            f"AutoPlateFlow: the mask of latent site {name!r} leaves out a part of a row of plate {plate!r}, whose "
            f"flow is one joint density. {_way_out(plate)}"
        )
    return every


def _way_out(plate: str) -> str:
    return (
        f"Mask whole rows, with one mask around all of plate {plate!r}, or the observed sites only, so that the priors "
        "of the latents stay in, as for series that are padded to one length."
    )


def _reduced(mask: Tensor | bool, site: dict[str, Any], plate: str, how: Any) -> Tensor:
    """A mask, reduced to the rows of a plate, ``(rows,)``."""
    frame = _frame(site, plate)
    number = frame.size if frame.size > 0 else rows_in(site, frame.dim)
    whole = torch.as_tensor(mask, device=site["value"].device)
    if whole.dim() < -frame.dim:
        return how(whole).expand(number)
    return how(whole.movedim(frame.dim, 0).reshape(whole.shape[frame.dim], -1), -1).expand(number)


def _frame(site: dict[str, Any], plate: str | None) -> Any:
    return next((frame for frame in site["cond_indep_stack"] if frame.name == plate), None)
