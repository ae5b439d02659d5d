"""Exact draws by way of a guide: Markov chains in the space of the guide's base distribution.

Where the guide has turned the posterior into something near its base, a standard normal say, Hamiltonian Monte Carlo
takes long steps whatever the posterior's shape.  With u the base's coordinates and T the guide's transform the chains'
target is p(T(u), x) |det dT/du|.

NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport (Hoffman, Sountsov, Dillon, Langmore, Tran,
Vasudevan 2019, arXiv:1903.03704).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor
from torch.distributions import biject_to

from ..arguments import check_integers, joined
from ..programs.nesting import runs_programs
from ..programs.task import check_trained
from .verdict import check as judge

_REFUSAL = "the guide must be an AutoContinuous with a base distribution, AutoFlow or AutoMultivariateNormal say"


@dataclass(frozen=True)
class Neutra:
    """A model over a guide's base, and the way back: the result of :func:`~pyro_flows.neutra`.

    Attributes:
        model: The model to give to ``NUTS``, called with the model's own arguments.
        site: The name of its one latent site, which holds the base's vectors ``(D,)``.
        guide: The guide.
        args: The arguments that the guide's transform depends on.
        kwargs: Its keyword arguments.

    Example::

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoDiagonalNormal
        >>> pyro.clear_param_store()
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> guide = AutoDiagonalNormal(model, init_scale=1.0)
        >>> _ = guide()  # in earnest: fit it
        >>> found = neutra(model, guide, check=False)
        >>> start = found.initial(num_chains=4)
        >>> start[found.site].shape, found.transform(start)["x"].shape
        (torch.Size([4, 1]), torch.Size([4]))
    """

    model: Callable[..., Any]
    site: str
    guide: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @torch.no_grad()
    def transform(self, samples: dict[str, Tensor] | Tensor) -> dict[str, Tensor]:
        """Map draws in the base's space to the model's latents.

        Args:
            samples: What ``MCMC.get_samples`` returns, by chain or not, or vectors of the base, ``(*batch, D)``.

        Returns:
            For each latent site of the guide, values of shape ``(*batch, *site_shape)``; other sites stay as they are.

        Raises:
            ValueError: If the samples lack the base's site.
        """
        others: dict[str, Tensor] = {}
        if not isinstance(samples, Tensor):
            if self.site not in samples:
                raise ValueError(f"Neutra.transform: samples lack the site {self.site!r}; got {sorted(samples)}.")
            others = dict(samples)
            samples = others.pop(self.site)
        batch, nodes = samples.shape[:-1], self.guide.prototype_trace.nodes.values()
        frames = [frame for site in nodes for frame in site.get("cond_indep_stack", ()) if frame.vectorized]
        room = (1,) * max((-frame.dim for frame in frames), default=0)  # the draws lie left of all plates
        latent = self.guide.get_transform(*self.args, **self.kwargs)(samples.reshape(-1, *room, samples.shape[-1]))
        if hasattr(self.guide, "constrain"):
            values = self.guide.constrain(latent.reshape(-1, latent.shape[-1]), *self.args, **self.kwargs)
            return {**others, **{name: value.reshape(batch + value.shape[1:]) for name, value in values.items()}}
        for site, value in self.guide._unpack_latent(latent):
            others[site["name"]] = biject_to(site["fn"].support)(value).reshape(batch + site["value"].shape)
        return others

    @torch.no_grad()
    def initial(self, num_chains: int = 1) -> dict[str, Tensor]:
        """Draws of the guide to start the chains from: the ``initial_params`` of ``MCMC``.

        For several chains the draw's dimension comes first, ``(num_chains, D)``; for one there is none, as Pyro has it.

        Raises:
            ValueError: If ``num_chains`` is below 1.
        """
        check_integers("Neutra.initial", num_chains=num_chains)
        base = self.guide.get_base_dist()
        draws = biject_to(base.support).inv(base.sample((num_chains,)))
        return {self.site: draws if num_chains > 1 else draws[0]}


@runs_programs
def neutra(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    check: bool = True,
    max_plate_nesting: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Neutra:
    """Turn a model into one over the base of a trained guide, where Markov chains mix faster.

    With u the base's coordinates and T the guide's transform the chains' target is (Hoffman, Sountsov, Dillon,
    Langmore, Tran, Vasudevan 2019, arXiv:1903.03704)::

        log p(T(u), x) + log|det dT/du|

    However inexact the guide, what the chains converge to is the posterior, so a guide that is merely inexact does no
    harm but to speed.  One that has collapsed does: where it draws next to nothing, at a mode it misses or in tails far
    beyond its own, its base is stretched or squeezed so much that finite chains seldom get there, and agree with each
    other nonetheless.  So the guide is judged first, and its faults are a warning and no error.

    Args:
        model: A Pyro model with continuous latents.
        guide: A trained ``AutoContinuous`` guide with a base distribution: ``AutoFlow``, ``AutoMultivariateNormal``,
            ``AutoDiagonalNormal``, ``AutoNormalizingFlow``, ``AutoIAFNormal``.
        *args: The model's arguments.
        check: Whether to judge the guide by :func:`~pyro_flows.check` and to warn if its verdict is ``"do not trust"``.
        max_plate_nesting: How many dimensions the plates of model and guide take; by default what one run shows.
        model_kwargs: Keyword arguments of the model whose names clash with those above.
        **kwargs: The model's other keyword arguments.

    Returns:
        The :class:`~pyro_flows.diagnostics.Neutra`: its ``model`` is for ``NUTS``, its ``transform`` for the samples.

    Raises:
        ValueError: If the guide has no base or was never trained, or cannot be checked.

    Warns:
        UserWarning: If the guide is not to be trusted.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import MCMC, NUTS
        >>> from pyro.infer.autoguide import AutoDiagonalNormal
        >>> pyro.clear_param_store()
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> guide = AutoDiagonalNormal(model, init_scale=1.0)
        >>> _ = guide()  # in earnest: fit it
        >>> found = neutra(model, guide, check=False)
        >>> mcmc = MCMC(NUTS(found.model), 20, 20, initial_params=found.initial(), disable_progbar=True)
        >>> mcmc.run()
        >>> found.transform(mcmc.get_samples())["x"].shape
        torch.Size([20])
    """
    kwargs = joined("neutra", kwargs, model_kwargs)
    if not isinstance(guide, AutoContinuous):
        raise ValueError(f"neutra: {_REFUSAL}, got {type(guide).__name__}.")
    check_trained("neutra", guide)
    try:
        guide.get_base_dist()
    except NotImplementedError as error:
        raise ValueError(f"neutra: {_REFUSAL}; {type(guide).__name__} has none.") from error
    if check:
        try:
            found = judge(model, guide, *args, model_kwargs=kwargs)
        except ValueError as error:
            raise ValueError(f"neutra: the guide cannot be checked (check=False leaves that out): {error}") from error
        if found.verdict == "do not trust":
            words = "the guide is not to be trusted, and chains may stay where it has collapsed"
            warnings.warn(f"neutra: {words}. {found.reason}", stacklevel=3)
    first = next(name for name, _ in guide.prototype_trace.iter_stochastic_nodes())
    site = f"{first}_shared_latent"
    return Neutra(_over_base(model, guide, site), site, guide, args, kwargs)


def _over_base(model: Callable[..., Any], guide: Any, site: str) -> Callable[..., Any]:
    """The model over the guide's base.

    Pyro's reparameteriser draws the base's vector at the first latent that it meets: if that lies in a plate of K rows,
    it counts the transform's log-determinant K times over, and a model that breaks down half-way leaves it in disorder.
    So the vector and the log-determinant have their place before the model, and each run has a new reparameteriser.
    """

    def over_base(*args: Any, **kwargs: Any) -> Any:
        reparam = NeuTraReparam(guide)
        u = pyro.sample(site, guide.get_base_dist().mask(False))
        reparam.transform = transform = guide.get_transform(*args, **kwargs)
        latent = transform(u)
        pyro.factor(f"{site}_log_det", transform.log_abs_det_jacobian(u, latent))
        reparam.x_unconstrained = {found["name"]: (found, value) for found, value in guide._unpack_latent(latent)}
        return poutine.reparam(model, config=reparam._reparam_config)(*args, **kwargs)

    return over_base
