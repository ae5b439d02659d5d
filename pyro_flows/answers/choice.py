"""The choice of a guide: by the number of latents, and by subsampled plates that hold latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from torch import nn

from ..guides import AutoFlow, AutoPlateFlow, AutoStructuredFlow, init_to_center

MANY = 512  # numbers in all latents, beyond which the guide follows the structure of the model


def choose(model: Callable[..., Any], guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a guide for a model.

    Args:
        model: The model.
        guide: A guide, a function from the model to a guide, or None for the one that suits the model.
        args: The model's arguments.
        kwargs: Its keyword arguments.
    """
    if isinstance(guide, AutoGuide | nn.Module):
        return guide
    if guide is not None:
        return guide(model)
    rows = _subsampled(model, args, kwargs)
    if len(rows) == 1:
        return AutoPlateFlow(model, rows.pop())
    if rows:
        return AutoStructuredFlow(model)
    found = AutoFlow(model).setup(*args, **kwargs)
    return found if found.latent_dim <= MANY else AutoStructuredFlow(model)


def _subsampled(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """Return the plates that run over a part of their rows and hold latents; none if the model does not run."""
    try:
        with pyro.validation_enabled(False), poutine.block():
            trace = poutine.trace(InitMessenger(init_to_center)(model)).get_trace(*args, **kwargs)
    except Exception:  # the setup of an AutoFlow says what is wrong
        return set()
    frames = [frame for name in trace.stochastic_nodes for frame in trace.nodes[name]["cond_indep_stack"]]
    return {frame.name for frame in frames if frame.full_size is not None and frame.size < frame.full_size}
