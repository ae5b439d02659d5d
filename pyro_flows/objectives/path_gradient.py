"""ELBOs with path gradients, which pass through the draws alone: plain, of order α, and annealed.

The gradient of E_q [log q(z) - log p(z, x)] through the parameters of log q has mean zero but not variance zero.
Without that part, the gradient vanishes for each single draw if q is the posterior, so that a fit converges without
noise.

Rényi's bounds tighten with the number K of draws.  Their plain gradient becomes pure noise as K grows.  The doubly
reparameterised gradient passes through the draws alone.  With w = p(z, x) / q(z) and v_k the normalised w_k^(1-α), draw
k has the weight α v_k + (1-α) v_k² for the guide and v_k for the model's parameters.  The noise then falls with K, and
vanishes at the posterior.

The annealed ELBO is for posteriors with separated modes.  The ELBO hardly penalises a guide that covers one mode and
misses the others, and its gradient at one mode has no information about the rest.  The modes of a tempered posterior
p^β overlap if β is small.  The guide first covers all of it, and keeps its modes as β rises.  The weights of the modes
change with β, but once the modes are separated no draw moves from one to another.  Therefore, until well after β = 1,
half of the loss is the standard deviation of log q - β log p over the draws.  It compares modes at any distance, and
vanishes, with its noise, if the guide is right.  The standard deviation, unlike the variance, has a gradient whose size
does not depend on the guide's error.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..arguments import check_integers, check_numbers
from ..flows.distribution import FlowDistribution
from ..programs.checks import check_drawn
from ..programs.program import leaves_of, trace_of
from ..vjp import graph_of
from .base import ParticleObjective
from .plain import PlainELBO


class PathGradient:
    """Mixin for a Pyro ELBO that scores the guide's reparameterised draws with its parameters held fixed."""

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[tuple[Trace, Trace]]:
        # Inside the ELBO's handlers, because a second run must not take a branch from its queue of discrete choices.
        seen = poutine.trace(_CarryScores()(guide))
        for model_trace, guide_trace in super()._get_traces(model, seen, args, kwargs):  # type: ignore[misc]
            check_drawn(f"{type(self).__name__}: ", model_trace, guide_trace)
            self._hold_parameters(guide, seen.trace, model_trace, guide_trace, args, kwargs)
            yield model_trace, guide_trace

    def _hold_parameters(
        self, guide: Any, seen: Trace, model_trace: Trace, guide_trace: Trace, args: Any, kwargs: Any
    ) -> None:
        """Score a guide's trace again with its parameters held fixed, except at flows that carried their scores."""
        # A flow that carried its score, or a point, has no gradient through the guide's parameters any more.
        sites = [(name, site["fn"]) for name, site in guide_trace.iter_stochastic_nodes() if site["fn"].has_rsample]
        carried = [name for name, fn in sites if isinstance(fn, FlowDistribution) and fn.path_gradient]
        rest = [name for name, fn in sites if name not in carried and not isinstance(fn, dist.Delta)]
        if not rest:
            return
        program = self._vectorized_num_particles(guide) if self.vectorize_particles else guide  # type: ignore[attr-defined]
        with frozen(leaves_of(seen, poutine.unwrap(guide))), poutine.block(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not registered in the param store")  # because they are frozen
            again = trace_of(poutine.replay(program, trace=seen), args, kwargs)
            for name in again.nodes.keys() - set(rest):
                again.remove_node(name)  # flows have scored these
            again.compute_score_parts()
        if hasattr(model_trace, "plate_to_symbol"):
            again.pack_tensors(model_trace.plate_to_symbol)
        for name in rest:
            first, second = guide_trace.nodes[name]["fn"], again.nodes[name]["fn"]
            context = first.context if isinstance(first, FlowDistribution) else None
            if context is not None and not (context == second.context).all():
                raise ValueError(
                    f"PathELBO: the context of the guide's site {name!r} changes between calls, for example because of "
                    "dropout. Put its encoder into evaluation mode, or use Pyro's Trace_ELBO."
                )
            guide_trace.nodes[name] = again.nodes[name]


class PathELBO(PathGradient, PlainELBO):
    """The ELBO with path gradients: Pyro's ``Trace_ELBO``, whose gradient passes through the draws alone.

    The loss, in nats, is the negative ELBO::

        loss = E_q [log q(z) - log p(z, x)],    z = z(ε; φ) drawn from the guide with parameters φ

    For the gradient, φ in log q is held fixed.  The gradient keeps its mean if all draws are reparameterised, and has
    no variance if the guide is the posterior (Roeder, Wu, Duvenaud 2017, arXiv:1703.09194).  Flows compute the score in
    the same pass as the draws, at about 1.4 times the cost of a plain step (Vaitl, Nicoli, Nakajima, Kessel 2022,
    arXiv:2207.08219).  Other guides run a second time.  Plates, ``scale``, masks and subsampling work as in Pyro.

    Args:
        num_particles: The number of draws that the loss is a mean over.
        max_plate_nesting: The number of dimensions that the model's plates take; found by a run by default.
        vectorize_particles: Whether all draws run at once under an outer plate, or one after the other.  The model must
            then broadcast to the left of its plates.

    The other arguments are those of Pyro's ``ELBO``.

    Raises:
        ValueError: In use, naming the site: if the guide has a latent that the model lacks, if it scores elements that
            the model masks, or if the context of a flow in the guide changes between calls, for example with dropout.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow, flows
        >>> def model():
        ...     pyro.sample("x", dist.Normal(2.0, 1.0))
        >>> guide = AutoFlow(model, flows.iaf, init_scale=1.0).setup()  # starts at the posterior
        >>> loss = PathELBO(num_particles=8, vectorize_particles=True)(model, guide)()
        >>> loss.backward()
        >>> all(p.grad.abs().max() < 1e-4 for p in guide.parameters() if p.grad is not None)  # for each single draw
        True
    """


class PathEnumELBO(PathGradient, TraceEnum_ELBO):
    """Pyro's ``TraceEnum_ELBO``, which sums out the model's discrete latents, with path gradients for the guide.

    The loss, in nats, for continuous latents z and discrete latents k::

        loss = E_q [log q(z) - log Σ_k p(z, k, x)]

    Args:
        num_particles: The number of draws that the loss is a mean over.
        max_plate_nesting: The number of dimensions that the model's plates take; found by a run by default.
        vectorize_particles: Whether all draws run at once under an outer plate, or one after the other.  The model must
            then broadcast to the left of its plates.

    The other arguments are those of Pyro's ``ELBO``.

    Raises:
        ValueError: In use, naming the site: if the guide has a latent that the model lacks, if it scores elements that
            the model masks, or if the context of a flow in the guide changes between calls, for example with dropout.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro import poutine
        >>> from pyro.infer import config_enumerate
        >>> from pyro_flows import AutoFlow
        >>> @config_enumerate
        ... def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     k = pyro.sample("k", dist.Bernoulli(0.3))
        ...     pyro.sample("y", dist.Normal(x + 4 * k, 1.0), obs=torch.tensor(3.0))
        >>> guide = AutoFlow(poutine.block(model, hide=["k"])).setup()  # of x alone
        >>> loss = PathEnumELBO(max_plate_nesting=0)(model, guide)()
        >>> loss.backward()
    """


class _CarryScores(Messenger):
    """Handler that lets flows in a guide compute the score in the same pass as their draws.

    A flow whose context depends on an earlier draw is left out: its density depends on that draw in two ways.
    """

    def __enter__(self) -> _CarryScores:
        self._drawn: set[Any] = set()
        return super().__enter__()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if isinstance(fn, FlowDistribution) and not msg["done"]:
            seen = graph_of(fn.context) if fn.context is not None and self._drawn else ()
            if not any(node in self._drawn for node in seen):
                msg["fn"] = fn.with_path_gradient()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["value"], Tensor) and msg["value"].grad_fn is not None:
            self._drawn.add(msg["value"].grad_fn)


@contextlib.contextmanager
def frozen(leaves: list[Tensor]) -> Iterator[None]:
    """Context manager in which tensors require no gradient."""
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    for leaf in trained:
        leaf.requires_grad_(False)
    try:
        yield
    finally:
        for leaf in trained:
            leaf.requires_grad_(True)


class RenyiELBO(PathGradient, ParticleObjective):
    """Rényi's bound of order α, with doubly reparameterised gradients.

    The loss, in nats, is the negative bound of K draws z_k of the guide q (Li, Turner 2016, arXiv:1602.02311)::

        bound = 1/(1 - α) log 1/K Σ_k w_k^(1 - α),    w_k = p(z_k, x) / q(z_k)

    With α below 1 the guide covers more of the posterior than with the ELBO; with α above 1 it concentrates on modes.
    The gradients are those of Tucker, Lawson, Gu, Maddison 2018, arXiv:1810.04152.  Plates, ``scale``, masks and
    subsampling work as in Pyro.  Latents must be continuous and reparameterised in the guide, and its parameters must
    be Pyro's or those of modules.  Far from the posterior one draw has all the weight, so start near it: pass
    ``warm_start=True`` to ``fit_svi``, or continue from a fitted guide.

    Args:
        alpha: The order α, any number but 1.
        num_particles: The number K of draws under the logarithm.
        max_plate_nesting: The number of dimensions that the model's plates take; found by a run by default.
        vectorize_particles: Whether all draws run at once, with the same subsample.  The model must then broadcast
            to the left of its plates.

    Raises:
        ValueError: If α is 1 or ``num_particles`` is below 1.  In use, naming the site: if a latent is missing from the
            guide or not reparameterised.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))
        >>> guide = AutoFlow(model, init_scale=1.0).setup()
        >>> losses = [RenyiELBO(alpha, num_particles=1000).loss(model, guide) for alpha in (0.0, 0.5, 0.99)]
        >>> losses == sorted(losses)  # from minus the log-evidence to minus the ELBO
        True
    """

    def __init__(
        self,
        alpha: float,
        num_particles: int = 16,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        check_numbers("RenyiELBO", alpha=alpha)
        if alpha == 1:
            raise ValueError("RenyiELBO: alpha must not be 1, got 1: that bound is the ELBO. Use PathELBO.")
        super().__init__(num_particles, max_plate_nesting, vectorize_particles)
        self.alpha = alpha

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        model_traces, guide_traces = zip(*self._get_traces(model, guide, args, kwargs), strict=True)
        for trace in guide_traces:
            self._check_reparameterised(trace)
        log_p = torch.cat([self._log_density(trace) for trace in model_traces])  # (K,)
        log_q = torch.cat([self._log_density(trace) for trace in guide_traces])  # (K,)
        order = 1 - self.alpha
        powers = order * (log_p - log_q).detach()
        bound = (torch.logsumexp(powers, 0) - math.log(self.num_particles)) / order
        weight = torch.softmax(powers, 0)
        share = self.alpha + order * weight  # the guide's weight of a draw over the model's
        self._scale_draws(model_traces, guide_traces[0], share)
        surrogate = (weight * (log_p - share * log_q)).where(weight > 0, 0).sum()  # no density, no gradient
        return surrogate.detach() - bound - surrogate

    def _scale_draws(self, model_traces: tuple[Trace, ...], guide_trace: Trace, share: Tensor) -> None:
        """Multiply the model's gradient at each of the guide's K draws by its share, ``(K,)``.

        A value that all draws have in common is a parameter, for example of a ``Delta``, and keeps its gradient.
        """
        for name in [name for name, _ in model_traces[0].iter_stochastic_nodes() if name in guide_trace.nodes]:
            values = [trace.nodes[name]["value"] for trace in model_traces]
            rows = torch.cat([value.detach().reshape(self._rows, -1) for value in values])
            factors = torch.where((rows == rows[0]).all(), 1, share)
            for value, factor in zip(values, factors.split(self._rows), strict=True):
                if value.requires_grad:
                    value.register_hook(lambda grad, f=factor: (f * grad.reshape(len(f), -1).T).T.reshape(grad.shape))


class ImportanceWeightedELBO(RenyiELBO):
    """The importance weighted bound of K draws (Burda, Grosse, Salakhutdinov 2015, arXiv:1509.00519).

    The loss, in nats, is the negative bound: :class:`RenyiELBO` of order 0, with the same gradients::

        bound = log 1/K Σ_k w_k,    w_k = p(z_k, x) / q(z_k)

    With one draw it is the ELBO; with more it is closer to the evidence.  Draws far out have little weight and cost
    little, so a flow that is trained by this bound alone may widen until draws overflow.  Fit with another objective
    first, then finish in small steps:
    ``fit_svi(model, fit.guide, objective=ImportanceWeightedELBO(8), lr=3e-4, steps=1000)``.

    Args:
        num_particles: The number K of draws under the logarithm.
        max_plate_nesting: The number of dimensions that the model's plates take; found by a run by default.
        vectorize_particles: Whether all draws run at once, with the same subsample.  The model must then broadcast
            to the left of its plates.

    Raises:
        ValueError: If ``num_particles`` is below 1.  In use, naming the site: if a latent is missing from the guide or
            not reparameterised.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))
        >>> guide = AutoFlow(model, init_scale=1.0).setup()
        >>> bound = -ImportanceWeightedELBO(num_particles=4000).loss(model, guide)
        >>> abs(bound - dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(2.0))) < 0.2  # of the log-evidence
        tensor(True)
    """

    def __init__(
        self, num_particles: int = 16, max_plate_nesting: float = float("inf"), vectorize_particles: bool = True
    ) -> None:
        super().__init__(0.0, num_particles, max_plate_nesting, vectorize_particles)


# Shares of all steps: β begins to rise after the first, is 1 after the second; modes are compared until the third.
HOLD, RISEN, COMPARED = 0.05, 0.55, 0.9


class TemperedELBO(PathGradient, ParticleObjective):
    """The ELBO of a tempered posterior, so that a flow finds separated modes and their weights.

    The loss, in nats, for a power β that rises to 1::

        loss = E_q [log q(z) - β log p(z, x)]

    β stays at ``start`` for 5 % of the steps, then rises geometrically to 1 within the next half of them (Rezende,
    Mohamed 2015, arXiv:1505.05770).  During the first 90 % of the steps, half of the loss is the standard deviation of
    log q - β log p over the draws (Richter, Boustati, Nüsken, Ruiz, Akyildiz 2020, arXiv:2010.10436).  The last 10 %
    are steps of a plain :class:`PathELBO`.  The density is tempered in the space of the guide's draws, for an
    ``AutoFlow`` the unconstrained space.  ``fit_svi`` starts an ``AutoFlow`` from a Gaussian approximation of the
    tempered posterior.

    Each call with gradients enabled counts as a step, so use an object for one fit.  A step costs about 1.6 steps of a
    ``PathELBO``.  Latents must be reparameterised in the guide.

    Args:
        num_steps: The number of steps of the fit.
        start: β at the start, above 0 and at most 1.  Modes that are further apart need a smaller value.
        num_particles: The number of draws in each step, at least 2.
        max_plate_nesting: The number of dimensions that the model's plates take; found by a run by default.
        vectorize_particles: Whether all draws run at once.  The model must then broadcast to the left of its plates.

    Raises:
        ValueError: If a number is out of its range.  In use, naming the site: if a latent is missing from the guide or
            not reparameterised.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow, fit_svi
        >>> def model():  # x is near 4 or near -4
        ...     x = pyro.sample("x", dist.Normal(0.0, 5.0))
        ...     pyro.sample("y", dist.Normal(x**2, 1.0), obs=torch.tensor(16.0))
        >>> objective = TemperedELBO(10)
        >>> fit = fit_svi(model, AutoFlow(model), objective=objective, progress=False)
        >>> fit.steps, objective.beta
        (10, 1.0)
    """

    def __init__(
        self,
        num_steps: int,
        start: float = 0.05,
        num_particles: int = 256,
        max_plate_nesting: float = float("inf"),
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(num_particles, max_plate_nesting, vectorize_particles, least=2)
        check_integers("TemperedELBO", num_steps=num_steps)
        check_numbers("TemperedELBO", start=start)
        if not 0 < start <= 1:
            raise ValueError(f"TemperedELBO: start must be above 0 and at most 1, got {start}.")
        self.num_steps, self.start, self.step = num_steps, start, 0

    @property
    def beta(self) -> float:
        """The power of the posterior at the current step."""
        risen = (self.step / self.num_steps - HOLD) / (RISEN - HOLD)
        return self.start ** (1 - min(max(risen, 0.0), 1.0))

    @property
    def settled(self) -> bool:
        """True in the last steps, whose losses can be compared because they are plain ELBOs."""
        return self.step >= COMPARED * self.num_steps

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        beta, compares = self.beta, self.step < COMPARED * self.num_steps
        self.step += torch.is_grad_enabled()
        elbos, ratios = [], []
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            self._check_reparameterised(guide_trace)
            # The density of a guide's Delta is the change of variables from the space of its draws.
            change = self._log_density(guide_trace, dist.Delta)
            log_q = self._log_density(guide_trace) - change
            log_p = beta * (self._log_density(model_trace) - change)
            elbos.append(log_p - log_q)  # (rows,)
            if compares:
                held = self._score(guide, self._draws_of(guide_trace), args, kwargs)
                ratios.append(self._log_density(held) - self._log_density(held, dist.Delta) - log_p.detach())  # (rows,)
        loss = -torch.cat(elbos).mean()
        if not compares:
            return loss
        mixed = (loss + (torch.cat(ratios).var() + 1e-12).sqrt()) / 2  # because a root has no slope at 0
        return loss.detach() + mixed - mixed.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps taken."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the steps of a ``state_dict``."""
        self.step = state["step"]
