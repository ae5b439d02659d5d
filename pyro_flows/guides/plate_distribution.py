"""The law behind :class:`AutoPlateFlow`: q(g, l) = q(g) Π_i q(l_i | c_i, g), over vectors and over values of sites."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..flows import Flow
from ..flows.chunks import chunk_for
from ..transforms.recompute import recomputed
from .masked import RowMasks
from .packing import Packing
from .recipe import is_untrained, permutes


class Nested(nn.Module):
    """A flow over the latents outside of a plate, and a conditional one over those of each of its rows.

    Args:
        shared: How the latents outside of the plate lie in a vector g.
        own: How those of a row lie in a vector l.
        flow: The flow over g, of :func:`assemble`; None where there is no g.
        local_flow: The flow over l, of :func:`assemble_local`; None where there is no l.
        scale: The scale that the guide starts from.
    """

    scale: Tensor

    def __init__(self, shared: Packing, own: Packing, flow: Flow | None, local_flow: Flow | None, scale: float) -> None:
        super().__init__()
        self.shared, self.own = shared, own
        self.flow, self.local_flow = flow, local_flow
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

    @property
    def is_fresh(self) -> bool:
        """Whether the flows are still untrained."""
        if self.flow and not is_untrained(self.flow, float(self.scale), [False] * self.shared.size):
            return False
        if not self.local_flow:
            return True
        return permutes(self.local_flow.transforms[:-1], self.own.start.new_zeros(self.own.size))

    def contexts(self, rows: Tensor, g: Tensor | None) -> Tensor:
        """The contexts of rows, ``(rows, context_dim)``, in the plate's dimension and beside g.

        The latter is seen from the middle of its flow, in a unit that stays: were it the flow's width, what was learned
        of a row given g would be wrong whenever the flow gets narrower.  The unit is wide, so that noise in what is
        learned matters little within the narrow law of g that many rows leave.
        """
        rows = rows.to(self.own.start.dtype).reshape(len(rows), *(1,) * self.own.trailing, -1)
        if g is None or self.flow is None:
            return rows
        centre = torch.zeros_like(self.shared.start)
        for transform in self.flow.transforms:
            centre, _ = transform.forward_and_log_det(centre)
        g = (g - centre) / (10 * self.scale.to(g))
        shape = torch.broadcast_shapes(rows.shape[:-1], g.shape[:-1])
        return torch.cat((rows.expand(*shape, -1), g.expand(*shape, -1)), -1)

    def draw(self, size: int, rows: Tensor) -> dict[str, Tensor]:
        """Draws for rows with some contexts: for each site ``(size, *site_shape)``."""
        depth = max(self.shared.depth, self.own.depth)
        lead, g, found = (size, *(1,) * depth), None, dict[str, Tensor]()
        if self.flow:
            g = self.flow().sample(lead)
            found.update(self.shared.values(g, size))
        if self.local_flow:
            more = () if self.flow else lead[: depth - self.own.trailing]
            found.update(self.own.values(self.local_flow(self.contexts(rows, g)).sample(more), size))
        return found

    def log_prob(self, values: dict[str, Tensor], rows: Tensor, masks: RowMasks) -> Tensor:
        """The log-density of values ``(*batch, *site_shape)`` for rows with some contexts, ``batch``.

        What is masked does not count.  Many values are scored some at a time, those of the first
        dimension of the batch, so that they fit into memory.
        """
        parts = {**self.shared.parts, **self.own.parts}
        given = [(values[name], part) for name, part in parts.items() if name in values]
        batches = {value.shape[: value.dim() - len(part.batch) - part.event_dim] for value, part in given}
        batch = batches.pop() if len(given) == len(parts) and len(batches) == 1 else torch.Size()
        size = chunk_for((self.shared.size + len(rows) * self.own.size) * batch[1:].numel())
        if batch[:1].numel() <= size:
            return self._log_prob(values, rows, masks)
        columns = zip(*(value.split(size) for value, _ in given), strict=True)
        chunks = [dict(zip(parts, chunk, strict=True)) for chunk in columns]
        return torch.cat([recomputed(self._log_prob, chunk, rows, masks) for chunk in chunks])

    def _log_prob(self, values: dict[str, Tensor], rows: Tensor, masks: RowMasks) -> Tensor:
        total, g = torch.zeros(()), None
        if self.flow:
            packed, log_det = self.shared.pack(values)
            total = total + self.flow().log_prob(packed) + log_det
            g = packed.reshape(*packed.shape[:-1], *(1,) * (self.own.trailing + 1), -1)
        if self.local_flow:
            packed, log_det = self.own.pack(values, masks.parts)
            own = packed.reshape(*packed.shape[:-1], *(1,) * self.own.trailing, -1)
            log_q = self.local_flow(self.contexts(rows, g)).log_prob(own)
            log_q = log_q.reshape(log_det.shape) + log_det
            total = total + (log_q if masks.rows is None else log_q.where(masks.rows.flatten(), 0.0)).sum(-1)
        return total
