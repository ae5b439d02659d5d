"""Predictions: a model run forward at draws of its posterior, for the same or for other arguments."""

from typing import Any

import torch
from pyro import validation_enabled
from pyro.poutine.messenger import Messenger

from ..programs.engines import in_batches
from ..programs.program import Args, Function, Kwargs, nesting_of, trace_at
from ..programs.runner import Runner, choose
from ..programs.sites import Values, is_observation

BATCH = 1000  # draws that run at once


@torch.no_grad()
def predicted(draws: Values, model: Function, args: Args, kwargs: Kwargs, *, again: bool) -> Values:
    """Run a model at draws of latents, and return its other sites, each ``(N, *site_shape)``.

    Args:
        draws: Draws of sites, each ``(N, *site_shape)``.  Deterministic sites, and sites of another shape in the model,
            are not used.
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        again: True to draw the observed sites anew.
    """
    number = len(next(iter(draws.values())))
    program = _Anew()(model) if again else model
    with validation_enabled(False):
        first, last = (trace_at(_Put(draws, i)(program), {}, args, kwargs) for i in (0, number - 1))
    nodes = {name: site for name, site in first.nodes.items() if site["type"] == "sample"}
    held = [name for name, site in nodes.items() if site["infer"].get(HELD)]
    free = [name for name, site in nodes.items() if name not in held and not is_observation(site)]
    run = Runner(program, args, kwargs, first, nesting_of(first))
    drawn = {name for name, _ in run.single.iter_stochastic_nodes()}
    second = {name: last.nodes[name]["value"].unsqueeze(0) for name in drawn}
    run = run.with_(choice=choose(run, second, "auto", "model"))

    def step(part: Values, size: int) -> Values:
        return run.sample(lambda view: {name: view.read(name) for name in free if name in run.single}, part, size)

    return in_batches(step, {name: draws[name] for name in held}, number, BATCH)


HELD = "_held"  # marks a site whose draws are given


class _Put(Messenger):
    """Puts draw ``i`` of some sites into a single run, where their shapes agree, and marks these sites."""

    def __init__(self, draws: Values, i: int) -> None:
        super().__init__()
        self._draws, self._i = draws, i

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        value = self._draws.get(msg["name"])
        if value is None or msg["is_observed"] or msg["value"] is not None or value.shape[1:] != msg["fn"].shape():
            return
        msg["value"], msg["infer"] = value[self._i], {**(msg["infer"] or {}), HELD: True}


class _Anew(Messenger):
    """Draws observed sites anew, except factors."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_observation(msg) and type(msg["fn"]).__name__ != "Unit":
            msg["value"], msg["is_observed"] = None, False
