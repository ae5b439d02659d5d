"""Where a guide starts: at the centre of the prior, without drawing from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Independent, MaskedDistribution
from torch import Tensor
from torch.distributions import biject_to


def init_to_center(site: dict[str, Any] | None = None) -> Tensor | Callable[..., Any]:
    """Initialise a site to its prior's median where that is known in closed form, else to its mean where that is
    finite, else to the origin of the unconstrained space.

    Unlike Pyro's strategies it needs no draw, so flat priors (``ImproperUniform``) have a start too, and the same
    start every time.

    Args:
        site: A Pyro sample site; without one the strategy itself is returned, as Pyro's strategies do.

    Returns:
        A value of the site's shape, in its support.

    Raises:
        NotImplementedError: If torch knows no bijection onto the site's support.

    Example::

        >>> import pyro.distributions as dist
        >>> init_to_center({"fn": dist.LogNormal(0.0, 3.0)}).item()
        1.0
        >>> init_to_center({"fn": dist.ImproperUniform(dist.constraints.positive, (), ())}).item()
        1.0
    """
    if site is None:
        return init_to_center
    fn = site["fn"]
    if fn.support.is_discrete:
        return fn.sample()  # for the guide to refuse, in words of its own
    try:
        bijection = biject_to(fn.support)
    except NotImplementedError as error:
        fault = (
            f"torch knows no bijection from real vectors onto {fn.support}, the support of site {site.get('name')!r}"
        )
        way = "write the site another way, a covariance as scales and an LKJCholesky, say"
        raise NotImplementedError(f"init_to_center: {fault}; {way}.") from error
    for value in (_median(fn), _mean(fn)):
        if value is not None and value.shape == fn.shape() and bijection.inv(value).isfinite().all():
            return value
    like = next(iter(_tensors(fn)), torch.zeros(()))
    return bijection(like.new_zeros(bijection.inverse_shape(fn.shape())))


def bare(fn: Any) -> Any:
    """Return a distribution of single numbers, without a mask."""
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    return fn


def _median(fn: Any) -> Tensor | None:
    shape, fn = fn.shape(), bare(fn)
    tensors = _tensors(fn)
    if not tensors:
        return None
    try:
        return fn.icdf(torch.full((), 0.5, dtype=tensors[0].dtype, device=tensors[0].device)).expand(shape).detach()
    except (NotImplementedError, RuntimeError, ValueError):
        return None


def _mean(fn: Any) -> Tensor | None:
    try:
        mean = fn.mean.detach().clone()
        return torch.where(mean.isfinite(), mean, fn.loc) if hasattr(fn, "loc") else mean  # StudentT of one degree
    except (NotImplementedError, RuntimeError, AttributeError):
        return None


def _tensors(fn: Any) -> list[Tensor]:
    """The floating parameters of a distribution, down to the base that it wraps."""
    found = [t for t in vars(fn).values() if isinstance(t, Tensor) and t.is_floating_point()]
    base = getattr(fn, "base_dist", None)
    return found or (_tensors(base) if base is not None else [])
