"""The posterior of a model, from the model and its data alone: the stages of an answer, in their order.

A guide that suits the model is fitted until its draws can be weighted, and checked.  If it is trusted, its draws are
the answer; if its weights are reliable, they correct the draws.  Otherwise it is trained until it has converged, and
checked again.  If that does not suffice, chains from the guide follow, which are exact once they have converged.  If
the check has found mass that chains may not reach, or they do not converge, a population finds the modes, and its guide
is checked in turn.
"""

import math
import time
from collections.abc import Callable
from typing import Any

from pyro import poutine, validation_enabled
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.trace_struct import Trace
from torch import nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..arguments import check_flags, check_integers, check_numbers, check_program
from ..guides import AutoFlow, AutoPlateFlow, AutoStructuredFlow, init_to_center
from ..programs import Program
from ..programs.program import Args, Function, Kwargs, inner_of, runs_programs
from ..time_limit import TimeUp, within
from ..training import distributed
from ..user_code import warn_user
from .record import Posterior, Question
from .stages import Judged, Stages

CALLER = "posterior"
MANY = 256  # latents beyond which a structured guide is faster, unless nearly all are effects of a hierarchy


@runs_programs
def posterior(
    model: Callable[..., Any],
    *args: Any,
    num_draws: int = 4000,
    seconds: float | None = None,
    guide: Any = None,
    progress: bool = True,
    **kwargs: Any,
) -> Posterior:
    """Sample the posterior of a model, and go on until the draws can be trusted.

    A guide is fitted and checked, and its draws are weighted.  If the check does not trust that, the guide is trained
    on, and then chains start from it and run until they have converged.  If mass is missing, a population annealed from
    the prior finds it.

    Args:
        model: A Pyro model; discrete latents of finite support are summed out, and sampled at the end.
        *args: The model's arguments.
        num_draws: The number of draws.
        seconds: The time after which the best answer so far is returned; by default there is no limit.
        guide: A guide, or a class or function that makes one from the model.  A guide itself is taken as it is, unless
            it is known to be untrained: a guide of pyro_flows, or a Pyro ``AutoGuide`` that was never called.
            The default is an :class:`~pyro_flows.AutoFlow`, an :class:`~pyro_flows.AutoStructuredFlow` for many latents
            without a hierarchy of normal effects, and an :class:`~pyro_flows.AutoPlateFlow` if latents lie in a
            subsampled plate.
        progress: Whether to show progress bars, and what each stage finds.
        **kwargs: The model's keyword arguments.

    Returns:
        The :class:`~pyro_flows.Posterior`.  Ctrl-C returns the best answer so far.

    Raises:
        TypeError: If ``guide`` neither is nor makes a guide.
        ValueError: If a number is out of its range, the model has no continuous latents, or has parameters, or its
            posterior is detectably improper; or if several processes run.

    Warns:
        UserWarning: If a stage failed after an earlier one had an answer.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> found = posterior(model, torch.tensor(2.0), progress=False)
        >>> found.verdict, round(found.log_evidence, 1)  # log Normal(2; 0, 2**0.5)
        ('trust', -2.3)
    """
    began = time.perf_counter()
    check_program(model=model)
    check_integers(CALLER, num_draws=num_draws)
    check_numbers(CALLER, above=0, optional=True, seconds=seconds)
    check_flags(CALLER, progress=progress)
    if distributed.size() > 1:
        fault = f"posterior runs in one process, got {distributed.size()}"
        raise ValueError(f"{CALLER}: {fault}. Let them share fit_svi, and call check in one of them.")
    question, chosen = _choose(model, args, kwargs, guide)
    stages = Stages(question, num_draws, progress, seconds or math.inf)
    try:
        with within(seconds or math.inf):
            _go_on(stages, chosen, chosen is guide)
    except (KeyboardInterrupt, Exception) as error:
        if not stages.judged and isinstance(error, TimeUp):
            stages.judged.append(Judged(chosen))
        if not stages.judged:
            raise
        if not isinstance(error, KeyboardInterrupt):
            _warn_of(error)
    while True:
        try:
            return stages.answer(began)
        except Exception as error:
            lost = stages.best
            stages.judged = [one for one in stages.judged if one is not lost]
            if not stages.judged:
                raise
            _warn_of(error)


def _warn_of(error: BaseException) -> None:
    words = str(error) or type(error).__name__
    warn_user(f"{CALLER}: a stage failed, and the best answer before it is returned. {words}")


def _go_on(stages: Stages, guide: Any, is_given: bool) -> None:
    """Fit and check a guide, and go on until the answer can be trusted."""
    try:
        stages.fit(guide, is_given=is_given)
    except (FloatingPointError, LinAlgError) as error:  # for example at a hard edge
        warn_user(f"{CALLER}: training broke down, and a population takes over. {error}")
        stages.cover()
    if not stages.can_check:
        return
    stages.check()
    if stages.is_rough and not (stages.is_settled or stages.best.misses_mass):
        stages.fit_on()
        stages.check()
    if not (stages.is_settled or stages.best.misses_mass):
        stages.sample()
    for _ in range(2):  # a second population starts from what the first one has found
        if stages.can_cover and not stages.is_settled:
            stages.cover()
            stages.check()
            if not (stages.is_settled or stages.best.misses_mass):
                stages.sample()


def _choose(model: Function, args: Args, kwargs: Kwargs, guide: Any) -> tuple[Question, Any]:
    """Return a question about a model, and a guide that answers it.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        guide: A guide, a function from the model to a guide, or None for the one that suits the model.

    Raises:
        TypeError: If no guide is given or made.
        ValueError: If the model has no continuous latents, or has parameters.
    """
    program = Program(model, args, kwargs)
    trace = _trace(program)
    _check_no_parameters(inner_of(model), trace)
    if isinstance(guide, AutoGuide | nn.Module):  # it is called with the arguments of the model
        return Question(model, args, kwargs, model), guide
    if guide is None:
        return Question(program, (), {}, model), _suited(program, trace)
    made = guide(program) if callable(guide) else guide
    if not callable(made):
        fault = f"guide must be a guide, or a class or function that makes one from the model, got {guide!r}"
        raise TypeError(f"{CALLER}: {fault}.")
    return Question(program, (), {}, model), made


def _suited(program: Program, trace: Trace) -> Any:
    """Return a guide that suits a model."""
    rows = _subsampled(trace)
    if rows:
        return AutoPlateFlow(program, rows.pop()) if len(rows) == 1 else AutoStructuredFlow(program)
    try:
        found = AutoFlow(program).setup()
    except ValueError as error:
        if "no latents" not in str(error):
            raise
        fault = "the model must have a continuous latent site, got none"
        raise ValueError(f"{CALLER}: {fault}. Sum discrete latents by pyro.infer.infer_discrete.") from error
    return found if found.latent_dim <= MANY or found.is_of_effects else AutoStructuredFlow(program)


def _trace(program: Program) -> Trace:
    """Return a trace of the model; an empty one if it does not run, since the setup of the guide says why."""
    try:
        with validation_enabled(False), poutine.block():
            return poutine.trace(InitMessenger(init_to_center)(program)).get_trace()
    except Exception:
        return Trace()


def _check_no_parameters(model: Any, trace: Trace) -> None:
    """Raise ValueError if a model has parameters, since its posterior would depend on them."""
    names = [name for name, site in trace.nodes.items() if site["type"] == "param"]
    if isinstance(model, nn.Module):
        names += [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if names:
        fault = f"the model must have no parameters, got {', '.join(map(repr, names[:3]))}"
        raise ValueError(f"{CALLER}: {fault}. Give them priors, or fit them by fit_svi.")


def _subsampled(trace: Trace) -> set[str]:
    """Return the plates that run over a part of their rows and hold latents."""
    frames = [frame for name in trace.stochastic_nodes for frame in trace.nodes[name]["cond_indep_stack"]]
    return {frame.name for frame in frames if frame.full_size is not None and frame.size < frame.full_size}
