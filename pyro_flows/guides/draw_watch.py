"""Watch over the draws of a guide: errors for draws that are not finite name the site, the cause and the way out.

They end the step.  Pyro itself would go on to ``Delta(v: nan)`` and the names of all parameters.  Without validation it
would go on to losses that stay NaN.  A gradient that is not finite shows in the next draw only.  So the last finite
draw is kept, to find out where the model broke.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from pyro import poutine, validation_enabled
from pyro.distributions import is_validation_enabled
from torch import Tensor, nn

from ..compiler_state import is_traced
from ..flows.distribution import FlowDistribution
from ..programs.engines import is_weighing
from ..programs.log_density import NonFiniteDraw
from ..programs.program import trace_of
from ..programs.sites import Values
from .contexts import remoteness
from .guide_call import Call

ANEW = (
    "Build the guide anew and train it with a smaller step size, pyro.optim.ClippedAdam, more particles, or fit_svi, "
    "which skips such steps"
)
BLAME = ": there the log-density of the model's site"
Seen = dict[str, tuple[Tensor, Mapping[str, Tensor]]]  # draws, and the rows that they are of


class _Broken(NonFiniteDraw):
    """A draw that is not finite: its sites, the value and the likely cause.

    It is explained once the guide has left all plates, which the model enters too.
    """


class DrawWatch:
    """The watch over one guide's draws, which remembers the last finite ones.

    The guide's ``packings`` hold the layout of the vector at each of its sample statements.
    """

    def __init__(self) -> None:
        self._now: Seen = {}
        self._last: Seen = {}

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles hold no draws
        return {"_now": {}, "_last": {}}

    @contextmanager
    def over(self, guide: Any, call: Call) -> Iterator[None]:
        """Explain the error if a call of the guide ends because a draw is not finite.

        If parameters are lost, a distribution or an equation may raise its own error first.
        """
        self._now = {}
        try:
            yield
        except (ValueError, RuntimeError, FloatingPointError) as error:
            own, lost = isinstance(error, _Broken), not is_traced() and _number_lost(guide)
            if is_traced() or not (own or lost):  # numbers of a traced program cannot be looked at
                raise
            sites, got, cause = error.args if own else (list(call.latents), math.nan, "")
            way = ANEW
            if lost:
                when, number = "the last step" if self._last else "an earlier step", len(list(guide.parameters()))
                cause = f"{lost} of the guide's {number} parameters are lost, since the gradient of {when} was not"
                cause += self._fault(guide, call)
            elif far := remoteness(call, guide.data_encoders):
                cause, way = far, "Correct the data, or train on data that reach as far"
            draw = f"the draw of latent site {sites[0]!r}" + (f" and of {len(sites) - 1} more" if sites[1:] else "")
            words = f"{call.owner}: {draw} must be finite, got {got}: {cause}. {way}."
            raise NonFiniteDraw(words) from (None if own else error)
        self._last = self._now or self._last

    def see(self, guide: Any, name: str, q: FlowDistribution, z: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Refuse a packed draw that is not finite, or whose constrained value is not.

        Without gradients, for example if draws are weighed, the draw is refused only if it is one of an encoder's data
        and not finite itself, or if parameters of the guide are not finite and validation is on.
        """
        if is_traced():
            return
        plain = z.detach()
        size = torch.linalg.vector_norm(plain, math.inf).item()
        training = z.requires_grad and not is_weighing()
        in_range = size < math.log(torch.finfo(plain.dtype).max)  # so that its exponential is finite; False for NaN
        remote = not math.isfinite(size) and guide.data_encoders
        if not in_range and (training or remote or (is_validation_enabled() and _number_lost(guide))):
            self._judge(guide, name, q, plain)
        if training:
            self._now[name] = plain, rows

    def checked(self, guide: Any, call: Call, values: Values) -> Values:
        """Return draws ``(N, *site_shape)`` given an encoder's data; refuse them if some are not finite."""
        if guide.data_encoders and (sites := [name for name, value in values.items() if not value.isfinite().all()]):
            with self.over(guide, call):
                value = values[sites[0]]
                raise _Broken(sites, worst(value), _overflow(value))
        return values

    @torch.no_grad()
    def _judge(self, guide: Any, name: str, q: FlowDistribution, z: Tensor) -> None:
        packing, cause = guide.packings[name], _overflow(z)
        bad = (~z.isfinite()).reshape(-1, z.shape[-1]).any(0).tolist()
        if any(bad):
            contexts = [view.context for view in q.transforms if view.context is not None]
            if contexts and not contexts[0].isfinite().all():
                cause = "the encoder returned NaN or infinite numbers, as of data that are not finite"
            sites = dict.fromkeys(site for site, is_bad in zip(packing.coordinates, bad, strict=True) if is_bad)
            raise _Broken(list(sites), worst(z[..., bad.index(True)]), cause)
        for site, _, value, _ in packing.unpack(z):
            if not value.isfinite().all():
                far = z[..., [own == site for own in packing.coordinates]].max()
                cause = f"an unconstrained draw of {far:.4g} overflows {_kind(z)} where it is constrained"
                raise _Broken([site], worst(value), cause)

    def _fault(self, guide: Any, call: Call) -> str:
        """Name the model's first site whose log-density at the last draws, or its gradient, was not finite."""
        if not self._last or call.model is None:
            return ""
        given = {k: v for _, rows in self._last.values() for k, v in rows.items() if k not in guide._given_plates}
        draws = {  # each (particles, [rows, *1s,] size)
            name: z.reshape(-1, *z.shape[z.dim() - 1 - guide.packings[name].depth :])
            for name, (z, _) in self._last.items()
        }
        # A user's program may raise anything, and the step has its error already.
        with suppress(Exception), call.same_draws(), poutine.block(), torch.enable_grad(), validation_enabled(False):
            for particle in range(min(100, max(map(len, draws.values())))):
                draw = {name: z[min(particle, len(z) - 1)].clone().requires_grad_() for name, z in draws.items()}
                found = [part for name, leaf in draw.items() for part in guide.packings[name].unpack(leaf)]
                data = {**given, **{site: value for site, _, value, _ in found}}
                trace = trace_of(poutine.condition(call.model, data=data), call.args, call.kwargs)
                trace.compute_log_prob()
                sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
                for name, site in sites.items():
                    if not site["log_prob"].isfinite().all():
                        return f"{BLAME} {name!r} was {worst(site['log_prob'])}"
                for name, site in sites.items():
                    if (total := site["log_prob_sum"]).requires_grad:
                        leaves = list(draw.values())
                        gradients = torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True)
                        if not all(gradient.isfinite().all() for gradient in gradients):
                            return f"{BLAME} {name!r} had a gradient that is not finite"
        return ""


def worst(value: Tensor) -> float:
    """Return the first number that is not finite."""
    return value[~value.isfinite()].flatten()[0].item()


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _overflow(value: Tensor) -> str:
    """Return words for the cause if a draw is not finite though all parameters are."""
    return f"the guide's parameters are finite, but so large that the draw overflows {_kind(value)}"


def _number_lost(guide: nn.Module) -> int:
    """Return the number of a guide's parameters that are not finite."""
    return sum(not bool(parameter.isfinite().all()) for parameter in guide.parameters())
