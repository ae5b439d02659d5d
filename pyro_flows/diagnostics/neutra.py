"""Neural transport: Markov chains in the space of a guide's base distribution.

In the base coordinates of a good guide the posterior is close to the base, for example a standard normal, so that
Hamiltonian Monte Carlo mixes fast for any shape of the posterior.
"""

from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor
from torch.distributions import biject_to

from ..arguments import check_integers
from ..programs.checks import check_trained
from ..programs.model_and_guide import Task
from ..programs.program import Args, Function, Kwargs, nesting_of, runs_programs
from ..user_code import warn_user
from .verdict import assess


@dataclass(frozen=True)
class Neutra:
    """A model over a guide's base, and the transform to its latents: the result of :func:`~pyro_flows.neutra`.

    Attributes:
        model: The model for ``NUTS``, called with the arguments of the original model.
        site: The name of its single latent site, a vector ``(D,)`` of the base.
        guide: The guide.
        args: The arguments of the guide's transform.
        kwargs: The keyword arguments of the guide's transform.

    Example::

        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoDiagonalNormal
        >>> pyro.clear_param_store()
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> guide = AutoDiagonalNormal(model, init_scale=1.0)
        >>> _ = guide()  # in practice: fit it
        >>> found = neutra(model, guide, check=False)
        >>> start = found.initial(num_chains=4)
        >>> start[found.site].shape, found.transform(start)["x"].shape
        (torch.Size([4, 1]), torch.Size([4]))
    """

    model: Function
    site: str
    guide: Any
    args: Args
    kwargs: Kwargs

    @torch.no_grad()
    def transform(self, samples: dict[str, Tensor] | Tensor) -> dict[str, Tensor]:
        """Map draws in the base's space to the model's latents.

        Args:
            samples: The result of ``MCMC.get_samples``, by chain or not, or vectors of the base, ``(*batch, D)``.

        Returns:
            For each latent site of the guide, values of shape ``(*batch, *site_shape)``; other sites are unchanged.

        Raises:
            ValueError: If the samples lack the base's site.
        """
        others = {} if isinstance(samples, Tensor) else {**samples}
        if not isinstance(samples, Tensor):
            if self.site not in samples:
                must = f"samples must contain the site {self.site!r}"
                raise ValueError(f"Neutra.transform: {must}, got {sorted(samples)}.")
            samples = others.pop(self.site)
        batch, room = samples.shape[:-1], (1,) * nesting_of(self.guide.prototype_trace)  # draws lie left of all plates
        latent = self.guide.get_transform(*self.args, **self.kwargs)(samples.reshape(-1, *room, samples.shape[-1]))
        if hasattr(self.guide, "constrain"):
            values = self.guide.constrain(latent.reshape(-1, latent.shape[-1]), *self.args, **self.kwargs)
            return {**others, **{name: value.reshape(batch + value.shape[1:]) for name, value in values.items()}}
        for site, value in self.guide._unpack_latent(latent):
            others[site["name"]] = biject_to(site["fn"].support)(value).reshape(batch + site["value"].shape)
        return others

    @torch.no_grad()
    def initial(self, num_chains: int = 1) -> dict[str, Tensor]:
        """Return draws of the guide as the starts of chains, for the argument ``initial_params`` of ``MCMC``.

        Several chains have the shape ``(num_chains, D)``, a single chain ``(D,)``, as Pyro requires.

        Raises:
            ValueError: If ``num_chains`` is below 1.
        """
        check_integers("Neutra.initial", num_chains=num_chains)
        base = self.guide.get_base_dist()
        draws = biject_to(base.support).inv(base.sample((num_chains,)))
        return {self.site: draws if num_chains > 1 else draws[0]}


@runs_programs
def neutra(model: Function, guide: Any, *args: Any, check: bool = True, **kwargs: Any) -> Neutra:
    """Return a model over the base of a trained guide, where Markov chains mix faster.

    For base coordinates u and the guide's transform T, the log-density of the new model is (Hoffman, Sountsov, Dillon,
    Langmore, Tran, Vasudevan 2019, arXiv:1903.03704)::

        log p(T(u), x) + log|det dT/du|

    The chains converge to the posterior for any guide, and an inexact guide only makes them slower.  A collapsed guide
    is different: at a mode that it misses, or far in the tails, T is so steep that finite chains rarely reach the
    place, yet they agree with each other.  Therefore the guide is checked first, and faults lead to a warning.

    Args:
        model: A Pyro model with continuous latents.
        guide: A trained ``AutoContinuous`` guide with a base distribution: ``AutoFlow``, ``AutoMultivariateNormal``,
            ``AutoDiagonalNormal``, ``AutoNormalizingFlow``, ``AutoIAFNormal``.
        *args: The model's arguments.
        check: Whether to check the guide with :func:`~pyro_flows.check` and warn if the verdict is ``"do not trust"``.
        **kwargs: The model's keyword arguments.

    Returns:
        The :class:`~pyro_flows.diagnostics.Neutra`: its ``model`` is for ``NUTS``, its ``transform`` for the samples.

    Raises:
        ValueError: If the guide has no base, is untrained, or cannot be checked.

    Warns:
        UserWarning: If the verdict on the guide is ``"do not trust"``.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import MCMC, NUTS
        >>> from pyro.infer.autoguide import AutoDiagonalNormal
        >>> pyro.clear_param_store()
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> guide = AutoDiagonalNormal(model, init_scale=1.0)
        >>> _ = guide()  # in practice: fit it
        >>> found = neutra(model, guide, check=False)
        >>> mcmc = MCMC(NUTS(found.model), 20, 20, initial_params=found.initial(), disable_progbar=True)
        >>> mcmc.run()
        >>> found.transform(mcmc.get_samples())["x"].shape
        torch.Size([20])
    """
    if not isinstance(guide, AutoContinuous) or type(guide).get_base_dist is AutoContinuous.get_base_dist:
        raise ValueError(
            "neutra: guide must be an AutoContinuous with a base distribution, such as AutoFlow or "
            f"AutoMultivariateNormal, got {type(guide).__name__}, which has no base."
        )
    check_trained("neutra", guide)
    if check:
        try:
            found = assess(Task(model, guide, args, kwargs))
        except ValueError as error:
            raise ValueError(f"neutra: check failed: {error} Pass check=False to skip the check.") from error
        if found.verdict == "do not trust":
            words = "neutra: the guide cannot be trusted, so chains may miss a part of the posterior."
            warn_user(f"{words} {found.reason}")
    site = f"{guide.prototype_trace.stochastic_nodes[0]}_shared_latent"
    return Neutra(_over_base(model, guide, site), site, guide, args, kwargs)


def _over_base(model: Function, guide: Any, site: str) -> Function:
    """Return the model over the guide's base.

    Pyro's reparameteriser draws the base's vector at the first latent.  If that latent lies in a plate of K rows, the
    log-determinant counts K times; and an error in the model leaves the reparameteriser in an invalid state.  So the
    vector and the log-determinant come before the model, and each run has a new reparameteriser.
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
