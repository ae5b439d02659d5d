"""A guide's space as functions of vectors z, ``(N, D)``, which is all that samplers know of a model.

The coordinates in which chains move come from the guide, whose base is nearly normal, and from the priors of a
hierarchy, whose scales depend on other latents.
"""

from functools import partial
from typing import Any, cast

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.utils import _sum_rightmost

from ..programs.density import Density
from ..programs.log_density import or_nan
from ..programs.sites import Site, loc_and_scale_of
from ..sampling.annealed_population import Prior
from ..sampling.chains import Target
from ..sampling.coordinates import Coordinates, GuideDensity, Hierarchy, Mapped, NonCentred, Stretched, White

FIRST = 4096  # draws by which a hierarchy is recognised


def target_of(space: Density, batch_size: int = 4096) -> Target:
    """Return a posterior and a guide that proposes draws, in batches of some size."""
    return Target(
        dim=space.dim,
        log_p=space.log_prob,
        log_q=space.log_q,
        draw=lambda number: space.draw(number, batch_size)[:3],
        quantities=space.quantities,
        coordinates=partial(chain_coordinates, space),
        is_slow=space.task.runs_one_by_one,
    )


class _Muted(Messenger):
    """Masks the log-densities of the sites of some names."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self._names = names

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self._names:
            msg["mask"] = False


def prior_of(space: Density) -> Prior:
    """Return the posterior and the prior of a model's latents."""
    model, own = space.task.model, None
    if model.enumerated:  # then the prior of the others takes a run without the data; factors are observed sites
        muted = _Muted({*model.single.observation_nodes, *space.flat})
        own = space.task.of(space.task.guide.call, muted(model.call)).settle().model
    return Prior(
        draw=space.prior,
        log_p=space.log_prob,
        log_prior_and_p=or_nan(lambda z: torch.stack(space.log_prior_and_prob(z, own), -1), 2),
        flat=torch.tensor([name in space.flat for name in space.coordinates]),
        in_parts=space.in_parts,
        takes_a_run=own is not None,
    )


def guide_coordinates(space: Density, z: Tensor) -> tuple[list[Coordinates], White]:
    """Return base coordinates, if any, and whitened ones, given draws z, ``(N, D)``; also the latter alone."""
    white, base = White(z), base_of(space, z[:100])
    return [base, white] if base else [white], white


def chain_coordinates(space: Density, z: Tensor) -> list[Coordinates]:
    """Return the coordinates for chains, given draws z, ``(N, D)``: non-centred ones first if the model has them."""
    (others, _), hierarchy = guide_coordinates(space, z), hierarchy_of(space, z[:FIRST])
    found = NonCentred.of(hierarchy, z[:FIRST]) if hierarchy else None
    return [found, others[0]] if found else others


def guide_density(space: Density, coordinates: Coordinates) -> GuideDensity | None:
    """Return the guide's log-density over coordinates; None if it is unknown at vectors that the guide did not draw.

    In base coordinates it needs no inverse, which some flows find one dimension after another.
    """
    inner = coordinates.chart if isinstance(coordinates, Stretched) else coordinates
    guide: Any = space.task.guide.call
    if not (isinstance(inner, Mapped) and hasattr(guide, "get_base_dist")):
        log_q = space.log_q
        return (lambda x, z, log_det: log_q(z) + log_det) if space.has_log_q else None

    def of_base(x: Tensor, z: Tensor, log_det: Tensor) -> Tensor:
        own, change = coordinates.inwards(x) if isinstance(coordinates, Stretched) else (x, 0.0)
        log_prob = guide.get_base_dist().log_prob(own)
        return _sum_rightmost(log_prob, log_prob.dim() - 1) + change

    return of_base


def base_of(space: Density, z: Tensor) -> Mapped | None:
    """Return a guide's base coordinates; None if it has no base, or its transform is not invertible at draws z."""
    guide = space.task.guide
    transform_of: Any = getattr(guide.call, "get_transform", None)  # as each ``AutoContinuous`` has it
    if transform_of is None:
        return None

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        transform = transform_of(*guide.args, **guide.kwargs)
        z = transform(x)
        log_det = transform.log_abs_det_jacobian(x, z)
        return z, _sum_rightmost(log_det, log_det.dim() - 1).expand(len(x))

    found = Mapped(forward, lambda z: transform_of(*guide.args, **guide.kwargs).inv(z))
    try:
        again, _ = forward(found.inverse(z))
    except (NotImplementedError, KeyError):  # no transform, or no inverse
        return None
    return found if bool(((again - z).abs() <= 1e-3 * z.std(0)).all()) else None


@torch.no_grad()
def hierarchy_of(space: Density, z: Tensor) -> Hierarchy | None:
    """Return the real latents whose priors have locations and scales, given draws z; None if there are none."""
    model = space.task.model
    names = [name for name in space.task.latents if _has_loc_and_scale(model.single.nodes[name])]
    if not names or model.enumerated or space.task.runs_one_by_one:
        return None
    places = [place for name in names for place, own in enumerate(space.coordinates) if own == name]
    latents, columns = space.constrain(z), torch.tensor(places, device=z.device)
    values = torch.cat([latents[name].reshape(len(z), -1) for name in names], -1)
    if values.shape[1] != len(columns) or not torch.allclose(z[:, columns], values):
        return None

    def stacked(z: Tensor) -> Tensor:
        found = model.run(lambda view: {n: view.read(n, _loc_and_scale) for n in names}, space.constrain(z), len(z))
        return torch.cat([found[name].reshape(len(z), -1, 2) for name in names], 1).to(z)

    guarded = or_nan(stacked, len(columns), 2)

    def parameters(z: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = guarded(z).unbind(-1)
        return loc, scale

    return Hierarchy(columns, parameters)


def _loc_and_scale(site: Site) -> Tensor:
    """Return the location and the scale of each value of a site that has both, ``(*shape, 2)``."""
    return torch.stack(cast(tuple[Tensor, Tensor], loc_and_scale_of(site["fn"])), -1)


def _has_loc_and_scale(site: Site) -> bool:
    """True if each value of a site has its own location and scale."""
    known = loc_and_scale_of(site["fn"])
    return known is not None and all(part.shape == site["value"].shape for part in known)
