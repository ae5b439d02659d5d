"""Checks of programs: before a fit, and after a loss that is not finite.

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

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Transform, biject_to

from ..objectives import ForwardKL, PathELBO, PathEnumELBO
from ..objectives.base import ParticleObjective
from ..programs.engines import Values, View
from ..programs.error_text import quoted
from ..programs.latents import check_drawn, check_guided, check_likelihood, is_discrete, lacking, support_of
from ..programs.log_density import is_breakdown
from ..programs.model_and_guide import Task
from ..training.randomness import unchanged
from ..user_code import warn_user
from .propriety import check_masked

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


def check_task(task: Task, objective: ELBO | None, *, search: bool) -> None:
    """Raise ValueError unless the guide has all latents and programs run vectorised over draws, if a fit needs both.

    Args:
        task: The model and the guide.
        objective: The user's objective; None for the default one.
        search: True if the fit searches for a start.
    """
    if drawn := [name for name in task.left_out if name in task.latents and not task.observes]:
        name = drawn[0]
        warn_user(f"fit_svi: the model observes no data, since {name}=None is drawn. Give {name}=... if you have it.")
    if search or objective is None or isinstance(objective, PathELBO | PathEnumELBO | ParticleObjective):
        check_guided("fit_svi: ", *task.traces, task.left_out)
        check_drawn("fit_svi: ", *task.traces)
        if not task.model.enumerated:  # a point may depend on discrete latents, which are drawn here
            check_likelihood("fit_svi", task.traces[0])
    takes_scores = objective is None or not (isinstance(objective, ForwardKL) or task.model.enumerated)
    if search or takes_scores:
        check_score(task)
    check_masked(task)
    vectorised = is_vectorised(objective) and not lacking(*task.traces)
    if search or vectorised:
        with unchanged():
            task.settle()
    if vectorised and task.guide.engine != "plate":
        way = "Let it broadcast to the left of its plates, or give the objective vectorize_particles=False"
        raise ValueError(f"fit_svi: the guide{task.guide.fault}. {way}.")


def is_vectorised(objective: ELBO | None) -> bool:
    """True if an objective runs programs for many draws at once."""
    return bool(getattr(objective, "vectorize_particles", False)) and getattr(objective, "num_particles", 1) > 1


@unchanged()
def check_score(task: Task) -> None:
    """Raise an error unless the model's score is the gradient of its log-density.

    Densities that are constant between jumps are no fault, since straight-through estimators give them scores.

    Raises:
        NoScore: If score and gradient differ at one site for one latent; the message names both.
        ValueError: If the model fails at latents that require gradients.
    """
    places = [_Place(task, task.traces[0], 0), _Place(task, task.once()[0], 1)]
    try:
        suspects = [place.faults([*place.z], LIMITS.steps[:1], LIMITS.whole) for place in places]
    except RuntimeError as error:
        raise ValueError(
            f"fit_svi: the model has no gradients, by which guides are trained: {quoted(error)}. Keep latents in "
            "torch, without .numpy(); or learn from simulations: give an AutoFlow an encoder, and fit_amortized."
        ) from error
    own = [task.guide.single.nodes[name]["fn"] for name in task.own]
    if not any(suspects) or not all(fn.has_rsample or is_discrete(fn) for fn in own):  # others train without scores
        return
    places.append(_Place(task, task.once()[0], 2))
    if sum(bool(place.faults([*place.z], LIMITS.steps, LIMITS.whole)) for place in places) < 2:  # one may lie at a kink
        return
    for name in [*places[0].z][: LIMITS.latents]:
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
        z: The continuous latents, unconstrained.
    """

    def __init__(self, task: Task, trace: Trace, seed: int) -> None:
        self.model, generator = task.model.by("loop"), torch.Generator().manual_seed(seed)
        self.held, self.z, self.direction = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        self.maps: dict[str, Transform] = {}
        for name in [name for name in task.latents if name in trace.nodes]:
            fn, value = trace.nodes[name]["fn"], torch.as_tensor(trace.nodes[name]["value"]).detach()
            self.held[name] = value
            if is_discrete(fn) or not value.is_floating_point():
                continue
            with suppress(NotImplementedError):  # torch knows no bijection onto spheres, for example
                self.maps[name] = biject_to(support_of(fn))
                z = self.z[name] = self.maps[name].inv(value)
                signs = 2 * torch.randint(2, z.shape, generator=generator) - 1
                self.direction[name] = signs.to(z) * (1 + z.abs())
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
        for site in [site for site in scores if all(site in known for known in rates)]:
            rate, score = torch.stack([known[site] for known in rates]), scores[site]
            rounding = LIMITS.rounding * self.eps * values[site][1] / lengths[0]
            doubt = LIMITS.spread * (rate.max() - rate.min()) + rounding
            apart, size = (rate[0] - score).abs(), torch.maximum(rate[0].abs(), score.abs())
            if apart.isfinite() and apart > doubt + share * size and rate[0].abs() > doubt:
                found[site] = float(score), float(rate[0])
        return found

    @unchanged()
    def _log_densities(self, z: Values, by_site: bool) -> Values:
        """Return log-densities and the sizes of their terms, ``(2,)``, at some unconstrained latents."""
        held = {**self.held, **{name: self.maps[name](value) for name, value in z.items()}}
        held = {name: value.unsqueeze(0) for name, value in held.items()}
        if self.model.enumerated:
            total = self.model.log_prob(held, 1).double()
            return {"": torch.cat((total, total.detach().abs()))}
        sites = {name: value[0] for name, value in self.model.run(_terms, held, 1).items()}
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


@torch.no_grad()
def culprit(task: Task) -> str:
    """Return words for the first site, of the guide and then of the model, whose value or density is not finite."""
    for _ in range(20):
        with pyro.validation_enabled(False):  # validation would raise, and name no site
            model_trace, guide_trace = task.once()
        for program, trace in (("guide", guide_trace), ("model", model_trace)):
            for name, site in trace.nodes.items():
                if site["type"] != "sample":
                    continue
                value = site["value"]
                if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                    return f"the {program}'s site {name!r} has a value that is not finite"
                log_prob = scale_and_mask(site["fn"].log_prob(value), 1.0, site["mask"])
                if program == "model" and (log_prob == -torch.inf).any():
                    return (
                        f"the model's site {name!r} has a log-density of -inf where the guide draws: an overflow, or a "
                        "hard edge, where KL(q || p) is infinite: use pf.posterior or pf.anneal"
                    )
                if not log_prob.isfinite().all():
                    return f"the {program}'s site {name!r} has a log-density that is not finite"
    return "all sites are finite in 20 single draws, so the gradient is at fault"
