"""One fit of a guide by an ELBO: the objective, where the guide starts, the pace of its networks, and the descent.

A flow guide starts from a Gaussian.  Adam moves each parameter at its own pace and so crawls on ill-conditioned
posteriors; batch and match does not.  It starts at the guide's start and, for posteriors far away, from where some
steps of L-BFGS uphill lead.  A Gaussian that is near the posterior is kept at once, else the better of the two in ELBO,
so that modes of negligible mass are discarded.

The settings of ``fit_svi``, its warm-up, decay and clipping, were found for weights as torch has them.  Guides
set paces of their own, slow for networks, so that the steps of any optimiser are safe; these are put aside in training.
What a guide learns of each row moves farther in a step than what all rows share, since a row is seen once in many.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pyro import validation_enabled
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn
from tqdm import tqdm

from ..conditioners.base import Network
from ..flows import Flow
from ..guides import AutoFlow
from ..guides.base import holders
from ..guides.contexts import RowContexts
from ..guides.schedule import plan_of
from ..objectives import PathELBO, TemperedELBO
from ..objectives.particles import ParticleObjective
from ..programs.latent_space import LatentSpace
from ..programs.log_density import or_nan
from ..programs.task import Task
from ..sampling.gaussian import Gaussian, fit_gaussian
from ..threads import OPERATIONS
from ..training import checkpoint as checkpoints
from ..training import distributed
from ..training.interrupts import hold_interrupts
from ..training.loop import Fit, ask, descend
from ..training.randomness import unchanged
from ..training.stopping import noise_at
from ..transforms import Elementwise, ScaledLinear
from ..transforms.single_precision import InSingle
from ..vjp import is_plain
from .optimizers import optimizers
from .program_checks import culprit, fingerprint, program_of, trained_by
from .propriety import check_proper

SETTINGS = "num_particles", "vectorize_particles", "num_steps", "start", "alpha", "buffer_size"  # of objectives
OF_ROWS = 32.0
PACED = Network, Elementwise, RowContexts, ScaledLinear
# where Pyro's JIT objectives keep what they compiled
RECORDED = "_loss_and_surrogate_loss", "_differentiable_loss", "_jit_loss_and_surrogate_loss"
CONVERGED = 0.003  # the gap to the log evidence, in nats, below which a fit ends soon
MANY = 64  # draws in each step, from which on SOAP does better than Adam
SKIPPED = "Ctrl-C: no further search for a start.  Training goes on; Ctrl-C again ends it.\n"
SHARE = 0.25  # of the gradients of a fit, for its start
ONE_BY_ONE = 8  # draws in each step where the model runs one at a time


class ELBOFit:
    """A fit of one guide from one start.

    Args:
        task: The model and the guide.
        objective: The objective that is asked for; None for the one that suits the guide.
        num_particles: The number of draws in each step that is asked for; None for what suits the guide.
    """

    def __init__(self, task: Task, objective: ELBO | None, num_particles: int | None) -> None:
        self.task, self.plan = task, plan_of(task.guide.call)
        self.guide: Any = task.guide.call
        self.asked: dict[str, Any] = {}  # what the user knows of, whatever the number of processes
        self.is_default, self._chooses = objective is None, objective is None and num_particles is None
        self.objective = objective or self._default(num_particles)

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
        self.asked = {"num_particles": number, "vectorize_particles": several}
        kind = PathELBO if self.plan.takes_paths else Trace_ELBO
        return kind(-(-number // processors), max_plate_nesting=self.task.nesting, vectorize_particles=by_plate)

    def start(self, warm: bool | None, progress: bool = False) -> Gaussian | None:
        """Let the guide start from a Gaussian, if that is asked for or suits, and return it.

        Args:
            warm: Whether that is asked for; None for what suits.
            progress: True to show a progress bar where the search takes more than a second.

        Raises:
            ValueError: If the posterior is improper.
        """
        if not self.plan.is_joint:
            return None
        objective = self.objective
        ours = isinstance(objective, PathELBO | ParticleObjective) and objective.vectorize_particles
        new = self.plan.is_fresh and ours and not self.task.subsampled and self.guide.encoder is None
        if new:
            check_proper(self.guide, self.task)
        if not (new if warm is None else warm):
            return None
        power = objective.beta if isinstance(objective, TemperedELBO) else 1.0
        suited = self.plan.schedule()
        budget = SHARE * suited.steps * suited.num_particles
        return start_from_gaussian(self.guide, self.task, power, budget, progress)

    def run(self, settings: dict[str, Any], file: Path | None) -> Fit:
        """Train the guide.

        Args:
            settings: ``steps``, ``lr``, ``clip_norm`` and ``warm_start``, None where nothing is asked for;
                ``on_nonfinite`` and ``progress``.
            file: The checkpoint.
        """
        task, guide, objective = self.task, self.guide, self.objective
        kept = checkpoints.steps_of(file) if file else None
        self.plan.prepare(task.model.call, task.model.args, task.model.kwargs)
        start = None if kept else self.start(settings["warm_start"], settings["progress"])
        self._program = program_of(task, objective)
        parameters = trained_by(self._loss, task.model.call, guide)
        alone = self._is_alone(parameters)
        suited, fewer = (self.plan.schedule(near=near, alone=alone) for near in (False, True))
        lr = float(settings["lr"] or suited.lr)
        annealed = getattr(objective, "num_steps", None)
        own = {name: getattr(objective, name, None) for name in SETTINGS} | self.asked
        given = (*task.model.args, *task.model.kwargs.values())
        with in_training(guide, parameters, objective):
            # A run that goes on has known since its start.
            near = start.is_near and {*parameters} <= {*guide.parameters()} if start else kept == fewer.steps
            near = distributed.broadcast(lambda: near)
            plan = fewer if near else suited
            if alone and near and self._chooses and not settings["steps"]:
                objective.num_particles = -(-plan.num_particles // distributed.size())
            draws = distributed.size() * getattr(objective, "num_particles", 1)
            fit = descend(
                self.joint_loss if alone else self._loss,
                parameters,
                optimizers(parameters, lr, by_soap=self.plan.by_soap() if alone else [], by_muon=self.plan.by_muon()),
                trained=guide,
                steps=settings["steps"] or annealed or plan.steps,
                lr=lr,
                clip_norm=float(settings["clip_norm"] or suited.clip_norm),
                on_nonfinite=settings["on_nonfinite"],
                progress=settings["progress"],
                diagnose=lambda: culprit(task),
                settled=lambda: getattr(objective, "settled", True),
                checkpoint=file,
                settings={"objective": type(objective).__name__, **own, "data": fingerprint(given)},
                companion=objective,
                work=self._work(parameters),
                noise=noise_at(CONVERGED, draws) if alone and not settings["steps"] else 0.0,
            )
        self._warn(fit)
        return fit

    def _work(self, parameters: list[Tensor]) -> float:
        """Return about how many operations a step takes: those of the networks, unless a single draw is large."""
        if self.task.is_settled and self.task.model.chunk == 1:
            return math.inf
        draws = getattr(self.objective, "num_particles", 1)  # of this process
        return OPERATIONS * draws * sum(parameter.numel() for parameter in parameters)

    def _loss(self) -> Tensor:
        model, guide, objective = self.task.model, self.guide, self.objective
        if hasattr(objective, "differentiable_loss"):
            with validation_enabled(False) if self.task.has_bare_dimensions else contextlib.nullcontext():
                return objective.differentiable_loss(self._program, guide, *model.args, **model.kwargs)
        # An objective such as RenyiELBO fills in the gradients itself, one such as ReweightedWakeSleep has two losses.
        found = objective.loss_and_grads(self._program, guide, *model.args, **model.kwargs)
        return torch.tensor(sum(found) if isinstance(found, tuple) else found, requires_grad=True)

    def _is_alone(self, parameters: list[Tensor]) -> bool:
        """True if one flow is trained by many draws a step, and nothing else."""
        plain = self.is_default and self.plan.is_joint and self.plan.takes_paths and self.guide.draws_from_flow
        many = plain and self.objective.vectorize_particles and self.asked["num_particles"] >= MANY
        return many and not self.task.subsampled and {*parameters} <= {*self.guide.parameters()}

    @functools.cached_property
    def _space(self) -> LatentSpace:
        return LatentSpace(self.task)

    @functools.cached_property
    def _flow(self) -> Flow:
        flow = self.guide.flow
        *layers, fixed = flow.transforms  # before the last one all draws are in units of their own
        single = self.guide.has_default_flow and is_plain([flow]) and InSingle.suits(layers)
        return Flow([InSingle(layers), fixed], flow.base) if single else flow

    def joint_loss(self) -> Tensor:
        """The loss of the default objective, without the handlers that an ELBO runs a guide under."""
        z, log_q = self._flow().with_path_gradient().rsample_and_log_prob((self.objective.num_particles,))
        return (log_q - self._space.log_p(z)).mean()

    def _warn(self, fit: Fit) -> None:
        if fit.skipped > fit.steps / 5:
            warnings.warn(
                f"fit_svi: {fit.skipped} of {fit.steps} steps were skipped, as loss or gradient were not finite; what "
                f"was learned comes from the others. {ask(lambda: culprit(self.task))}",
                stacklevel=6,
            )


def start_from_gaussian(
    guide: AutoFlow, task: Task, power: float = 1.0, budget: float = math.inf, progress: bool = False
) -> Gaussian | None:
    """Let a guide start from the best Gaussian found, which is where it is already if none is better.

    Latents on circles have none, and more than 512 latents are too many for a dense one.  Ctrl-C ends the search, and
    the guide starts from what was found.

    Args:
        guide: The guide.
        task: The model and the guide.
        power: The Gaussian is one of the posterior to this power.
        budget: The largest number of gradients to spend.
        progress: True to show a progress bar where the search takes more than a second.
    """
    if not guide.starts_from_gaussian:
        return None
    shown = progress and distributed.rank() == 0
    words = "looking for a Gaussian to start from"
    with (
        tqdm(desc=words, unit="round", disable=not shown, delay=1, leave=False) as bar,
        hold_interrupts(notice=SKIPPED) as asked,
    ):

        def watch() -> bool:
            bar.update()
            return asked()

        with validation_enabled(False):  # a place without density is for the scores to show
            density = or_nan(LatentSpace(task).log_p)
            settings: dict[str, Any] = {"budget": budget, "watch": watch}
            found = fit_gaussian(lambda latent: power * density(latent), *guide.start, **settings)
    guide.start_at(found.loc, found.scale_tril.norm(dim=-1).diag() if found.is_poor else found.scale_tril)
    return found


@contextlib.contextmanager
def in_training(guide: Any, parameters: list[Tensor], objective: Any) -> Iterator[None]:
    """Put a guide into training mode, with paces that suit ``fit_svi``, and then into evaluation mode, with its own.

    The guide computes the same, bit for bit.

    Args:
        guide: The guide; guides that a function calls are found by their parameters.
        parameters: The tensors that are trained.
        objective: The loss, which forgets what it compiled: paces are constants there.
    """
    guides = [guide] if isinstance(guide, nn.Module) else holders(parameters)
    parts = [part for one in guides for part in one.modules() if isinstance(part, PACED) and part.pace is not None]
    with contextlib.ExitStack() as stack:
        for one in guides:
            stack.callback(one.eval)
            one.train()
        stack.callback(_forget, objective)
        for part in parts:
            stack.callback(part.set_pace, part.pace)
            part.set_pace(OF_ROWS if isinstance(part, RowContexts) else None)
        _forget(objective)
        yield


def _forget(objective: Any) -> None:
    for name in RECORDED:
        if name in getattr(objective, "__dict__", ()):
            setattr(objective, name, None)
