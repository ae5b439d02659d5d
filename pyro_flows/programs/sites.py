"""Sites of a trace: which of their elements count, the kinds of their distributions, and the plates they lie in."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import Delta, Independent, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Cauchy, Laplace, MultivariateNormal, Normal, StudentT, constraints

Site = dict[str, Any]
Values = dict[str, Tensor]
Bools = Tensor | bool
MOST = 1000  # joint values of a discrete site


class Mask(NamedTuple):
    """The mask of a site, over its batch shape.

    Attributes:
        some: True where some part of an element counts.
        every: True where all of it counts; it differs from ``some`` if a mask divides an event.
    """

    some: Bools
    every: Bools

    @property
    def hides(self) -> bool:
        """True if some of the site does not count."""
        return self.every is not True and not bool(torch.as_tensor(self.every).all())

    @property
    def is_scalar(self) -> bool:
        """True if one number masks all of the site, as ``mask=False`` does."""
        return not any(isinstance(part, Tensor) and part.dim() for part in self)


def mask_of(site: Site) -> Mask:
    """Return the mask of a site in a trace, from its handlers and from its distribution."""
    own = True if site["mask"] is None else site["mask"]
    return Mask(*(_both(part, own) for part in _of_distribution(site["fn"])))


def _of_distribution(fn: Any) -> Mask:
    if not isinstance(fn, MaskedDistribution | Independent):
        return Mask(True, True)
    some, every = _of_distribution(fn.base_dist)
    if isinstance(fn, MaskedDistribution):
        return Mask(_both(some, fn._mask), _both(every, fn._mask))
    number = fn.reinterpreted_batch_ndims
    return Mask(_last(some, number, torch.any), _last(every, number, torch.all))


def _both(one: Bools, other: Bools) -> Bools:
    """Return the elements that both masks keep; a tensor that the JIT traces takes no Python bool."""
    return other if one is True else one if other is True else one & other


def _last(mask: Bools, number: int, reduce: Any) -> Bools:
    """Reduce a mask over its last dimensions."""
    if not isinstance(mask, Tensor) or not number or not mask.dim():
        return mask
    return reduce(mask.flatten(max(mask.dim() - number, 0)), -1)


def is_masked(site: Site) -> bool:
    """True if a site has a mask, even one that hides nothing."""
    return any(part is not True for part in mask_of(site))


def are_equal(one: Mask, other: Mask) -> bool:
    """True if two masks hide the same elements."""
    pairs = [[torch.as_tensor(part) for part in pair] for pair in zip(one, other, strict=True)]
    return all(bool((a.to(b.device) == b).all()) for a, b in pairs)


def present_of(values: Tensor, counts: Tensor | None) -> Tensor:
    """Return the numbers that count, ``(*batch, n)``, of ``(*batch, N)``; None stands for all."""
    return values if counts is None else values[..., counts.to(values.device)]


def among_absent(values: Tensor, counts: Tensor | None) -> Tensor:
    """Return numbers ``(*batch, n)`` at their places among zeros, ``(*batch, N)``, as :func:`present_of` took them."""
    if counts is None:
        return values
    counts = counts.to(values.device)
    padded = torch.cat((values, values.new_zeros(*values.shape[:-1], 1)), -1)
    return padded.index_select(-1, torch.where(counts, counts.cumsum(0) - 1, values.shape[-1]))


def is_observation(site: Site) -> bool:
    """True if a site is observed data or a factor, but no deterministic value."""
    return site["type"] == "sample" and site["is_observed"] and not is_deterministic(site)


def is_deterministic(site: Site) -> bool:
    """True if a site names a value: by ``pyro.deterministic``, or in place of a reparametrised latent."""
    return bool(site["type"] == "sample" and (site["infer"].get("_deterministic") or is_reparametrised(site)))


def is_reparametrised(site: Site) -> bool:
    """True if a site was a latent before ``poutine.reparam``, which observes its value as a point that is masked out.

    A point at data is not masked out.
    """
    fn, is_marked = site["fn"], site["infer"].get("_deterministic")
    is_hidden_point = isinstance(fn, MaskedDistribution) and isinstance(fn.base_dist, Delta) and fn._mask is False
    return bool(site["is_observed"] and is_hidden_point and not is_marked)


def group_of(site: Site) -> str | None:
    """Return a site's group: ``"posterior"`` for latent and deterministic sites, ``"observed"``, or None."""
    if site["type"] != "sample" or site_is_subsample(site) or not isinstance(site["value"], Tensor):
        return None
    if not site["is_observed"] or is_deterministic(site):
        return "posterior"
    return None if type(site["fn"]).__name__ == "Unit" else "observed"


def value_of(site: Site) -> Tensor:
    """Return the value of a site as a tensor."""
    return torch.as_tensor(site["value"])


def row_log_prob(site: Site) -> Tensor:
    """Return the log-density of each row of a site without the scale of its plates, 0 for masked rows."""
    value = _counted_data(site) if is_masked(site) else site["value"]
    return scale_and_mask(site["fn"].log_prob(value, *site["args"], **site["kwargs"]), mask=site["mask"])


def hides_nan(trace: Trace) -> bool:
    """True if a mask hides data of an observed site that are NaN."""
    sites = (site for site in trace.nodes.values() if is_observation(site) and isinstance(site["value"], Tensor))
    return any(is_masked(site) and bool(site["value"].isnan().any()) for site in sites)


class WithoutHiddenNaN(Messenger):
    """Handler that scores no NaN behind a mask, since 0 times the NaN in its gradient is NaN."""

    def _pyro_sample(self, msg: Site) -> None:
        if is_observation(msg) and isinstance(msg["value"], Tensor) and is_masked(msg):
            msg["value"] = _counted_data(msg)


def _counted_data(site: Site) -> Tensor:
    """Return the data of an observed site, with others in place of those that are NaN and that a mask hides."""
    value, depth = torch.as_tensor(site["value"]), site["fn"].event_dim
    counts = torch.as_tensor(mask_of(site).some, device=value.device)
    events = value.reshape(-1, *value.shape[value.dim() - depth :])
    whole = ~events.isnan().reshape(len(events), -1).any(-1)
    other = events[whole.long().argmax()]  # in the support, whatever that is
    hidden = value.isnan() & ~counts.reshape(counts.shape + (1,) * depth)
    return torch.where(hidden, other.nan_to_num(), value)


def innermost(fn: Any) -> Any:
    """Return a distribution without its masks and without declarations of events."""
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    return fn


def loc_and_scale_of(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Return the location and the scale of each number of a distribution, or None if it has none.

    Each number is then loc + scale times a variable whose own distribution depends on neither.  Numbers of a
    multivariate normal have their marginal scales.
    """
    fn = innermost(fn)
    if isinstance(fn, MultivariateNormal):
        return fn.loc, fn.scale_tril.norm(dim=-1)
    return (fn.loc, fn.scale) if isinstance(fn, Normal | Laplace | Cauchy | StudentT) else None


def base_of(fn: Any) -> Any:
    """Return the distribution in all wrappers."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def is_point(fn: Any) -> bool:
    """True if a distribution is a point mass, whose site has a value that follows from the others."""
    return isinstance(base_of(fn), Delta)


def states_support(fn: Any) -> bool:
    """True if a distribution states its support; the flows of other libraries do not."""
    try:
        return fn.support is not None
    except NotImplementedError:
        return False


def support_of(fn: Any) -> Any:
    """Return the support of a distribution, or all real numbers if it states none."""
    return fn.support if states_support(fn) else constraints.independent(constraints.real, len(fn.event_shape))


def is_discrete(fn: Any) -> bool:
    """True if a distribution is over integers; a point mass is not."""
    try:
        return not is_point(fn) and bool(support_of(fn).is_discrete)
    except AttributeError:  # for example, the rows of a plate have no support
        return False


def is_summable(fn: Any) -> bool:
    """True if a distribution is discrete and its support finite, so that its site can be summed out."""
    return is_discrete(fn) and bool(with_values(fn).has_enumerate_support)


class _JointEvent(Independent):
    """Independent discrete numbers, ``Bernoulli(p).to_event(1)``, whose joint values are the support."""

    has_enumerate_support = True

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all joint values, ``(number, *batch_shape, *event_shape)``, with 1 for the batch unless expanded."""
        one = self.base_dist.enumerate_support(expand=False).flatten()
        joint = torch.cartesian_prod(*[one] * self.event_shape.numel())
        joint = joint.reshape(-1, *(1,) * len(self.batch_shape), *self.event_shape)
        return joint.expand(-1, *self.batch_shape, *self.event_shape) if expand else joint


class _AnyCount(dist.ExtendedBinomial):
    """Binomial whose number of trials differs between rows, for example because it is a latent.

    Its support reaches up to the largest number; counts above a row's own are impossible.
    """

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return the counts, ``(number, *batch_shape)``, with 1 for the batch unless expanded."""
        counts = torch.arange(1 + int(self.total_count.max())).to(self._param)
        counts = counts.reshape(-1, *(1,) * len(self.batch_shape))
        return counts.expand(-1, *self.batch_shape) if expand else counts


def with_values(fn: Any) -> Any:
    """Return a distribution that lists its values, if they are finitely many, or else the distribution unchanged."""
    if isinstance(fn, dist.Binomial) and bool((fn.total_count != fn.total_count.flatten()[0]).any()):
        return _AnyCount(fn.total_count, logits=fn.logits)
    if not isinstance(fn, Independent) or not fn.reinterpreted_batch_ndims:
        return fn
    base = with_values(fn.base_dist)
    if not base.has_enumerate_support or base.event_shape or not fn.event_shape.numel():
        return fn
    values = len(base.enumerate_support(expand=False)) ** fn.event_shape.numel()
    return _JointEvent(base, fn.reinterpreted_batch_ndims) if values <= MOST else fn


class WithValues(Messenger):
    """Lets sites list their values, and marks them for Pyro's enumeration unless ``marked`` is False."""

    def __init__(self, names: tuple[str, ...], *, marked: bool = True) -> None:
        super().__init__()
        self._names = names
        self._marks = {"enumerate": "parallel", "expand": False, "num_samples": None} if marked else {}

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self._names:
            msg["fn"] = with_values(msg["fn"])
            msg["infer"] = {**msg["infer"], **self._marks}


def plates_of(site: Site) -> list[Any]:
    """Return the frames of the plates whose rows are dimensions of a site."""
    return [frame for frame in site.get("cond_indep_stack", ()) if frame.vectorized]


def plate_like(frame: Any) -> Any:
    """Return a new plate with a frame's name, sizes and dimension; a size of -1 in the frame means no size."""
    if frame.size < 0:
        return pyro.plate(frame.name, dim=frame.dim)
    return pyro.plate(frame.name, frame.full_size or frame.size, frame.size, dim=frame.dim)


def is_subsampled(frame: Any) -> bool:
    """True if a plate runs over a part of its rows."""
    return frame.full_size is not None and frame.size < frame.full_size


def subsampled_plate(trace: Trace) -> str:
    """Return words for the first plate of a trace that runs over a part of its rows, or an empty string."""
    for name, site in trace.nodes.items():
        for frame in site.get("cond_indep_stack", ()):
            if is_subsampled(frame):
                rows = f"{frame.size} of {frame.full_size} rows"
                return f"site {name!r} lies in plate {frame.name!r}, which is subsampled ({rows})"
    return ""


def rows_of(site: Site) -> torch.Size:
    """Return the shape of a site's rows, or that of its data's rows if it has more dimensions."""
    fn, value = site["fn"], site["value"]
    if not isinstance(value, Tensor) or site_is_subsample(site):
        return torch.Size()
    of_value = value.shape[: value.dim() - getattr(fn, "event_dim", 0)]
    return max(getattr(fn, "batch_shape", torch.Size()), of_value, key=len)


def has_bare_dimensions(trace: Trace) -> bool:
    """True if a site of a trace has rows that neither plates nor events declare, which Pyro's checks refuse."""
    for site in trace.nodes.values():
        if site["type"] == "sample":
            dims, shape = {plate.dim for plate in plates_of(site)}, rows_of(site)
            if any(size > 1 and place - len(shape) not in dims for place, size in enumerate(shape)):
                return True
    return False


def named(names: Iterable[str]) -> str:
    """Return names as a list in words: ``'a', 'b'``."""
    return ", ".join(map(repr, names))


def labels_of(name: str, shape: torch.Size) -> list[str]:
    """Return names for the numbers of a site: theta[0, 1], or the site's own name for a single number."""
    return [f"{name}[{', '.join(map(str, place))}]" if place else name for place in np.ndindex(*shape)]
