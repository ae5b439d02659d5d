"""Blocks of latents, each with a flow that depends on the blocks before it: q(z) = Π_b Π_i q(z_bi | c_bi, z_<b).

A block holds the latents in the rows i of some plates, or those outside of all such plates.  Structured Stochastic
Variational Inference (Hoffman, Blei 2014, arXiv:1404.4114).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..flows.chunks import chunk_for, in_chunks
from ..flows.distribution import FlowDistribution
from ..transforms import Conditioned, Permute
from ..transforms.base import chained
from ..transforms.recurrence import Process
from .contexts import BlockRows, RowContexts
from .guide_call import Key, RowMasks
from .guide_flow import GuideFlow
from .packing import Packing
from .read_structure import Nesting

LEANS = 16  # the largest number of shared latents on which gains depend
Parts = tuple[Tensor | None, ...]  # the tensors of a frame, in the order of Frame.set


class Frame(nn.Module):
    """The distribution from which a block of latents starts: Gaussian along the steps of each row, given its parents.

    For the latents z of row i, given the latents p of the parents, among them the latents g outside of all rows::

        z_i = μ_i + M_i(g) (p - p_i) + e_i,    e_it = A_it(g) e_i,t-1 + L_it(g) w_it,
        M_i(g) = M_i + Σ_k C_ik (g - g_i)_k,    A_it(g) = A_it + Σ_k B_itk (g - g_i)_k,
        L_it(g) = L_it diag exp(s_it (g - g_i))

    with w from the block's flow, and p_i the place of the parents at which the row has mean μ_i.  So the flow is
    trained in coordinates in which the posterior is nearly standard normal, and funnels have straight walls.  The gain
    of a row in the latents of an outer row depends on scales, which are among g: the C.  Thousands of rows with a
    constant gain would each cost few nats away from the middle of g, and all together make g too narrow.

    There is one for each row, set and not trained, at first the same for all rows.

    All tensors are parameters, so that parameter stores and checkpoints hold them, but no gradient reaches them.

    Args:
        start: The first means, ``(rows, T, d)``.
        scale: The first standard deviation.
        num_given: The number of the parents' latents.
        num_shared: The number of these, the first ones, that lie outside of all rows.
    """

    def __init__(self, start: Tensor, scale: float, num_given: int, num_shared: int) -> None:
        super().__init__()
        rows, self.steps, self.width = start.shape
        self.num_shared, several = num_shared, self.steps > 1  # the first step has none before it
        eye = (scale * torch.eye(self.width).to(start)).expand(rows, self.steps, -1, -1)
        self.origin = nn.Parameter(start.new_zeros(rows, num_given))
        self.loc = nn.Parameter(start.clone())
        self.gain = nn.Parameter(start.new_zeros(*start.shape, num_given))
        self.scale = nn.Parameter(eye.clone())
        self.stretch = nn.Parameter(start.new_zeros(*start.shape, num_shared))
        self.matrix = nn.Parameter(torch.zeros_like(eye)) if several else None
        self.turn = nn.Parameter(start.new_zeros(*eye.shape, num_shared)) if several else None
        inner = num_given - num_shared
        leans = inner > 0 and 0 < num_shared <= LEANS
        self.lean = nn.Parameter(start.new_zeros(*start.shape, inner, num_shared)) if leans else None

    def parts(self) -> Parts:
        """Return the tensors that a file holds, for :meth:`of`."""
        return self.origin, self.loc, self.gain, self.scale, self.stretch, self.matrix, self.turn, self.lean

    @classmethod
    def of(cls, parts: Any) -> Frame | None:
        """Return a frame from its parts, or None."""
        if parts is None:
            return None
        origin, loc, _, _, stretch, *_ = parts
        frame = cls(loc, 1.0, origin.shape[-1], stretch.shape[-1])
        frame.set(*parts)
        return frame

    @torch.no_grad()
    def set(self, *parts: Any) -> None:
        """Set all tensors, in the order of :meth:`parts`; those that this frame lacks may be given."""
        for own, new in zip(self.parts(), parts, strict=True):
            if own is not None:
                own.copy_(new)

    def at(self, places: Tensor, given: Tensor | None) -> Process:
        """Return the map from noise to the latents of some rows.

        Args:
            places: The places of the rows, aligned, ``(*batch)``.
            given: The parents' latents, ``(*batch, num_given)``, or None.
        """
        loc, scale = self.loc.detach()[places], self.scale.detach()[places].tril()
        matrix = None if self.matrix is None else self.matrix.detach()[places]
        if given is None:
            return Process(loc, matrix, scale)
        away = given - self.origin.detach()[places]
        along, shared = away[..., None, :, None], away[..., None, : self.num_shared, None]
        loc = loc + (self.gain.detach()[places] @ along).squeeze(-1)
        if self.lean is not None:
            products = away[..., self.num_shared :, None] * away[..., None, : self.num_shared]
            loc = loc + (self.lean.detach()[places].flatten(-2) @ products.flatten(-2)[..., None, :, None]).squeeze(-1)
        scale = scale * (self.stretch.detach()[places] @ shared).exp().mT
        if matrix is not None and self.turn is not None:
            matrix = matrix + (self.turn.detach()[places] @ shared.unsqueeze(-3)).squeeze(-1)
        return Process(loc, matrix, scale)


Masks = Mapping[Key, RowMasks]


@dataclass(frozen=True)
class Drawn:
    """The vectors of a block, aligned, as later blocks see them.

    Attributes:
        block: The block.
        z: The vectors.
        q: Their distribution.
    """

    block: Block
    z: Tensor
    q: FlowDistribution

    @cached_property
    def relative(self) -> Tensor:
        """The vectors relative to the middle of their distribution, in a fixed unit.

        In units of the flow's width, what was learned of other blocks would be wrong whenever the flow gets narrower.
        The unit is wide: many rows leave shared latents a narrow distribution, within which noise in what was learned
        then matters little.  If shared latents depend on a context, their middle differs from dataset to dataset; they
        are relative to the start.
        """
        if self.block.is_pooled:
            middle = self.block.flow.fixed.loc.detach()
        else:
            middle, _ = chained(self.q.runs, self.z.new_zeros(self.block.packing.size), self.q.context)
        return (self.z - middle) / self.block.unit.detach()


class Block(nn.Module):
    """The latents in the rows of some plates: a flow over each row's vector, conditional on its context.

    Args:
        name: The name of the guide's sample statement.
        packing: The packing of a row's latents into a vector.
        flow: The flow over the vector.
        contexts: The contexts of the rows; None outside of all rows.
        parents: The places of the blocks on which this one depends.
        nestings: The nestings by an index of the plates of its rows.
        frame: The Gaussian that follows the flow, or None.
        order: The places of the frame's numbers in the vector, ``(T, d)``; None for the same order.
        unit: The unit of the block's latents, as other blocks see them.
    """

    def __init__(
        self,
        name: str,
        packing: Packing,
        flow: GuideFlow,
        contexts: RowContexts | None,
        parents: Sequence[int],
        nestings: Sequence[Nesting],
        frame: Frame | None,
        order: Tensor | None,
        unit: float,
    ) -> None:
        super().__init__()
        self.name, self.packing, self.flow, self.contexts, self.frame = name, packing, flow, contexts, frame
        self.parents, self.nestings = tuple(parents), tuple(nestings)
        self.order = order
        self.permute = None if order is None else Permute(torch.argsort(order.flatten()))
        # A parameter, so that parameter stores hold it, but no gradient reaches it.
        self.unit = nn.Parameter(torch.full((packing.size,), unit, dtype=packing.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> Block:
        super()._apply(fn, *args)
        self.packing = self.packing.moved(fn)
        return self

    @property
    def number(self) -> int:
        """The number of all rows, 1 for latents outside of all rows."""
        return 1 if self.contexts is None else self.contexts.number

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of all rows in each plate."""
        return () if self.contexts is None else self.contexts.sizes

    @property
    def seen(self) -> tuple[int, ...]:
        """The numbers of rows in each plate that the guide was set up with, all rows or those of a minibatch."""
        start = self.packing.start
        return tuple(start.shape[start.dim() - 1 + dim] for dim in self.packing.dims)

    @property
    def starts_near(self) -> bool:
        """True if each row starts near its posterior, as its mean differs from that of other rows."""
        return self.frame is not None and bool((self.frame.loc != self.frame.loc[:1]).any())

    @property
    def is_pooled(self) -> bool:
        """True if the latents lie outside of all rows, and depend on the data, or did before the guide was bound."""
        depends = self.flow.context_dim > 0 or any(isinstance(t, Conditioned) for t in self.flow.couplings)
        return depends and not (self.contexts or self.parents)

    def rows_of(self, parent: Block, sizes: tuple[int, ...]) -> Tensor:
        """Return for each row of plates of some sizes the row of a parent that it belongs to."""
        number = dict(zip(self.packing.plates, sizes, strict=True))
        row = dict(zip(number, torch.meshgrid(*map(torch.arange, sizes), indexing="ij") if sizes else (), strict=True))
        if nesting := self._nesting_in(parent):
            return nesting.rows[row[nesting.plate]].flatten()
        found = torch.zeros(sizes, dtype=torch.long)
        for plate in parent.packing.plates:
            found = found * number[plate] + row[plate]
        return found.flatten()

    def _nesting_in(self, parent: Block) -> Nesting | None:
        """Return the nesting by an index in a parent, or None if its plates are among those of this block."""
        apart = {*parent.packing.plates} - {*self.packing.plates}
        return next((nesting for nesting in self.nestings if nesting.outer in apart), None)

    def from_parent(self, parent: Block, vectors: Tensor, places: Tensor | None) -> Tensor:
        """Return for each row the vector of the parent's row that it belongs to, aligned.

        Args:
            parent: The parent.
            vectors: The vectors of its rows, aligned.
            places: The places of the rows of this block, or None for all in their order.
        """
        nesting = self._nesting_in(parent)
        if nesting is None:
            return vectors
        axis, (dim,) = self.packing.plates.index(nesting.plate), parent.packing.dims
        if vectors.shape[dim - 1] != parent.number:
            fault = f"plate {nesting.outer!r} takes {vectors.shape[dim - 1]} of its {parent.number} rows"
            raise ValueError(f"{fault}, but rows of {nesting.plate!r} belong to all of them. Let it take all rows.")
        rows, own = nesting.rows.to(vectors.device), self.packing.dims[axis]
        if places is not None:
            first = places.movedim(axis, 0).reshape(places.shape[axis], -1)[:, 0]
            rows = rows[first.to(rows.device) // math.prod(self.sizes[axis + 1 :]) % self.sizes[axis]]
        alone = vectors.dim() - 1 == parent.packing.depth  # without a batch
        vectors = vectors.index_select(dim - 1, rows)
        vectors = vectors.reshape(*(1,) * (1 - own - vectors.dim()), *vectors.shape).transpose(dim - 1, own - 1)
        return vectors.reshape(vectors.shape[-1 - self.packing.depth :]) if alone else vectors

    def start(self, *, whole: bool) -> Tensor:
        """Return the start of the rows' vectors, ``(rows, size)``; rows that were not seen have that of the first."""
        start = self.packing.start.reshape(-1, self.packing.size)
        return start if not whole or len(start) == self.number else start[:1].expand(self.number, -1)

    def parts(self) -> tuple[Any, ...]:
        """Return the parts of the block that a file holds."""
        frame = None if self.frame is None else self.frame.parts()
        rows = None if self.contexts is None else self.contexts.parts()
        return self.flow, self.parents, frame, self.unit, rows

    def aligned(self, rows: Tensor, trailing: int, depth: int = 0) -> Tensor:
        """Put tensors ``(*batch, *rows, ...)`` with so many trailing dimensions at the dimensions of the rows' plates.

        If there is a batch, there are at least ``depth`` dimensions between the batch and the trailing ones.
        """
        end = rows.dim() - trailing
        batch, sizes = rows.shape[: end - len(self.packing.dims)], rows.shape[end - len(self.packing.dims) : end]
        shape = [1] * max(self.packing.depth, depth if batch else 0)
        for dim, size in zip(self.packing.dims, sizes, strict=True):
            shape[dim] = size
        return rows.reshape((*batch, *shape, *rows.shape[end:]))

    def at(self, context: Tensor | None, places: Tensor | None, given: Tensor | None) -> FlowDistribution:
        """Return the distribution of the rows' vectors.

        Args:
            context: Their contexts, aligned.
            places: The places of the rows.
            given: The latents of the parents, aligned.
        """
        q = self.flow(context)
        if self.frame is None:
            return q
        alike = places is None or len(self.frame.loc) == 1  # rows that have one frame
        where = torch.zeros((), dtype=torch.long) if alike or places is None else self.aligned(places, 0)
        q = q.followed_by(self.frame.at(where, given))
        return q if self.permute is None else q.followed_by(self.permute)


class Blocks(nn.Module):
    """The joint distribution of blocks, in an order in which each depends on earlier ones alone.

    Args:
        scale: The scale of the guide's start.

    Attributes:
        blocks: The blocks, none at first.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList()
        self.scale = scale

    def at(self, block: Block, rows: BlockRows, drawn: Sequence[Drawn]) -> FlowDistribution:
        """Return the distribution of a block's vectors for some rows, given the blocks before it."""
        parents = [drawn[parent] for parent in block.parents]

        def of_parents(vectors: Iterable[Tensor]) -> list[Tensor]:
            pairs = zip(parents, vectors, strict=True)
            return [block.from_parent(parent.block, z, rows.places) for parent, z in pairs]

        context = _joined(
            [] if rows.contexts is None else [block.aligned(rows.contexts.to(block.packing.dtype), 1, self.depth)],
            of_parents(parent.relative for parent in parents),
        )
        given = _joined(of_parents(parent.z for parent in parents)) if block.frame is not None else None
        return block.at(context, rows.places, given)

    def draw(self, size: int, rows: Sequence[BlockRows], masks: Masks) -> dict[str, Tensor]:
        """Sample the sites for some rows of each block, ``(size, *batch, *site_shape)`` for a batch of datasets.

        Rows that a mask hides are at the origin of the unconstrained space.
        """
        drawn, found, batch = list[Drawn](), dict[str, Tensor](), self.batch_of(rows)
        for block, own in zip(self.blocks, rows, strict=True):
            q, depth = self.at(block, own, drawn), block.packing.depth
            ones = () if batch else (1,) * (self.depth - depth)
            z = q.sample(() if block.parents else (size, *ones))  # parents' draws have the size
            z = masks.get(block.packing.plates, RowMasks()).filled(z)
            drawn.append(Drawn(block, z, q))
            found.update(block.packing.values(z.reshape(size, *batch, *z.shape[z.dim() - 1 - depth :])))
        return found

    def batch_of(self, rows: Sequence[BlockRows]) -> torch.Size:
        """Return the shape of a batch of datasets whose rows have some contexts; ``()`` for one dataset."""
        found = [
            own.contexts.shape[: own.contexts.dim() - 1 - len(block.packing.dims)]
            for block, own in zip(self.blocks, rows, strict=True)
            if own.contexts is not None
        ]
        return found[0] if found else torch.Size()

    @property
    def depth(self) -> int:
        """The number of dimensions of an aligned batch that holds the rows of all blocks."""
        return max(block.packing.depth for block in self.blocks)

    def values(self, vectors: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Map packed vectors of all rows, ``(N, D)``, to values of the sites.

        Returns:
            The values, each ``(N, *site_shape)``, and the log-determinant of the map in nats, ``(N,)``.
        """
        found, change = dict[str, Tensor](), vectors.new_zeros(len(vectors))
        parts = vectors.split([block.number * block.packing.size for block in self.blocks], -1)
        for block, part in zip(self.blocks, parts, strict=True):
            sizes, depth = dict(zip(block.packing.dims, block.sizes, strict=True)), block.packing.site_depth
            aligned = part.reshape(len(part), *(sizes.get(dim, 1) for dim in range(-depth, 0)), -1)
            for name, _, value, log_det in block.packing.unpack(aligned):
                found[name], change = value, change + log_det.reshape(len(part), -1).sum(-1)
        return found, change

    def log_prob(self, values: dict[str, Tensor], rows: Sequence[BlockRows], masks: Masks) -> Tensor:
        """Return the log-density of values ``(*batch, *site_shape)`` for rows with some contexts, ``batch``.

        Masked rows do not count.  The flows see a chunk of the batch at a time, so that many values fit into memory.
        """
        mask_of = [masks.get(block.packing.plates, RowMasks()) for block in self.blocks]
        packed, shapes, change = [], [], torch.zeros(())
        for block, mask in zip(self.blocks, mask_of, strict=True):
            z, log_det = block.packing.pack(values, mask.parts)  # (*batch, *rows, size), (*batch, *rows)
            start = z.dim() - 1 - block.packing.depth
            shapes.append(z.shape[start:])
            packed.append(z.flatten(start))
            change = change + _counted(log_det, mask, block.packing.depth)
        batch = torch.broadcast_shapes(*(z.shape[:-1] for z in packed))
        vectors = torch.cat([z.expand(*batch, -1) for z in packed], -1)
        chunk = None if self.batch_of(rows) else chunk_for(vectors.shape[-1])  # each dataset has contexts of its own

        def of_vectors(z: Tensor, _: None) -> Tensor:
            total, batch = torch.zeros(()), z.shape[:-1]
            carried = self.carried(z, shapes, rows, inverse=True)
            for block, shape, mask, (x, log_det) in zip(self.blocks, shapes, mask_of, carried, strict=True):
                log_q = (block.flow.base().log_prob(x) + log_det).reshape((*batch, *shape[:-1]))
                total = total + _counted(log_q, mask, block.packing.depth)
            return total

        return in_chunks(of_vectors, chunk, vectors, None, 1) + change

    def carried(
        self, vectors: Tensor, shapes: Sequence[Sequence[int]], rows: Sequence[BlockRows], *, inverse: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Map packed vectors of all blocks, ``(*batch, D)``, from the bases to the latents, or back.

        Args:
            vectors: The vectors.
            shapes: The shape of each block's vectors, ``(*rows, size)``, with rows at the dimensions of their plates.
            rows: The rows of each block.
            inverse: True for the way back.

        Returns:
            For each block its vectors, aligned, and the log-determinant of the map of each row.
        """
        drawn, found, batch = list[Drawn](), [], vectors.shape[:-1]
        parts = vectors.split([math.prod(shape) for shape in shapes], -1)
        for block, own, shape, part in zip(self.blocks, rows, shapes, parts, strict=True):
            x = part.reshape(*batch, *(1,) * (self.depth - block.packing.depth), *shape)
            q = self.at(block, own, drawn)
            found.append(chained(q.runs, x, q.context, inverse=inverse))
            drawn.append(Drawn(block, x if inverse else found[-1][0], q))
        return found


class BlockTransform(Transform):
    """The map from the bases of all blocks to their vectors, each packed, for all rows: ``(*batch, D)``.

    Args:
        posterior: The blocks.
        rows: The rows of each block.  If they are of a batch of datasets, ``batch`` ends with its shape.
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, posterior: Blocks, rows: Sequence[BlockRows]) -> None:
        super().__init__()
        self._posterior, self._rows = posterior, rows
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # x, z and log|dz/dx|

    def _call(self, x: Tensor) -> Tensor:
        z, log_det = self._carried(x, inverse=False)
        self._last = x, z, log_det
        return z

    def _inverse(self, y: Tensor) -> Tensor:
        return self._carried(y, inverse=True)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log|dz/dx|, in nats, ``batch``."""
        last = self._last
        return last[2] if last and last[0] is x and last[1] is y else self._carried(x, inverse=False)[1]

    def _carried(self, vectors: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        batch = vectors.shape[:-1]
        pairs = self._posterior.carried(vectors, self._shapes, self._rows, inverse=inverse)
        found = [(y.reshape(*batch, -1), log_det.reshape(*batch, -1)) for y, log_det in pairs]
        return torch.cat([y for y, _ in found], -1), torch.cat([log_det for _, log_det in found], -1).sum(-1)

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        """The shape of each block's vectors, with the rows at the dimensions of their plates."""
        pairs, batch = zip(self._posterior.blocks, self._rows, strict=True), len(self._posterior.batch_of(self._rows))
        rows = [() if own.contexts is None else block.aligned(own.contexts, 1).shape[batch:-1] for block, own in pairs]
        return [(*sizes, block.packing.size) for block, sizes in zip(self._posterior.blocks, rows, strict=True)]


def _joined(*groups: Sequence[Tensor]) -> Tensor | None:
    """Join vectors ``(*batch, n)`` with batches that broadcast; return None for no vectors."""
    parts = [part for group in groups for part in group]
    if not parts:
        return None
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch, -1) for part in parts], -1)


def _counted(log_q: Tensor, mask: RowMasks, depth: int) -> Tensor:
    """Sum log-densities ``(*batch, *rows)`` over the rows that count."""
    if not depth:
        return log_q
    counts = torch.as_tensor(mask.rows, device=log_q.device)
    return log_q.where(counts, 0.0).sum([*range(-depth, 0)])
