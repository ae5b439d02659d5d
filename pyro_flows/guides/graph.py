"""The graph of a model's latents, as a mask for autoregressive guides: who depends on whom in the posterior.

Faithful Inversion of Generative Models for Effective Amortized Inference (Webb et al. 2018, arXiv:1712.00287), as
``pyro.infer.inspect.get_dependencies`` has it: latents are taken in the reverse of the model's order, and each depends
on its children and on what shares children with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.inspect import get_dependencies
from torch import Tensor

from .auto import AutoFlow


def posterior_graph(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Which of the packed latents of an ``AutoFlow`` each of them may have to depend on, given the model's arguments.

    It is the ``adjacency`` of autoregressive recipes::

        graph = posterior_graph(model, *data)
        guide = AutoFlow(model, functools.partial(flows.maf, adjacency=graph))

    With one layer the guide has exactly this graph, with k layers a latent sees k generations of ancestors; with
    ``flows.iaf``, whose networks see the base, all of them at once.  Rows of a plate count as independent unless Pyro
    sees what joins them; what couples them inside of the plate, such as a ``factor`` of neighbours, it does not see.
    After Webb et al. 2018, arXiv:1712.00287.

    Args:
        model: A Pyro model with continuous latents.
        *args: Its arguments, with the data.
        **kwargs: Its keyword arguments.

    Returns:
        A boolean matrix ``(D, D)``, true at (i, j) where latent number i depends on latent number j.  It has no cycle.

    Raises:
        TypeError: If the model asks for arguments and none are given.
        RuntimeError: If it has no latents.
        ValueError: If an :class:`~pyro_flows.AutoFlow` refuses the model, as where a latent is discrete.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     mean = pyro.sample("mean", dist.Normal(0, 1))
        ...     with pyro.plate("group", 2):
        ...         level = pyro.sample("level", dist.Normal(mean, 1))
        ...         pyro.sample("y", dist.Normal(level, 1), obs=torch.zeros(2))
        >>> posterior_graph(model).int().tolist()  # the mean depends on both levels, which depend on the data alone
        [[0, 1, 1], [0, 0, 0], [0, 0, 0]]
    """
    trace = AutoFlow(model).setup(*args, **kwargs).prototype_trace
    depends = get_dependencies(model, args, kwargs)["posterior_dependencies"]
    sites = dict(trace.iter_stochastic_nodes())
    places = {name: _places(site) for name, site in sites.items()}
    rows = []
    for child in sites:
        parts = []
        for parent in sites:
            plates = depends.get(child, {}).get(parent)
            size = places[child][""][:, None], places[parent][""]
            part = torch.full(torch.broadcast_shapes(size[0].shape, size[1].shape), plates is not None)
            for plate in places[child].keys() & places[parent].keys() - {""} - (plates or set()):
                part &= places[child][plate][:, None] == places[parent][plate]
            parts.append(part & (size[0] > size[1]) if child == parent else part)
        rows.append(torch.cat(parts, -1))
    return torch.cat(rows)


def _places(site: dict[str, Any]) -> dict[str, Tensor]:
    """For each number of an unconstrained site its place in the plates, by their names, and under "" among all."""
    fn, value = site["fn"], site["value"]
    shape = torch.distributions.biject_to(fn.support).inv(value).shape
    batch = value.dim() - fn.event_dim
    found = {"": torch.arange(shape.numel())}
    for frame in site["cond_indep_stack"]:
        if frame.vectorized:
            axis = batch + frame.dim
            place = torch.arange(shape[axis]).reshape(-1, *(1,) * (len(shape) - axis - 1))
            found[frame.name] = place.expand(shape).flatten()
    return found
