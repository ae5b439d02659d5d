"""The start of a guide: the Gaussian, or the distribution of the guide's structure, that is nearest to the posterior.

Adam scales each parameter separately and is slow on ill-conditioned posteriors; batch and match is not.  It starts at
the guide's own start and, for posteriors far away, also at the end of some steps of L-BFGS uphill.  A Gaussian that is
near the posterior is kept immediately, else the one with the better ELBO, so that modes of negligible mass are
discarded.  Beyond 512 latents, or 100 with effects of a hierarchy, natural gradients take fewer draws.
"""

import copy
import math
from dataclasses import dataclass

import torch
from pyro import validation_enabled
from torch import Tensor
from tqdm import tqdm

from ..guides import AutoFlow
from ..guides.block_guide import BlockGuide
from ..guides.guide_flow import LIMITS, rank_for
from ..programs.density import Density
from ..programs.log_density import RunBudget, in_parts, or_nan
from ..programs.model_and_guide import Task
from ..programs.plate_rows import MOST, RowShare, RowsOfPlate, number_of_shares
from ..programs.runner import TOTAL
from ..programs.sites import is_masked
from ..sampling.block_conditionals import Layout
from ..sampling.block_gaussian import BlockGaussian, fit_blocks
from ..sampling.gaussian import Gaussian, LowRankGaussian, Watch, fit_gaussian, fit_low_rank
from ..training.interrupts import watching
from ..transforms import NonCentred
from ..user_code import warn_user
from ..vjp import LogDensity

Start = Gaussian | BlockGaussian | LowRankGaussian
SKIPPED = "Ctrl-C: no further search for a start.  Training goes on; Ctrl-C again ends it.\n"


@dataclass(frozen=True)
class Starts:
    """Settings of the search for a start.

    Attributes:
        matched: Latents, beyond which batch and match takes too many draws.
        related: The same with effects of a hierarchy, which are nearly independent given the other latents.
        fewest: The fewest rounds of natural gradients then; fewer are worse than none.
        rounds: The most of them.
        per_latent: Gradients of each round per latent.
        least: The fewest gradients for a start of low rank.
        share: The budget of the start, as a share of the gradients of a fit.
        seconds: The longest search if the model runs one draw at a time.
        least_runs: The fewest runs of such a model for a search.
    """

    matched: int = 512
    related: int = 100
    fewest: int = 10
    rounds: int = 80
    per_latent: int = 4
    least: int = 10_000
    share: float = 0.25
    seconds: float = 60.0
    least_runs: int = 3000


STARTS = Starts()


def start_from_gaussian(
    guide: AutoFlow,
    task: Task,
    power: float = 1.0,
    budget: float = math.inf,
    progress: bool = False,
    seconds: float = STARTS.seconds,
) -> Start | None:
    """Start a guide from the best Gaussian found, or leave it at its start if no other Gaussian is better.

    Latents on circles have no Gaussian.  That of more than 4096 latents is of low rank plus diagonal.  Ctrl-C ends the
    search; the guide starts from the best Gaussian so far.

    Args:
        guide: The guide.
        task: The model and the guide.
        power: The exponent of the posterior that the Gaussian approximates.
        budget: The largest number of gradients to spend.
        progress: True to show a progress bar if the search takes more than a second.
        seconds: The time to spend on a model that runs one draw at a time.
    """
    if guide.has_circles or not _allows(runs := task.settle().budget(seconds), ", or warm_start=True"):
        return None
    with watching(_bar(progress), SKIPPED) as held, validation_enabled(False):
        untempered = runs.counted(Density(task).log_prob)  # draws without density must reach the scores
        watch = runs.watched(held, "fit_svi")

        def density(latent: Tensor) -> Tensor:
            return power * untempered(latent)

        units, dim = guide.flow.units, guide.latent_dim
        if units is not None and dim > (STARTS.matched if units.chained else STARTS.related):
            related = _start_related(guide, units, density, watch)
            if related is not None:
                return related
        if dim > STARTS.matched:
            return _start_wide(guide, density, budget, watch)
        found = _in_best_units(guide, density, budget, watch)
    guide.flow.start_at(found.loc, found.scale_tril.norm(dim=-1) if found.is_poor else found.scale_tril)
    return found


def _in_best_units(guide: AutoFlow, density: LogDensity, budget: float, watch: Watch) -> Gaussian:
    """Return the Gaussian nearest to a density, in the best units of effects if the guide has any.

    The first Gaussian is sought in units of the priors.  There effects have the precision I, and what they have more
    comes from the data.  This makes their potentials, with which the second Gaussian is sought.
    """
    units, (loc, scale) = guide.flow.units, (guide.flow.fixed.loc.detach(), guide.start[1])
    if units is None:
        return fit_gaussian(density, loc, scale, budget=budget, watch=watch)

    in_units = _in_units(units, density)
    first = fit_gaussian(in_units, loc, scale, budget=budget / 2, watch=watch)
    with torch.no_grad():
        z, _ = units.forward_and_log_det(first.loc)
        units.set_potentials(z, torch.cholesky_inverse(first.scale_tril))
        loc, _ = units.inverse_and_log_det(z)
    second = fit_gaussian(in_units, loc, scale, budget=budget / 2, watch=watch)
    if second.elbo >= first.elbo:
        return second
    units.drop_potentials()
    return first


def _in_units(units: NonCentred, density: LogDensity) -> LogDensity:
    """Return the log-density over effects in units of their priors."""

    def in_units(x: Tensor) -> Tensor:
        z, log_det = units.forward_and_log_det(x)
        return density(z) + log_det

    return in_units


def _start_related(guide: AutoFlow, units: NonCentred, density: LogDensity, watch: Watch) -> BlockGaussian | None:
    """Start a guide of many effects, which are taken as independent given the other latents.

    As for few effects there are two fits.  The first tells the precision of each effect given the other latents.  The
    second draws too few to compare their ELBOs, but the potentials have made it more nearly Gaussian.
    """
    columns = [group.columns.T.unsqueeze(1) for group in units.groups]  # (R, 1, d)
    effects = torch.cat([places.flatten() for places in columns])
    others = torch.arange(units.input_dim)[~torch.isin(torch.arange(units.input_dim), effects)]
    layouts = [Layout(others.reshape(1, 1, -1), ())]
    layouts += [Layout(places, ((0, torch.zeros(len(places), dtype=torch.long)),)) for places in columns]
    in_units, loc = _in_units(units, density), guide.flow.fixed.loc.detach()
    first = fit_blocks(in_units, layouts, loc, guide.start[1], watch=watch)
    if first is None:
        return None
    precision = torch.zeros(units.input_dim, units.input_dim).to(loc)
    for places, block in zip(columns, first.blocks[1:], strict=True):
        rows = places[:, 0]
        precision[rows.unsqueeze(-1), rows.unsqueeze(-2)] = torch.cholesky_inverse(block.scale[:, 0]).to(loc)
    with torch.no_grad():
        z, _ = units.forward_and_log_det(_dense(first, layouts)[0].to(loc))
        units.set_potentials(z, precision)
        loc, _ = units.inverse_and_log_det(z)
    second = fit_blocks(in_units, layouts, loc, guide.start[1], watch=watch)
    if second is None:
        units.drop_potentials()
    found = second or first
    loc, covariance = _dense(found, layouts)
    guide.flow.start_at(loc, torch.linalg.cholesky(covariance))
    return found


def _dense(found: BlockGaussian, layouts: list[Layout]) -> tuple[Tensor, Tensor]:
    """Return the mean, ``(D,)``, and the covariance, ``(D, D)``, of effects and of all that they depend on."""
    root, *blocks = found.blocks
    places, size = layouts[0].places.flatten(), sum(layout.places.numel() for layout in layouts)
    loc, factor = root.loc.new_zeros(size), root.loc.new_zeros(size, size)
    loc[places], factor[places[:, None], places] = root.loc.flatten(), root.scale[0, 0]
    for layout, block in zip(layouts[1:], blocks, strict=True):
        rows = layout.places[:, 0]
        loc[rows] = block.loc[:, 0]
        factor[rows.unsqueeze(-1), places] = block.gains @ root.scale[0, 0]
        factor[rows.unsqueeze(-1), rows.unsqueeze(-2)] = block.scale[:, 0]
    return loc, factor @ factor.mT


def _start_wide(guide: AutoFlow, density: LogDensity, budget: float, watch: Watch) -> Start | None:
    """Start a guide of more latents than batch and match has draws for, unless too few rounds are within the budget."""
    dim, gradients = guide.latent_dim, budget / STARTS.share
    if dim > LIMITS.dense:
        if gradients < STARTS.least:
            return None
        sparse = fit_low_rank(density, *guide.start, rank_for(dim), budget=gradients, watch=watch)
        if sparse is not None:
            guide.start_at(sparse.loc, sparse.scale, sparse.directions, sparse.stretch)
        return sparse
    rounds = int(min(STARTS.rounds, gradients / STARTS.per_latent / dim))
    if rounds < STARTS.fewest:
        return None
    everything = Layout(torch.arange(dim).reshape(1, 1, -1), ())
    wide = fit_blocks(density, [everything], *guide.start, rounds=rounds, watch=watch)
    if wide is not None:
        guide.start_at(wide.blocks[0].loc[0, 0], wide.blocks[0].scale[0, 0])
    return wide


def start_from_blocks(guide: BlockGuide, task: Task, progress: bool = False) -> BlockGaussian | None:
    """Start a guide from the best Gaussian of its structure, or leave it at its start if none is better.

    Subsampled plates take all of their rows, part by part.  If that is not possible, the rows of one minibatch count as
    if there were no others: scaled, they would have more density than entropy.

    Args:
        guide: The guide.
        task: The model and the guide.
        progress: True to show a progress bar if the search takes more than a second.
    """
    if not guide.takes_gaussian or not _allows(runs := task.settle().budget(STARTS.seconds)):
        return None
    with watching(_bar(progress), SKIPPED) as held, validation_enabled(False):
        density = density_of_all_rows(guide, task.settle()) if task.subsampled else None
        whole = density is not None or not task.subsampled
        space = Density(task if whole else _unscaled(guide, task))
        layouts = [Layout(*of_block) for of_block in guide.places(whole=whole)]
        start = torch.cat([block.start(whole=whole).flatten() for block in guide.posterior.blocks])
        if density is None and space.dim != len(start):  # the guide was set up with other numbers of rows
            return None
        counted, watch = or_nan(runs.counted(density or space.log_prob)), runs.watched(held, "fit_svi")
        found = fit_blocks(counted, layouts, start, guide.posterior.scale, watch=watch)
    if found is None:
        return None
    guide.start_from(found.blocks)
    return found._replace(is_near=whole)  # rows of a minibatch tell little of the others


def _unscaled(guide: BlockGuide, task: Task) -> Task:
    """Return the model and the guide with the rows of minibatches at scale one."""
    nodes = task.model.single.nodes
    frames = {frame.name: frame for name in task.latents for frame in nodes[name]["cond_indep_stack"]}
    shares = {name: frame.size / (frame.full_size or frame.size) for name, frame in frames.items()}
    share = RowShare({name: RowsOfPlate(None, None, shares[name]) for name in guide.row_plates if name in shares})
    other = copy.copy(task)
    other.model = task.model.on_rows(share)
    return other


def density_of_all_rows(guide: BlockGuide, task: Task) -> LogDensity | None:
    """Return the log-density over the packed latents of all rows, or None if it has no parts, or too many."""
    model, nodes = task.model, task.model.single.nodes
    frames = {frame.name for name in task.latents for frame in nodes[name]["cond_indep_stack"]}
    others = (frames & model.subsamples.keys()) - {*guide.row_plates}
    masked = any(is_masked(nodes[name]) for name in task.latents)
    few = number_of_shares(model.rows, model.sizes) <= MOST
    shares = model.all_rows(list(task.sites("observed"))) if few and not (others or masked) else []
    if not shares:
        return None

    def density_of(share: RowShare) -> LogDensity:
        def density(z: Tensor) -> Tensor:
            values, change = guide.posterior.values(z)
            log_p = model.score_rows(share, values, len(z))[TOTAL]
            return log_p + change if share is shares[0] else log_p

        return density

    return in_parts([density_of(share) for share in shares], model.chunk, model.threads)


def _allows(runs: RunBudget, way: str = "") -> bool:
    """True if a budget is enough for a search; warn otherwise."""
    if runs.number < STARTS.least_runs:
        words = f"no Gaussian is sought to start from, since {runs.words}"
        warn_user(f"fit_svi: {words}. Training begins at the guide's own start; give more steps{way}.")
    return runs.number >= STARTS.least_runs


def _bar(progress: bool) -> tqdm:
    return tqdm(desc="looking for a Gaussian to start from", unit="round", disable=not progress, delay=1, leave=False)
