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
from pyro.infer.autoguide import init_to_value
from torch import Tensor, nn
from torch.distributions import constraints

from ..flows import Flow
from .auto import AutoFlow
from .base import FlowGuide
from .circles import is_circular
from .look import Rows
from .names import is_free
from .nested import Nested
from .plate import AutoPlateFlow


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
        raise ValueError(
            f"save: this {type(guide).__name__} was never set up, so that it has no flow yet. Fit it first, or call "
            "guide.setup(...) with the model's arguments."
        )
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
    """What :func:`auto_of` needs to build a guide again."""
    return {
        "sites": sites_of(guide),
        "flow": guide.flow,
        "encoder": guide.encoder,
        "context_dim": guide._context_dim,
        "init_scale": guide._init_scale,
        "moves": guide._engine is not None,
        "name": guide._pyro_name,
    }


def auto_of(
    sites: Sequence[Site],
    flow: Flow,
    encoder: nn.Module | None,
    context_dim: int,
    init_scale: float,
    name: str,
    moves: bool = False,
) -> AutoFlow:
    """A guide without a model, from its parts.

    Raises:
        ValueError: If they do not fit together.
    """
    guide = AutoFlow(
        program_of(sites),
        encoder=encoder,
        init_loc_fn=_start_of(sites),
        init_scale=init_scale,
        name=_name_like(name),
    )
    super(AutoFlow, guide)._setup_prototype()  # Pyro's part: what is ours is built already
    _check_fits(flow, guide.latent_dim, context_dim)
    guide._context_dim = context_dim
    guide._circular = [is_circular(guide.prototype_trace.nodes[name]) for name in guide.coordinates]
    guide.flow, guide._engine = flow, "vmap" if moves else None
    guide._model = (None,)
    return guide


# ------------------------------------------------------------ AutoPlateFlow


def parts_of_plate(guide: AutoPlateFlow) -> dict[str, Any]:
    """What :func:`plate_of` needs to build a guide again."""
    embedding = guide.contexts.embedding
    sites = sites_of(guide)
    return {
        "plate": guide.plate,
        "sites": sites,
        "flow": guide.posterior.flow,
        "local_flow": guide.posterior.local_flow,
        "encoder": guide.contexts.encoder,
        "embedding": None if embedding is None else embedding.weight,
        "embedding_dim": guide.contexts.embedding_dim,
        "width": guide.contexts.width,
        "full_size": guide.full_size,
        "scale": float(guide.posterior.scale),
        "init_scale": guide._init_scale,
        "name": guide._pyro_name,
    }


def plate_of(
    plate: str,
    sites: Sequence[Site],
    flow: Flow | None,
    local_flow: Flow | None,
    encoder: nn.Module | None,
    embedding: Tensor | None,
    embedding_dim: int,
    width: int,
    full_size: int,
    scale: float,
    init_scale: float | None,
    name: str,
) -> AutoPlateFlow:
    """A guide without a model, from its parts.

    Raises:
        ValueError: If they do not fit together.
    """
    guide = AutoPlateFlow(
        program_of(sites),
        plate,
        encoder=encoder,
        embedding_dim=embedding_dim,
        init_loc_fn=_start_of(sites),
        init_scale=init_scale,
        name=_name_like(name),
    )
    super(AutoPlateFlow, guide)._setup_prototype()
    seen = [size for site in sites for frame, _, size, _ in site.plates if frame == plate]
    shared, own = guide._sorted(Rows(full_size, seen[0] if seen else full_size, None))
    _check_fits(flow, shared.size, 0)
    _check_fits(local_flow, own.size, width + shared.size)
    guide.contexts.width = width
    if embedding is not None:
        guide.contexts.embedding = nn.Embedding.from_pretrained(embedding, freeze=False)
    guide.posterior = Nested(shared, own, flow, local_flow, scale)
    guide.full_size = full_size
    guide._model = (None,)
    return guide


# ------------------------------------------------------------ both


def _start_of(sites: Sequence[Site]) -> Callable[..., Any]:
    return init_to_value(values={site.name: site.value for site in sites}, fallback=None)


def _name_like(name: str) -> str | None:
    """A name for a guide that once had this one; none where tensors of another would be taken for its own."""
    stored = any(key.startswith(f"{name}.") for key in pyro.get_param_store())
    return name if is_free(name) and not stored else None


def _check_fits(flow: Flow | None, size: int, context_dim: int) -> None:
    got = (0, 0) if flow is None else (flow.event_shape.numel(), flow.context_dim)
    if got[0] != size or (size and got[1] != context_dim):
        raise ValueError(
            f"the flow is over {got[0]} numbers with a context of width {got[1]}, but the sites have {size} and "
            f"{context_dim}"
        )
