"""The start of a guide where none is asked for: the prior's centre, or the origin of the unconstrained space.

The centre is the better one where priors know something.  Where they are as wide as LogNormal(-20, 5) it may be absurd:
a noise of e⁻²⁰ makes any data impossible, and steps of an optimiser do not lead out of there.  So the origin is taken
where it is far likelier, data included.  Where neither has a density, as in models whose draws must fit each other,
the first of some places around the origin that has one is taken, as Pyro's NUTS does, or the first such draw of the
latents' own distributions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from pyro import validation_enabled
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from ..programs.program import Program
from .discrete import summed
from .guide_call import Call
from .refusals import check_density

ABSURD = 10.0  # nats per latent by which the origin must be likelier
TRIES = 100  # places around the origin, and draws, where neither has a density


def settle_start(call: Call, *, choose: bool) -> None:
    """Check that a model has a finite density where the latents of its prototype are.

    Args:
        call: The call of a guide that is set up.
        choose: Whether to move the latents to the origin first, if the joint density is far higher there.
    """
    with call.same_draws():
        program = summed(call)
    if choose:
        _choose(call, program)
    check_density(call, program)


def _choose(call: Call, program: Program | None) -> None:
    """Compare densities of unconstrained latents, given the same subsample of data; no random numbers are used up."""
    transforms = call.transforms
    centre = {name: transforms[name].inv(value) for name, value in call.start.items()}
    origin = {name: torch.zeros_like(value) for name, value in centre.items()}
    rows: dict[str, Tensor] = {}

    def log_density(free: dict[str, Tensor]) -> float:
        values = {name: transforms[name](value) for name, value in free.items()}
        if program:
            total = program.log_prob({name: value.unsqueeze(0) for name, value in values.items()}, 1)[0]
        else:
            trace = call.trace_at({**values, **rows})
            sites = [(name, site) for name, site in trace.nodes.items() if site["type"] == "sample"]
            rows.update({name: site["value"] for name, site in sites if isinstance(site["fn"], _Subsample)})
            total = torch.as_tensor(trace.log_prob_sum())
        for name, value in values.items():
            total = total + transforms[name].log_abs_det_jacobian(free[name], value).sum()
        return -math.inf if total.isnan() else float(total)

    with torch.no_grad(), call.same_draws(), validation_enabled(False):
        at_centre = log_density(centre)
        at_origin = log_density(origin) if any(value.any() for value in centre.values()) else at_centre
        least = ABSURD * sum(value.numel() for value in origin.values())
        place = origin if math.isfinite(at_origin) and at_centre < at_origin - least else centre
        if not (math.isfinite(at_centre) or math.isfinite(at_origin)):
            places = _elsewhere(call, centre)
            place = next((elsewhere for elsewhere in places if math.isfinite(log_density(elsewhere))), centre)
        if place is centre:
            return
        # Densities that differ from run to run are given sites that are hidden from the guide, and drawn anew.
        stays = (log_density(centre), log_density(origin)) == (at_centre, at_origin)
    if stays:
        for name, site in call.latents.items():
            site["value"] = transforms[name](place[name])


def _elsewhere(call: Call, centre: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield unconstrained latents within 2 of the origin, then draws of their distributions.

    Those are as the prototype has them, with other latents at the centre.
    """
    for _ in range(TRIES):
        yield {name: 4 * torch.rand_like(value) - 2 for name, value in centre.items()}
    for _ in range(TRIES):
        try:
            drawn = {name: site["fn"].sample() for name, site in call.latents.items()}
        except NotImplementedError:  # by an ImproperUniform
            return
        yield {name: transform.inv(drawn[name]) for name, transform in call.transforms.items()}
