"""The base class of guides that are made of blocks: a flow over shared latents, and conditional flows over rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ..arguments import check_integers, check_numbers
from ..bijectors import Affine
from ..encoders.base import at_rest
from ..flows import Flow
from ..programs.engines import in_batches
from ..programs.plate_minibatches import Shuffled
from .base import FlowGuide, check_fits
from .blocks import Block, Blocks, BlockTransform, Drawn, Frame
from .contexts import BlockRows, InTurn, RowContexts, check_encoder, check_tied, initialize
from .default_training import Schedule, schedule_of_many
from .guide_call import Call, Found, Key, RowMasks, Rows, frames_of, masks_of_all
from .guide_flow import (
    LIMITS,
    GuideFlow,
    assemble,
    assemble_local,
    autoencoder_flow,
    built,
    check_recipes,
    default_for,
    local_flow,
    rows_flow,
    sequence_flow,
)
from .packing import Packing, check_supports, is_circular, moving_supports, place
from .read_structure import Nesting, Structure, check_nestings, takes_all

SHARED = "latent"  # the name of the block of latents outside of all rows
Encoder = Callable[..., Tensor]


@dataclass(frozen=True)
class Scales:
    """Units and sizes of guides that are made of blocks.

    Attributes:
        wide: The unit of a block's latents, as other blocks see them, in scales of the start.
        unit: The same in standard deviations, once the guide has started from a Gaussian.
        largest: Numbers to draw at once.
        numbers: Latents to draw in a step, with up to 8 draws.
    """

    wide: float = 10.0
    unit: float = 3.0
    largest: int = 1_000_000
    numbers: int = 200_000


SCALES = Scales()


class BlockGuide(FlowGuide):
    """A guide whose joint density is a product over blocks of latents.

    Args:
        model: The model.
        encoders: For the plates whose rows have encoded contexts, the encoder.
        local_flow: The recipe for the latents of rows, or None.
        global_flow: The recipe for the latents outside of rows, or None.
        embedding_dim: The width of the learned vector of each row, without an encoder.
        init_loc_fn: The strategy for the start, or None.
        init_scale: The scale of each unconstrained latent at the start, or None.
        name: The guide's name, or None.

    Attributes:
        size_of_rows: The largest number of all rows of a plate whose rows have flows.
    """

    recipes = "_build_local", "_build_global"
    posterior: Blocks
    minibatches: Any
    structure: Structure
    size_of_rows: int

    def __init__(
        self,
        model: Callable[..., Any],
        encoders: Mapping[str, Encoder],
        local_flow: Callable[..., Flow] | None,
        global_flow: Callable[[int], Flow] | None,
        embedding_dim: int,
        init_loc_fn: Callable[..., Any] | None,
        init_scale: float | None,
        name: str | None,
    ) -> None:
        owner = type(self).__name__
        check_recipes(owner, local_flow=local_flow, global_flow=global_flow)
        check_numbers(owner, above=0, optional=True, init_scale=init_scale)
        check_integers(owner, embedding_dim=embedding_dim)
        for encoder in encoders.values():
            check_encoder(owner, encoder)
        super().__init__(model, None, init_loc_fn, name)
        self._build_local, self._build_global = local_flow, global_flow
        self._encoders, self.embedding_dim, self._init_scale = dict(encoders), embedding_dim, init_scale

    @property
    def is_amortised(self) -> bool:
        return False

    def _build(self, call: Call, found: Found) -> None:
        check_nestings(call.owner, self.structure, found.rows)
        self.structure = self.structure.without_absent(self._calls.present)
        self.packings = self._layouts(call.latents)
        scale = float(self._init_scale or (0.1 if self._has_shared else 1.0))
        check_supports(call, moving_supports(call, scale))
        self.minibatches = nn.ModuleList(Shuffled() for _ in self.row_plates)
        self.size_of_rows = max((rows.full_size for rows in found.rows.values()), default=1)
        self.posterior = Blocks(scale)
        for name, packing in self.packings.items():
            self.posterior.blocks.append(self._block(name, packing, call, found))

    @property
    def _has_shared(self) -> bool:
        """True if some latents lie outside of all rows."""
        return any(not packing.plates for packing in self.packings.values())

    def _block(self, name: str, packing: Packing, call: Call, found: Found) -> Block:
        """Build the block of some latents, which depends on the blocks before it."""
        blocks, key, order = self.posterior.blocks, packing.plates, self._order(packing)
        nestings = self._nestings(key)
        parents = [i for i, b in enumerate(blocks) if b.permute is None and _is_around(b.packing.plates, key, nestings)]
        num_given = sum(blocks[parent].packing.size for parent in parents)
        width = num_given + (0 if key or parents or order is not None else self._shared_width(call))
        start, rows = packing.start.reshape(-1, packing.size), [found.rows[plate] for plate in key]
        contexts, linear = None, False
        if key:
            contexts = self._contexts(key)
            linear = order is None and not self._needs_network(contexts, num_given)
            for plate in key if contexts.encoder is None else ():
                check_tied(call, plate, found.rows[plate])
            numbers, noise = Affine().num_params * packing.size * (1 + num_given if linear else 1), self.embedding_dim
            if contexts.encoder is not None:
                numbers, noise = (self.embedding_dim if self._corrects(key) else 0), 0
            contexts.setup(call, rows, start, numbers, noise=0 if linear else noise)
            width += contexts.width
        flow = self._flow(packing, order, contexts, width, num_given if linear else None)
        by_row = contexts is not None and contexts.encoder is None
        shared = blocks[0].packing.size if parents[:1] == [0] and not blocks[0].packing.plates else 0
        frame = None
        number = contexts.number if contexts is not None and by_row else 1
        first = start if len(start) == number else start[:1].expand(number, -1)
        if order is not None:
            frame = Frame(first[:, order], self.posterior.scale, num_given, shared)
        elif by_row:
            frame = Frame(torch.zeros_like(first)[:, None], 1.0, num_given, shared)
        return Block(name, packing, flow, contexts, parents, nestings, frame, order, SCALES.wide * self.posterior.scale)

    def _nestings(self, key: Key) -> list[Nesting]:
        """Return the nestings by an index of the rows of some plates; of plates with two ways to an outer one, none."""
        found = [nesting for plate in key for nesting in self.structure.outside(plate) if nesting.outer not in key]
        ways = Counter(nesting.outer for nesting in found)
        return [nesting for nesting in found if ways[nesting.outer] == 1]

    def _shared_width(self, call: Call) -> int:
        """Return the width of the context of the latents outside of all rows."""
        return 0

    def _contexts(self, key: Key) -> RowContexts:
        return RowContexts(key, self._encoders.get(key[0]) if len(key) == 1 else None)

    def _corrects(self, key: Key) -> bool:
        """True if rows with an encoder have learned vectors too."""
        return False

    def _needs_network(self, contexts: RowContexts, num_given: int) -> bool:
        """True if rows share a network: in an AutoPlateFlow always.

        Args:
            contexts: The contexts of the rows.
            num_given: The number of latents of the parents.
        """
        return True

    def _flow(
        self, packing: Packing, order: Tensor | None, contexts: RowContexts | None, width: int, linear: int | None
    ) -> GuideFlow:
        """Build the flow of a block.

        Args:
            packing: The packing of its latents.
            order: The order of a sequence, or None.
            contexts: The contexts of its rows, or None.
            width: The width of the contexts together with the parents' latents.
            linear: The number of the parents' latents if rows share no network, or None.
        """
        owner, size, scale = type(self).__name__, packing.size, self.posterior.scale
        start = packing.start.reshape(-1, size)
        by_row = contexts is not None and contexts.encoder is None
        if order is not None:
            steps, each = order.shape
            flow = built(owner, "sequence_flow", None, lambda _, n=0: sequence_flow(steps, each, n), size, width)
            return assemble_local(flow, torch.zeros_like(start[0]), 1.0, by_row=by_row)
        if contexts is None:
            flow = built(owner, "global_flow", self._build_global, default_for((), width), size, width)
            return assemble(flow, None, start[0], scale)
        if linear is not None:
            return assemble_local(rows_flow(size, width, linear), start.mean(0), scale, by_row=False)
        default = local_flow if width > contexts.width or by_row else autoencoder_flow
        default = default_for((), width) if self.is_amortised else default
        flow = built(owner, "local_flow", self._build_local, default, size, width)
        return assemble_local(flow, start.mean(0), scale, by_row=by_row, amortised=self.is_amortised)

    def _order(self, packing: Packing) -> Tensor | None:
        """Return the places of each step of a sequence in a row's vector, ``(T, d)``; None if it is no sequence."""
        names = list(packing.parts)
        which = self.structure.group(names[0])
        return None if which < 0 else self.structure.sequences[which].order(names)

    def _layouts(self, sites: dict[str, Any]) -> dict[str, Packing]:
        owner = type(self).__name__
        if angles := [name for name, site in sites.items() if is_circular(site["fn"].support)]:
            raise ValueError(f"{owner}: latent site {angles[0]!r} is an angle; only AutoFlow takes angles.")
        groups: dict[tuple[Key, int], list[Any]] = {}
        for name, site in sites.items():
            key = tuple(frame.name for frame in frames_of(site, self.row_plates))
            groups.setdefault((key, self.structure.group(name)), []).append(site)
        found = {}

        def depth(group: tuple[Key, int]) -> tuple[int, int]:
            return sum(map(self.structure.depth, group[0])), group[1]

        for key, which in sorted(groups, key=depth):  # parents first
            group = groups[key, which]
            words = [*key, SHARED] if which < 0 else [*key, group[0]["name"], "steps"]
            found["_".join(words)] = Packing(owner, group, key, {} if key else self._calls.present)
        return found

    def parts(self) -> dict[str, Any]:
        found = super().parts()
        blocks = tuple(block.parts() for block in self.posterior.blocks)
        found |= {"embedding_dim": self.embedding_dim, "size_of_rows": self.size_of_rows}
        return found | {"scale": self.posterior.scale, "blocks": blocks}

    def _restore(self, scale: float, size_of_rows: int, blocks: tuple[tuple[Any, ...], ...]) -> None:
        self.size_of_rows = size_of_rows
        self.minibatches = nn.ModuleList(Shuffled() for _ in self.row_plates)
        self.posterior = Blocks(scale)
        parts = zip(self.packings.items(), blocks, strict=True)
        for (name, packing), (flow, parents, frame, unit, rows) in parts:
            width = sum(self.posterior.blocks[parent].packing.size for parent in parents)
            key, contexts, order = packing.plates, None, self._order(packing)
            if rows is not None:
                contexts = self._contexts(key)
                contexts.restore(*rows)
                width += contexts.width
            block = Block(name, packing, flow, contexts, parents, self._nestings(key), Frame.of(frame), order, 1.0)
            check_fits(flow, packing.size, flow.context_dim if block.is_pooled else width)
            block.unit.data.copy_(unit)
            self.posterior.blocks.append(block)

    # The default training.

    @property
    def is_fresh(self) -> bool:
        """True if the guide is untrained, and has not started from another distribution."""
        blocks, unit = self.posterior.blocks, SCALES.wide * self.posterior.scale
        return all(torch.equal(b.unit, torch.full_like(b.unit, unit)) and b.flow.is_untrained for b in blocks)

    @property
    def prefers_short_steps(self) -> bool:
        """True if path gradients save less noise than minibatches make, and cost a second run of the guide."""
        blocks = self.posterior.blocks
        some = any(math.prod(block.seen) < block.number for block in blocks)  # of the rows of a plate
        return some and any(block.parents for block in blocks)

    @property
    def takes_gaussian(self) -> bool:
        """True if the guide can start at a Gaussian of its structure: each block of rows has a frame."""
        return all(block.contexts is None or block.frame is not None for block in self.posterior.blocks)

    def places(self, *, whole: bool) -> list[tuple[Tensor, tuple[tuple[int, Tensor], ...]]]:
        """Return the layout of each block in the vector of all latents of the guide's sample statements.

        Args:
            whole: True for all rows, False for those that the guide was set up with.

        Returns:
            For each block the places of its latents, ``(N, T, d)`` for N rows and T steps, and its parents.  These are
            pairs of the parent's place among the blocks and the parent's row of each row, ``(N,)``.
        """
        found, start = [], 0
        for block in self.posterior.blocks:
            rows, size = block.sizes if whole else block.seen, block.packing.size
            number = math.prod(rows)
            own = torch.arange(start, start + number * size).reshape(number, size)
            start += own.numel()
            order = block.order if block.order is not None else torch.arange(size).unsqueeze(0)
            parents = tuple((i, block.rows_of(self.posterior.blocks[i], rows)) for i in block.parents)
            found.append((own[:, order], parents))
        return found

    @torch.no_grad()
    def start_from(self, blocks: Sequence[Any]) -> None:
        """Start from a distribution with the structure of the guide.

        Without all rows of a subsampled plate, each starts from the average over the rows of the minibatch.

        Args:
            blocks: For each block its distribution given its parents, for all rows or for those that the guide was set
                up with: see :class:`~pyro_flows.sampling.block_conditionals.Conditional`.
        """
        means: list[Tensor] = []
        whole = all(len(found.loc) == block.number for block, found in zip(self.posterior.blocks, blocks, strict=True))
        for block, found in zip(self.posterior.blocks, blocks, strict=True):
            loc, scale = found.loc, found.scale
            rows = block.sizes if whole else block.seen
            if block.frame is None:
                block.flow.start_at(loc[0, 0], scale[0, 0])
            else:
                end = block.flow.fixed
                end.set(torch.zeros_like(end.loc), torch.ones_like(end.scale))
                given = [means[i][block.rows_of(self.posterior.blocks[i], rows)] for i in block.parents]
                none = loc.new_zeros(*loc.shape[:1], 0), loc.new_zeros(*loc.shape, 0)
                origin = torch.cat((none[0], *given), -1)
                gain = torch.cat((none[1], *(gain.reshape(*loc.shape, -1) for gain in found.gains)), -1)
                size = block.frame.num_shared
                lean = found.bends.lean.reshape(*loc.shape, *found.bends.lean.shape[2:])
                stretch, turn, lean = (slope[..., :size] for slope in (found.bends.stretch, found.bends.turn, lean))
                parts = [origin, loc, gain, scale, stretch, found.matrix, turn, lean]
                block.frame.set(*(parts if len(loc) == block.number else [p.mean(0, keepdim=True) for p in parts]))
            deviation = scale.square().sum(-1).mean(0).sqrt()  # (T, d)
            block.unit.copy_(SCALES.unit * deviation.flatten())
            means.append(loc.flatten(1))

    def schedule(self, *, near: bool = False, alone: bool = True, share: float = 1.0) -> Schedule:
        """Return the schedule that suits the guide: few draws per step, since gradients are averaged over the rows.

        Only the latents outside of rows need several draws.  The largest norm of a gradient grows with the plates, as
        the gradients do; a fixed norm would weight minibatches by their gradients.  Shared latents alone are one flow.
        """
        first, *others = self.posterior.blocks
        if not others and first.contexts is None and first.frame is None and first.packing.size > LIMITS.few:
            return schedule_of_many(first.packing.size, near=near)
        of_rows = {name for packing in self.packings.values() if packing.plates for name in packing.parts}
        sizes = {name: site["value"].numel() for name, site in self.prototype_trace.iter_stochastic_nodes()}
        size = sum(round(size / share) if name in of_rows else size for name, size in sizes.items())
        num_particles = max(1, min(8, SCALES.numbers // size)) if self._has_shared else 1
        steps, lr = (500, 0.002) if near else (4000, 0.005)
        return Schedule(steps, num_particles, lr=lr, clip_norm=1e3 * self.size_of_rows)

    @property
    def data_encoders(self) -> list[Any]:
        return [*self._encoders.values()]

    def prepare(self, call: Call) -> None:
        if self.is_fresh:
            for encoder in self._encoders.values():
                initialize(call, encoder)

    def _draws(self, call: Call) -> dict[str, Tensor]:
        posterior, plates = self.posterior, self._plates(call)
        result, drawn = dict[str, Tensor](), list[Drawn]()
        # The model enters the plates itself, so it must be run before the guide does.
        all_rows = {name: plates[name].indices for name in self._inner_plates}
        masks = self._calls.masks(call, all_rows)
        shared = self._shared(call, masks)
        for block in posterior.blocks:
            key, mask = block.packing.plates, masks.get(block.packing.plates, RowMasks())
            with ExitStack() as stack:
                indices = {name: stack.enter_context(plates[name]) for name in key}
                stack.enter_context(_masked(mask))
                inside = [plates[name] for name in key]
                rows = block.contexts.of(call, inside, [*indices.values()]) if block.contexts else shared
                q = posterior.at(block, rows, drawn)
                z = mask.filled(self._draw(block.name, q, indices))
            drawn.append(Drawn(block, z, q))
            with _masked(mask):
                result.update(place(block.packing.unpack(z, mask.parts), plates, mask.parts))
        return result

    @property
    def _inner_plates(self) -> list[str]:
        """The plates of rows that hold latents."""
        return [name for name in self.row_plates if any(name in p.plates for p in self.packings.values())]

    def _plates(self, call: Call) -> dict[str, Any]:
        """Return the plates of the latents, with their sizes for these arguments."""
        inner = self._inner_plates if self.master is None else []
        rows, plates = self._calls.rows(call, needed=bool(inner)), dict(self._create_plates())
        for name in inner:
            # A plate without a size has no site in the model, and must not get one here.
            frame = self._prototype_frames[name]
            hidden, known = [name] if frame.size < 0 else [], rows.get(name) or self._rows_without_model(name, call)
            with poutine.block(hide=hidden), InTurn(name, self.minibatches[self.row_plates.index(name)]):
                plates[name] = pyro.plate(name, *known, dim=frame.dim)
        return plates

    def _rows_without_model(self, name: str, call: Call) -> Rows:
        """Return the rows of a plate in the arguments: all of them."""
        contexts = next(b.contexts for b in self.posterior.blocks if b.contexts and name in b.packing.plates)
        number = contexts.of_all(call).contexts.shape[contexts.plates.index(name)]
        return Rows(number, number)

    # Answers for all rows of the plates, even if the model subsamples them.

    def _sampled(self, number: int, call: Call) -> dict[str, Tensor]:
        found = self.check_same(call)
        some = found is None or any(rows.size < rows.full_size for rows in found.rows.values())
        rows, masks = self._all_rows(call, found), {} if some else self._calls.masks(call, {})
        numbers = sum(part.start.numel() for packing in self.packings.values() for part in packing.parts.values())
        size = max(1, SCALES.largest // max(1, numbers * self.posterior.batch_of(rows).numel()))
        return in_batches(lambda _, number: self.posterior.draw(number, rows, masks), {}, number, size)

    def _log_prob(self, values: dict[str, Tensor], call: Call) -> Tensor:
        found = self.check_same(call)
        return self.posterior.log_prob(values, self._all_rows(call, found), masks_of_all(found) if found else {})

    def get_transform(self, *args: Any, **kwargs: Any) -> BlockTransform:
        """Return the map from the bases of all blocks to their packed, unconstrained latents, for all rows."""
        call = self.setup(*args, **kwargs)._call(args, kwargs)
        found = self.check_same(call) if self.is_amortised else None
        return BlockTransform(self.posterior, self._all_rows(call, found))

    def _all_rows(self, call: Call, found: Found | None) -> list[BlockRows]:
        """Return all rows of each block, for a call whose model has some sites."""
        with ExitStack() as stack:
            for encoder in self._encoders.values():
                stack.enter_context(at_rest(encoder))
            shared = self._shared(call, masks_of_all(found) if found and self.is_amortised else {})
            own = [block.contexts.of_all(call) if block.contexts else shared for block in self.posterior.blocks]
        for block, rows in zip(self.posterior.blocks, own, strict=True):
            if found and block.contexts and block.contexts.encoder and rows.contexts is not None:
                plate, number = block.contexts.plates[0], rows.contexts.shape[-2]
                there = found.rows[plate]
                if takes_all(there) and there.size != number:
                    fault = f"the model has {there.size} rows of plate {plate!r}, and the data have {number}"
                    raise ValueError(f"{call.owner}: {fault}. Give the model the number of rows of the data.")
        return own

    def _shared(self, call: Call, masks: Mapping[Key, RowMasks]) -> BlockRows:
        """Return the context of the latents outside of all rows, if they depend on the data.

        Args:
            call: The call.
            masks: The masks of the rows.
        """
        return BlockRows()


def _masked(mask: RowMasks) -> AbstractContextManager[Any]:
    """Return the handler that masks rows, or none if all count, since the JIT joins no Python bool to a mask."""
    return nullcontext() if mask.rows is True else poutine.mask(mask=mask.rows)


def _is_around(plates: Key, key: Key, nestings: Sequence[Nesting]) -> bool:
    """True if each row of the plates of a key lies in a row of some plates, or of a single plate by an index."""
    return {*plates} <= {*key} or (len(plates) == 1 and any(plates[0] == nesting.outer for nesting in nestings))
