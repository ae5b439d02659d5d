"""The log-likelihood of each row of a plate by importance sampling, log p(x) ≈ log (1/K) Σ_k p(x, z_k) / q(z_k | x).

A lower bound on average, which rises with K to the log-likelihood.  Importance Weighted Autoencoders (Burda, Grosse,
Salakhutdinov 2015, arXiv:1509.00519).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from ..checks import joined
from ..programs.alongside import side_by_side
from ..programs.draws import check_guide, check_integers, check_side_by_side, single_trace
from ..programs.nesting import takes_nesting


@takes_nesting
@torch.no_grad()
def importance_log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    plate: str | None = None,
    num_samples: int = 500,
    batch_size: int = 50,
    max_plate_nesting: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Estimate log p(x_i) of each row of a plate, such as each test image of a variational autoencoder.

    Row by row, with K draws z_k of the row's latents from the guide q, it is::

        log p(x_i) ≈ log 1/K Σ_k p(x_i, z_k) / q(z_k | x_i)

    a lower bound on average, which rises with K (Burda, Grosse, Salakhutdinov 2015, arXiv:1509.00519).  Latents outside
    of the plate have no place in it: fix them, with ``poutine.condition``.

    Args:
        model: A Pyro model whose latents all lie in the plate; it must broadcast to the left of its plates.
        guide: A Pyro guide of the same latents.
        *args: The model's arguments, with the rows to score.
        plate: The plate's name; by default that of an ``AutoPlateFlow``.
        num_samples: The number K of draws for each row.
        batch_size: How many draws are run at once.
        max_plate_nesting: How many dimensions the plates of model and guide take; by default what one run shows.
        model_kwargs: Keyword arguments of the model whose names clash with those above.
        **kwargs: The model's other keyword arguments.

    Returns:
        The log-likelihood of each row, ``(rows,)`` in nats: mean and sum are those of the data set.

    Raises:
        ValueError: If a number is out of its range, the plate is missing or subsampled, a latent lies outside, the
            guide is a point or of other latents, or the model does not run vectorised over draws.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("row", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("row", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> x = torch.tensor([0.0, 2.0])
        >>> found = importance_log_likelihood(model, guide, x, plate="row", num_samples=10)
        >>> torch.allclose(found, dist.Normal(0.0, 2**0.5).log_prob(x), atol=1e-4)  # exact, as the guide is
        True
    """
    kwargs = joined("importance_log_likelihood", kwargs, model_kwargs)
    check_integers("importance_log_likelihood", num_samples=(num_samples, 1), batch_size=(batch_size, 1))
    name = plate if plate is not None else getattr(guide, "plate", None)
    if name is None:
        raise ValueError("importance_log_likelihood: give the name of the rows' plate, plate=...")
    single, nesting = check_guide(model, guide, args, kwargs)
    check_side_by_side(model, guide, args, kwargs)
    _, guide_trace, _ = single_trace(model, guide, args, kwargs)
    dim = _place(name, single)
    _place(name, guide_trace)
    total: Tensor | None = None
    for start in range(0, num_samples, batch_size):
        size = min(batch_size, num_samples - start)
        with poutine.block(), pyro.validation_enabled(False):
            guide_trace = poutine.trace(side_by_side(guide, size, nesting)).get_trace(*args, **kwargs)
            replayed = poutine.replay(side_by_side(model, size, nesting), trace=guide_trace)
            model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        log_p, log_q = (_by_row(trace, name, dim, size) for trace in (model_trace, guide_trace))  # (size, rows)
        log_weights = log_p - log_q
        batch = log_weights.logsumexp(0)
        total = batch if total is None else torch.logaddexp(total, batch)
    assert total is not None
    return total - math.log(num_samples)


def _place(plate: str, trace: Trace) -> int:
    """The plate's dimension; every site with a density must lie in it."""
    dim = None
    for name, site in prune_subsample_sites(trace).nodes.items():
        if site["type"] != "sample" or (site["is_observed"] and not _in(plate, site)):
            continue  # what is given, outside of the plate, is the same for all rows
        frames = _in(plate, site)
        if not frames:
            raise ValueError(
                f"importance_log_likelihood: site {name!r} lies outside of plate {plate!r}: rows have no likelihood of "
                "their own. Fix latents outside of the plate with poutine.condition(model, data={...}), and give a "
                "guide that draws row by row, in the plate."
            )
        dim = frames[0].dim
    if dim is None:
        raise ValueError(f"importance_log_likelihood: the model has no plate {plate!r}.")
    return dim


def _in(plate: str, site: dict[str, Any]) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.name == plate and frame.vectorized]


def _by_row(trace: Trace, plate: str, dim: int, size: int) -> Tensor:
    """The log-density of each draw and row, ``(size, rows)``."""
    trace.compute_log_prob()
    total = torch.zeros(())
    for site in prune_subsample_sites(trace).nodes.values():
        if site["type"] == "sample" and _in(plate, site):
            rows = scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]).movedim(dim, -1)
            rows = rows.expand(size, *rows.shape[1:]) if rows.dim() > 1 else rows.expand(size, -1)
            total = total + rows.reshape(size, -1, rows.shape[-1]).sum(1)
    return total
