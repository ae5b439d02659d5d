"""Latent sites of a guide as data, and a program that stands in for the model of a guide that is loaded from a file.

The program draws the same sites, with flat distributions over their supports.  The guide that is built from it drops
it at the end, since loaded guides have no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..flows import Flow


@dataclass(frozen=True)
class SavedSite:
    """A latent site of a guide.

    Args:
        name: Its name.
        support: The support of its values.
        value: The value that the guide starts from, ``batch_shape + event_shape``.
        batch_shape: The batch shape of its distribution, with its plates.
        event_shape: The event shape of its distribution.
        plates: Its plates, the outermost first: name, dim, the number of rows that the guide saw, and of all rows.
        present: The mask of its present elements, or None if all are present.
    """

    name: str
    support: constraints.Constraint
    value: Tensor
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]
    plates: tuple[tuple[str, int, int, int], ...]
    present: Tensor | None = None


def sites_of(guide: Any) -> list[SavedSite]:
    """Return the latent sites of a guide.

    Raises:
        ValueError: If the guide was never set up.
    """
    if guide.prototype_trace is None:
        fault = f"this {type(guide).__name__} was never set up, so that it has no flow yet"
        raise ValueError(f"save: {fault}. Fit it first, or call guide.setup(...) with the model's arguments.")
    sites, masks = [], guide._calls.present
    for name, node in guide.prototype_trace.iter_stochastic_nodes():
        fn, frames = node["fn"], sorted(node["cond_indep_stack"], key=lambda frame: frame.dim)
        plates = tuple((f.name, f.dim, int(f.size), int(f.full_size or f.size)) for f in frames)
        sites.append(
            SavedSite(name, fn.support, node["value"], fn.batch_shape, fn.event_shape, plates, masks.get(name))
        )
    return sites


def program_of(sites: Sequence[SavedSite]) -> Callable[[], None]:
    """Return a program that draws sites in their plates, with flat distributions over their supports."""

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


def check_fits(flow: Flow | None, size: int, context_dim: int) -> None:
    """Raise ValueError unless a flow is over ``size`` numbers with contexts of a width; None stands for 0 numbers."""
    got = (0, 0) if flow is None else (flow.event_shape.numel(), flow.context_dim)
    if got[0] != size or (size and got[1] != context_dim):
        fault = f"the flow is over {got[0]} numbers with a context of width {got[1]}"
        raise ValueError(f"{fault}, but the sites have {size} and {context_dim}")
