"""A draw that is not finite ends a step with one error, which names the site, the cause and the way out.

Pyro itself would go on to ``Delta(v: nan)`` and the names of all parameters or, without validation, to losses that stay
NaN.  A gradient that is not finite shows in the next draw only, so the last finite draw is kept: there the model broke.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from pyro import poutine, validation_enabled
from pyro.distributions import is_validation_enabled
from torch import Tensor, nn

from ..flows.distribution import FlowDistribution
from ..programs.engines import is_weighing
from ..programs.log_density import NonFiniteDraw
from ..programs.traces import trace_of
from ..transforms.tracing import is_traced
from .guide_call import Call

MOST = 100  # draws of one step at which the model is run again
ANEW = (
    "Build the guide anew and train it with a smaller step size, pyro.optim.ClippedAdam, more particles, or fit_svi, "
    "which skips such steps"
)


class Sites(NamedTuple):
    """Layout of a packed draw: the site of each number, the sites' values, the plate of its rows, and those rows."""

    coordinates: Callable[[], list[str]]
    unpack: Callable[[Tensor], dict[str, Tensor]]
    dim: int | None = None
    rows: Tensor | None = None

    def single(self, z: Tensor) -> Tensor:
        """Draws of many particles, one after the other: ``(particles, [rows, *1s,] size)``."""
        return z.reshape(-1, *z.shape[z.dim() - 1 + (self.dim or 0) :])


def joint_sites(guide: Any) -> Sites:
    """Return the sites of a joint guide, without a reference that keeps it alive."""
    known = weakref.proxy(guide)
    return Sites(lambda: known.coordinates, lambda z: known.unpack(z))


class _Broken(NonFiniteDraw):
    """A draw that is not finite, to be explained when all plates of the guide are left: the model enters them too."""

    def __init__(self, site: str, got: float, more: int, cause: str) -> None:
        others = f" and of {more} more" if more else ""
        super().__init__(f"the draw of latent site {site!r}{others} must be finite, got {got}")
        self.cause = cause


class Watch:
    """The last finite draws of one guide."""

    def __init__(self) -> None:
        self._now: dict[str, tuple[Sites, Tensor]] = {}
        self._last: dict[str, tuple[Sites, Tensor]] = {}
        self._overflowing: dict[str, Tensor] = {}

    @contextmanager
    def over(self, guide: Any, call: Call) -> Iterator[None]:
        """Explain why a guide's call ends, where a draw is not finite."""
        self._now = {}
        try:
            yield
        except _Broken as broken:
            raise self._explained(guide, broken, call) from None
        except (ValueError, RuntimeError, FloatingPointError) as error:  # a distribution or an equation may be first
            if not _lost(guide):
                raise
            first, *others = call.latents
            failed = _Broken(first, math.nan, len(others), "")
            raise self._explained(guide, failed, call) from error
        self._last = self._now or self._last

    def see(self, guide: Any, name: str, sites: Sites, q: FlowDistribution, z: Tensor) -> None:
        """Refuse a draw that is not finite, or whose value is not.

        Without gradients, as where draws are weighed, only a guide that is lost is refused, and only by validation.
        """
        if is_traced():
            return
        plain = z.detach()
        size = torch.linalg.vector_norm(plain, math.inf).item()
        training = z.requires_grad and not is_weighing()
        if not size < _reach(plain.dtype) and (training or (is_validation_enabled() and _lost(guide))):  # NaN is not
            self._judge(name, sites, q, plain, size)
        if training:
            self._now[name] = sites, plain

    @torch.no_grad()
    def _judge(self, name: str, sites: Sites, q: FlowDistribution, z: Tensor, size: float) -> None:
        dtype = str(z.dtype).removeprefix("torch.")
        if math.isfinite(size):
            if name not in self._overflowing:
                self._overflowing[name] = _overflowing(sites, z)
            reaching = z.index_select(-1, self._overflowing[name])
            if not reaching.numel() or reaching.max() < _reach(z.dtype):
                return
            for site, value in sites.unpack(z).items():
                if not value.isfinite().all():
                    cause = f"an unconstrained draw of {reaching.max():.4g} overflows {dtype} where it is constrained"
                    raise _Broken(site, worst(value), 0, cause)
            return
        bad = (~z.isfinite()).reshape(-1, z.shape[-1]).any(0).tolist()
        first, *others = dict.fromkeys(site for site, is_bad in zip(sites.coordinates(), bad, strict=True) if is_bad)
        contexts = [view.context for view in q.transforms if view.context is not None]
        cause = f"the guide's parameters are finite, but so large that the draw overflows {dtype}"
        if contexts and not contexts[0].isfinite().all():
            cause = "the encoder returned NaN or infinite numbers, as of data that are not finite"
        raise _Broken(first, worst(z[..., bad.index(True)]), len(others), cause)

    def _explained(self, guide: Any, broken: _Broken, call: Call) -> NonFiniteDraw:
        cause = broken.cause
        if lost := _lost(guide):
            when = "the last step" if self._last else "an earlier step"
            parameters = f"{lost} of the guide's {len(list(guide.parameters()))} parameters"
            cause = f"{parameters} are lost, since the gradient of {when} was not{self._fault(guide, call)}"
        return NonFiniteDraw(f"{call.owner}: {broken}: {cause}. {ANEW}.")

    def _fault(self, guide: Any, call: Call) -> str:
        """Name the model's first site that was not finite at the last draws, or whose gradient was not."""
        if not self._last or call.model is None:
            return ""
        singles = {name: sites.single(z)[:MOST] for name, (sites, z) in self._last.items()}
        # A user's program may raise anything, and the step has its error already.
        with suppress(Exception), call.same_draws(), poutine.block(), torch.enable_grad(), validation_enabled(False):
            for particle in range(max(map(len, singles.values()))):
                draw = {name: z[min(particle, len(z) - 1)] for name, z in singles.items()}
                if found := self._fault_at(draw, guide, call):
                    return found
        return ""

    def _fault_at(self, draw: dict[str, Tensor], guide: Any, call: Call) -> str:
        leaves, data = [z.clone().requires_grad_() for z in draw.values()], dict[str, Tensor]()
        for name, leaf in zip(draw, leaves, strict=True):
            sites = self._last[name][0]
            data.update(sites.unpack(leaf))
            if sites.rows is not None and call.plate is not None and call.plate not in guide._data_plates:
                data[call.plate] = sites.rows
        trace = trace_of(poutine.condition(call.model, data=data), call.args, call.kwargs)
        trace.compute_log_prob()
        found = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        for name, site in found.items():
            if not site["log_prob"].isfinite().all():
                return f": there the log-density of the model's site {name!r} was {worst(site['log_prob'])}"
        for name, site in found.items():
            if site["log_prob_sum"].requires_grad and not _is_smooth(site["log_prob_sum"], leaves):
                return f": there the log-density of the model's site {name!r} had a gradient that is not finite"
        return ""

    # What was drawn is not part of the guide: copies and pickles begin anew.

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_now": {}, "_last": {}, "_overflowing": {}}


def _is_smooth(log_prob: Tensor, leaves: list[Tensor]) -> bool:
    """True if a log-density has finite gradients."""
    gradients = torch.autograd.grad(log_prob, leaves, allow_unused=True, retain_graph=True)
    return all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)


def worst(value: Tensor) -> float:
    """Return the first number that is not finite."""
    return value[~value.isfinite()].flatten()[0].item()


def _lost(guide: nn.Module) -> int:
    """Return the number of a guide's parameters that are not finite."""
    return sum(not bool(parameter.isfinite().all()) for parameter in guide.parameters())


@functools.cache
def _reach(dtype: torch.dtype) -> float:
    """The largest number whose exponential is finite."""
    return math.log(torch.finfo(dtype).max)


def _overflowing(sites: Sites, z: Tensor) -> Tensor:
    """The places in a packed draw that belong to sites whose values overflow: those of exponentials."""
    far = sites.unpack(torch.full_like(z, 2 * _reach(z.dtype)))
    names = {name for name, value in far.items() if not value.isfinite().all()}
    places = [place for place, name in enumerate(sites.coordinates()) if name in names]
    return torch.tensor(places, dtype=torch.long, device=z.device)
