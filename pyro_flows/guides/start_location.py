"""Starts of guides: the centre of the prior, the origin of the unconstrained space, or the first place with a density.

The centre is the default.  It may be absurd for priors as wide as LogNormal(-20, 5): noise of scale e⁻²⁰ makes any data
impossible.  The steps of an optimiser do not lead out of there.  The origin replaces the centre if its density, data
included, is far higher.  In models whose draws must fit each other, neither may have a density, and a distribution may
refuse its parameters there, as an ``OrderedLogistic`` refuses equal cut points.  Then random places around the origin
are tried, as in Pyro's NUTS, and then draws of the latents' own distributions.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from pyro import validation_enabled
from pyro.distributions import is_validation_enabled
from torch import Tensor

from ..programs.checks import check_crossed, check_observed
from ..programs.log_density import is_breakdown
from ..programs.program import arguments_of
from ..programs.runner import Runner
from ..programs.sites import innermost, is_observation
from .draw_watch import worst
from .guide_call import Call
from .left_out import summed
from .packing import Packing, bijection_onto

ABSURD = 10.0  # nats per latent by which the origin must be likelier
TRIES = 100  # random places, and draws, to try if centre and origin have no density


def init_to_center(site: dict[str, Any] | None = None) -> Tensor | Callable[..., Any]:
    """Initialise a site to the median of its prior if it is known in closed form.

    Otherwise the value is the mean of the prior if it is finite, or else the origin of the unconstrained space.  It is
    the same each time.  Pyro's strategies draw from the prior; this one also starts flat priors (``ImproperUniform``).
    A ``ProjectedNormal``, which a guide takes after Pyro's ``ProjectedNormalReparam`` alone, starts at its mean.

    Args:
        site: A Pyro sample site.  Without one the strategy itself is returned, as Pyro's strategies do.

    Returns:
        A value of the site's shape, in its support.

    Raises:
        NotImplementedError: If torch knows no bijection onto the site's support, and its mean is not known.

    Example::

        >>> import pyro.distributions as dist
        >>> init_to_center({"fn": dist.LogNormal(0.0, 3.0)}).item()
        1.0
        >>> init_to_center({"fn": dist.ImproperUniform(dist.constraints.positive, (), ())}).item()
        1.0
    """
    if site is None:
        return init_to_center
    fn = site["fn"]
    if fn.support.is_discrete:
        return fn.sample()  # the guide refuses the site with a better error
    centres = [value for value in _centres(fn) if value.shape == fn.shape()]
    try:
        bijection = bijection_onto("init_to_center", site.get("name"), fn.support)
    except NotImplementedError:  # a reparametrisation may replace the site, or else the guide refuses it
        if not centres:
            raise
        return centres[0]
    like = next(iter(_tensors(fn)), torch.zeros(()))
    for value in centres:
        if bijection.inv(value).isfinite().all():
            return value
    return bijection(like.new_zeros(bijection.inverse_shape(fn.shape())))  # last, since it may import sympy


def _centres(fn: Any) -> list[Tensor]:
    """Return the median and the mean of a distribution, if they are known in closed form."""
    found, inner = [], innermost(fn)
    with suppress(NotImplementedError, RuntimeError, ValueError):
        for tensor in _tensors(inner)[:1]:
            found.append(inner.icdf(tensor.new_full((), 0.5)).expand(fn.shape()).detach())
    with suppress(NotImplementedError, RuntimeError, AttributeError):
        mean = fn.mean.detach().clone()
        found.append(torch.where(mean.isfinite(), mean, fn.loc) if hasattr(fn, "loc") else mean)  # a wide StudentT
    return found


def _tensors(fn: Any) -> list[Tensor]:
    """Return the floating parameters of a distribution, or else those of its base."""
    found = [t for t in vars(fn).values() if isinstance(t, Tensor) and t.is_floating_point()]
    base = getattr(fn, "base_dist", None)
    return found or (_tensors(base) if base is not None else [])


def settle_start(call: Call, *, choose: bool) -> None:
    """Raise ValueError unless the data have the model's shapes, and a finite density at the latents of the prototype.

    Args:
        call: The call of a guide at setup.
        choose: True to move the latents first, as the module's docstring says.
    """
    with call.same_draws():
        program = summed(call)
        with validation_enabled(False):
            check_crossed(f"{call.owner}: ", program.single)
        check_observed(f"{call.owner}: ", program.single, arguments_of(call.model, call.args, call.kwargs))
    if choose:
        _choose(call, program)
    _check_density(call, program)


def _choose(call: Call, program: Runner) -> None:
    """Compare densities of unconstrained latents at one subsample of the data, and move the prototype's latents."""
    packing = Packing(call.owner, call.latents.values())
    centre, origin = packing.start, torch.zeros_like(packing.start)
    validates = not is_validation_enabled()  # otherwise distributions have validated their parameters at the centre

    def log_density(z: Tensor) -> float:
        try:
            if validates:
                with validation_enabled(True):
                    call.trace_at(packing.values(z))
        except Exception as error:
            if is_breakdown(error):
                return -math.inf
            raise
        change = sum(log_det.sum() for *_, log_det in packing.unpack(z))
        total = program.log_prob(packing.values(z.unsqueeze(0)), 1)[0] + change
        return -math.inf if total.isnan() else float(total)

    def elsewhere() -> Iterator[Tensor]:
        """Yield latents within 2 of the origin, then draws of their distributions, with others at the centre."""
        for _ in range(TRIES):
            yield 4 * torch.rand_like(centre) - 2
        with suppress(NotImplementedError):  # an ImproperUniform cannot be sampled
            for _ in range(TRIES):
                yield packing.pack({name: site["fn"].sample() for name, site in call.latents.items()})[0]

    with torch.no_grad(), call.same_draws(), validation_enabled(False):
        at_centre = log_density(centre)
        at_origin = log_density(origin) if centre.any() else at_centre
        place = origin if math.isfinite(at_origin) and at_centre < at_origin - ABSURD * len(origin) else centre
        if not (math.isfinite(at_centre) or math.isfinite(at_origin)):
            place = next((z for z in elsewhere() if math.isfinite(log_density(z))), centre)
        # Sites that are hidden from the guide may be drawn anew in each run; then the densities cannot be compared.
        if place is not centre and (log_density(centre), log_density(origin)) == (at_centre, at_origin):
            for name, value in packing.values(place).items():
                call.latents[name]["value"] = value


def _check_density(call: Call, program: Runner) -> None:
    """Refuse a model without a finite density at the start.

    Args:
        call: The call of the guide.
        program: The model with its discrete latents summed out.
    """
    with validation_enabled(False):  # its errors would come first and say less
        if program.enumerated:
            at_start = program.log_prob({name: value.unsqueeze(0) for name, value in call.start.items()}, 1)
            sites = {"the model, discrete latents summed out,": {"log_prob": at_start}}
        else:
            trace = call.trace_at(call.start)
            trace.compute_log_prob()
            sites = {f"site {name!r}": site for name, site in trace.nodes.items() if site["type"] == "sample"}
    for what, site in sites.items():
        if site["log_prob"].isfinite().all():
            continue
        fault = f"the log-density of {what} is {worst(site['log_prob'])} at the guide's start"
        way = "give a better one with init_loc_fn=init_to_value(values={...})"
        data = site["value"] if "type" in site and is_observation(site) else None
        if infinite := int(data.isinf().sum()) if isinstance(data, Tensor) else 0:
            held = f"its data hold {infinite} infinite number{'s' * (infinite > 1)}"
            way = f"{held}. Leave those rows out, or mask them by poutine.mask"
        raise ValueError(f"{call.owner}: {fault}; {way}.")
