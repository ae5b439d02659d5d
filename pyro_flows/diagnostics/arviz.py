"""Guide draws as ArviZ data: one chain of N independent draws, with both log-densities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from .compat import from_groups
from .draws import draw, rows_of
from .importance import weigh


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    batch_size: int = 1000,
    vectorize: bool = True,
    log_likelihood: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Draw from a guide into ArviZ's container: ``InferenceData`` for ArviZ 0.2x, ``DataTree`` for 1.x.

    The groups are ``posterior`` (latent and deterministic sites), ``sample_stats`` (``log_p``, ``log_q`` and their
    difference ``log_weight``, in nats), ``log_likelihood`` and ``observed_data``.  Dimensions are ``(chain=1, draw=N)``
    and the names of the model's plates; k-hat is an attribute of each group.  The draws are independent and
    unweighted, so ``r_hat`` and ``ess`` of ``arviz.summary`` say nothing about the guide's quality: see :func:`psis`.

    Args:
        num_samples: The number N of draws.
        log_likelihood: Whether to keep each observation's log-likelihood.

    The other arguments and the errors are those of :func:`psis`.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> data = to_arviz(model, model, num_samples=100)
        >>> dict(data["posterior"].sizes)
        {'chain': 1, 'draw': 100}
    """
    if num_samples < 25:
        raise ValueError(f"to_arviz: num_samples must be at least 25 to fit a tail, got {num_samples}.")
    kwargs = {**kwargs, **(model_kwargs or {})}
    parts: dict[str, dict[str, list[Tensor]]] = {"posterior": {}, "sample_stats": {}, "log_likelihood": {}}
    observed: dict[str, np.ndarray] = {}
    dims: dict[str, list[str]] = {}
    for batch in draw(model, guide, args, kwargs, num_samples, batch_size=batch_size, vectorize=vectorize):
        for name, site in batch.model.nodes.items():
            kind = _kind(site)
            if kind is None:
                continue
            plates = sorted((f for f in site["cond_indep_stack"] if f.vectorized), key=lambda f: f.dim)
            plates = [frame for frame in plates if frame.name != "_pyro_flows_draws"]
            depth = -plates[0].dim if plates else 0
            labels = {frame.dim: frame.name for frame in plates}
            dims[name] = [labels.get(dim - depth, f"{name}_dim_{dim}") for dim in range(depth)]
            single, size = batch.single.nodes[name], len(batch.log_p)
            if kind == "posterior":
                value = rows_of(name, site["value"], single["value"].shape, size)
                parts["posterior"].setdefault(name, []).append(value)
            else:
                observed[name] = _array(single["value"])
                if log_likelihood:
                    density = scale_and_mask(
                        site["unscaled_log_prob"], mask=site["mask"]
                    )  # a masked row counts nothing
                    value = rows_of(name, density, single["fn"].batch_shape, size)
                    parts["log_likelihood"].setdefault(name, []).append(value)
        stats = {"log_p": batch.log_p, "log_q": batch.log_q, "log_weight": batch.log_p - batch.log_q}
        for name, value in stats.items():
            parts["sample_stats"].setdefault(name, []).append(value)
    groups = {
        group: {name: _array(torch.cat(values))[None] for name, values in variables.items()}
        for group, variables in parts.items()
        if variables
    }
    khat = weigh(torch.as_tensor(groups["sample_stats"]["log_weight"][0])).khat
    attrs = {"inference_library": "pyro_flows", "inference_method": "variational", "khat": khat}
    latent_dims = {name: dims[name] for name in (*groups["posterior"], *groups.get("log_likelihood", {})) if dims[name]}
    latent_dims = {name: _complete(name, groups, latent_dims[name]) for name in latent_dims}
    if observed:
        groups["observed_data"] = observed
    return from_groups(groups, {}, latent_dims, attrs)


def _kind(site: dict[str, Any]) -> str | None:
    """The group of a site of the model's trace."""
    if site["type"] != "sample" or not isinstance(site["value"], Tensor):
        return None
    if not site["is_observed"] or site["infer"].get("_deterministic", False):
        return "posterior"
    return None if type(site["fn"]).__name__ == "Unit" else "observed"


def _complete(name: str, groups: dict[str, dict[str, np.ndarray]], dims: list[str]) -> list[str]:
    """Names for a variable's plates, and generic ones for what is left of its shape."""
    array = groups["posterior"].get(name, groups.get("log_likelihood", {}).get(name))
    assert array is not None
    return dims + [f"{name}_dim_{i}" for i in range(len(dims), array.ndim - 2)]


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
