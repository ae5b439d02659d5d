"""Detection of improper posteriors, which flat priors cause.

A density is not integrable if its logarithm, over the unconstrained space, is a straight line along some direction v.
Then the score times v is constant.  Such directions are null vectors of scores at some places, among the latents with
flat priors.  Each direction is followed as far as floating-point numbers resolve, so no posterior is refused for being
wide.  A density that only levels off is not detected, for example that of a mixture's component.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pyro import validation_enabled
from torch import Tensor
from torch.distributions import constraints

from ..programs.latent_space import LatentSpace
from ..programs.latents import flat_by_mask
from ..programs.log_density import LogDensity, or_nan, score_of
from ..programs.model_and_guide import Task
from ..training.randomness import unchanged
from ..user_code import warn_user

MANY = 200  # latents with flat priors beyond which the search would take long


def check_proper(space: LatentSpace, start: Tensor) -> None:
    """Raise ValueError if the posterior is detectably improper; the message names the sites at fault.

    Args:
        space: The latent space of a guide.
        start: A vector in it, ``(D,)``, to search around.
    """
    flat = _flat_latents(space)
    if not 0 < sum(map(len, flat.values())) <= MANY:
        return
    density = or_nan(space.log_p)
    for on_lines, places in flat.items():
        for direction in _straight_lines(density, start, places, on_lines):
            sites = sorted({space.coordinates[place] for place in (direction.abs() > 0.1).nonzero()})
            which = f"latent site{'s' * (len(sites) > 1)} {', '.join(map(repr, sites))}"
            raise ValueError(
                f"fit_svi: the posterior is improper: nothing in the model bounds {which}, whose prior is flat, in "
                f"some direction. Give {'it' if len(sites) == 1 else 'one of them'} a proper prior."
            )


def check_masked(task: Task) -> None:
    """Warn of priors that are masked as a whole; raise ValueError if they leave the posterior detectably improper."""
    if words := flat_by_mask(*task.traces):
        warn_user(f"fit_svi: the posterior may be improper: {words}.")
        with unchanged(), validation_enabled(False):
            if not task.subsampled and (space := _space_of(task)):
                check_proper(space, space.draw_alone(1, 1)[0])


def _space_of(task: Task) -> LatentSpace | None:
    """Return the latent space of a guide, or None if its draws have no density there."""
    try:
        space = LatentSpace(task)
        space.verify()
    except ValueError:
        return None
    return space


def _flat_latents(space: LatentSpace) -> dict[bool, list[int]]:
    """Return the packed latents with flat priors on the real line (True) and elsewhere (False)."""
    flat: dict[bool, list[int]] = {True: [], False: []}
    for place, name in enumerate(space.coordinates):
        if name not in space.flat:
            continue
        support = space.task.model.single.nodes[name]["fn"].support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if not isinstance(support, constraints.interval):
            flat[isinstance(support, type(constraints.real))].append(place)
    return flat


def _straight_lines(density: LogDensity, start: Tensor, places: list[int], on_lines: bool) -> Iterator[Tensor]:
    """Yield directions, ``(D,)``, among the latents at ``places`` in which the log-density is a straight line."""
    if not places:
        return
    count, eps = max(64, 2 * len(places)), torch.finfo(start.dtype).eps
    noise = torch.randn(count, len(start), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise *= torch.logspace(-1, 0, count, dtype=torch.float64).unsqueeze(-1)
    scores = score_of(density, start + noise.to(start)).double().cpu()
    scores = scores[scores.isfinite().all(-1)][:, places]
    if len(scores) < count / 2:
        return
    mean, centred = scores.mean(0), scores - scores.mean(0)
    floor = 0.0 if on_lines else 1.0  # the size of scores of changes of variables
    round_off = 100 * eps * scores.abs().amax(0).clamp_min(floor)
    constant = centred.abs().amax(0) <= round_off
    axes = torch.eye(len(places), dtype=torch.float64)
    _, sizes, null = torch.linalg.svd(centred[:, ~constant], full_matrices=False)
    null = null[sizes <= round_off.max() * len(scores) ** 0.5] @ axes[~constant]
    # A single latent moves exactly, so far; several latents move only as far as rounding errors stay small.
    reach = 0.1 / eps / centred.abs().max().clamp_min(1e-9).sqrt().item()
    for v in torch.cat([axes[constant], torch.where(null.abs() < 1e-3, 0.0, null)]):
        far = (reach if v.count_nonzero() > 1 else 1e12) if on_lines else 30.0
        direction = torch.zeros(len(start), dtype=torch.float64)
        direction[places] = v
        if _is_straight(density, start, direction, (mean @ v).item(), far):
            yield direction


@torch.no_grad()
def _is_straight(density: LogDensity, start: Tensor, direction: Tensor, slope: float, far: float) -> bool:
    walk = far * torch.tensor([0.0, 0.01, -0.01, 0.1, -0.1, 1.0, -1.0], dtype=torch.float64)
    value = density(start + (walk.unsqueeze(-1) * direction).to(start)).double().cpu()
    return bool(((value - value[0] - walk * slope).abs() <= 0.1).all())
