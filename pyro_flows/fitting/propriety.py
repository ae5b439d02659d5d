"""Detection of improper posteriors, which flat priors and growing factors cause.

A density is not integrable if its logarithm, over the unconstrained space, is a straight line along some direction v.
Then the score times v is constant.  Such directions are null vectors of scores at some places, among the latents with
flat priors.  Each direction is followed as far as floating-point numbers resolve, so no posterior is refused for being
wide.

Nor is a density integrable if its integral is infinite along one axis, through places that are not chosen for it: by
Fubini's theorem almost all such integrals of an integrable density are finite.  From some draws of the prior the axes
are followed over many magnitudes.  A density that falls no faster than the inverse root of the distance is improper.
The first test is for a fit; ``anneal`` makes both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pyro import validation_enabled
from torch import Tensor
from torch.distributions import constraints

from ..guides import AutoFlow
from ..programs.density import Density
from ..programs.latents import flat_by_mask
from ..programs.model_and_guide import Task
from ..training.randomness import unchanged
from ..user_code import warn_user
from ..vjp import LogDensity, score_of


@dataclass(frozen=True)
class Walks:
    """Constants of the walks along axes.

    Attributes:
        axes: The most axes, and the most latents with flat priors: more would take long.
        places: The number of starts on each axis; all must show the fault.
        steps: The lengths of the steps, in standard deviations of the prior.
        round_off: The relative change of a place there and back from which the edge of a support has rounded it.
        slowest: The power of the distance; a density that falls more slowly than the power -1 has no integral.
        batch: The number of vectors per run of the model, for its memory.
    """

    axes: int = 200
    places: int = 4
    steps: tuple[float, ...] = (3.0, 1e1, 3e1, 1e2, 1e3, 1e4, 1e6, 1e9, 1e12)
    round_off: float = 0.1
    slowest: float = -0.5
    batch: int = 2048


WALKS = Walks()


def check_proper(caller: str, space: Density, start: Tensor) -> None:
    """Raise ValueError if a flat prior leaves the posterior detectably improper; the message names the sites.

    Args:
        caller: The start of the message.
        space: The latent space of a guide.
        start: A vector in it, ``(D,)``, to search around.
    """
    flat: dict[bool, list[int]] = {True: [], False: []}  # the packed latents on the real line, and elsewhere
    for place, name in enumerate(space.placement.coordinates):
        if name in space.flat:
            support = space.task.model.single.nodes[name]["fn"].support
            while isinstance(support, constraints.independent):
                support = support.base_constraint
            if not isinstance(support, constraints.interval):
                flat[isinstance(support, type(constraints.real))].append(place)
    if not 0 < sum(map(len, flat.values())) <= WALKS.axes:
        return
    for on_lines, places in flat.items():
        for direction in _straight_lines(space.log_prob, start, places, on_lines):
            which, one = _named({space.placement.coordinates[place] for place in (direction.abs() > 0.1).nonzero()})
            raise ValueError(
                f"{caller}: the posterior is improper: nothing in the model bounds {which}, whose prior is flat, in "
                f"some direction. Give {'it' if one else 'one of them'} a proper prior."
            )


def _named(sites: set[str]) -> tuple[str, bool]:
    """Return words for some sites, and True if there is only one."""
    one = len(sites) == 1
    return f"latent site{'' if one else 's'} {', '.join(map(repr, sorted(sites)))}", one


def check_masked(task: Task) -> None:
    """Warn of priors that are masked as a whole; raise ValueError if they leave the posterior detectably improper."""
    if words := flat_by_mask(*task.traces):
        warn_user(f"fit_svi: the posterior may be improper: {words}.")
        with unchanged(), validation_enabled(False):
            try:
                space = Density(task)
                space.placement.verify()
            except ValueError:  # the guide's draws have no density
                return
            if not task.subsampled:
                check_proper("fit_svi", space, space.placement.vectors(1, 1)[0])


@torch.no_grad()
def check_bounded(caller: str, guide: AutoFlow, space: Density, z: Tensor) -> None:
    """Raise ValueError if the posterior's integral along the axis of a latent is infinite.

    Args:
        caller: The start of the message.
        guide: The guide whose coordinates the space has.
        space: The space.
        z: Draws of the prior, ``(N, D)``.
    """
    z = z[z.isfinite().all(-1)]
    axes = (~torch.tensor(guide.circular)).nonzero().flatten()  # angles have no end
    axes = axes[torch.randperm(len(axes))[: WALKS.axes]].to(z.device)
    if len(z) < WALKS.places or not len(axes):
        return
    steps = torch.tensor(WALKS.steps).to(z)
    unit = torch.nn.functional.one_hot(axes, z.shape[1]).to(z) * z.std(0)
    walks = torch.stack((steps, -steps)).view(2, -1, 1) * unit.view(-1, 1, 1, z.shape[1])  # (axes, 2, steps, D)
    ends = z[: WALKS.places].view(-1, 1, 1, 1, z.shape[1]) + walks
    parts = []
    for part in ends.flatten(0, -2).split(WALKS.batch):  # rounding errors keep a latent from the edge of its support
        back = space.placement.located(space.constrain(part))
        off = torch.zeros_like(part) if back is None else (back - part).abs() - WALKS.round_off * part.abs()
        parts.append(space.log_prob(part).where((off <= 0).all(-1), math.nan))
    endless = _diverges(torch.cat(parts).view(ends.shape[:-1]).double(), steps.double().log()).all(0).any(-1)
    if bool(endless.any()):
        which, _ = _named({guide.coordinates[int(axis)] for axis in axes[endless]})
        fault = f"the posterior is improper: its density has no end along {which}"
        raise ValueError(f"{caller}: {fault}. Give a prior that falls faster than the other factors grow.")


def _diverges(log_p: Tensor, log_steps: Tensor) -> Tensor:
    """Return True for lines along which a density falls too slowly to have an integral, as far as it is finite.

    Args:
        log_p: The log-density at some steps, ``(*lines, steps)``.
        log_steps: The logarithms of these steps.
    """
    known = (~log_p.isnan() & (log_p < torch.inf)).long().cumprod(-1)
    count = known.sum(-1, keepdim=True)
    slopes = (log_p.diff(dim=-1) / log_steps.diff()).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    last = slopes.gather(-1, (count - 2 - torch.arange(2, device=log_p.device)).clamp_min(0))
    return (count.squeeze(-1) > 2) & (last > WALKS.slowest).all(-1)


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
        walk = far * torch.tensor([0.0, 0.01, -0.01, 0.1, -0.1, 1.0, -1.0], dtype=torch.float64)
        with torch.no_grad():
            value = density(start + (walk.unsqueeze(-1) * direction).to(start)).double().cpu()
        if ((value - value[0] - walk * (mean @ v)).abs() <= 0.1).all():
            yield direction
