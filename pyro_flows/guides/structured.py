"""AutoStructuredFlow: a guide whose blocks follow the structure of the model, q(z) = Π_b Π_i q(z_bi | c_bi, z_<b).

Automatic Structured Variational Inference (Ambrogioni et al. 2020, arXiv:2002.00643); conditional flows for nested
plates: ADAVI (Rouillard, Wassermann 2021, arXiv:2106.12248).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from ..arguments import check_kind, suggests_recipes
from ..flows import Flow, cnf, nsf, nsf_ar, realnvp
from .block_guide import BlockGuide, Encoder
from .contexts import RowContexts
from .guide_call import Call, Key
from .guide_flow import LIMITS
from .read_structure import Structure, read_structure


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

    @suggests_recipes(nsf, nsf_ar, realnvp, cnf)
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

    def _corrects(self, key: Key) -> bool:
        return len(key) == 1 and key[0] in self._semi_amortized

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

    def _needs_network(self, contexts: RowContexts, num_given: int) -> bool:
        return self._build_local is not None or contexts.encoder is not None or num_given > LIMITS.factors

    def parts(self) -> dict[str, Any]:
        encoders = {"encoders": tuple(self._encoders.items()), "semi_amortized": self._semi_amortized}
        return super().parts() | encoders | {"structure": self.structure.parts()}
