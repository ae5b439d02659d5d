"""The choice of a guide: by the number of latents, and by subsampled plates that hold latents."""

from __future__ import annotations

from typing import Any

from pyro import poutine, validation_enabled
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.trace_struct import Trace
from torch import nn

from ..guides import AutoFlow, AutoPlateFlow, AutoStructuredFlow, init_to_center
from ..programs import Program
from ..programs.program import Args, Function, Kwargs, inner_of
from .record import Question

MANY = 512  # numbers in all latents, beyond which one flow over all of them is slow


def choose(model: Function, args: Args, kwargs: Kwargs, guide: Any) -> tuple[Question, Any]:
    """Return a question about a model, and a guide that answers it.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        guide: A guide, a function from the model to a guide, or None for the one that suits the model.

    Raises:
        ValueError: If the model has no continuous latents, or has parameters.
    """
    program = Program(model, args, kwargs)
    trace = _trace(program)
    _check_no_parameters(inner_of(model), trace)
    if isinstance(guide, AutoGuide | nn.Module):  # it is called with the arguments of the model
        return Question(model, args, kwargs, model), guide
    return Question(program, (), {}, model), guide(program) if guide is not None else _suited(program, trace)


def _suited(program: Program, trace: Trace) -> Any:
    """Return a guide that suits a model."""
    rows = _subsampled(trace)
    if rows:
        return AutoPlateFlow(program, rows.pop()) if len(rows) == 1 else AutoStructuredFlow(program)
    try:
        found = AutoFlow(program).setup()
    except (RuntimeError, ValueError) as error:
        if "no latent" not in str(error):
            raise
        fault = "the model must have a continuous latent site, got none"
        raise ValueError(f"posterior: {fault}. Sum discrete latents by pyro.infer.infer_discrete.") from error
    return found if found.latent_dim <= MANY else AutoStructuredFlow(program)


def _trace(program: Program) -> Trace:
    """Return a trace of the model; an empty one if it does not run, since the setup of the guide says why."""
    try:
        with validation_enabled(False), poutine.block():
            return poutine.trace(InitMessenger(init_to_center)(program)).get_trace()
    except Exception:
        return Trace()


def _check_no_parameters(model: Any, trace: Trace) -> None:
    """Raise ValueError if a model has parameters, of which a posterior is a function."""
    names = [name for name, site in trace.nodes.items() if site["type"] == "param"]
    if isinstance(model, nn.Module):
        names += [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if names:
        fault = f"the model must have no parameters, got {', '.join(map(repr, names[:3]))}"
        raise ValueError(f"posterior: {fault}. Give them priors, or fit them by fit_svi.")


def _subsampled(trace: Trace) -> set[str]:
    """Return the plates that run over a part of their rows and hold latents."""
    frames = [frame for name in trace.stochastic_nodes for frame in trace.nodes[name]["cond_indep_stack"]]
    return {frame.name for frame in frames if frame.full_size is not None and frame.size < frame.full_size}
