"""One fit of a guide by an ELBO: the objective, the start of the guide, the pace of its networks, and the descent.

A flow guide starts from a Gaussian.  Adam scales each parameter separately and is slow on ill-conditioned posteriors;
batch and match is not.  It starts at the guide's own start and, for posteriors far away, also at the end of some steps
of L-BFGS uphill.  A Gaussian that is near the posterior is kept immediately, else the one with the better ELBO, so that
modes of negligible mass are discarded.  Beyond 512 latents natural gradients take fewer draws.

The settings of ``fit_svi``, its warm-up, decay and clipping, were tuned for weights as torch initialises and scales
them.  Guides set slower paces for their networks, which are safe with any optimiser; training puts them aside.  The
parameters of each row take larger steps than shared ones, since each row is seen once in many steps.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pyro import poutine, validation_enabled
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from tqdm import tqdm

from ..conditioners.base import Network
from ..flows import Flow
from ..guides import AutoFlow
from ..guides.base import holders
from ..guides.block_guide import BlockGuide
from ..guides.blocks import Block
from ..guides.contexts import RowContexts
from ..guides.default_flows import DENSE
from ..guides.default_training import Schedule, plan_of
from ..objectives import PathELBO, TemperedELBO
from ..objectives.base import ParticleObjective
from ..programs.error_text import warn_user
from ..programs.latent_space import LatentSpace
from ..programs.log_density import LogDensity, is_breakdown, or_nan
from ..programs.model_and_guide import Task
from ..programs.traces import leaves_of
from ..sampling.block_gaussian import BlockGaussian, Layout, fit_blocks
from ..sampling.gaussian import Gaussian, Watch, fit_gaussian
from ..threads import OPERATIONS
from ..training import distributed
from ..training.checkpoint import fingerprint, steps_of
from ..training.interrupts import watching
from ..training.loop import Descent, Fit, Settings, ask
from ..training.randomness import unchanged
from ..training.stopping import noise_at
from ..transforms import Elementwise, ScaledLinear
from ..transforms.single_precision import InSingle
from ..vjp import is_plain
from .optimizers import optimizers
from .program_checks import culprit, is_vectorised
from .propriety import check_proper

# The attributes of objectives that identify a run.
SETTINGS = "num_particles", "vectorize_particles", "num_steps", "start", "alpha", "buffer_size"
OF_ROWS = 32.0  # the pace of the parameters of rows, unless the rows start near the posterior
PACED = Network, Elementwise, RowContexts, ScaledLinear
# The attributes in which Pyro's JIT objectives keep compiled functions.
RECORDED = "_loss_and_surrogate_loss", "_differentiable_loss", "_jit_loss_and_surrogate_loss"
CONVERGED = 0.003  # the gap to the log evidence, in nats, below which a fit has converged
MATCHED = 512  # latents, beyond which batch and match takes too many draws
FEWEST, ROUNDS, PER_LATENT = 10, 80, 4  # rounds of natural gradients then, and gradients of each per latent
MANY = 64  # draws per step, from which on SOAP does better than Adam
SKIPPED = "Ctrl-C: no further search for a start.  Training goes on; Ctrl-C again ends it.\n"
SHARE = 0.25  # the budget of the start, as a share of the gradients of a fit
ONE_BY_ONE = 8  # draws per step if the model runs one at a time


class ELBOFit:
    """One fit of one guide.

    Args:
        task: The model and the guide.
        objective: The user's objective; None for the one that suits the guide.
        num_particles: The user's number of draws per step; None for the one that suits the guide.
    """

    def __init__(self, task: Task, objective: ELBO | None, num_particles: int | None) -> None:
        self.task, self.plan = task, plan_of(task.guide.call)
        self.guide: Any = task.guide.call
        self.marks: dict[str, Any] = {}  # the default objective's settings, which do not depend on the processes
        self.is_default, self._chooses = objective is None, objective is None and num_particles is None
        self.objective: Any = objective or self._default(num_particles)

    def _default(self, num_particles: int | None) -> ELBO:
        number, processors = num_particles or self.plan.schedule().num_particles, distributed.size()
        if num_particles and num_particles % processors:
            words = f"{num_particles} are those of all {processors} processes together"
            raise ValueError(f"fit_svi: num_particles={words}; give a multiple of {processors}, or leave it out.")
        several, by_plate = number > 1, False
        if several:
            with unchanged():
                by_plate = self.task.settle().guide.engine == "plate"
            if not num_particles and self.task.runs_one_by_one:
                number = min(ONE_BY_ONE, number)
        self.marks = {"num_particles": number, "vectorize_particles": several}
        kind = PathELBO if self.plan.takes_paths else Trace_ELBO
        return kind(-(-number // processors), max_plate_nesting=self.task.model.nesting, vectorize_particles=by_plate)

    def start(self, warm: bool | None, progress: bool = False) -> Gaussian | BlockGaussian | None:
        """Start the guide from a Gaussian and return it, or None if the guide keeps its start.

        Args:
            warm: The user's choice; None for what suits the guide.
            progress: True to show a progress bar if the search takes more than a second.

        Raises:
            ValueError: If the posterior is improper.
        """
        objective = self.objective
        ours = isinstance(objective, PathELBO | ParticleObjective)
        new = self.plan.is_fresh and ours
        if not self.plan.is_joint:
            blocked = new and isinstance(self.guide, BlockGuide)
            return start_from_blocks(self.guide, self.task, progress) if blocked else None
        new = new and objective.vectorize_particles and not self.task.subsampled and self.guide.encoder is None
        if new:
            check_proper(self.guide, self.task)
        if not (new if warm is None else warm):
            return None
        power = objective.beta if isinstance(objective, TemperedELBO) else 1.0
        suited = self.plan.schedule()
        return start_from_gaussian(self.guide, self.task, power, SHARE * suited.steps * suited.num_particles, progress)

    def run(self, asked: dict[str, Any], file: Path | None) -> Fit:
        """Train the guide.

        Args:
            asked: ``steps``, ``lr``, ``clip_norm`` and ``warm_start``, None for defaults; ``on_nonfinite`` and
                ``progress``.
            file: The checkpoint, or None.
        """
        task, guide, objective, plan = self.task, self.guide, self.objective, self.plan
        kept = steps_of(file) if file else None
        plan.prepare(task.model.call, task.model.args, task.model.kwargs)
        start = None if kept else self.start(asked["warm_start"], asked["progress"])
        self._program = _program_of(task, objective)
        parameters = _trained_by(self._loss, task.model.call, guide)
        alone = self._is_alone(parameters)
        with in_training(guide, parameters, objective):
            schedule, fewer = (plan.schedule(near=near, alone=alone) for near in (False, True))
            # The checkpoint of a run keeps its number of steps, and so whether it started near the posterior.
            near = start.is_near and {*parameters} <= {*guide.parameters()} if start else kept == fewer.steps
            if distributed.broadcast(lambda: near):
                schedule = fewer
                if alone and self._chooses and not asked["steps"]:
                    objective.num_particles = -(-fewer.num_particles // distributed.size())
            settings = self._settings(asked, schedule, parameters, alone=alone, file=file)
            by_soap, by_muon = plan.by_soap() if alone else [], plan.by_muon()
            fit = Descent(
                self.joint_loss if alone else self._loss,
                parameters,
                optimizers(parameters, settings.lr, by_soap=by_soap, by_muon=by_muon),
                settings,
                guide,
                lambda: culprit(task),
                companion=objective,
            ).fit()
        if fit.skipped > fit.steps / 5:
            words = f"{fit.skipped} of {fit.steps} steps were skipped, as loss or gradient were not finite"
            warn_user(f"fit_svi: {words}; the guide was trained by the others. {ask(lambda: culprit(task))}")
        return fit

    def _settings(
        self, asked: dict[str, Any], schedule: Schedule, parameters: list[Tensor], *, alone: bool, file: Path | None
    ) -> Settings:
        model, objective = self.task.model, self.objective
        draws = getattr(objective, "num_particles", 1)  # of this process
        is_large = self.task.is_settled and model.chunk == 1  # a single draw is work for several threads
        own = {name: getattr(objective, name, None) for name in SETTINGS} | self.marks
        data = fingerprint((*model.args, *model.kwargs.values()))
        return Settings(
            caller="fit_svi",
            steps=asked["steps"] or getattr(objective, "num_steps", None) or schedule.steps,
            lr=float(asked["lr"] or schedule.lr),
            clip_norm=float(asked["clip_norm"] or schedule.clip_norm),
            on_nonfinite=asked["on_nonfinite"],
            progress=asked["progress"],
            checkpoint=file,
            marks={"objective": type(objective).__name__, **own, "data": data},
            work=math.inf if is_large else OPERATIONS * draws * sum(part.numel() for part in parameters),
            noise=noise_at(CONVERGED, draws * distributed.size()) if alone and not asked["steps"] else 0.0,
        )

    def _loss(self) -> Tensor:
        model, guide, objective = self.task.model, self.guide, self.objective
        if hasattr(objective, "differentiable_loss"):
            with validation_enabled(False) if self.task.has_bare_dimensions else contextlib.nullcontext():
                return objective.differentiable_loss(self._program, guide, *model.args, **model.kwargs)
        # An objective such as RenyiELBO fills in the gradients itself, one such as ReweightedWakeSleep has two losses.
        found = objective.loss_and_grads(self._program, guide, *model.args, **model.kwargs)
        return torch.tensor(sum(found) if isinstance(found, tuple) else found, requires_grad=True)

    def _is_alone(self, parameters: list[Tensor]) -> bool:
        """True if one flow is trained by many draws per step, and nothing else."""
        plain = self.is_default and self.plan.is_joint and self.plan.takes_paths and self.guide.draws_from_flow
        many = plain and self.objective.vectorize_particles and self.marks["num_particles"] >= MANY
        return many and not self.task.subsampled and {*parameters} <= {*self.guide.parameters()}

    @functools.cached_property
    def _space(self) -> LatentSpace:
        return LatentSpace(self.task)

    @functools.cached_property
    def _flow(self) -> Flow:
        flow = self.guide.flow
        *layers, fixed = flow.transforms  # the last layer standardises, so the others can run in single precision
        single = self.guide.has_default_flow and is_plain([flow]) and InSingle.suits(layers)
        return Flow([InSingle(layers), fixed], flow.base) if single else flow

    def joint_loss(self) -> Tensor:
        """Return the loss of the default objective, without the handlers that an ELBO runs a guide under."""
        z, log_q = self._flow().with_path_gradient().rsample_and_log_prob((self.objective.num_particles,))
        return (log_q - self._space.log_p(z)).mean()


def _program_of(task: Task, objective: ELBO) -> Callable[..., Any]:
    """Return the model as an objective runs it: unchanged, or lifted if the objective needs that."""
    if isinstance(objective, TraceEnum_ELBO):
        return task.model.marked
    sums_itself = not isinstance(objective, Trace_ELBO) or isinstance(objective, TraceMeanField_ELBO)
    if sums_itself or not (task.model.enumerated or is_vectorised(objective)):
        return task.model.call
    with unchanged():
        return task.broadcasting


def _trained_by(loss: Callable[[], Tensor], model: Any, guide: Any) -> list[Tensor]:
    """Return the tensors that the loss depends on, in modules and in Pyro's param statements."""
    with poutine.trace(param_only=True) as capture:
        try:
            loss()
        except (ValueError, LinAlgError, FloatingPointError) as error:
            if not is_breakdown(error):
                raise
    found = leaves_of(capture.trace, model, guide)
    unique = {id(parameter): parameter for parameter in found if parameter is not None and parameter.requires_grad}
    if not unique:
        raise ValueError("fit_svi: neither the guide nor the model has parameters to train.")
    return list(unique.values())


def start_from_gaussian(
    guide: AutoFlow, task: Task, power: float = 1.0, budget: float = math.inf, progress: bool = False
) -> Gaussian | BlockGaussian | None:
    """Start a guide from the best Gaussian found, or leave it at its start if no other Gaussian is better.

    Latents on circles have no Gaussian, and more than 4096 latents are too many for a dense one.  Ctrl-C ends the
    search; the guide starts from the best Gaussian so far.

    Args:
        guide: The guide.
        task: The model and the guide.
        power: The exponent of the posterior that the Gaussian approximates.
        budget: The largest number of gradients to spend.
        progress: True to show a progress bar if the search takes more than a second.
    """
    if guide.has_circles:
        return None
    with watching(_bar(progress), SKIPPED) as watch, validation_enabled(False):
        untempered = or_nan(LatentSpace(task).log_p)  # draws without density must reach the scores

        def density(latent: Tensor) -> Tensor:
            return power * untempered(latent)

        if guide.latent_dim > MATCHED:
            return _start_wide(guide, density, budget, watch)
        found = fit_gaussian(density, *guide.start, budget=budget, watch=watch)
    guide.start_at(found.loc, found.scale_tril.norm(dim=-1).diag() if found.is_poor else found.scale_tril)
    return found


def _start_wide(guide: AutoFlow, density: LogDensity, budget: float, watch: Watch) -> BlockGaussian | None:
    """Start a guide of more latents than batch and match has draws for, unless rounds of D gradients cost too much."""
    everything = Layout(torch.arange(guide.latent_dim).reshape(1, 1, -1), ())
    rounds = int(min(ROUNDS, budget / SHARE / PER_LATENT / guide.latent_dim))
    if rounds < FEWEST or guide.latent_dim > DENSE:
        return None
    wide = fit_blocks(density, [everything], *guide.start, rounds=rounds, watch=watch)
    if wide is not None:
        guide.start_at(wide.blocks[0].loc[0, 0], wide.blocks[0].scale[0, 0])
    return wide


def start_from_blocks(guide: BlockGuide, task: Task, progress: bool = False) -> BlockGaussian | None:
    """Start a guide from the best Gaussian of its structure, or leave it at its start if none is better.

    Args:
        guide: The guide.
        task: The model and the guide.
        progress: True to show a progress bar if the search takes more than a second.
    """
    if not guide.takes_gaussian:
        return None
    with watching(_bar(progress), SKIPPED) as watch, validation_enabled(False):
        space = LatentSpace(task)
        start = torch.cat([block.packing.start.flatten() for block in guide.posterior.blocks])
        if space.dim != len(start):  # the guide was set up with other numbers of rows
            return None
        layouts = [Layout(*of_block) for of_block in guide.places()]
        found = fit_blocks(or_nan(space.log_p), layouts, start, guide.posterior.scale, watch=watch)
    if found is None:
        return None
    guide.start_from(found.blocks)
    return found._replace(is_near=not task.subsampled)  # rows of a minibatch tell little of the others


def _bar(progress: bool) -> tqdm:
    shown = progress and distributed.rank() == 0
    return tqdm(desc="looking for a Gaussian to start from", unit="round", disable=not shown, delay=1, leave=False)


@contextlib.contextmanager
def in_training(guide: Any, parameters: list[Tensor], objective: Any) -> Iterator[None]:
    """Put a guide into training mode, with paces that suit ``fit_svi``; afterwards into evaluation mode, with its own.

    The outputs of the guide stay the same, bit for bit.

    Args:
        guide: The guide; guides that a function calls are found by their parameters.
        parameters: The tensors that are trained.
        objective: The loss, whose compiled functions are dropped, since paces are constants in them.
    """
    guides = [guide] if isinstance(guide, nn.Module) else holders(parameters)
    modules = [part for one in guides for part in one.modules()]
    parts = [part for part in modules if isinstance(part, PACED) and part.pace is not None]
    near = [part.contexts for part in modules if isinstance(part, Block) and part.starts_near]
    with contextlib.ExitStack() as stack:
        for one in guides:
            stack.callback(one.eval)
            one.train()
        stack.callback(_forget, objective)
        for part in parts:
            stack.callback(part.set_pace, part.pace)
            far = isinstance(part, RowContexts) and not any(part is contexts for contexts in near)
            part.set_pace(OF_ROWS if far else None)
        _forget(objective)
        yield


def _forget(objective: Any) -> None:
    """Drop the compiled functions of an objective."""
    for name in RECORDED:
        if name in getattr(objective, "__dict__", ()):
            setattr(objective, name, None)
