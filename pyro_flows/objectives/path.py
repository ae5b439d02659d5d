"""The ELBO with path gradients: only the way through the draws counts.

The gradient of E_q [log q(z) - log p(z, x)] by way of q's own parameters has mean zero but not variance zero.  Left
out, what remains vanishes draw by draw where q is the posterior, so that a fit settles instead of jittering.

Sticking the Landing (Roeder, Wu, Duvenaud 2017, arXiv:1703.09194); for flows Vaitl, Nicoli, Nakajima, Kessel 2022,
arXiv:2207.08219.
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
from torch import Tensor, nn

from ..flows.distribution import FlowDistribution
from ..programs.latents import check_drawn
from ..programs.traces import trace_of

DENSITY = "log_prob", "log_prob_sum", "unscaled_log_prob", "score_parts", "packed"  # what a trace keeps of a site's


class PathGradient:
    """For a Pyro ELBO: score the guide's reparameterised draws with its parameters held fixed."""

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[tuple[Trace, Trace]]:
        # Inside of the ELBO's own handlers: a second run must not take a branch from its queue of discrete choices.
        seen = poutine.trace(_CarryScores()(guide))
        for model_trace, guide_trace in super()._get_traces(model, seen, args, kwargs):  # type: ignore[misc]
            check_drawn(f"{type(self).__name__}: ", model_trace, guide_trace)
            self._hold_parameters(guide, seen.trace, model_trace, guide_trace, args, kwargs)
            yield model_trace, guide_trace

    def _hold_parameters(
        self, guide: Any, seen: Trace, model_trace: Trace, guide_trace: Trace, args: Any, kwargs: Any
    ) -> None:
        """Replace the densities of a guide's trace, but those that flows carry, by ones with its parameters held."""
        rest = [name for name, site in guide_trace.iter_stochastic_nodes() if _has_parameters(site["fn"])]
        if not rest:
            return
        program = self._vectorized_num_particles(guide) if self.vectorize_particles else guide  # type: ignore[attr-defined]
        with frozen(_leaves(guide, seen)), poutine.block(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not registered in the param store")  # they are frozen
            again = trace_of(poutine.replay(program, trace=seen), args, kwargs)
            for name in again.nodes.keys() - set(rest):
                again.remove_node(name)  # scored already
            again.compute_score_parts()
        if hasattr(model_trace, "plate_to_symbol"):
            again.pack_tensors(model_trace.plate_to_symbol)
        for name in rest:
            _check_same(name, guide_trace.nodes[name]["fn"], again.nodes[name]["fn"])
            site = again.nodes[name]
            guide_trace.nodes[name].update({key: site[key] for key in DENSITY if key in site})


class PathELBO(PathGradient, Trace_ELBO):
    """The ELBO with path gradients: Pyro's ``Trace_ELBO``, in which the guide learns by way of its draws alone.

    The loss is that of the ELBO, in nats::

        loss = E_q [log q(z) - log p(z, x)],    z = z(ε; φ) drawn from the guide with parameters φ

    and φ in log q is held fixed for the gradient, which has the same mean wherever draws are reparameterised, and no
    variance where the guide is the posterior (Roeder, Wu, Duvenaud 2017, arXiv:1703.09194).  Flows carry the score
    along with their draws, at about 1.4 times the cost of a plain step (Vaitl, Nicoli, Nakajima, Kessel 2022,
    arXiv:2207.08219); other guides run a second time.  Plates, ``scale``, masks and subsampling work as they do in
    Pyro.

    Args:
        num_particles: The number of draws that the loss is a mean over.
        max_plate_nesting: How many dimensions the plates of the model take; by default that is found out.
        vectorize_particles: Whether draws run side by side under an outer plate, for which the model must broadcast to
            the left of its plates, or one after the other.

    The other arguments are those of Pyro's ``ELBO``.

    Raises:
        ValueError: In use, naming the site, if the guide draws what is no latent of the model, or counts where the
            model is masked; or if the context of a flow in the guide is another each time, as with dropout.

    Example::

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_flows import AutoFlow, flows
        >>> def model():
        ...     pyro.sample("x", dist.Normal(2.0, 1.0))
        >>> guide = AutoFlow(model, flows.iaf, init_scale=1.0).setup()  # it starts at the posterior
        >>> loss = PathELBO(num_particles=8, vectorize_particles=True)(model, guide)()
        >>> loss.backward()
        >>> all(p.grad.abs().max() < 1e-4 for p in guide.parameters() if p.grad is not None)  # draw by draw
        True
    """


class PathEnumELBO(PathGradient, TraceEnum_ELBO):
    """Pyro's ``TraceEnum_ELBO``, which sums discrete latents out of the model, with path gradients for the guide.

    The loss, in nats, is that of :class:`PathELBO` for the continuous latents z, with k the discrete ones::

        loss = E_q [log q(z) - log Σ_k p(z, k, x)]

    Args:
        num_particles: The number of draws that the loss is a mean over.
        max_plate_nesting: How many dimensions the plates of the model take; by default that is found out.
        vectorize_particles: Whether draws run side by side under an outer plate, for which the model must broadcast to
            the left of its plates, or one after the other.

    The other arguments are those of Pyro's ``ELBO``.

    Raises:
        ValueError: In use, naming the site, if the guide draws what is no latent of the model, or counts where the
            model is masked; or if the context of a flow in the guide is another each time, as with dropout.

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
    """Lets flows in a guide carry the score along with their draws.

    A flow at a context that is drawn itself does not: its density depends on that draw in two ways.
    """

    def __enter__(self) -> _CarryScores:
        self._drawn: set[Any] = set()
        return super().__enter__()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if isinstance(fn, FlowDistribution) and not msg["done"]:
            contexts = {id(view.context): view.context for view in fn.transforms if view.context is not None}
            if not any(_reaches(context, self._drawn) for context in contexts.values()):
                msg["fn"] = fn.with_path_gradient()

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if isinstance(msg["value"], Tensor) and msg["value"].grad_fn is not None:
            self._drawn.add(msg["value"].grad_fn)


def _reaches(value: Tensor, nodes: set[Any]) -> bool:
    """Whether a tensor was computed from what some nodes of the graph of gradients made."""
    seen, front = set(), [value.grad_fn] if nodes else []
    while front:
        node = front.pop()
        if node in nodes:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            front.extend(parent for parent, _ in node.next_functions)
    return False


def _has_parameters(fn: Any) -> bool:
    """Whether a site's density is still to be freed of its parameters."""
    carried = isinstance(fn, FlowDistribution) and fn.path_gradient
    return fn.has_rsample and not carried and not isinstance(fn, dist.Delta)


def _check_same(name: str, first: Any, second: Any) -> None:
    """Refuse a flow whose context is another when the guide runs again with the same draws."""
    if isinstance(first, FlowDistribution):
        for a, b in zip(first.transforms, second.transforms, strict=True):
            if a.context is not None and not torch.equal(a.context, b.context):
                raise ValueError(
                    f"PathELBO: the context of the guide's site {name!r} is another each time, as with dropout. Put "
                    "its encoder into evaluation mode, or use Pyro's Trace_ELBO."
                )


def _leaves(guide: Any, trace: Trace) -> list[Tensor]:
    """The tensors that a guide may train: those of its param statements and of the modules in it."""
    values = [site["value"] for site in trace.nodes.values() if site["type"] == "param"]
    found = [value.unconstrained() if hasattr(value, "unconstrained") else value for value in values]
    program = poutine.unwrap(guide)
    return found + (list(program.parameters()) if isinstance(program, nn.Module) else [])


@contextlib.contextmanager
def frozen(leaves: list[Tensor]) -> Iterator[None]:
    """Let tensors require no gradient for a while."""
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    for leaf in trained:
        leaf.requires_grad_(False)
    try:
        yield
    finally:
        for leaf in trained:
            leaf.requires_grad_(True)
