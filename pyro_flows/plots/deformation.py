"""The deformation of the plane by a flow of two features, layer by layer."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_integers
from ..flows import Flow
from ..transforms import FlowTransform, Inverse
from .panels import Picture, panels

REACH = 2.5  # of the grid, in standard deviations of a normal base
LINES, POINTS = 21, 201  # lines of the grid in each direction, and points of a line
DOTS = 1000  # draws


@torch.no_grad()
def deformation(flow: Flow, context: Tensor | None = None, *, most: int = 8) -> Picture:
    """Plot a square grid of the base, and draws from it, as the transforms of a flow map them to the data.

    Args:
        flow: A flow over vectors of two features.
        context: One context, ``(context_dim,)`` or an input of the flow's encoder for one event; None if the flow takes
            no context.
        most: The largest number of panels: the base, evenly chosen transforms, and the last one.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: If the flow's events are not two numbers, ``most`` is below 2, or draws are not finite.  Also if the
            context does not fit, or the context or the base is a batch.

    Example::

        >>> from pyro_flows import flows
        >>> picture = deformation(flows.nsf(2, num_transforms=2))
        >>> [axis.get_title() for axis in picture.axes][:2]
        ['base', '1 Coupling']
    """
    if tuple(flow.event_shape) != (2,):
        raise ValueError(f"deformation: the flow must be over two features, got {tuple(flow.event_shape)}.")
    check_integers("deformation", 2, most=most)
    encoded, base = flow.encode(context), flow.base()
    batches = {"context": () if encoded is None else encoded.shape[:-1], "base": base.batch_shape}
    for what, batch in batches.items():
        if batch:
            raise ValueError(f"deformation: one {what} is pictured, got a batch of {tuple(batch)}.")
    draws = base.sample((DOTS,))
    value = torch.cat((_grid(draws), draws))
    stages = [("base", value)]
    for number, transform in enumerate(flow.transforms, 1):
        value, _ = transform.forward_and_log_det(value, encoded if transform.context_dim else None)
        stages.append((f"{number} {_title(transform)}", value))
        if not value[-DOTS:].isfinite().all():
            raise ValueError(f"deformation: transform {number}, {_title(transform)}, makes draws that are not finite.")
    chosen = np.unique(np.linspace(0, len(stages) - 1, min(most, len(stages))).round().astype(int))
    columns = min(4, len(chosen))
    picture, axes = panels(2.4 * columns, 2.55 * -(-len(chosen) // columns), len(chosen), columns)
    for axis, place in zip(axes, chosen, strict=True):
        title, mapped = stages[place]
        _draw(axis, mapped.cpu().double())
        axis.set_title(title, fontsize=9)
    return picture


def _grid(draws: Tensor) -> Tensor:
    """Return the points of a square grid over the bulk of draws, all lines in one direction before the others."""
    ticks, along = torch.linspace(-REACH, REACH, LINES), torch.linspace(-REACH, REACH, POINTS)
    upright = torch.stack(torch.meshgrid(ticks, along, indexing="ij"), -1)  # (LINES, POINTS, 2)
    unit = torch.cat((upright, upright.flip(-1))).to(draws).reshape(-1, 2)
    low, middle, high = draws.float().quantile(torch.tensor([0.16, 0.5, 0.84], device=draws.device), 0).to(draws)
    grid = unit * (high - low) / 2 + middle  # quantiles do not depend on heavy tails
    return grid.clamp(draws.min(0).values, draws.max(0).values)  # a bounded base has nothing beyond


def _draw(axis: Any, mapped: Tensor) -> None:
    """Draw lines in two colours and the draws, in a frame that contains nearly all draws."""
    from matplotlib.collections import LineCollection

    lines, draws = mapped[:-DOTS].reshape(2, LINES, POINTS, 2).numpy(), mapped[-DOTS:].numpy()
    for part, color in zip(lines, ("C0", "C1"), strict=True):
        axis.add_collection(LineCollection(list(part), colors=color, lw=0.7))
    axis.scatter(*draws.T, s=2, color="0.25", alpha=0.35, lw=0, zorder=3, rasterized=True)
    low, high = np.quantile(draws, [0.005, 0.995], axis=0)
    margin = 0.12 * (high - low) + 1e-6
    (left, bottom), (right, top) = low - margin, high + margin
    axis.set(xlim=(left, right), ylim=(bottom, top))
    axis.tick_params(labelsize=7)


def _title(transform: FlowTransform) -> str:
    return f"inverse {_title(transform.inv)}" if isinstance(transform, Inverse) else type(transform).__name__
