"""Mass of a posterior outside of a guide's support, which neither weights nor chains of the guide's draws can show.

Points over the support of each of the model's sites show whether the guide's site has a density there.  So equal
supports may be expressed in different ways.  A narrower support is a fault only if the posterior has mass outside, and
a model may well have no density there.  So a population is annealed in coordinates of the model's support.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.distributions import MixtureSameFamily, TransformedDistribution
from torch import Tensor
from torch.distributions import ComposeTransform, biject_to

from ..guides import AutoFlow
from ..guides.packing import is_circular
from ..programs.density import Density
from ..programs.model_and_guide import Task
from ..programs.sites import innermost, is_discrete, is_point, named, states_support
from ..sampling.annealed_population import Effort, Reference, anneal
from ..user_code import warn_user
from .drift import Drift
from .guide_space import prior_of


@dataclass(frozen=True)
class Reach:
    """Constants of the estimate of mass outside of a support.

    Attributes:
        ladder: Places in the unconstrained space, on both sides of 0.
        round_off: The relative change of a place there and back, from which the support's edge has rounded it.
        same: The relative change of a value that a guide's transform can reach.
        particles: The particles of a population.
        few: Those of one whose model runs one draw at a time.
        latents: The latents beyond which a search would take long.
        negligible: The share of the mass that draws may lack.
    """

    ladder: tuple[float, ...] = (0.1, 1.0, 3.0, 10.0, 30.0, 1e3, 1e6)
    round_off: float = 0.1
    same: float = 1e-3
    particles: int = 256
    few: int = 64
    latents: int = 1000
    negligible: float = 0.01


REACH = Reach()
EFFORT = Effort(kept=0.3, forgotten=0.5, moves=(1, 4), max_steps=6, gradients=1500)


class Missing(NamedTuple):
    """Posterior mass that a guide misses.

    Attributes:
        share: The missed share of the posterior's mass, as far as it was found.
        share_se: The standard error of ``share``.
        place: The point of highest density in it, ``(D,)``; None if nothing was found.
        error: The resulting errors of the guide's moments for each of K quantities, or None.
        is_blind: Whether the search for modes failed because too few draws of the prior have a density.
        neck: The latent in whose neck the mass lies, and its value there, in words; empty if the mass lies elsewhere.
        outside: The guide's sites whose support leaves the mass out, in words; empty if the support is the model's.
        narrowest: The scale of the narrowest mode within the guide's draws that the search finds with a chance of
            95 %, relative to the guide's standard deviations; 1 if it did not look for narrow modes.
        cut: The reason why the search ended early, in words; empty if it did not.
    """

    share: float = 0.0
    share_se: float = 0.0
    place: Tensor | None = None
    error: Drift | None = None
    is_blind: bool = False
    neck: str = ""
    outside: str = ""
    narrowest: float = 1.0
    cut: str = ""


def check_reach(caller: str, task: Task) -> None:
    """Raise ValueError for a guide whose support leaves out more than 1 % of the posterior's mass.

    Warns:
        UserWarning: If a support is narrower than the model's, and the mass outside could not be estimated.
    """
    found = unreached(task)
    if found.share <= REACH.negligible:
        return
    way = "Give the site a distribution over the model's support, or use AutoFlow(model)"
    if found.share > REACH.negligible:
        fault = f"got {found.share:.0%} of the posterior's mass outside of the support of the guide's {found.outside}"
        raise ValueError(f"{caller}: guide must reach where the model has mass, {fault}. {way}.")
    fault = f"the support of the guide's {found.outside} is narrower than the model's"
    warn_user(f"{caller}: {fault}, and the mass outside could not be estimated. {way}.")


def unreached(task: Task) -> Missing:
    """Return the posterior's mass outside of a guide's support; its share is NaN if it could not be estimated."""
    narrow = _narrow(task)
    if not narrow:
        return Missing()
    sites = f"site{'s' * (len(narrow) > 1)} {named(narrow)}"
    unknown, model = Missing(math.nan, math.nan, outside=sites), task.settle().model
    if sum(model.single.nodes[name]["value"].numel() for name in task.latents) > REACH.latents:
        return unknown
    try:
        guide = AutoFlow(model.call).setup(*model.args, **model.kwargs)
    except (ValueError, NotImplementedError):  # models that AutoFlow refuses, mostly those without a density at a start
        return unknown
    space = Density(task.of(guide))
    number = REACH.few if task.runs_one_by_one else REACH.particles
    population = anneal(Reference(prior_of(space), guide.start[0]), number, EFFORT)
    if population is None or not population.has_arrived:
        return unknown
    latents = space.constrain(population.z)
    outside = ~torch.stack([_is_inside(fn, latents[name]) for name, fn in narrow.items()]).all(0)
    return Missing(*population.share(outside), outside=sites) if bool(outside.any()) else Missing()


def _narrow(task: Task) -> dict[str, Any]:
    """Return the distributions of the guide's sites that have no density at some places of the model's support."""
    found = {}
    for name in task.latents:
        fn, own = _law_of(task, name), task.model.single.nodes[name]["fn"]
        if fn is None or is_discrete(own) or not states_support(own):
            continue
        try:
            points = _points(own, task.model.single.nodes[name]["value"])
        except NotImplementedError:  # torch knows no map onto the model's support
            continue
        if len(points) and not bool(_is_inside(fn, points).all()):
            found[name] = fn
    return found


def _law_of(task: Task, name: str) -> Any:
    """Return a distribution with the support of the guide's draws of a site, or None if it is unknown."""
    guide: Any = task.guide.call
    sites = task.guide.single.nodes
    if name in sites and not is_point(sites[name]["fn"]):
        return sites[name]["fn"] if states_support(sites[name]["fn"]) else None
    if getattr(guide, "moves", False):  # its supports are those of the model
        return None
    prototype = getattr(guide, "prototype_trace", None)
    fn = prototype.nodes[name].get("fn") if prototype is not None and name in prototype.nodes else None
    return None if fn is None or not states_support(fn) or is_circular(fn.support) else fn


@torch.no_grad()
def _points(fn: Any, value: Tensor) -> Tensor:
    """Return places all over the support of a site, ``(n, *shape)``."""
    transform = biject_to(fn.support)
    free = transform.inv(value)
    steps = torch.tensor([sign * size for size in REACH.ladder for sign in (1, -1)]).to(free)
    z = steps.reshape(-1, *(1,) * free.dim()).expand(-1, *free.shape)
    points = transform(z)
    back = (transform.inv(points) - z).abs() <= REACH.round_off * z.abs()  # False for NaN
    inside = fn.support.check(points).reshape(len(z), -1).all(-1)
    return points[inside & back.reshape(len(z), -1).all(-1)]


@torch.no_grad()
def _is_inside(fn: Any, values: Tensor) -> Tensor:
    """Return True for the values ``(N, *shape)`` at which a distribution may have a density, ``(N,)``."""
    inner = innermost(fn)
    if isinstance(inner, MixtureSameFamily) or not states_support(fn):  # torch joins the supports of all components
        return torch.ones(len(values), dtype=torch.bool, device=values.device)
    inside = fn.support.check(values).reshape(len(values), -1).all(-1)
    if isinstance(inner, TransformedDistribution):  # torch states the support of the last transform alone
        whole = ComposeTransform(inner.transforms)
        with suppress(NotImplementedError, KeyError):  # a transform without an inverse; Pyro's raise KeyError
            base = whole.inv(values)
            back = (whole(base) - values).abs() <= REACH.same * (1 + values.abs())  # False for NaN
            inside &= back.reshape(len(values), -1).all(-1) & _is_inside(inner.base_dist, base)
    return inside
