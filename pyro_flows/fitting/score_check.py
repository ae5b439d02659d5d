"""Comparison of a model's score with differences of its log-density.

Guides are trained by the score, the gradient of log p.  Where a model leaves torch, as by ``.detach()`` or in NumPy,
autograd misses a part of it, and the guide learns another posterior.  So the score along a random direction u is
compared with the symmetric difference::

    uᵀ ∇ log p(z)  ≈  (log p(z + h u) - log p(z - h u)) / 2 h

At two draws of the guide, two runs of the model and one with gradients suffice where both agree.  Otherwise three steps
h show the error of the difference, as at kinks or in noisy densities.  Then each site and each latent are compared, and
two of three draws must show the fault.
All runs use the same random numbers and the same rows of plates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from ..programs.engines import Values, View
from ..programs.error_text import quoted
from ..programs.latents import is_discrete, support_of
from ..programs.log_density import is_breakdown
from ..programs.model_and_guide import Task
from ..training.randomness import unchanged

WAY_OUT = "Keep latents in torch. For a model without scores use pf.anneal(model, ...), which is right without them"


@dataclass(frozen=True)
class Limits:
    """Constants of the comparison.

    Attributes:
        steps: The lengths of the steps h, in units of the smallest, which balances truncation and round-off.
        latents: The most latents that are compared one by one, since each takes runs of the model.
        rounding: The round-off of a log-density, in units of eps times the size of its terms.
        spread: The error of a difference, in units of the range of differences with several steps.
        whole: The relative error of the whole score that is no fault.
        of_site: The relative error of a site's score for one latent that is no fault.
    """

    steps: tuple[float, ...] = (1.0, 2.0, 4.0)
    latents: int = 20
    rounding: float = 10.0
    spread: float = 5.0
    whole: float = 0.01
    of_site: float = 0.1


LIMITS = Limits()


class NoScore(ValueError):
    """Error for a model whose score is not the gradient of its log-density."""


def check_score(task: Task) -> None:
    """Raise an error unless the model's score is the gradient of its log-density.

    Densities that are constant between jumps are no fault, since straight-through estimators give them scores.

    Raises:
        NoScore: If score and gradient differ at one site for one latent; the message names both.
        ValueError: If the model fails at latents that require gradients.
    """
    with unchanged():
        _check(task)


def _check(task: Task) -> None:
    places = [_Place(task, task.traces[0], 0), _Place(task, task.once()[0], 1)]
    try:
        suspects = [place.faults(place.names, LIMITS.steps[:1], LIMITS.whole) for place in places]
    except RuntimeError as error:
        raise ValueError(
            f"fit_svi: the model has no gradients, by which guides are trained: {quoted(error)}. Keep latents in "
            "torch, without .numpy(); or learn from simulations: give an AutoFlow an encoder, and fit_amortized."
        ) from error
    own = [task.guide.single.nodes[name]["fn"] for name in task.own]
    if not any(suspects) or not all(fn.has_rsample or is_discrete(fn) for fn in own):  # others train without scores
        return
    places.append(_Place(task, task.once()[0], 2))
    if (
        sum(bool(place.faults(place.names, LIMITS.steps, LIMITS.whole)) for place in places) < 2
    ):  # one may lie at a kink
        return
    for name in places[0].names[: LIMITS.latents]:
        met = [place.faults([name], LIMITS.steps, LIMITS.of_site, by_site=True) for place in places]
        for site, number in Counter(site for found in met for site in found).items():
            if number < 2:
                continue
            score, rate = next(found[site] for found in met if site in found)
            where = f"site {site!r}" if site else "the model, discrete latents summed out,"
            raise NoScore(
                f"fit_svi: the score of {where} must be the gradient of its log-density, got {score:.3g} along latent "
                f"{name!r} where the log-density changes at a rate of {rate:.3g}. The model leaves torch there, as by "
                f".detach(), .numpy() or .item(), or rounds. {WAY_OUT}."
            )


class _Place:
    """A draw of the guide, and the model's log-densities along a line through it.

    Args:
        task: The model and the guide.
        trace: A run of the model.
        seed: The seed of the direction.

    Attributes:
        names: The continuous latents.
    """

    def __init__(self, task: Task, trace: Trace, seed: int) -> None:
        self.model = task.model.by("loop")
        sites = {name: trace.nodes[name] for name in task.latents if name in trace.nodes}
        self.held = {name: torch.as_tensor(site["value"]).detach() for name, site in sites.items()}
        self.maps: dict[str, Any] = {}
        for name, site in sites.items():
            if self.held[name].is_floating_point() and not is_discrete(site["fn"]):
                with suppress(NotImplementedError):  # torch knows no bijection onto spheres, for example
                    self.maps[name] = biject_to(support_of(site["fn"]))
        self.names = list(self.maps)
        self.z = {name: found.inv(self.held[name]) for name, found in self.maps.items()}
        generator = torch.Generator().manual_seed(seed)
        signs = {name: 2 * torch.randint(2, z.shape, generator=generator) - 1 for name, z in self.z.items()}
        self.direction = {name: sign.to(self.z[name]) * (1 + self.z[name].abs()) for name, sign in signs.items()}
        self.eps = max((torch.finfo(z.dtype).eps for z in self.z.values()), default=0.0)

    def faults(
        self, names: Sequence[str], steps: Sequence[float], share: float, *, by_site: bool = False
    ) -> dict[str, tuple[float, float]]:
        """Return the score and the difference where they differ, by site or of the model, along some latents.

        Args:
            names: The latents that move.
            steps: The steps h, in units of the smallest one; one step does not show the error of the difference.
            share: The relative error that is no fault.
            by_site: True to compare each site.
        """
        lengths, rates = [step * self.eps**0.25 for step in steps], list[Values]()
        leaves = {name: self.z[name].clone().requires_grad_() for name in names}
        try:
            with torch.enable_grad():
                values = self._log_densities(leaves, by_site)
                scores = {site: self._along(value[0], leaves) for site, value in values.items()}
            for length in lengths:
                ends = [{n: self.z[n] + way * length * self.direction[n] for n in names} for way in (1, -1)]
                up, down = (self._log_densities(end, by_site) for end in ends)
                both = up.keys() & down.keys()  # a branch may lead to other sites
                rates.append({site: (up[site][0] - down[site][0]) / (2 * length) for site in both})
        except Exception as error:
            if is_breakdown(error):
                return {}
            raise
        found = {}
        for site, score in scores.items():
            if not all(site in known for known in rates):
                continue
            rate = torch.stack([known[site] for known in rates])
            doubt = (
                LIMITS.spread * (rate.max() - rate.min()) + LIMITS.rounding * self.eps * values[site][1] / lengths[0]
            )
            apart, size = (rate[0] - score).abs(), torch.maximum(rate[0].abs(), score.abs())
            if apart.isfinite() and apart > doubt + share * size and rate[0].abs() > doubt:
                found[site] = float(score), float(rate[0])
        return found

    def _log_densities(self, z: Values, by_site: bool) -> Values:
        """Return log-densities and the sizes of their terms, ``(2,)``, at some unconstrained latents."""
        held = {**self.held, **{name: self.maps[name](value) for name, value in z.items()}}
        held = {name: value.unsqueeze(0) for name, value in held.items()}
        with unchanged():
            if self.model.enumerated:
                total = self.model.log_prob(held, 1).double()
                return {"": torch.cat((total, total.detach().abs()))}
            found = self.model.run(_terms, held, 1)
        sites = {name: value[0] for name, value in found.items()}
        return sites if by_site else {"": torch.stack([*sites.values()]).sum(0)}

    def _along(self, log_density: Tensor, leaves: Values) -> Tensor:
        """Return the derivative of a log-density along the direction, by autograd."""
        if not log_density.requires_grad:
            return torch.zeros_like(log_density)
        scores = torch.autograd.grad(log_density, [*leaves.values()], retain_graph=True, allow_unused=True)
        parts = [(self.direction[n] * s).double().sum() for n, s in zip(leaves, scores, strict=True) if s is not None]
        return sum(parts, torch.zeros_like(log_density))


def _terms(view: View) -> Values:
    """Read the log-density of each site and the size of its terms, ``(2,)``."""
    view.trace.compute_log_prob()
    terms = {name: site["log_prob"].double() for name, site in view.trace.nodes.items() if site["type"] == "sample"}
    return {name: torch.stack((term.sum(), term.detach().abs().sum())) for name, term in terms.items()}
