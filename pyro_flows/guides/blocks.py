"""Blocks of latents, each with a flow that depends on the blocks before it: q(z) = Π_b Π_i q(z_bi | c_bi, z_<b).

A block holds the latents in the rows i of some plates, or those outside of all such plates.  Structured Stochastic
Variational Inference (Hoffman, Blei 2014, arXiv:1404.4114).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..flows.distribution import FlowDistribution, chunk_for, in_chunks
from ..transforms import Conditioned, Permute, View
from ..transforms.base import TwoWay, chained
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
        L_it(g) = L_it (I + N_it(g)) exp D_it(g)

    with w from the block's flow, and p_i the place of the parents at which the row has mean μ_i.  The diagonal matrix D
    and the strictly lower triangular one N are linear in g - g_i, so correlations within a row depend on g, too.  The
    flow is trained in coordinates in which the posterior is nearly standard normal, and funnels have straight walls.
    The gain of a row in the latents of an outer row depends on scales, which are among g: the C.  Thousands of rows
    with a constant gain would each cost few nats away from the middle of g, and all together make g too narrow.

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
        rows, steps, width = start.shape
        self.num_shared, inner, new = num_shared, num_given - num_shared, start.new_zeros
        eye = (scale * torch.eye(width).to(start)).repeat(rows, steps, 1, 1)
        several = steps > 1  # the first step has none before it
        leans = inner > 0 and 0 < num_shared <= LEANS
        self.origin, self.loc = nn.Parameter(new(rows, num_given)), nn.Parameter(start.clone())
        self.gain, self.scale = nn.Parameter(new(*start.shape, num_given)), nn.Parameter(eye)
        self.stretch = nn.Parameter(new(*eye.shape, num_shared))
        self.matrix = nn.Parameter(torch.zeros_like(eye)) if several else None
        self.turn = nn.Parameter(new(*eye.shape, num_shared)) if several else None
        self.lean = nn.Parameter(new(*start.shape, inner, num_shared)) if leans else None

    def parts(self) -> Parts:
        """Return the tensors, which a file holds."""
        return self.origin, self.loc, self.gain, self.scale, self.stretch, self.matrix, self.turn, self.lean

    @classmethod
    def of(cls, parts: Any) -> Frame:
        """Return a frame from its :meth:`parts`."""
        frame = cls(parts[1], 1.0, parts[0].shape[-1], parts[4].shape[-1])
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
        stretch = (self.stretch.detach()[places] @ shared.unsqueeze(-3)).squeeze(-1)
        scale = (scale + scale @ stretch.tril(-1)) * stretch.diagonal(dim1=-2, dim2=-1).exp().unsqueeze(-2)
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
        parents: The places of the blocks on which this one depends.  Each row of this block lies in a row of theirs,
            or belongs to one by the index of a nesting.
        frame: The Gaussian that follows the flow, or None.
        order: The places in the vector of the latents of each step, ``(T, d)``; one step if they are no sequence.
        unit: The unit of the block's latents, as other blocks see them, ``(size,)``.
    """

    def __init__(
        self,
        name: str,
        packing: Packing,
        flow: GuideFlow,
        contexts: RowContexts | None,
        parents: Mapping[int, Nesting | None],
        frame: Frame | None,
        order: Tensor,
        unit: Tensor,
    ) -> None:
        super().__init__()
        self.name, self.packing, self.flow, self.contexts, self.frame = name, packing, flow, contexts, frame
        self.parents, self.order = parents, order
        self.permute = None if len(order) == 1 else Permute(torch.argsort(order.flatten()))
        # A parameter, so that parameter stores hold it, but no gradient reaches it.
        self.unit = nn.Parameter(unit.detach().clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> Block:
        super()._apply(fn, *args)
        self.packing = self.packing.moved(fn)
        return self

    @property
    def number(self) -> int:
        """The number of all rows."""
        return math.prod(self.sizes)

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

    def start(self, *, whole: bool) -> Tensor:
        """Return the start of the rows' vectors, ``(rows, size)``; rows that were not seen have that of the first."""
        start = self.packing.start.reshape(-1, self.packing.size)
        return start if not whole or len(start) == self.number else start[:1].expand(self.number, -1)

    def parts(self) -> tuple[Any, ...]:
        """Return the parts of the block that a file holds."""
        return self.flow, self.frame and self.frame.parts(), self.unit, self.contexts and self.contexts.parts()

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

    def rows_of(self, block: Block, parent: int, sizes: Sequence[int]) -> Tensor:
        """Return for each row of a block, with plates of some sizes, the row of a parent that it belongs to."""
        outer, number = self.blocks[parent], dict(zip(block.packing.plates, sizes, strict=True))
        there = outer.sizes if block.parents[parent] else [number[plate] for plate in outer.packing.plates]
        index = outer.aligned(torch.arange(math.prod(there)).reshape(*there, 1), 1)
        own = block.aligned(torch.zeros(*sizes, 1), 1)
        return self._of_parent(block, parent, index, None).expand(own.shape).flatten()

    def _of_parent(self, block: Block, parent: int, vectors: Tensor, places: Tensor | None) -> Tensor:
        """Return for each row of a block the vector of the parent's row that it belongs to, aligned.

        Args:
            block: The block.
            parent: The place of the parent.
            vectors: The vectors of its rows, aligned.
            places: The places of the rows of the block, or None for all in their order.
        """
        outer, nesting = self.blocks[parent], block.parents[parent]
        if nesting is None:
            return vectors
        axis, (dim,) = block.packing.plates.index(nesting.plate), outer.packing.dims
        if vectors.shape[dim - 1] != outer.number:
            fault = f"plate {nesting.outer!r} takes {vectors.shape[dim - 1]} of its {outer.number} rows"
            raise ValueError(f"{fault}, but rows of {nesting.plate!r} belong to all of them. Let it take all rows.")
        rows, own = nesting.rows.to(vectors.device), block.packing.dims[axis]
        if places is not None:
            first = places.movedim(axis, 0).reshape(places.shape[axis], -1)[:, 0]
            rows = rows[first.to(rows.device) // math.prod(block.sizes[axis + 1 :]) % block.sizes[axis]]
        alone = vectors.dim() - 1 == outer.packing.depth  # without a batch
        vectors = vectors.index_select(dim - 1, rows)
        vectors = vectors.reshape(*(1,) * (1 - own - vectors.dim()), *vectors.shape).transpose(dim - 1, own - 1)
        return vectors.reshape(vectors.shape[-1 - block.packing.depth :]) if alone else vectors

    def at(self, block: Block, rows: BlockRows, drawn: Sequence[Drawn]) -> FlowDistribution:
        """Return the distribution of a block's vectors for some rows, given the blocks before it."""
        places, frame = rows.places, block.frame
        own = [] if rows.contexts is None else [block.aligned(rows.contexts.to(block.packing.dtype), 1, self.depth)]
        relative = [self._of_parent(block, i, drawn[i].relative, places) for i in block.parents]
        q = block.flow(_joined(own + relative))
        if frame is None:
            return q
        given = _joined([self._of_parent(block, i, drawn[i].z, places) for i in block.parents])
        one = places is None or len(frame.loc) == 1  # rows that have one frame
        where = torch.zeros((), dtype=torch.long) if one or places is None else block.aligned(places, 0)
        q = q.followed_by(frame.at(where, given))
        return q if block.permute is None else q.followed_by(block.permute)

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
        for block, own in zip(self.blocks, rows, strict=True):
            if own.contexts is not None:
                return own.contexts.shape[: own.contexts.dim() - 1 - len(block.packing.dims)]
        return torch.Size()

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

    def transform(self, rows: Sequence[BlockRows]) -> View:
        """Return the map from the bases of all blocks to their packed vectors, for some rows of each."""
        return View(BlockTransform(self, rows))

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


class BlockTransform(TwoWay):
    """The map from the bases of all blocks to their vectors, each packed, for all rows: ``(*batch, D)``.

    Args:
        posterior: The blocks.
        rows: The rows of each block.  If they are of a batch of datasets, ``batch`` ends with its shape.
    """

    def __init__(self, posterior: Blocks, rows: Sequence[BlockRows]) -> None:
        pairs, batch = zip(posterior.blocks, rows, strict=True), len(posterior.batch_of(rows))
        sizes = [() if own.contexts is None else block.aligned(own.contexts, 1).shape[batch:-1] for block, own in pairs]
        # The shape of each block's vectors, with the rows at the dimensions of their plates.
        shapes = [(*of, block.packing.size) for block, of in zip(posterior.blocks, sizes, strict=True)]
        super().__init__((sum(map(math.prod, shapes)),))
        self.posterior, self.rows, self.shapes = posterior, rows, shapes

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        pairs = self.posterior.carried(value, self.shapes, self.rows, inverse=inverse)
        flat = [(y.reshape(*value.shape[:-1], -1), log_det.reshape(*value.shape[:-1], -1)) for y, log_det in pairs]
        return torch.cat([y for y, _ in flat], -1), torch.cat([log_det for _, log_det in flat], -1).sum(-1)


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Join vectors ``(*batch, n)`` with batches that broadcast; return None for no vectors."""
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
