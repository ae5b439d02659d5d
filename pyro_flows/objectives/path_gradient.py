"""The ELBO with path gradients: gradients through the draws alone.

The gradient of E_q [log q(z) - log p(z, x)] through the parameters of log q has mean zero but not variance zero.
Without that part, the gradient vanishes for each single draw if q is the posterior, so that a fit converges without
noise.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..flows.distribution import FlowDistribution
from ..programs.latents import check_drawn
from ..programs.traces import leaves_of, trace_of
from ..vjp import graph_of


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
        rest = [name for name, site in guide_trace.iter_stochastic_nodes() if _has_parameters(site["fn"])]
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
            _check_same(name, guide_trace.nodes[name]["fn"], again.nodes[name]["fn"])
            guide_trace.nodes[name] = again.nodes[name]


class PathELBO(PathGradient, Trace_ELBO):
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
        if isinstance(fn, FlowDistribution) and not msg["done"] and not _reaches(fn.context, self._drawn):
            msg["fn"] = fn.with_path_gradient()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["value"], Tensor) and msg["value"].grad_fn is not None:
            self._drawn.add(msg["value"].grad_fn)


def _reaches(value: Tensor | None, nodes: set[Any]) -> bool:
    """Return True if a tensor was computed from the results of some nodes of the autograd graph."""
    return value is not None and bool(nodes) and any(node in nodes for node in graph_of(value))


def _has_parameters(fn: Any) -> bool:
    """Return True if a site's density still has a gradient through the guide's parameters."""
    carried = isinstance(fn, FlowDistribution) and fn.path_gradient
    return fn.has_rsample and not carried and not isinstance(fn, dist.Delta)


def _check_same(name: str, first: Any, second: Any) -> None:
    """Raise ValueError if a flow's context has changed between two runs of the guide with the same draws."""
    context = first.context if isinstance(first, FlowDistribution) else None
    if context is not None and not torch.equal(context, second.context):
        raise ValueError(
            f"PathELBO: the context of the guide's site {name!r} changes between calls, for example because of "
            "dropout. Put its encoder into evaluation mode, or use Pyro's Trace_ELBO."
        )


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
