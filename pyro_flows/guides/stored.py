"""What a guide is without its model: its latent sites, its flows, its encoder.

These parts are enough to draw and to score latents, and from them a guide is built again.  In place of its model runs
a program that draws the same sites, flat over their supports; then the model is forgotten, as pickles forget it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, AutoGuide, init_to_value
from torch import Tensor
from torch.distributions import constraints

from ..flows import Flow
from .auto import AutoFlow
from .base import FlowGuide
from .parameter_names import is_free
from .plate import AutoPlateFlow
from .plate_distribution import Nested
from .prototype import Rows


@dataclass(frozen=True)
class Site:
    """A latent site as a guide saw it.

    Args:
        name: Its name.
        support: Where its values lie.
        value: The value that the guide starts from, ``batch_shape + event_shape``.
        batch_shape: The batch shape of its law, that of its plates included.
        event_shape: The event shape of its law.
        plates: Its plates, the outermost first: name, dim, how many rows the guide saw, and how many there are.
    """

    name: str
    support: constraints.Constraint
    value: Tensor
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    plates: tuple[tuple[str, int, int, int], ...]


def sites_of(guide: FlowGuide) -> list[Site]:
    """The latent sites of a guide.

    Raises:
        ValueError: If the guide was never set up.
    """
    if guide.prototype_trace is None:
        fault = f"this {type(guide).__name__} was never set up, so that it has no flow yet"
        raise ValueError(f"save: {fault}. Fit it first, or call guide.setup(...) with the model's arguments.")
    sites = []
    for name, node in guide.prototype_trace.iter_stochastic_nodes():
        fn, frames = node["fn"], sorted(node["cond_indep_stack"], key=lambda frame: frame.dim)
        plates = tuple((f.name, f.dim, int(f.size), int(f.full_size or f.size)) for f in frames)
        sites.append(Site(name, fn.support, node["value"], fn.batch_shape, fn.event_shape, plates))
    return sites


def program_of(sites: Sequence[Site]) -> Callable[[], None]:
    """A program that draws sites, flat over their supports, in their plates."""

    def program() -> None:
        plates: dict[str, Any] = {}
        for site in sites:
            with ExitStack() as stack:
                for name, dim, size, full_size in site.plates:
                    if name not in plates:
                        plates[name] = pyro.plate(name, full_size, subsample=torch.arange(size), dim=dim)
                    stack.enter_context(plates[name])
                pyro.sample(site.name, dist.ImproperUniform(site.support, site.batch_shape, site.event_shape))

    return program


# ------------------------------------------------------------ AutoFlow


def parts_of_auto(guide: AutoFlow) -> dict[str, Any]:
    """Return what :func:`auto_of` needs to build a guide again."""
    return {
        **_parts_of_both(guide, sites_of(guide), guide.encoder),
        "flow": guide.flow,
        "context_dim": guide._context_dim,
        "moves": guide._engine is not None,
    }


def auto_of(
    sites: Sequence[Site], flow: Flow, context_dim: int, name: str, moves: bool = False, **settings: Any
) -> AutoFlow:
    """Build a guide without a model from its parts; ``settings`` are other arguments of its class.

    Raises:
        ValueError: If they do not fit together.
    """
    guide = AutoFlow(program_of(sites), **settings, **_start_of(sites, name))
    AutoContinuous._setup_prototype(guide)  # Pyro's part: what is ours is built already
    _check_fits(flow, guide.latent_dim, context_dim)
    guide.restore(flow, context_dim, "vmap" if moves else None)
    return guide


# ------------------------------------------------------------ AutoPlateFlow


def parts_of_plate(guide: AutoPlateFlow) -> dict[str, Any]:
    """Return what :func:`plate_of` needs to build a guide again."""
    sites = sites_of(guide)
    posterior, contexts = guide.posterior, guide.contexts
    return {
        **_parts_of_both(guide, sites, contexts.encoder),
        "plate": guide.plate,
        "flow": posterior.flow,
        "local_flow": posterior.local_flow,
        "embedding": None if contexts.embedding is None else contexts.embedding.weight,
        "embedding_dim": contexts.embedding_dim,
        "width": contexts.width,
        "full_size": guide.full_size,
        "scale": float(posterior.scale),
    }


def plate_of(
    plate: str,
    sites: Sequence[Site],
    flow: Flow | None,
    local_flow: Flow | None,
    embedding: Tensor | None,
    width: int,
    full_size: int,
    scale: float,
    name: str,
    **settings: Any,
) -> AutoPlateFlow:
    """Build a guide without a model from its parts; ``settings`` are other arguments of its class.

    Raises:
        ValueError: If they do not fit together.
    """
    guide = AutoPlateFlow(program_of(sites), plate, **settings, **_start_of(sites, name))
    AutoGuide._setup_prototype(guide)
    seen = [size for site in sites for frame, _, size, _ in site.plates if frame == plate]
    shared, own = guide._sorted(Rows(full_size, seen[0] if seen else full_size))
    _check_fits(flow, shared.size, 0)
    _check_fits(local_flow, own.size, width + shared.size)
    guide.contexts.restore(width, embedding)
    guide.restore(Nested(shared, own, flow, local_flow, scale), full_size)
    return guide


# ------------------------------------------------------------ both


def _parts_of_both(guide: Any, sites: list[Site], encoder: Any) -> dict[str, Any]:
    return {"sites": sites, "encoder": encoder, "init_scale": guide._init_scale, "name": guide._pyro_name}


def _start_of(sites: Sequence[Site], name: str) -> dict[str, Any]:
    """Return the start of a guide and its name: none where tensors of another would be taken for its own."""
    stored = any(key.startswith(f"{name}.") for key in pyro.get_param_store())
    start = init_to_value(values={site.name: site.value for site in sites}, fallback=None)
    return {"init_loc_fn": start, "name": name if is_free(name) and not stored else None}


def _check_fits(flow: Flow | None, size: int, context_dim: int) -> None:
    got = (0, 0) if flow is None else (flow.event_shape.numel(), flow.context_dim)
    if got[0] != size or (size and got[1] != context_dim):
        fault = f"the flow is over {got[0]} numbers with a context of width {got[1]}"
        raise ValueError(f"{fault}, but the sites have {size} and {context_dim}")
