"""Flat priors that nothing in the model makes up for: there is no posterior to fit then.

A density is not integrable if its logarithm, in the unconstrained space and with the change of variables in it, is a
straight line all along some direction v; then the score times v is the same everywhere.  Among the latents with flat
priors such directions are found as null vectors of scores at some places.  Each is then walked along as far as floating
point numbers resolve, so that no posterior is refused for being wide.  A density that merely levels off, as that of a
component of a mixture does, is not found out.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyro.distributions as dist
import torch
from pyro import validation_enabled
from torch import Tensor
from torch.distributions import constraints

from ..guides import AutoFlow
from ..programs.latent_space import LatentSpace
from ..programs.log_density import LogDensity, or_nan, score_of
from ..programs.task import Task

MANY = 200  # latents with flat priors, beyond which the search would take long


def check_proper(guide: AutoFlow, task: Task) -> None:
    """Refuse a model whose posterior cannot be normalised, by the names of the sites at fault, where that shows."""
    names, flat = _flat_latents(guide)
    if not 0 < sum(map(len, flat.values())) <= MANY:
        return
    with validation_enabled(False):
        density = or_nan(LatentSpace(task).log_p)
        for on_lines, places in flat.items():
            for direction in _straight_lines(density, guide.start[0], places, on_lines):
                sites = sorted({names[place] for place in (direction.abs() > 0.1).nonzero().flatten().tolist()})
                which = f"latent site{'s' * (len(sites) > 1)} {', '.join(map(repr, sites))}"
                raise ValueError(
                    f"fit_svi: the posterior is improper: nothing in the model bounds {which}, whose prior is flat, in "
                    f"some direction. Give {'it' if len(sites) == 1 else 'one of them'} a proper prior."
                )


def _flat_latents(guide: AutoFlow) -> tuple[list[str], dict[bool, list[int]]]:
    """Return the site of each packed latent, and those with flat priors: on the real line (True), and elsewhere."""
    names: list[str] = []
    flat: dict[bool, list[int]] = {True: [], False: []}
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        fn, support = site["fn"], site["fn"].support
        size = guide._unconstrained_shapes[name].numel()
        places = range(len(names), len(names) + size)
        names += [name] * size
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        while isinstance(fn, dist.Independent):
            fn = fn.base_dist
        is_flat = isinstance(fn, dist.ImproperUniform | dist.MaskedDistribution)
        if is_flat and not isinstance(support, constraints.interval):
            flat[isinstance(support, type(constraints.real))] += places
    return names, flat


def _straight_lines(density: LogDensity, start: Tensor, places: list[int], on_lines: bool) -> Iterator[Tensor]:
    """Directions, ``(D,)``, among the latents at ``places`` in which the log-density is a straight line."""
    if not places:
        return
    count, eps = max(64, 2 * len(places)), torch.finfo(start.dtype).eps
    noise = torch.randn(count, len(start), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise *= torch.logspace(-1, 0, count, dtype=torch.float64).unsqueeze(-1)
    scores = score_of(density, start + noise.to(start)).double().cpu()
    scores = scores[scores.isfinite().all(-1)][:, places]
    if len(scores) < count / 2:
        return
    mean, spread = scores.mean(0), scores - scores.mean(0)
    floor = 0.0 if on_lines else 1.0  # the size of the scores of changes of variables
    round_off = 100 * eps * scores.abs().amax(0).clamp_min(floor)
    still = spread.abs().amax(0) <= round_off
    axes = torch.eye(len(places), dtype=torch.float64)
    _, sizes, null = torch.linalg.svd(spread[:, ~still], full_matrices=False)
    null = null[sizes <= round_off.max() * len(scores) ** 0.5] @ axes[~still]
    # One latent is moved exactly and can go far; several are moved as far as their round-off is small.
    reach = 0.1 / eps / spread.abs().max().clamp_min(1e-9).sqrt().item()
    for v in torch.cat([axes[still], torch.where(null.abs() < 1e-3, 0.0, null)]):
        far = (reach if v.count_nonzero() > 1 else 1e12) if on_lines else 30.0
        direction = torch.zeros(len(start), dtype=torch.float64)
        direction[places] = v
        if _is_straight(density, start, direction, (mean @ v).item(), far):
            yield direction


@torch.no_grad()
def _is_straight(density: LogDensity, start: Tensor, direction: Tensor, slope: float, far: float) -> bool:
    walk = far * torch.tensor([0.0, 0.01, -0.01, 0.1, -0.1, 1.0, -1.0], dtype=torch.float64)
    value = density(start + (walk.unsqueeze(-1) * direction).to(start)).double().cpu()
    bend = (value - value[0] - walk * slope).abs()
    return bool((bend <= 0.1).all())
