"""AutoStructuredFlow: a guide whose blocks follow the structure of the model, q(z) = Π_b Π_i q(z_bi | c_bi, z_<b).

Automatic Structured Variational Inference (Ambrogioni et al. 2020, arXiv:2002.00643); conditional flows for nested
plates: ADAVI (Rouillard, Wassermann 2021, arXiv:2106.12248).  The base class of guides that are made of such blocks
comes first: a flow over shared latents, and conditional flows over rows.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from .. import flows
from ..arguments import check_integers, check_kind, check_numbers, suggests_recipes
from ..bijectors import Affine
from ..encoders.base import at_rest
from ..flows import Flow
from ..programs.engines import in_batches
from ..programs.plate_rows import Shuffled
from ..transforms import View
from .base import FlowGuide, Schedule, check_fits, schedule_of_many
from .blocks import Block, Blocks, Drawn, Frame
from .contexts import BlockRows, InTurn, RowContexts, check_encoder, check_tied, initialize
from .guide_call import Call, Found, Key, RowMasks, Rows, frames_of, masks_of_all
from .guide_flow import (
    LIMITS,
    assemble,
    assemble_local,
    built,
    check_recipes,
    default_for,
    rows_flow,
    sequence_flow,
)
from .guide_flow import local_flow as default_local_flow
from .packing import Packing, check_supports, is_circular, moving_supports, place
from .read_structure import Nesting, Structure, check_nestings, read_structure, takes_all

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
    most_factors = -1  # latents of parents for which rows have coefficients in place of a network
    _semi_amortized: tuple[str, ...] = ()  # the plates whose rows have an encoder and learned vectors

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
        self._begin(scale, max((rows.full_size for rows in found.rows.values()), default=1))
        for name, packing in self.packings.items():
            self.posterior.blocks.append(self._block(name, packing, call, found))

    def _begin(self, scale: float, size_of_rows: int) -> None:
        self.posterior, self.size_of_rows = Blocks(scale), size_of_rows
        self.minibatches = nn.ModuleList(Shuffled() for _ in self.row_plates)

    @property
    def _has_shared(self) -> bool:
        """True if some latents lie outside of all rows."""
        return any(not packing.plates for packing in self.packings.values())

    def _block(self, name: str, packing: Packing, call: Call, found: Found) -> Block:
        """Build the block of some latents, which depends on the blocks before it."""
        blocks, key, order, size = self.posterior.blocks, packing.plates, self._order(packing), packing.size
        parents, contexts, start = self._parents(key), self._contexts(key), packing.start.reshape(-1, size)
        num_given = sum(blocks[parent].packing.size for parent in parents)
        learned, steps = contexts is not None and contexts.encoder is None, len(order)
        alone = learned and steps == 1 and self._build_local is None and num_given <= self.most_factors
        if contexts is not None:
            self._begin_contexts(
                contexts, [found.rows[plate] for plate in key], start, call, num_given if alone else None
            )
            width = num_given + contexts.width
        else:
            width = num_given + (0 if parents or steps > 1 else self._shared_width(call))
        framed, frame, scale = learned or steps > 1, None, self.posterior.scale
        place = (torch.zeros_like(start[0]), 1.0) if framed else (start.mean(0), scale)
        if steps > 1:
            flow = assemble_local(sequence_flow(steps, size // steps, width), *place, by_row=learned)
        elif alone:
            flow = assemble_local(rows_flow(size, width, num_given), *place, by_row=False)
        elif contexts is None:
            made = built(call.owner, "global_flow", self._build_global, default_for((), width), (size, width))
            flow = assemble(made, None, *place)
        else:
            default: Callable[..., Flow] = partial(default_local_flow, spread=not (num_given or learned))
            default = default_for((), width) if self.is_amortised else default
            made = built(call.owner, "local_flow", self._build_local, default, (size, width))
            flow = assemble_local(made, *place, by_row=learned, amortised=self.is_amortised)
        if framed:
            shared = blocks[0].packing.size if 0 in parents and not blocks[0].packing.plates else 0
            number = contexts.number if learned and contexts is not None else 1
            first = start if steps > 1 and len(start) == number else start.mean(0, keepdim=True)
            frame = Frame(first[:, order].expand(number, -1, -1), scale, num_given, shared)
        unit = start.new_full((size,), SCALES.wide * scale)
        return Block(name, packing, flow, contexts, parents, frame, order, unit)

    def _begin_contexts(
        self, contexts: RowContexts, rows: list[Rows], like: Tensor, call: Call, factors: int | None
    ) -> None:
        """Set the contexts of rows up: those of an encoder, or coefficients and then noise for a network.

        Args:
            contexts: The contexts.
            rows: The rows of their plates.
            like: A tensor of the dtype and device of the learned vectors.
            call: The call of the guide.
            factors: The parents' latents of which a row has coefficients if it needs no network, or None.
        """
        if contexts.encoder is not None:
            corrects = contexts.plates[0] in self._semi_amortized
            return contexts.setup(call, rows, like, self.embedding_dim * corrects, 0)
        for plate, own in zip(contexts.plates, rows, strict=True):
            check_tied(call, plate, own)
        zeros = Affine().num_params * like.shape[-1] * (1 + (factors or 0))
        return contexts.setup(call, rows, like, zeros, self.embedding_dim if factors is None else 0)

    def _parents(self, key: Key) -> dict[int, Nesting | None]:
        """Return the places of the blocks around the rows of some plates, with the nestings in these or None.

        Of a plate with two ways to an outer one, no index counts.
        """
        found = [nesting for plate in key for nesting in self.structure.outside(plate) if nesting.outer not in key]
        ways = Counter(nesting.outer for nesting in found)
        outer = {(nesting.outer,): nesting for nesting in found if ways[nesting.outer] == 1}
        around = [(i, b.packing.plates) for i, b in enumerate(self.posterior.blocks) if len(b.order) == 1]
        return {i: outer.get(plates) for i, plates in around if {*plates} <= {*key} or plates in outer}

    def _shared_width(self, call: Call) -> int:
        """Return the width of the context of the latents outside of all rows."""
        return 0

    def _contexts(self, key: Key) -> RowContexts | None:
        """Return the contexts of the rows of some plates, not yet set up; None outside of rows."""
        return RowContexts(key, self._encoders.get(key[0]) if len(key) == 1 else None) if key else None

    def _order(self, packing: Packing) -> Tensor:
        """Return the places of each step in a row's vector, ``(T, d)``, of one step if the latents are no sequence."""
        names = list(packing.parts)
        which = self.structure.group(names[0])
        return torch.arange(packing.size).unsqueeze(0) if which < 0 else self.structure.sequences[which].order(names)

    def _layouts(self, sites: dict[str, Any]) -> dict[str, Packing]:
        owner, groups, found = type(self).__name__, dict[tuple[Key, int], list[Any]](), dict[str, Packing]()
        for name, site in sites.items():
            if is_circular(site["fn"].support):
                raise ValueError(f"{owner}: latent site {name!r} is an angle; only AutoFlow takes angles.")
            key = tuple(frame.name for frame in frames_of(site, self.row_plates))
            groups.setdefault((key, self.structure.group(name)), []).append(site)
        # Parents come first.
        for key, which in sorted(groups, key=lambda of: (sum(map(self.structure.depth, of[0])), of[1])):
            group = groups[key, which]
            words = [*key, SHARED] if which < 0 else [*key, group[0]["name"], "steps"]
            found["_".join(words)] = Packing(owner, group, key, {} if key else self._calls.present)
        return found

    def parts(self) -> dict[str, Any]:
        found = super().parts() | {"embedding_dim": self.embedding_dim, "size_of_rows": self.size_of_rows}
        blocks = tuple(block.parts() for block in self.posterior.blocks)
        return found | {"scale": self.posterior.scale, "blocks": blocks}

    def _restore(self, scale: float, size_of_rows: int, blocks: tuple[tuple[Any, ...], ...]) -> None:
        self._begin(scale, size_of_rows)
        for (name, packing), (flow, frame, unit, rows) in zip(self.packings.items(), blocks, strict=True):
            key, order, there = packing.plates, self._order(packing), self.posterior.blocks
            parents, contexts = self._parents(key), self._contexts(key)
            if contexts is not None:
                contexts.restore(*rows)
            block = Block(name, packing, flow, contexts, parents, frame and Frame.of(frame), order, unit)
            width = sum(there[parent].packing.size for parent in parents) + (contexts.width if contexts else 0)
            check_fits(flow, packing.size, flow.context_dim if block.is_pooled else width)
            there.append(block)

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
            parents = tuple((i, self.posterior.rows_of(block, i, rows)) for i in block.parents)
            found.append((own[:, block.order], parents))
        return found

    @torch.no_grad()
    def start_from(self, blocks: Sequence[Any]) -> None:
        """Start from a distribution with the structure of the guide.

        Without all rows of a subsampled plate, each starts from the average over the rows of the minibatch.

        Args:
            blocks: For each block its distribution given its parents, for all rows or for those that the guide was set
                up with: see :class:`~pyro_flows.sampling.block_conditionals.Conditional`.
        """
        means = list[Tensor]()
        whole = all(len(found.loc) == block.number for block, found in zip(self.posterior.blocks, blocks, strict=True))
        for block, found in zip(self.posterior.blocks, blocks, strict=True):
            loc, scale, bends = found.loc, found.scale, found.bends
            if block.frame is None:
                block.flow.start_at(loc[0, 0], scale[0, 0])
            else:
                rows, size = block.sizes if whole else block.seen, block.frame.num_shared
                given = [means[i][self.posterior.rows_of(block, i, rows)] for i in block.parents]
                origin = torch.cat((loc.new_zeros(len(loc), 0), *given), -1)
                gain = found.gains.reshape(*loc.shape, found.gains.shape[-1])
                lean = bends.lean.reshape(*loc.shape, *bends.lean.shape[2:])
                stretch, turn, lean = (slope[..., :size] for slope in (bends.stretch, bends.turn, lean))
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
        masks = self._calls.masks(call, {name: plates[name].indices for name in self._inner_plates})
        shared = self._shared(call, masks)
        for block in posterior.blocks:
            key, mask = block.packing.plates, masks.get(block.packing.plates, RowMasks())
            with ExitStack() as stack:
                indices = {name: stack.enter_context(plates[name]) for name in key}
                stack.enter_context(_masked(mask))
                known = [plates[name] for name in key], [*indices.values()]
                q = posterior.at(block, block.contexts.of(call, *known) if block.contexts else shared, drawn)
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
            plates[name].is_given = known.chosen is not None
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

    def get_transform(self, *args: Any, **kwargs: Any) -> View:
        """Return the map from the bases of all blocks to their packed, unconstrained latents, for all rows."""
        call = self.setup(*args, **kwargs)._call(args, kwargs)
        found = self.check_same(call) if self.is_amortised else None
        return self.posterior.transform(self._all_rows(call, found))

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


class AutoStructuredFlow(BlockGuide):
    """A guide for models of many latents, which knows the structure of their posterior.

    The structure is read from the model's log-density, and latents are divided into blocks::

        q(z) = q(g) Π_p Π_i q(l_pi | c_pi, g) Π_s q(x_s | g)

    - Latents g outside of plates have one flow.
    - The rows i of a plate p are independent given the latents outside.  They share one conditional flow, and each has
      a learned context c.  There may be several plates, nested or crossed, each subsampled or not.  Rows of a nested
      plate depend on the latents in their own row of the outer plate.  So do rows that belong to a row of another
      plate by an index, as in ``dist.Normal(hospital[hospital_of_doctor], 1)``, if neither plate is subsampled.
    - Latents along a sequence s of steps, such as the states of a ``pyro.markov`` chain or of a random walk, or the
      lines of a grid, have a flow that is linear and convolutional along the sequence.

    Time and memory of a step are proportional to the number of latents.  ``fit_svi`` starts from the best distribution
    of this structure that is Gaussian given g.

    Args:
        model: A Pyro model of fixed structure.  Its discrete latents of finite support are summed out.
        encoders: For some plates, by name, a network or function from the model's arguments to a context for each row,
            ``(rows, context_dim)``.  Of arguments with one row for each row of a subsampled plate it gets the rows of
            the minibatch only.  Rows of other plates have learned contexts.
        semi_amortized: Plates with an encoder whose rows also have a learned vector.  It starts at zero and corrects
            what the encoder cannot tell (Kim, Wiseman, Miller, Sontag, Rush 2018, arXiv:1802.02550).  New rows have the
            encoder alone: see :meth:`for_new_rows`.
        local_flow: A recipe for the latents of rows, called with their number and the width of the context.
        global_flow: A recipe for the latents outside of plates, called with their number; by default as ``AutoFlow``.
        embedding_dim: The width of the learned vector of each row.
        init_loc_fn: The strategy for the start, as for ``AutoFlow``.
        init_scale: The scale of each unconstrained latent at the start, by default as for ``AutoPlateFlow``.
        structure: The plates with independent rows, the sequences and the nestings; by default they are found.
        name: The guide's name in Pyro's parameter store, unique by default.

    Raises:
        TypeError: If a recipe or encoder cannot be called; at :meth:`setup`, if a recipe fails.
        ValueError: If a number is out of its range, or a semi-amortised plate has no encoder.  At :meth:`setup`, as for
            ``AutoPlateFlow``.
        FloatingPointError: In training, naming the site, the cause and the way out, if a draw is not finite.  In use,
            if an encoder's data lie so far from those of training that a draw is not finite.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0, 1))
        ...     users = pyro.plate("users", y.shape[0], subsample_size=5, dim=-2)
        ...     items = pyro.plate("items", y.shape[1], subsample_size=4, dim=-1)
        ...     with users:
        ...         kind = pyro.sample("kind", dist.Normal(0, 1))
        ...     with items:
        ...         good = pyro.sample("good", dist.Normal(0, 1))
        ...     with users as u, items as i:
        ...         pyro.sample("y", dist.Normal(mean + kind + good, 1), obs=y[u][:, i])
        >>> y = torch.randn(100, 80)
        >>> guide = AutoStructuredFlow(model).setup(y)
        >>> {name: tuple(value.shape) for name, value in guide(y).items()}
        {'mean': (), 'kind': (5, 1), 'good': (4,)}
    """

    settings = "init_scale", "embedding_dim", "encoders", "semi_amortized", "structure"
    most_factors = LIMITS.factors

    @suggests_recipes(flows.nsf, flows.nsf_ar, flows.realnvp, flows.cnf)
    def __init__(
        self,
        model: Callable[..., Any],
        *,
        encoders: Mapping[str, Encoder] | None = None,
        semi_amortized: Collection[str] = (),
        local_flow: Callable[..., Flow] | None = None,
        global_flow: Callable[[int], Flow] | None = None,
        embedding_dim: int = 8,
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float | None = None,
        structure: Structure | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            model, dict(encoders or {}), local_flow, global_flow, embedding_dim, init_loc_fn, init_scale, name
        )
        semi_amortized = (semi_amortized,) if isinstance(semi_amortized, str) else semi_amortized
        if missing := [plate for plate in semi_amortized if plate not in self._encoders]:
            fault = f"plate {missing[0]!r} is semi-amortised and has no encoder; its rows have learned vectors alone"
            raise ValueError(f"{type(self).__name__}: {fault}. Give encoders={{{missing[0]!r}: ...}}, or leave it out.")
        self._semi_amortized, self._given_structure = tuple(semi_amortized), structure
        if structure is not None:
            words = "a Structure, such as guide.structure of another guide"
            check_kind(type(self).__name__, tuple, words, structure=structure)
            self.structure = Structure.of(structure)
            self.row_plates = self.structure.plates

    def _read_structure(self, call: Call) -> None:
        if self._given_structure is None:
            self.structure = read_structure(call, {*self._encoders})
            self.row_plates = self.structure.plates
        if missing := [plate for plate in self._encoders if plate not in self.row_plates]:
            fault = f"encoders has the plate {missing[0]!r}, which holds no latents or is not in structure="
            raise ValueError(f"{call.owner}: {fault}. Its plates are {', '.join(self.row_plates) or 'none'}.")

    def for_new_rows(self) -> AutoStructuredFlow:
        """Return a copy for other rows, whose contexts are those of the encoders alone.

        A number of rows that differs from that of the fit says so by itself.

        Raises:
            ValueError: If the guide was never set up.
        """
        if self.prototype_trace is None:
            raise ValueError(f"{type(self).__name__}.for_new_rows: call setup(...) first, or fit the guide.")
        other = copy.deepcopy(self)
        with torch.no_grad():
            for block in other.posterior.blocks:
                contexts = block.contexts
                if contexts is not None and contexts.encoder is not None and contexts.embedding is not None:
                    contexts.embedding.weight.zero_()
        return other

    def parts(self) -> dict[str, Any]:
        encoders = {"encoders": tuple(self._encoders.items()), "semi_amortized": self._semi_amortized}
        return super().parts() | encoders | {"structure": self.structure.parts()}


def _masked(mask: RowMasks) -> AbstractContextManager[Any]:
    """Return the handler that masks rows, or none if all count, since the JIT joins no Python bool to a mask."""
    return nullcontext() if mask.rows is True else poutine.mask(mask=mask.rows)
