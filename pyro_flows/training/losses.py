"""The loss of rows that a fit minimises: the default one, or what the user asks for."""

from __future__ import annotations

from collections.abc import Callable

from pyro.infer import ELBO
from torch import nn


def checked(caller: str, objective: nn.Module | None, default: Callable[[], nn.Module]) -> nn.Module:
    """Return the objective, or the default one for None; raise TypeError unless it is an objective of rows."""
    if objective is None:
        return default()
    if isinstance(objective, ELBO) or not isinstance(objective, nn.Module):
        got = objective.__name__ if isinstance(objective, type) else type(objective).__name__
        raise TypeError(
            f"{caller}: objective must be a module objective(flow, x, context) -> loss, such as "
            f"objectives.Likelihood() or objectives.FlowMatching(), got {got}"
            + (", which is for fit_svi." if isinstance(objective, ELBO) else ".")
        )
    return objective


def shown(objective: nn.Module) -> Callable[[float], str]:
    """How a progress bar shows a loss."""
    return ("{:.3f} nats" if getattr(objective, "in_nats", False) else "{:.4f}").format
