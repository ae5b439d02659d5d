"""Sites outside of a guide: discrete latents, which are summed out, point masses, and sites that were replaced.

Discrete latents have finite support.  The model derives sites that ``poutine.reparam`` replaced from its latents: ``x``
from ``x_decentered``.
"""

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import get_mask
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from ..programs.engines import in_batches
from ..programs.program import nesting_of, signature_of, trace_at
from ..programs.runner import Runner, choose
from ..programs.sites import Values, is_point, is_summable
from .guide_call import Call


class HideDiscrete(BlockMessenger):
    """Handler that hides point masses, and discrete latents that can be summed out, from the guide of a model.

    Attributes:
        names: The names of such discrete latents that the model had so far.
    """

    def __init__(self) -> None:
        super().__init__(hide_fn=self._hides)
        self.names: set[str] = set()

    def _hides(self, msg: dict[str, Any]) -> bool:
        if msg["type"] != "sample" or msg["is_observed"]:
            return False
        if is_summable(msg["fn"]):
            self.names.add(msg["name"])
            return True
        return is_point(msg["fn"])


def hidden_names(model: Any) -> set[str]:
    """Return the names of the discrete latents that are hidden in a guide's model, which a loaded guide lacks."""
    return model.args[1].args[0].names if model else set()


def summed(call: Call) -> Runner:
    """Return the model as a program, with the hidden discrete latents summed out of its density."""
    starts, hidden = call.model.args  # the guide's model is handled by InitMessenger, and before by HideDiscrete
    hides, inner = hidden.args

    def sampled(site: dict[str, Any]) -> Tensor:
        try:
            return site["fn"].sample()
        except NotImplementedError:  # a flat prior
            return starts.init_fn(site)

    program, values = (InitMessenger(sampled)(inner), {}) if hides.names else (inner, call.start)
    single = trace_at(program, values, call.args, call.kwargs)
    sites = prune_subsample_sites(single).iter_stochastic_nodes()
    names = tuple(name for name, site in sites if is_summable(site["fn"]))
    return Runner(inner, call.args, call.kwargs, single, nesting_of(single), names)


def draw_discrete(call: Call, latents: Values) -> Values:
    """Sample the hidden discrete latents given the guide's latents, in Pyro's ``Predictive``.

    ``Predictive`` masks all densities, so that further sites in a guide do not count.  Outside of it nothing is
    sampled.  Nor is it if a plate is subsampled, data are missing or another guide has some latents: these unknowns
    would have to be summed out too.

    Args:
        call: The call of the guide; its model has the guide's handlers.
        latents: The guide's latents, with or without a plate of draws.
    """
    if not latents or get_mask() is not False or not hidden_names(call.model):
        return {}
    program = summed(call)
    sites, found = program.single.nodes, Values()
    latent = {name for name, site in program.single.iter_stochastic_nodes() if not is_point(site["fn"])}
    if program.subsamples or not program.enumerated or latent != {*latents, *program.enumerated}:
        return {}
    # A plate of draws lies to the left of the latents' plates; a discrete latent may lie in more plates.
    depth = max(value.dim() - sites[name]["fn"].event_dim for name, value in latents.items())
    several = any(value.dim() > sites[name]["value"].dim() for name, value in latents.items())
    rows = {name: value.reshape(-1, *sites[name]["value"].shape) for name, value in latents.items()}
    size = max(map(len, rows.values()))
    held = {name: value.expand(size, *value.shape[1:]) for name, value in rows.items()}
    for name, value in program.discrete(held, size).items():
        event = sites[name]["fn"].event_dim
        more = value.dim() - event - depth
        if several:
            value = value.reshape(size, *(1,) * max(0, -more), *value.shape[1:])
            event += max(0, more)
        found[name] = pyro.sample(name, dist.Delta(value if several else value[0], event_dim=event))
    return found


BATCH = 1000  # draws per run of the model


def with_reparametrised(call: Call, names: Sequence[str], latents: Values) -> Values:
    """Add the sites that the user wrote and ``poutine.reparam`` replaced, at N draws of a guide's latents.

    They are left out where the model cannot tell them: in a guide from a file, without the model's arguments, and if a
    plate is subsampled.

    Args:
        call: The call of the guide; its model has the guide's handlers.
        names: These sites.
        latents: The guide's latents, ``(N, *site_shape)`` each.
    """
    if not names or call.model is None or not all(map(len, latents.values())):
        return latents
    try:
        signature_of(call.model).bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):  # the model needs other arguments
        return latents
    program = summed(call)
    if program.subsamples:
        return latents
    first = {name: value[:1] for name, value in latents.items()}
    program = program.with_(choice=choose(program, first, "auto", "model"))

    def step(held: Values, size: int) -> Values:
        drawn = {**held, **program.discrete(held, size)} if program.enumerated else held
        return runs.sample(lambda view: {name: view.read(name) for name in names}, drawn, size)

    # At values of its discrete latents a program that is summed out may not broadcast.
    runs = program.by("vmap") if program.enumerated and program.engine != "loop" else program
    return {**latents, **in_batches(step, latents, len(next(iter(latents.values()))), BATCH)}
