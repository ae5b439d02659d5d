"""The graph of a model's latents, as a mask for autoregressive guides: which latents depend on which in the posterior.

Faithful Inversion of Generative Models for Effective Amortized Inference (Webb et al. 2018, arXiv:1712.00287), as
``pyro.infer.inspect.get_dependencies`` computes it.  Latents are taken in the reverse of the model's order, and each
depends on its children and on the other parents of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.inspect import get_dependencies
from torch import Tensor

from .auto import AutoFlow


def posterior_graph(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Return the dependencies among the packed latents of an ``AutoFlow``, given the model's arguments.

    They are the ``adjacency`` of autoregressive recipes::

        graph = posterior_graph(model, *data)
        guide = AutoFlow(model, functools.partial(flows.maf, adjacency=graph))

    With one layer the guide has exactly this graph.  With k layers a latent depends on k generations of ancestors; with
    ``flows.iaf``, whose networks see the base, on all of them.  Rows of a plate count as independent unless Pyro sees a
    site that joins them.  It does not see couplings inside of the plate, such as a ``factor`` of neighbours.

    Args:
        model: A Pyro model with continuous latents.
        *args: Its arguments, with the data.
        **kwargs: Its keyword arguments.

    Returns:
        A boolean matrix ``(D, D)``, true at (i, j) if latent number i depends on latent number j.  It has no cycle.

    Raises:
        TypeError: If the model requires arguments and none are given.
        ValueError: If an :class:`~pyro_flows.AutoFlow` refuses the model, for example for a discrete latent
            or because there are none.

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
    parts = AutoFlow(model).setup(*args, **kwargs).packings["latent"].parts
    depends = get_dependencies(model, args, kwargs)["posterior_dependencies"]
    own = {name: part.rows for name, part in parts.items()}
    rows = []
    for child in parts:
        blocks = []
        for parent in parts:
            plates = depends.get(child, {}).get(parent)
            block = torch.full((parts[child].size, parts[parent].size), plates is not None)
            for plate in own[child].keys() & own[parent].keys() - (plates or set()):
                block &= own[child][plate][:, None] == own[parent][plate]
            blocks.append(block.tril(-1) if child == parent else block)
        rows.append(torch.cat(blocks, -1))
    return torch.cat(rows)
