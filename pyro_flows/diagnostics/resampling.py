"""Draws of a guide resampled by their Pareto-smoothed weights: draws of the posterior where k-hat is low.

Systematic resampling: N points u, u + 1/N, u + 2/N, ... for one u uniform on [0, 1/N) are dropped on the weights laid
end to end, so that a draw of weight w is kept N w times, rounded up or down, and N w times on average: less noise than
there is in N independent picks.  Then the order is shuffled.

Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry 2015, arXiv:1507.02646); Comparison of
Resampling Schemes for Particle Filtering (Douc, Cappé, Moulines 2005, arXiv:cs/0507025).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from ..checks import check_integers, is_integer, joined
from ..programs.nesting import takes_nesting
from ..programs.task import Draws, Task
from .importance import Psis, weigh


@takes_nesting
def resample(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    num_weighed: int = 10_000,
    batch_size: int = 1000,
    vectorize: str = "auto",
    max_plate_nesting: int | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Draw from any Pyro guide, resampled by Pareto-smoothed weights: closer to the posterior than the guide is.

    A draw of normalised weight w is kept N w times, rounded up or down at random (systematic resampling: Douc, Cappé,
    Moulines 2005, arXiv:cs/0507025).  The same seed gives the same draws (``pyro.set_rng_seed``).  Draws of great
    weight are there several times, so N of them tell less than N independent ones.

    Args:
        model: A Pyro model.
        guide: A Pyro guide of the same latents.
        *args: The model's arguments.
        num_samples: The number N of draws that are kept.
        num_weighed: How many draws of the guide they are chosen from, at least 25; at least N are.
        batch_size: How many draws are run at once.
        vectorize: The way to run many draws: ``"plate"``, ``"vmap"`` or ``"loop"``; by default the first of these that
            does to draws what single runs do (*Any Pyro program* in the docs).
        max_plate_nesting: How many dimensions the plates of model and guide take; by default what one run shows.
        model_kwargs: Keyword arguments of the model whose names clash with those above.
        **kwargs: The model's other keyword arguments.

    Returns:
        For each latent and deterministic site of the model, values of shape ``(num_samples, *site_shape)``.

    Raises:
        ValueError: If a number is out of its range, or :func:`~pyro_flows.psis` refuses the guide or its weights.

    Warns:
        UserWarning: If k-hat is above its threshold: the draws cannot be trusted.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("x", dist.Normal(0.0, 1.5))
        >>> pyro.set_rng_seed(0)
        >>> draws = resample(model, guide, num_samples=4000)
        >>> draws["x"].shape, bool((draws["x"].std() - 1).abs() < 0.1)
        (torch.Size([4000]), True)
    """
    check_integers("resample", num_samples=num_samples)
    if not is_integer(num_weighed) or num_weighed < 25:
        raise ValueError(f"resample: num_weighed must be at least 25 to fit a tail, got {num_weighed!r}.")
    kwargs = joined("resample", kwargs, model_kwargs)
    total = max(num_samples, num_weighed)
    with pyro.validation_enabled(False):  # a draw of no density is for the weights to show
        task = Task(model, guide, args, kwargs, vectorize).check()
    kept, _ = reweighted(task.draw(total, batch_size), num_samples, "resample")
    return task.values(kept.latents, batch_size)


def reweighted(draws: Draws, number: int, caller: str) -> tuple[Draws, Psis]:
    """A number of draws, chosen by their weights, and what the weights are worth."""
    psis = weigh(draws.log_p - draws.log_q)
    if not psis.reliable:
        warnings.warn(
            f"{caller}: k-hat is {psis.khat:.2f}, above {psis.threshold:.2f}: a few draws hold most of the weight, and "
            "the resampled draws cannot be trusted. Fit the guide longer, or give it a flow of more layers.",
            stacklevel=4,
        )
    return draws.take(systematic(psis.smoothed, number)), psis


def systematic(log_weights: Tensor, number: int) -> Tensor:
    """The numbers of the draws that are kept, ``(number,)``, shuffled.

    Args:
        log_weights: The logarithms of weights, ``(S,)``, not all of which are zero.
        number: How many to keep.
    """
    edges = (log_weights.double() - log_weights.max().double()).exp().cumsum(0)
    offset = torch.rand((), dtype=edges.dtype, device=edges.device)
    places = (torch.arange(number, dtype=edges.dtype, device=edges.device) + offset) / number * edges[-1]
    # Rounded up to the very end, a place would lie beyond the last draw.
    places = places.minimum(edges[-1].nextafter(torch.zeros_like(offset)))
    kept = torch.searchsorted(edges, places, right=True)
    return kept[torch.randperm(number, device=edges.device)]
