"""AutoPlateFlow: one conditional flow, shared by all rows of a plate, q(g, l) = q(g) Π_i q(l_i | c_i, g).

Auto-Encoding Variational Bayes (Kingma, Welling 2013, arXiv:1312.6114), with normalizing flows (Rezende, Mohamed 2015,
arXiv:1505.05770); Amortized Variational Inference for Simple Hierarchical Models (Agrawal, Domke 2021,
arXiv:2111.03144).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from ..arguments import check_integers, check_numbers, check_tensors, suggests_recipes
from ..bijectors import Affine
from ..encoders.base import at_rest
from ..flows import Flow, cnf, nsf, nsf_ar, realnvp
from ..flows.chunks import chunk_for, in_chunks
from ..programs.engines import in_batches
from ..programs.plate_minibatches import Shuffled
from ..transforms.base import chained
from .base import FlowGuide
from .checks import check_arguments, check_latents
from .circles import is_circular
from .contexts import InTurn, RowContexts, check_tied, initialize
from .default_flows import (
    assemble,
    assemble_local,
    autoencoder_flow,
    built,
    check_recipes,
    default_flow,
    is_untrained,
    local_flow,
    permutes,
)
from .default_training import Schedule
from .guide_call import Call, Rows, frame_of
from .loaded import check_fits
from .masked import RowMasks, masks_of_all
from .moving_supports import check_supports, moving_supports
from .packing import Packing, place
from .start_location import settle_start


class Nested(nn.Module):
    """A flow over the latents outside of a plate, and a conditional flow over the latents of each row.

    Args:
        shared: The packing of the latents outside of the plate into a vector g.
        own: The packing of the latents of a row into a vector l.
        flow: The flow over g, from :func:`assemble`; None if there is no g.
        local_flow: The flow over l, from :func:`assemble_local`; None if there is no l.
        scale: The scale of the guide's start.
    """

    scale: Tensor

    def __init__(self, shared: Packing, own: Packing, flow: Flow | None, local_flow: Flow | None, scale: float) -> None:
        super().__init__()
        self.shared, self.own = shared, own
        self.flow, self.local_flow = flow, local_flow
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

    def contexts(self, rows: Tensor, g: Tensor | None) -> Tensor:
        """Return the contexts of rows, from ``(rows, context_dim)``, in the plate's dimension and followed by g.

        g is given relative to the middle of its flow, in a fixed unit.  In units of the flow's width, what was learned
        of a row given g would be wrong whenever the flow gets narrower.  The unit is wide: many rows leave g a narrow
        distribution, within which noise in what was learned then matters little.
        """
        rows = rows.to(self.own.start.dtype).reshape(len(rows), *(1,) * self.own.trailing, -1)
        if g is None or self.flow is None:
            return rows
        centre, _ = chained(self.flow.transforms, torch.zeros_like(self.shared.start), None)
        g = (g - centre) / (10 * self.scale.to(g))
        shape = torch.broadcast_shapes(rows.shape[:-1], g.shape[:-1])
        return torch.cat((rows.expand(*shape, -1), g.expand(*shape, -1)), -1)

    def draw(self, size: int, rows: Tensor) -> dict[str, Tensor]:
        """Sample the sites for rows with some contexts, each ``(size, *site_shape)``."""
        g, found = None, dict[str, Tensor]()
        if self.flow:
            g = self.flow().sample((size, *(1,) * (1 + self.own.trailing)))
            found.update(self.shared.values(g.reshape(size, -1)))
        if self.local_flow:
            own = self.local_flow(self.contexts(rows, g)).sample(() if self.flow else (size,))
            found.update(self.own.values(own.reshape(size, -1, self.own.size)))
        return found

    def log_prob(self, values: dict[str, Tensor], rows: Tensor, masks: RowMasks) -> Tensor:
        """Return the log-density of values ``(*batch, *site_shape)`` for rows with some contexts, ``batch``.

        Masked rows do not count.  The flows see a chunk of the batch at a time, so that many values fit into memory.
        """
        total, g = torch.zeros(()), None
        if self.flow:
            g, log_det = self.shared.pack(values)  # (*batch, size), (*batch)
            q = self.flow()
            total = in_chunks(lambda g, _: q.log_prob(g), chunk_for(self.shared.size), g, None, 1) + log_det
        if self.local_flow:
            own, log_det = self.own.pack(values, masks.parts)  # (*batch, rows, size), (*batch, rows)
            conditional = partial(self._log_prob_of_rows, rows)
            log_q = in_chunks(conditional, chunk_for(own.shape[-2:].numel()), own, g, 2) + log_det
            counts = torch.as_tensor(masks.rows, device=log_q.device).flatten()
            total = total + log_q.where(counts, 0.0).sum(-1)
        return total

    def _log_prob_of_rows(self, rows: Tensor, own: Tensor, g: Tensor | None) -> Tensor:
        """Return the log-densities of the rows' vectors ``(*batch, rows, size)`` given g, ``(*batch, rows)``."""
        ones = (1,) * self.own.trailing
        seen = None if g is None else g.reshape(*g.shape[:-1], 1, *ones, -1)
        q = self.local_flow(self.contexts(rows, seen))  # type: ignore[misc]
        log_q = q.log_prob(own.reshape(*own.shape[:-1], *ones, self.own.size))  # (*batch, rows, *ones)
        return log_q.reshape(log_q.shape[: log_q.dim() - len(ones)])


class AutoPlateFlow(FlowGuide):
    """A guide for a model with a plate: a flow over the latents outside of it, and one conditional flow for its rows::

        q(g, l) = q(g) Π_i q(l_i | c_i, g)

    The posterior of the latents l_i of row i depends on the latents g outside and on the row's context c_i.  An encoder
    computes the context from the data (*amortised*: new rows work as well).  Without an encoder each row's context is
    learned.  The plate may be subsampled: minibatches are tied to the rows' indices, and Pyro's plate scales them.
    Latents in the plate may lie in further plates, of fixed size, within a row.  Rows that a mask hides do not count in
    the guide.  A mask may also hide a part of a row if no visible site depends on that part.

    If all latents lie in the plate, the model is a variational autoencoder; with latents outside too it is a hierarchy.
    If none lie in the plate, the guide is that of ``AutoFlow``.

    Args:
        model: A Pyro model of fixed structure.  Its discrete latents of finite support are summed out.
        plate: The name of the plate.
        encoder: A network or function from the model's arguments to a context for each row, ``(rows, context_dim)``.
            Of arguments with one row for each row of a subsampled plate it gets the rows of the minibatch only.
        local_flow: A recipe for the rows' latents, called with their number and the width of the context, such as
            ``flows.iaf``.  By default affine couplings, or splines for a single latent, and then an affine map that
            depends on the context.
        global_flow: A recipe for the other latents, called with their number; by default as for ``AutoFlow``.
        embedding_dim: The width of the learned vector of each row, without an encoder.
        init_loc_fn: The strategy for the start, as for ``AutoFlow``.
        init_scale: The scale of each unconstrained latent at the start.  By default 0.1, or 1 if all lie in the plate.
            Then, with an encoder, the rows start at a random linear map of their contexts.
        name: The guide's name in Pyro's parameter store, unique by default.

    Raises:
        TypeError: If a recipe or ``encoder`` cannot be called; at :meth:`setup`, if a recipe fails.
        ValueError: If ``init_scale`` or ``embedding_dim`` is out of its range.  At :meth:`setup`, if the model lacks
            the plate, or another plate that holds latents is subsampled.  If a latent is discrete with infinite
            support, is an angle or has no fixed support.  If a mask divides an event, or hides a part of a row that
            visible sites depend on.  The error names the site or plate.  If the model's density is not finite at the
            start, or the result of the encoder or of a recipe does not fit.  In use, if arguments change which latents
            the model has, or their shapes.
        FloatingPointError: In training, naming the site, the cause and the way out, if a draw is not finite.

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

    recipes = "_build_local", "_build_global"
    settings = "encoder", "init_scale", "plate", "embedding_dim"
    plate: str

    @suggests_recipes(nsf, nsf_ar, realnvp, cnf)
    def __init__(
        self,
        model: Callable[..., Any],
        plate: str,
        *,
        encoder: Callable[..., Tensor] | None = None,
        local_flow: Callable[..., Flow] | None = None,
        global_flow: Callable[[int], Flow] | None = None,
        embedding_dim: int = 8,
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float | None = None,
        name: str | None = None,
    ) -> None:
        check_recipes("AutoPlateFlow", local_flow=local_flow, global_flow=global_flow)
        check_numbers("AutoPlateFlow", above=0, optional=True, init_scale=init_scale)
        super().__init__(model, encoder, init_loc_fn, name)
        self._build_local, self._build_global = local_flow, global_flow
        self.plate, self._init_scale = plate, init_scale
        self.contexts, self.minibatches = RowContexts(plate, encoder, embedding_dim), Shuffled()

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        call = self._call(args, kwargs)
        found = self._calls.begin(call)
        self._given_plates, rows = found.given, found.rows
        assert rows is not None
        check_latents(call)
        if not call.latents:
            raise ValueError("AutoPlateFlow: the model has no latents.")
        settle_start(call, choose=self._chooses_start)
        self.packings = self._layouts(call.latents)
        shared, own = self.packings.values()
        scale = float(self._init_scale or (0.1 if shared.size else 1.0))
        check_supports(call, moving_supports(call, scale))
        by_row = self.contexts.encoder is None
        if own.size and by_row:
            check_tied(call, rows)
        outer = inner = None
        if shared.size:
            outer = built("AutoPlateFlow", "global_flow", self._build_global, default_flow, shared.size)
            outer = assemble(outer, None, shared.start, scale)
        if own.size:
            self.contexts.setup(call, rows, own.start, num_zeros=Affine().num_params * own.size)
            sizes = own.size, self.contexts.width + shared.size
            default = local_flow if shared.size or by_row else autoencoder_flow
            inner = built("AutoPlateFlow", "local_flow", self._build_local, default, *sizes)
            inner = assemble_local(inner, own.start.mean(0), scale, by_row=by_row)
        self.posterior, self.full_size = Nested(shared, own, outer, inner, scale), rows.full_size
        self._adopt_stored()

    def parts(self) -> dict[str, Any]:
        parts, contexts = super().parts(), self.contexts
        parts |= {"plate": self.plate, "flow": self.posterior.flow, "local_flow": self.posterior.local_flow}
        parts |= {name: getattr(contexts, name) for name in ("encoder", "embedding_dim", "width")}
        parts["embedding"] = None if contexts.embedding is None else contexts.embedding.weight
        return parts | {"full_size": self.full_size, "scale": float(self.posterior.scale)}

    def _restore(
        self, flow: Flow | None, local_flow: Flow | None, scale: float, full_size: int, **contexts: Any
    ) -> None:
        shared, own = self.packings.values()
        self.contexts.restore(**contexts)
        check_fits(flow, shared.size, 0)
        check_fits(local_flow, own.size, self.contexts.width + shared.size)
        self.posterior, self.full_size = Nested(shared, own, flow, local_flow, scale), full_size

    # The default training.

    @property
    def is_fresh(self) -> bool:
        """True if the guide is untrained."""
        posterior, size = self.posterior, self.posterior.shared.size
        if posterior.flow and not is_untrained(posterior.flow, float(posterior.scale), [False] * size):
            return False
        layers = posterior.local_flow.transforms[:-1] if posterior.local_flow else []
        return permutes(layers, posterior.own.start.new_zeros(posterior.own.size)) if layers else True

    def schedule(self, *, near: bool = False, alone: bool = True) -> Schedule:
        """Return the schedule that suits the guide: few draws per step, since gradients are averaged over the rows.

        Only the latents outside of the plate need several draws.  The largest norm of a gradient grows with the plate,
        as the gradients do; a fixed norm would weight minibatches by their gradients.
        """
        num_particles = 8 if self.posterior.shared.size else 1
        return Schedule(4000, num_particles, lr=0.005, clip_norm=1e3 * self.full_size)

    def prepare(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_fresh:
            initialize(Call("fit_svi", model, args, kwargs), self.contexts.encoder)

    def _layouts(self, sites: dict[str, Any]) -> dict[str, Packing]:
        if angles := [name for name, site in sites.items() if is_circular(site["fn"].support)]:
            raise ValueError(f"AutoPlateFlow: latent site {angles[0]!r} is an angle; only AutoFlow takes angles.")
        inside = [site for site in sites.values() if frame_of(site, self.plate)]
        outside = [site for site in sites.values() if not frame_of(site, self.plate)]
        own = Packing("AutoPlateFlow", inside, frame_of(inside[0], self.plate).dim if inside else None)
        return {"latent": Packing("AutoPlateFlow", outside), f"{self.plate}_latent": own}

    def _draws(self, call: Call) -> dict[str, Tensor]:
        posterior = self.posterior
        plates = self._plates(posterior, call)
        result, g = dict[str, Tensor](), None
        if posterior.flow:
            g = self._draw("latent", posterior.flow())
            result.update(place(posterior.shared.unpack(g), plates))
        if posterior.local_flow:
            plate = plates[self.plate]
            # The model enters the plate itself, so it must be run before the guide does.
            masks = self._calls.masks(call, plate.indices)
            with plate as indices, poutine.mask(mask=masks.rows):
                rows = self.contexts.of(call, plate, indices)
                q = posterior.local_flow(posterior.contexts(rows, g))
                latent = self._draw(f"{self.plate}_latent", q, indices)
            with poutine.mask(mask=masks.rows):
                result.update(place(posterior.own.unpack(latent, masks.parts), plates, masks.parts))
        return result

    def _plates(self, posterior: Nested, call: Call) -> dict[str, Any]:
        """Return the plates of the latents, with their sizes for these arguments."""
        needed = self.master is None and posterior.own.size > 0
        rows, plates = self._calls.rows(call, needed=needed), dict(self._create_plates())
        if needed:
            if rows is None:  # a guide without a model takes all rows in the arguments
                number = len(self._all_rows(call))
                rows = Rows(number, number)
            # A plate without a size has no site in the model, and must not get one here.
            hidden = [self.plate] if self._prototype_frames[self.plate].size < 0 else []
            with poutine.block(hide=hidden), InTurn(self.plate, self.minibatches):
                plates[self.plate] = pyro.plate(self.plate, *rows, dim=posterior.own.dim)
        return plates

    # Answers for all rows of the plate, even if the model subsamples it.

    @torch.no_grad()
    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample from the guide, for all rows of the plate in the arguments, at least one draw.

        Returns:
            For each latent site values of shape ``(num_samples, *site_shape)``.
        """
        check_integers("AutoPlateFlow.sample", num_samples=num_samples)
        self._check_arguments("sample", args, kwargs)
        call = self.setup(*args, **kwargs)._call(args, kwargs)
        self.check_same(call)
        rows = self._all_rows(call)
        size = max(1, 100_000 // max(1, len(rows)))
        return in_batches(lambda _, number: self.posterior.draw(number, rows), {}, num_samples, size)

    def log_prob(self, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the guide's log-density, in nats, of constrained values of all rows.

        Values of all latent sites, ``(*batch, *site_shape)``, have one of shape ``batch``; -inf outside of the support.
        Rows that the model masks do not count.
        """
        check_tensors("AutoPlateFlow.log_prob", "values", values)
        self._check_arguments("log_prob", args, kwargs)
        call = self.setup(*args, **kwargs)._call(args, kwargs)
        found = self.check_same(call)
        masks = masks_of_all(found) if found else RowMasks()
        return self.posterior.log_prob(values, self._all_rows(call), masks)

    def _check_arguments(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise TypeError if a guide that is set up lacks arguments of its model, on whose rows its answers depend."""
        if self.prototype_trace is not None and self.model is not None:
            check_arguments(f"AutoPlateFlow.{method}", self.model, args, kwargs)

    def quantiles(self, quantiles: float | list[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each latent, for all rows of the plate in the arguments, as ``AutoFlow`` does."""
        self._check_arguments("quantiles", args, kwargs)
        return super().quantiles(quantiles, *args, **kwargs)

    def _all_rows(self, call: Call) -> Tensor:
        """Return the contexts of all rows, ``(rows, context_dim)``; one empty context if the plate has no latents."""
        if not self.posterior.local_flow:
            return torch.zeros(1, 0)
        with at_rest(self.contexts.encoder):
            return self.contexts.of_all(call)
