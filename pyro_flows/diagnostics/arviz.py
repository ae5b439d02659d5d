"""Draws as ArviZ data, from a guide (one chain, with both log-densities) or from Markov chains."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch

from ..arguments import check_flags, check_integers
from ..arviz_versions import Groups, Variable, container
from ..programs.checks import warn_untrained
from ..programs.engines import in_batches
from ..programs.model_and_guide import Task
from ..programs.program import runs_programs
from ..programs.sites import Site, Values, row_log_prob
from ..sampling import Samples
from ..user_code import warn_user
from .importance import WEIGHING, reweighted, weigh


@runs_programs
def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any] | Samples,
    *args: Any,
    num_samples: int = 1000,
    importance: bool = False,
    num_weighed: int | None = None,
    posterior_predictive: bool = False,
    log_likelihood: bool = True,
    **kwargs: Any,
) -> Any:
    """Return draws in ArviZ's container: ``InferenceData`` for ArviZ 0.2x, ``DataTree`` for 1.x.

    The groups are ``posterior`` (latent and deterministic sites), ``sample_stats`` (``log_p``, ``log_q`` and their
    difference ``log_weight``, in nats), ``posterior_predictive``, ``log_likelihood`` and ``observed_data``.

    Draws of a guide have the dimensions ``(chain=1, draw=N)`` and those of the model's plates.  Each group has the
    attributes ``khat``, ``num_weighed``, the number of weighted draws that k-hat is found from, ``importance_ess``,
    their effective sample size, and ``importance_resampled`` (1 or 0).  The draws are unweighted, or with
    ``importance`` resampled as by :func:`~pyro_flows.resample`.  For them ``r_hat`` and ``ess`` of ``arviz.summary``
    have no meaning: see :func:`~pyro_flows.check`.

    Draws of :func:`~pyro_flows.sample` keep their chains, so ``r_hat`` and ``ess`` apply.  The dimensions are
    ``(chain, draw)``, ``sample_stats`` holds ``log_p``, and the attributes are ``converged`` (1 or 0), ``divergences``
    and ``sampling_time`` in seconds.

    ``arviz.loo`` accepts the result, with ``var_name`` if several sites are observed.  Masked observations have no
    likelihood and are left out of ``log_likelihood``.  The others of such a site have the dimension ``{site}_seen``,
    whose coordinates are their row numbers.

    Args:
        model: A Pyro model.
        guide: A Pyro guide of the same latents, or the result of :func:`~pyro_flows.sample`.
        *args: The model's arguments.
        num_samples: The number N of draws of a guide, at least 25.
        importance: Whether to resample the draws by their Pareto-smoothed weights.  ``sample_stats`` then describes the
            kept draws, some of them repeated.
        num_weighed: The number of weighted draws to find k-hat from, and with ``importance`` to choose from: at least
            25, and N if N is larger.  By default as many as :func:`~pyro_flows.check` weighs.
        posterior_predictive: Whether to sample the observed sites given the latents.  Sites that depend on an observed
            site then use its new value.
        log_likelihood: Whether to include the log-likelihood of each observation, in nats.
        **kwargs: The model's keyword arguments.

    Returns:
        ArviZ's container; ``.to_netcdf(path)`` writes it to a file.

    Raises:
        ValueError: If a number is out of its range, or :func:`~pyro_flows.psis` refuses the guide or its weights.

    Warns:
        UserWarning: If the guide was never trained, or k-hat is above its threshold, so that the weights do not confirm
            the draws.  Beyond 1,000 latents only with ``importance``.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> data = to_arviz(model, model, num_samples=100)
        >>> dict(data["posterior"].sizes)
        {'chain': 1, 'draw': 100}
    """
    check_integers("to_arviz", WEIGHING.least, num_samples=num_samples)
    check_integers("to_arviz", WEIGHING.least, optional=True, num_weighed=num_weighed)
    check_flags("to_arviz", importance=importance)
    chains, guide = (guide, guide.guide) if isinstance(guide, Samples) else (None, guide)
    if chains and importance:
        raise ValueError("to_arviz: importance must be False for draws of pf.sample, got True. They need no weights.")
    task = Task(model, guide, args, kwargs)
    with pyro.validation_enabled(False):  # because the weights show draws without a density
        task = task.check(whole=False).settle()
        at_once = WEIGHING.at_once(task)
    if chains:
        latents, stats, attrs = _from_chains(task, chains, at_once)
    else:
        warn_untrained("to_arviz", guide)
        latents, stats, attrs = _from_guide(task, num_samples, num_weighed, importance, at_once)
    number = len(next(iter(chains.draws.values()))) if chains else 1
    nodes, observed = task.model.single.nodes, task.sites("observed")

    def read(sites: Mapping[str, Site], *what: Any, event_dim: int | None = None, **how: Any) -> dict[str, Variable]:
        values = task.read(latents, list(sites), *what, batch_size=at_once, **how)
        return _by_draw(nodes, values, number, event_dim)

    groups: Groups = {"posterior": read(task.sites("posterior")), "sample_stats": _by_draw(nodes, stats, number)}
    if posterior_predictive:
        groups["posterior_predictive"] = read(observed, forget=True)
    if log_likelihood:
        groups["log_likelihood"] = {}
        for name, variable in read(observed, row_log_prob, event_dim=0).items():
            groups["log_likelihood"].update(_seen(name, *variable))
    groups["observed_data"] = {
        name: (_dims(name, site, site["value"].shape), site["value"].numpy(force=True))
        for name, site in observed.items()
    }
    groups = {group: variables for group, variables in groups.items() if variables}
    return container(groups, {"inference_library": "pyro_flows", **attrs})


def draws_alone(draws: Values) -> Any:
    """Return draws of sites, each ``(N, *site_shape)``, in ArviZ's container, as one chain and without a model."""
    return container({"posterior": _by_draw({}, draws, 1)}, {"inference_library": "pyro_flows"})


def _from_guide(
    task: Task, number: int, num_weighed: int | None, importance: bool, at_once: int
) -> tuple[Values, Values, dict[str, Any]]:
    """Draw from a guide, and resample the draws by their weights if that is asked for.

    Returns:
        The draws of all latents, each ``(N, *site_shape)``, statistics of each draw, ``(N,)``, and of all draws.
    """
    dim = sum(torch.as_tensor(task.model.single.nodes[name]["value"]).numel() for name in task.latents)
    drawn = max(number, num_weighed or WEIGHING.number(task, dim))
    draws = task.draw(drawn, at_once)
    if importance:
        draws, psis = reweighted(draws, number, "to_arviz", task)
    else:
        psis = weigh(draws.log_p - draws.log_q, "to_arviz", task, draws.latents_at)
        draws = draws.take(torch.arange(number))
        if not psis.reliable and dim <= WEIGHING.many:
            warn_user(
                f"to_arviz: k-hat is {psis.khat:.2f}, above {psis.threshold:.2f}: the weights do not confirm that "
                "these are draws of the posterior. Judge the guide by pf.check(model, guide, ...)."
            )
    stats = {"log_p": draws.log_p, "log_q": draws.log_q, "log_weight": draws.log_p - draws.log_q}
    attrs = {"inference_method": "variational", "khat": psis.khat, "num_weighed": drawn}
    attrs |= {"importance_resampled": int(importance), "importance_ess": psis.ess}
    return task.complete(draws.latents, at_once), stats, attrs


@torch.no_grad()
def _from_chains(task: Task, samples: Samples, at_once: int) -> tuple[Values, Values, dict[str, Any]]:
    """Return the draws of Markov chains, chain after chain, as :func:`_from_guide` does."""
    flat, names = samples.flat, (*task.latents, *task.model.enumerated)
    if missing := [name for name in names if name not in flat]:
        raise ValueError(f"to_arviz: the Samples are of another model; they lack the latent {missing[0]!r}.")
    held, number = {name: flat[name] for name in task.latents}, len(next(iter(flat.values())))
    stats = in_batches(lambda part, size: {"log_p": task.model.log_prob(part, size)}, held, number, at_once)
    attrs = {"inference_method": "mcmc", "sampling_time": samples.seconds}
    attrs |= {"converged": int(samples.converged), "divergences": samples.divergences}
    return {name: flat[name] for name in names}, stats, attrs


def _by_draw(
    nodes: Mapping[str, Site], values: Values, chains: int, event_dim: int | None = None
) -> dict[str, Variable]:
    """Return values ``(N, *shape)`` of sites, or statistics of draws, as ArviZ variables of some chains.

    Complex numbers, which netCDF lacks, are two variables, and bfloat16, which NumPy lacks, becomes single.
    """
    found: dict[str, Variable] = {}
    for name, value in values.items():
        parts = {f"re {name}": value.real, f"im {name}": value.imag} if value.is_complex() else {name: value}
        dims = ("chain", "draw", *_dims(name, nodes.get(name), value.shape[1:], event_dim))
        for label, part in parts.items():
            array = (part.float() if part.dtype is torch.bfloat16 else part).unflatten(0, (chains, -1))
            found[label] = dims, array.numpy(force=True)
    return found


def _dims(name: str, site: dict[str, Any] | None, shape: torch.Size, event_dim: int | None = None) -> tuple[str, ...]:
    """Return names for the dimensions of a shape: the names of the site's plates, and generic ones for the rest.

    The last ``event_dim`` dimensions lie in no plate; by default they are the dimensions of the site's events.
    """
    frames = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized} if site else {}
    depth = max((-dim for dim in frames), default=0)
    if site and not site["infer"].get("_deterministic"):  # because events of deterministic sites may contain plates
        depth = len(shape) - (site["fn"].event_dim if event_dim is None else event_dim)
    found = [(i, size, frames.get(i - depth)) for i, size in enumerate(shape)]
    return tuple(frame.name if frame and frame.size == size else f"{name}_dim_{i}" for i, size, frame in found)


def _seen(name: str, dims: tuple[str, ...], array: np.ndarray) -> dict[str, Variable]:
    """Return a log-likelihood without masked rows, on which ArviZ 1.x fails and 0.2x warns."""
    rows = (array != 0).any((0, 1))
    if rows.all():
        return {name: (dims, array)}
    if not rows.any():
        return {}
    label = f"{name}_seen"
    return {name: (("chain", "draw", label), array[:, :, rows]), label: ((label,), np.flatnonzero(rows))}
