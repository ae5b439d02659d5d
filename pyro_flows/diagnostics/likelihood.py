"""The log-likelihood of each row of a plate by importance sampling, log p(x) ≈ log (1/K) Σ_k p(x, z_k) / q(z_k | x).

A lower bound on average, which rises with K to the log-likelihood.  Importance Weighted Autoencoders (Burda, Grosse,
Salakhutdinov 2015, arXiv:1509.00519).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..checks import check_integers, joined
from ..programs.engines import Values, View, row_log_prob
from ..programs.nesting import takes_nesting
from ..programs.task import Task, in_batches


@takes_nesting
@torch.no_grad()
def importance_log_likelihood(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    plate: str | None = None,
    num_samples: int = 500,
    batch_size: int = 50,
    vectorize: str = "auto",
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
        model: A Pyro model whose latents all lie in the plate.
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
            guide is a point or of other latents.

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
    check_integers("importance_log_likelihood", num_samples=num_samples, batch_size=batch_size)
    name = plate if plate is not None else getattr(guide, "plate", None)
    if name is None:
        raise ValueError("importance_log_likelihood: give the name of the rows' plate, plate=...")
    task = Task(model, guide, args, kwargs, vectorize).check(whole=False).settle()
    dims = {program: _place(name, program.single) for program in (task.guide, task.model)}

    def read(view: View) -> Values:
        return {"log_q": _by_row(view, name, dims[task.guide]), **{n: view.read(n) for n in task.latents}}

    def step(_: Values, size: int) -> Values:
        latents = task.guide.run(read, {}, size)
        log_q = latents.pop("log_q")
        found = task.model.run(lambda view: {"log_p": _by_row(view, name, dims[task.model])}, latents, size)
        return {"log_weights": (found["log_p"] - log_q).logsumexp(0, keepdim=True)}  # (1, rows)

    return in_batches(step, {}, num_samples, batch_size)["log_weights"].logsumexp(0) - math.log(num_samples)


def _place(plate: str, trace: Trace) -> int:
    """The plate's dimension; every site with a density must lie in it."""
    dim = None
    for name, site in trace.nodes.items():
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


def _by_row(view: View, plate: str, dim: int) -> Tensor:
    """The log-density of each draw and row, ``(N, rows)``, or of each row of one draw."""
    total, lead = torch.zeros(()), int(view.size is not None)
    for site in view.trace.nodes.values():
        if site["type"] == "sample" and _in(plate, site):
            rows = view.by_draw(row_log_prob(site)).movedim(dim, -1)
            total = total + (rows.flatten(lead, -2).sum(lead) if rows.dim() > lead + 1 else rows)
    return total
