"""AutoPlateFlow: one conditional flow, shared by all rows of a plate, q(g, l) = q(g) Π_i q(l_i | c_i, g).

Auto-Encoding Variational Bayes (Kingma, Welling 2013, arXiv:1312.6114), with normalizing flows (Rezende, Mohamed 2015,
arXiv:1505.05770); Amortized Variational Inference for Simple Hierarchical Models (Agrawal, Domke 2021,
arXiv:2111.03144).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from pyro import validation_enabled
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ..arguments import suggests_recipes
from ..encoders.training_record import unjudged
from ..flows import Flow, cnf, nsf, nsf_ar, realnvp
from ..user_code import warn_user
from .amortised import EACH, OfDatasets, OfRow, Packed, SimulatedVectors
from .block_guide import BlockGuide
from .blocks import Drawn
from .contexts import BlockRows, RowContexts, check_encoder, encode, initialize, probe, standardise
from .guide_call import Call, Found, Key, RowMasks
from .read_structure import Structure


class AutoPlateFlow(BlockGuide):
    """A guide for a model with a plate: a flow over the latents outside of it, and one conditional flow for its rows::

        q(g, l) = q(g) Π_i q(l_i | c_i, g)

    The posterior of the latents l_i of row i depends on the latents g outside and on the row's context c_i.  An encoder
    computes the context from the data (*amortised*: new rows work as well).  Without an encoder each row's context is
    learned.  The plate may be subsampled: minibatches are tied to the rows' indices, and Pyro's plate scales them.
    Latents in the plate may lie in further plates, of fixed size, within a row.  A mask may hide rows, or a
    part of a row or of the latents outside, on which no visible site depends.  They do not count in the guide.

    If all latents lie in the plate, the model is a variational autoencoder; with latents outside too it is a hierarchy.
    If none lie in the plate, the guide is that of ``AutoFlow``.

    With a ``global_encoder`` as well, the whole posterior is amortised, q(g | c_1, …, c_n) Π_i q(l_i | c_i, g): one
    guide for the hierarchies of all datasets, with any number of rows, trained by ``fit_amortized``.  Then
    ``guide.sample(n, x)`` is the posterior of data ``x``; :meth:`bind` makes a guide of that dataset alone.

    Args:
        model: A Pyro model of fixed structure.  Its discrete latents of finite support are summed out.
        plate: The name of the plate.
        encoder: A network or function from the model's arguments to a context for each row, ``(rows, context_dim)``.
            Of arguments with one row for each row of a subsampled plate it gets the rows of the minibatch only.
        global_encoder: A network from the contexts of all rows, ``(*batch, rows, context_dim)``, to a context of the
            latents outside of the plate, ``(*batch, global_dim)``, such as ``encoders.SetEncoder``.  It is also given
            ``mask=``, ``(*batch, rows)``, if the model masks rows.  A loaded guide has no model and sees no masks:
            leave absent rows out of its data.
        local_flow: A recipe for the rows' latents, called with their number and the width of the context, such as
            ``flows.iaf``.  By default affine couplings, or splines for a single latent, and then an affine map that
            depends on the context.  With a ``global_encoder`` autoregressive splines take the place of the couplings.
        global_flow: A recipe for the other latents, called with their number, and with ``global_dim`` if there is a
            ``global_encoder``; by default as for ``AutoFlow``.
        embedding_dim: The width of the learned vector of each row, without an encoder.
        init_loc_fn: The strategy for the start, as for ``AutoFlow``.
        init_scale: The scale of each unconstrained latent at the start.  By default 0.1, or 1 if all lie in the plate.
            Then, with an encoder, the rows start at a random linear map of their contexts.
        name: The guide's name in Pyro's parameter store, unique by default.

    Raises:
        TypeError: If a recipe or an encoder cannot be called; at :meth:`setup`, if a recipe fails.
        ValueError: If ``init_scale`` or ``embedding_dim`` is out of its range, or there is a ``global_encoder`` without
            an ``encoder``.  At :meth:`setup`, if the model lacks the plate, or another plate that holds latents is
            subsampled.  If a latent is discrete with infinite support, is an angle or has no fixed support.  If a mask
            divides an event, or hides a part of a row that visible sites depend on.  The error names the site or plate.
            If the model's density is not finite at the start, or the result of the encoder or of a recipe does not fit.
            In use, if arguments change which latents the model has, or their shapes.
        FloatingPointError: In training, naming the site, the cause and the way out, if a draw is not finite.  In use,
            if an encoder's data lie so far from those of training that a draw is not finite.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows.encoders import MLPEncoder
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0, 1))
        ...     with pyro.plate("group", len(y), subsample_size=2) as rows:
        ...         level = pyro.sample("level", dist.Normal(mean, 1))
        ...         pyro.sample("y", dist.Normal(level[..., None], 1).to_event(1), obs=y[rows])
        >>> y = torch.randn(6, 3)
        >>> guide = AutoPlateFlow(model, "group", encoder=MLPEncoder(3, context_dim=4)).setup(y)
        >>> {name: tuple(value.shape) for name, value in guide(y).items()}
        {'mean': (), 'level': (2,)}
    """

    settings = "encoder", "global_encoder", "init_scale", "plate", "embedding_dim"

    @suggests_recipes(nsf, nsf_ar, realnvp, cnf)
    def __init__(
        self,
        model: Callable[..., Any],
        plate: str,
        *,
        encoder: Callable[..., Tensor] | None = None,
        global_encoder: Callable[..., Tensor] | None = None,
        local_flow: Callable[..., Flow] | None = None,
        global_flow: Callable[..., Flow] | None = None,
        embedding_dim: int = 8,
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float | None = None,
        name: str | None = None,
    ) -> None:
        encoders = {} if encoder is None else {plate: encoder}
        super().__init__(model, encoders, local_flow, global_flow, embedding_dim, init_loc_fn, init_scale, name)
        check_encoder("AutoPlateFlow", global_encoder, "global_encoder")
        if global_encoder is not None and encoder is None:
            fault = "global_encoder takes the contexts of an encoder of the rows, got encoder=None"
            raise ValueError(
                f"AutoPlateFlow: {fault}. Give encoder=, a network from the data to a vector for each row."
            )
        self.global_encoder = global_encoder
        self.row_range: tuple[int, int] | None = None  # the numbers of rows in training on simulations
        self.meets_masks = False  # True once the model has masked rows
        self.plate, self.row_plates, self.structure = plate, (plate,), Structure((plate,))

    @property
    def is_amortised(self) -> bool:
        return self.global_encoder is not None

    def _build(self, call: Call, found: Found) -> None:
        super()._build(call, found)
        if self.is_amortised and not (self._has_shared and self.posterior.blocks[-1].contexts):
            fault = f"global_encoder needs latents outside of plate {self.plate!r} and in it, but one kind is missing"
            raise ValueError(f"AutoPlateFlow: {fault}. Use AutoFlow(model, encoder=...) for latents of one kind.")

    def _shared_width(self, call: Call) -> int:
        if not self.is_amortised:
            return 0
        contexts = probe(call, self._encoders[self.plate])
        if contexts.dim() != 2:
            wanted = f"one vector for each row of plate {self.plate!r}, (rows, context_dim)"
            raise ValueError(f"AutoPlateFlow: the encoder must return {wanted}, got shape {tuple(contexts.shape)}.")
        shape = tuple(self._pooled(contexts, None).shape)
        if len(shape) != 1:
            fault = f"for contexts of shape {tuple(contexts.shape)} global_encoder must return one vector (n,)"
            raise ValueError(f"AutoPlateFlow: {fault}, got shape {shape}.")
        return shape[0]

    def _shared(self, call: Call, masks: Mapping[Key, RowMasks]) -> BlockRows:
        if not self.is_amortised:
            return BlockRows()
        rows, mask = self._row_contexts(call), masks.get((self.plate,), RowMasks()).rows
        number, masked = rows.shape[-2], mask is not True
        if self.row_range and not self.row_range[0] <= number <= self.row_range[1]:
            seen = f"the data have {number} row{'s' * (number != 1)} of plate {self.plate!r}"
            fault = f"{seen}, and the guide was trained on {self.row_range[0]} to {self.row_range[1]}"
            warn_user(f"AutoPlateFlow: {fault}. Use fit_amortized(..., datasets=...) that holds {number}.")
        if masked and rows.dim() > 2:
            fault = "datasets whose rows are masked must be given one by one, got a batch of them"
            raise ValueError(f"AutoPlateFlow: {fault}. Loop over them, or leave absent rows out of the data.")
        self.meets_masks = self.meets_masks or masked
        if self.meets_masks and call.model is None:
            fault = "the guide was used with masked rows, and a loaded guide has no model to see masks"
            warn_user(f"AutoPlateFlow: {fault}. Leave the absent rows out of the data.")
        counts = torch.as_tensor(mask).flatten().expand(rows.shape[:-1]) if masked else None
        return BlockRows(None, self._pooled(rows, counts))

    def _row_contexts(self, call: Call) -> Tensor:
        """Return the contexts of all rows, ``(*batch, rows, width)``."""
        return cast(Tensor, self.posterior.blocks[-1].contexts.of_all(call).contexts)

    def _pooled(self, contexts: Tensor, mask: Tensor | None) -> Tensor:
        """Return the context of all rows, ``(*batch, global_dim)``, from their contexts ``(*batch, rows, width)``."""
        network: Any = self.global_encoder
        with unjudged():  # numbers of rows are judged by row_range
            return network(contexts) if mask is None else network(contexts, mask=mask)

    # Training on simulations.

    def packed(self, values: dict[str, Tensor]) -> Packed:
        """Return the vectors of each block in N simulations, ``(N, *rows, size)``, with log|det| of the packing."""
        return [block.packing.pack(values) for block in self.posterior.blocks]

    @torch.no_grad()
    def start_at_draws(self, vectors: Sequence[Tensor]) -> None:
        """Start from the marginal distributions of the vectors of each block in simulations, each ``(N, size)``."""
        for block, z in zip(self.posterior.blocks, vectors, strict=True):
            block.unit.copy_(block.flow.start_at_draws(z))

    def initialize_encoders(self, call: Call) -> None:
        """Initialise the ``Standardize`` layers of both encoders from the data of a call."""
        encoder = self._encoders[self.plate]
        initialize(call, encoder)
        standardise(self.global_encoder, lambda: self._pooled(encode(call, encoder), None))

    def scored(self, packed: Packed, *args: Any, **kwargs: Any) -> list[SimulatedVectors]:
        """Return the vectors of N simulations with the contexts of their data, the model's arguments.

        Of the rows of each dataset, some are picked at random.
        """
        call = self._call(args, kwargs)
        contexts = self._row_contexts(call)  # (N, rows, width)
        number, size = contexts.shape[:2]
        picked = torch.randperm(size, device=contexts.device)[:EACH]
        owns = BlockRows(None, self._pooled(contexts, None)), BlockRows(None, contexts[:, picked])
        drawn, found = list[Drawn](), list[SimulatedVectors]()
        for block, own, (z, log_det) in zip(self.posterior.blocks, owns, packed, strict=True):
            for axis in block.packing.dims:
                z, log_det = z.index_select(axis - 1, picked), log_det.index_select(axis, picked)
            aligned = z.reshape(number, *(1,) * (self.posterior.depth - block.packing.depth), *z.shape[1:])
            q = self.posterior.at(block, own, drawn)
            drawn.append(Drawn(block, aligned, q))
            context = cast(Tensor, q.context).expand(*aligned.shape[:-1], -1).flatten(0, -2)
            found.append(SimulatedVectors(block.flow, aligned.flatten(0, -2), context, log_det.flatten()))
        return found

    @torch.no_grad()
    def of_datasets(self, *args: Any, **kwargs: Any) -> OfDatasets:
        """Return the posterior, for each of M datasets, of the latents outside of the plate and in one random row."""
        rows = self._all_rows(self._call(args, kwargs), None)
        contexts = cast(Tensor, rows[1].contexts)  # (M, rows, width)
        places = torch.randint(contexts.shape[1], (len(contexts),), device=contexts.device)
        return OfRow(self.posterior, rows, places)

    @torch.no_grad()
    def bind(self, *args: Any, **kwargs: Any) -> AutoPlateFlow:
        """Return a copy for the one dataset in the arguments, without encoders, to be checked or trained further."""
        if not self.is_amortised or self.prototype_trace is None:
            reason = "was never set up; train it by fit_amortized" if self.is_amortised else "has no global_encoder"
            raise ValueError(f"AutoPlateFlow.bind: the guide {reason}.")
        call = self._call(args, kwargs)
        rows = self._all_rows(call, self.check_same(call))
        if self.posterior.batch_of(rows):
            raise ValueError("AutoPlateFlow.bind: give one dataset, for which the encoder returns one vector per row.")
        self._check_draw(call)
        new = copy.deepcopy(self)
        new._encoders, new.global_encoder = {}, None
        with validation_enabled(False):
            AutoGuide._setup_prototype(new, *args, **kwargs)
        new.packings = new._layouts(new._call(args, kwargs).latents)
        for block, own, packing in zip(new.posterior.blocks, rows, new.packings.values(), strict=True):
            block.packing, seen = packing, cast(Tensor, own.contexts).to(packing.dtype)
            if block.contexts is None:
                block.flow = block.flow.bound(seen)
            else:
                block.contexts = RowContexts(packing.plates, None)
                block.contexts.restore(seen.shape[-1], seen.clone(), (len(seen),))
                new.size_of_rows = len(seen)
        return new

    def parts(self) -> dict[str, Any]:
        found = super().parts() | {"plate": self.plate, "encoder": self._encoders.get(self.plate)}
        learned = {"row_range": self.row_range, "meets_masks": self.meets_masks}
        return found | {"global_encoder": self.global_encoder, **learned}

    def _restore(
        self, *args: Any, row_range: tuple[int, int] | None = None, meets_masks: bool = False, **parts: Any
    ) -> None:
        self.row_range, self.meets_masks = row_range, meets_masks
        super()._restore(*args, **parts)
