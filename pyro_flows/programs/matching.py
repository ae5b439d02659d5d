"""A guide's trace beside the model's: the same latents, under the same masks."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Delta, Independent
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample

from .masks import Mask, is_observation, mask_of

KEEPS_MASK = "_keeps_mask"  # marks a guide's site whose density leaves out what the model masks


def check_drawn(owner: str, model: Trace, guide: Trace) -> None:
    """Refuse a guide that draws what is no latent of the model, or counts where the model's latent is masked.

    Either adds an entropy to the objective that nothing in the model bounds.

    Raises:
        ValueError: If the guide draws a site that the model has not, or observes; if a mask takes rows of a latent and
            of the data out of the model, and not out of the guide.
    """
    nodes = model.nodes
    drawn = {name: site for name, site in guide.nodes.items() if _is_latent(site)}
    for what, names in (
        ("not in", [name for name in drawn if name not in nodes]),
        ("observed in", [name for name in drawn if name in nodes and nodes[name]["is_observed"]]),
    ):
        if names:
            sites = f"site{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"
            raise ValueError(
                f"{owner}{sites} of the guide {'are' if len(names) > 1 else 'is'} {what} the model; is it the guide of "
                "another model? Where sites come and go with the data, pad the data and mask the observed sites only."
            )
    for name, site in drawn.items():
        mask = mask_of(nodes[name])
        if mask.every is True or not mask.hides or site["infer"].get(KEEPS_MASK) or _same(mask, mask_of(site)):
            continue
        if _hides_data(model) and not _is_point(site, guide):
            raise ValueError(
                f"{owner}latent site {name!r} is masked in the model, and not in the guide, whose entropy would count "
                "where the model has no density. Build the guide from the masked model, as in "
                "AutoPlateFlow(poutine.mask(model, mask=...), plate), or mask the observed sites only. For a flat "
                "prior write dist.ImproperUniform."
            )


def _is_latent(site: dict[str, Any]) -> bool:
    """True if a site of a guide draws a latent of the model."""
    auxiliary = site["type"] != "sample" or site["is_observed"] or site["infer"].get("is_auxiliary")
    return not (auxiliary or site_is_subsample(site))


def _is_point(site: dict[str, Any], guide: Trace) -> bool:
    """True if a site is a point without entropy, and no draw that another site has been scored for is placed there."""
    fn = site["fn"]
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return isinstance(fn, Delta) and not any(node["infer"].get("is_auxiliary") for node in _sites(guide))


def _sites(trace: Trace) -> list[dict[str, Any]]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


def _same(one: Mask, other: Mask) -> bool:
    pairs = [[torch.as_tensor(part) for part in pair] for pair in zip(one, other, strict=True)]
    return all(bool((a.to(b.device) == b).all()) for a, b in pairs)


def _hides_data(model: Trace) -> bool:
    """True if data are masked too: a mask on latents alone is a flat prior, which is for the guide to count."""
    return any(mask_of(site).hides for site in _sites(model) if is_observation(site))
