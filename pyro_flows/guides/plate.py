"""AutoPlateFlow: one conditional flow, shared by all rows of a plate, q(g, l) = q(g) Π_i q(l_i | c_i, g).

Auto-Encoding Variational Bayes (Kingma, Welling 2013, arXiv:1312.6114), with normalizing flows (Rezende, Mohamed 2015,
arXiv:1505.05770); Amortized Variational Inference for Simple Hierarchical Models (Agrawal, Domke 2021,
arXiv:2111.03144).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from ..arguments import check_integers, check_numbers
from ..bijectors import Affine
from ..encoders.base import at_rest
from ..flows import Flow
from ..programs.engines import plate_like
from ..programs.minibatches import Shuffled
from .base import FlowGuide
from .call_checks import Calls
from .circles import is_circular, mark_circles
from .contexts import RowContexts
from .discrete import HideDiscrete
from .encoding import check_encoder, initialize
from .guide_call import Call
from .init import init_to_center
from .masked import RowMasks, check_unmasked, masks_of_all
from .packing import Packing
from .parameter_names import claim_name
from .plate_distribution import Nested
from .prototype import Found, Rows, frame_of, look
from .recipe import assemble, built, check_recipes, default_flow
from .refusals import check_latents, check_shapes, check_supports, moving_supports
from .row_flows import assemble_local, autoencoder_flow, local_flow
from .rows import InTurn, check_tied, data_plates
from .schedule import Schedule
from .start import settle_start


class AutoPlateFlow(FlowGuide):
    """A guide for a model with a plate: a flow over the latents outside of it, and one conditional flow for its rows::

        q(g, l) = q(g) Π_i q(l_i | c_i, g)

    The latents l_i of row i get a posterior of their own, given the latents g outside and the row's context c_i, which
    an encoder computes from the data (*amortised*: rows never seen work as well) or, without one, is learned for each
    row.  The plate may be subsampled: minibatches are tied to the rows' indices, and Pyro's plate scales them.  Latents
    in the plate may lie in further plates, of fixed size: they belong to the row.  Rows that a mask takes out of the
    model do not count in the guide.  A model without latents outside of the plate is a variational autoencoder (Kingma,
    Welling 2013, arXiv:1312.6114), one with some a hierarchy (Agrawal, Domke 2021, arXiv:2111.03144); one without
    latents in it gets what ``AutoFlow`` gives.

    Args:
        model: A Pyro model of fixed structure, with continuous latents.
        plate: The name of the plate.
        encoder: A network or function from the model's arguments to a context for each row, ``(rows, context_dim)``.
            Of arguments with one row for each of a subsampled plate it gets the rows of the minibatch only.
        local_flow: A recipe for the rows' latents, called with their number and the width of the context, such as
            ``flows.iaf``; by default affine couplings, splines for a single latent, after an affine map of the context.
        global_flow: A recipe for the other latents, called with their number; by default as for ``AutoFlow``.
        embedding_dim: Without an encoder, the width of the vector that is learned for each row.
        init_loc_fn: Where the guide starts, as for ``AutoFlow``.
        init_scale: The scale of each unconstrained latent at the start; by default 0.1, or 1 where all lie in the
            plate: with an encoder they start spread by a random map of their contexts.
        name: The guide's name in Pyro's parameter store, unique by default.

    Raises:
        TypeError: If a recipe or ``encoder`` cannot be called; at :meth:`setup`, if a recipe fails.
        ValueError: If ``init_scale`` or ``embedding_dim`` is out of its range; at :meth:`setup`, naming site or plate:
            if the model lacks the plate, another plate that holds latents is subsampled, a latent is discrete, an angle
            or has no fixed support, its density is not finite at the start, a mask divides a row, or what encoder or
            recipe return does not fit.  In use, if arguments change which latents the model has, or their shapes.
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
    plate: str

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
        check_encoder("AutoPlateFlow", encoder)
        check_numbers("AutoPlateFlow", above=0, optional=True, init_scale=init_scale)
        super().__init__(InitMessenger(init_loc_fn or init_to_center)(HideDiscrete()(mark_circles(model))))
        self.plate = plate
        self._build_local, self._build_global = local_flow, global_flow
        self._init_scale, self._chooses_start = init_scale, init_loc_fn is None
        self.contexts, self.minibatches = RowContexts(plate, encoder, embedding_dim), Shuffled()
        self._calls = Calls()
        self._pyro_name = claim_name(self, name)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        call = self._call(args, kwargs)
        found = self._calls.begin(call)
        self._data_plates, rows = data_plates(found), found.rows
        assert rows is not None
        check_latents(call)
        settle_start(call, choose=self._chooses_start)
        shared, own = self._sorted(rows)
        scale = float(self._init_scale or (0.1 if shared.size else 1.0))
        check_supports(call, moving_supports(call, scale))
        self._build(call, rows, shared, own, scale)

    def _build(self, call: Call, rows: Rows, shared: Packing, own: Packing, scale: float) -> None:
        by_row = self.contexts.encoder is None
        if own.size and by_row:
            check_tied(call, self.plate, rows)
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
        self.posterior = Nested(shared, own, outer, inner, scale)
        self.full_size = rows.full_size
        self._adopt_stored()

    # How it is trained where nothing else is asked for.

    @property
    def is_fresh(self) -> bool:
        """True if the guide is still untrained."""
        return self.posterior.is_fresh

    def schedule(self, *, near: bool = False, alone: bool = True) -> Schedule:
        """Few draws a step: the rows average themselves, and only the latents that they share need several.

        Gradients grow with the plate, and clipping at any one norm would weigh minibatches by theirs.
        """
        num_particles = 8 if self.posterior.shared.size else 1
        return Schedule(4000, num_particles, lr=0.005, clip_norm=1e3 * self.full_size)

    def prepare(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_fresh:
            initialize(Call("fit_svi", model, args, kwargs), self.contexts.encoder)

    def restore(self, posterior: Nested, full_size: int) -> None:
        """Take over the parts of a guide that was saved, and let go of the model."""
        self.posterior, self.full_size = posterior, full_size
        self._model = (None,)

    def _sorted(self, rows: Rows, found: Found | None = None) -> tuple[Packing, Packing]:
        """The latents outside of the plate, and those in it, as they were at setup or are found to be now."""
        at_setup = dict(self.prototype_trace.iter_stochastic_nodes())
        sites = [found.latents[name] if found else site for name, site in at_setup.items()]
        if not sites:
            raise ValueError("AutoPlateFlow: the model has no latents.")
        if angles := [site["name"] for site in sites if is_circular(site["fn"].support)]:
            raise ValueError(f"AutoPlateFlow: latent site {angles[0]!r} is an angle; only AutoFlow takes angles.")
        inside = [site for site in sites if frame_of(site, self.plate)]
        outside = [site for site in sites if not frame_of(site, self.plate)]
        dim = frame_of(inside[0], self.plate).dim if inside else None
        return Packing("AutoPlateFlow", outside), Packing("AutoPlateFlow", inside, dim, rows.size)

    def _draws(self, call: Call) -> dict[str, Tensor]:
        posterior = self.posterior
        plates = self._plates(posterior, call)
        result, g = dict[str, Tensor](), None
        if posterior.flow:
            g = self._draw("latent", posterior.flow(), posterior.shared.sites())
            result.update(posterior.shared.place(g, plates, {}))
        if posterior.local_flow:
            plate = plates[self.plate]
            # The model enters the plate itself, so it is looked at before the guide is in there.
            masks = self._calls.masks(call, plate.indices)
            with plate as indices, masks.context:
                rows = self.contexts.of(call, plate, indices)
                q = posterior.local_flow(posterior.contexts(rows, g))
                latent = self._draw(f"{self.plate}_latent", q, posterior.own.sites(indices))
            with masks.context:
                result.update(posterior.own.place(latent, plates, masks.parts))
        return result

    def _plates(self, posterior: Nested, call: Call) -> dict[str, Any]:
        """The plates that latents lie in, of the sizes that they have with these arguments."""
        needed = self.master is None and posterior.own.size > 0
        rows = self._calls.rows(call, needed=needed)
        if self.master is not None:
            return self._create_plates()
        frames = self._prototype_frames.values()
        made = {f.name: plate_like(f) for f in frames if f.name != self.plate}
        if needed:
            if rows is None:  # a guide that was saved looks at all rows that it is told of
                number = len(self._all_rows(call))
                rows = Rows(number, number)
            # One without a size has no site in the model, so it shall have none here.
            hidden = [f.name for f in frames if f.name == self.plate and f.size < 0]
            with poutine.block(hide=hidden), InTurn(self.plate, self.minibatches):
                made[self.plate] = pyro.plate(self.plate, *rows, dim=posterior.own.dim)
        return made

    # Using the answer, for all rows of the plate even where the model looks at a few.

    @torch.no_grad()
    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the guide, for all rows of the plate that the arguments tell of, one draw at least.

        Returns:
            For each latent site values of shape ``(num_samples, *site_shape)``.
        """
        call = self.setup(*args, **kwargs)._call(args, kwargs)
        self._look(call)
        check_integers("AutoPlateFlow.sample", num_samples=num_samples)
        rows = self._all_rows(call)
        size = max(1, 100_000 // max(1, len(rows)))
        batches = [self.posterior.draw(min(size, num_samples - i), rows) for i in range(0, num_samples, size)]
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def log_prob(self, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The guide's log-density, in nats, of any constrained values of all rows.

        Values of all latent sites, ``(*batch, *site_shape)``, have one of shape ``batch``; -inf outside of the support.
        Rows that the model masks do not count.
        """
        call = self.setup(*args, **kwargs)._call(args, kwargs)
        found = self._look(call)
        masks = masks_of_all(self.plate, found) if found else RowMasks()
        return self.posterior.log_prob(values, self._all_rows(call), masks)

    def _all_rows(self, call: Call) -> Tensor:
        """The contexts of all rows, ``(rows, context_dim)``; of one without content where none is needed."""
        if not self.posterior.local_flow:
            return torch.zeros(1, 0)
        with at_rest(self.contexts.encoder):
            return self.contexts.of_all(call)

    def _look(self, call: Call) -> Found | None:
        """Refuse arguments that change the latents or their supports."""
        if call.model is None:  # which saved guides are without
            return None
        found = look(call)
        check_shapes(call, found)
        check_unmasked(call, found)
        assert found.rows is not None
        shared, own = self._sorted(found.rows, found)
        self.posterior.shared.check_same(shared)
        self.posterior.own.check_same(own)
        return found
