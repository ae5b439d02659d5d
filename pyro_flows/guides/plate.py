"""AutoPlateFlow: one conditional flow, shared by all rows of a plate, q(g, l) = q(g) Π_i q(l_i | c_i, g).

Auto-Encoding Variational Bayes (Kingma, Welling 2013, arXiv:1312.6114), with normalizing flows (Rezende, Mohamed 2015,
arXiv:1505.05770); Amortized Variational Inference for Simple Hierarchical Models (Agrawal, Domke 2021,
arXiv:2111.03144).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..arguments import suggests_recipes
from ..flows import Flow, cnf, nsf, nsf_ar, realnvp
from .block_guide import BlockGuide
from .guide_call import Call
from .structure import Structure


class AutoPlateFlow(BlockGuide):
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

    settings = "encoder", "init_scale", "plate", "embedding_dim"

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
        encoders = {} if encoder is None else {plate: encoder}
        super().__init__(model, encoders, local_flow, global_flow, embedding_dim, init_loc_fn, init_scale, name)
        self.plate, self.row_plates, self.structure = plate, (plate,), Structure((plate,))

    def _read(self, call: Call) -> Structure:
        return self.structure

    def parts(self) -> dict[str, Any]:
        return super().parts() | {"plate": self.plate, "encoder": self._encoders.get(self.plate)}
