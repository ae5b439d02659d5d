"""Pyro's ``Trace_ELBO`` without reads of numbers, which a graph cannot hold.

    loss = E_q [log q(z) - log p(z, x)]

Automated Variational Inference in Probabilistic Programming (Wingate, Weber 2013, arXiv:1301.1299).
"""

from __future__ import annotations

from typing import Any

from pyro.distributions.util import is_identically_zero
from pyro.infer import Trace_ELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor


class PlainELBO(Trace_ELBO):
    """Pyro's ``Trace_ELBO``, which reads no numbers of tensors if all draws are reparameterised."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss in nats, with its gradient.  Unlike Pyro's own, it reads no numbers of tensors."""
        pairs = [self._loss_and_surrogate(*pair) for pair in self._get_traces(model, guide, args, kwargs)]
        loss, surrogate = (sum(parts) / self.num_particles for parts in zip(*pairs, strict=True))
        return loss + (surrogate - surrogate.detach())

    def _loss_and_surrogate(self, model_trace: Trace, guide_trace: Trace) -> tuple[Any, Any]:
        """Return the loss of one pair of traces, and a tensor with its gradient."""
        own, others = _sites_of(guide_trace), _sites_of(model_trace)
        if not all(is_identically_zero(site["score_parts"].score_function) for site in own):
            found: tuple[Any, Any] = self._differentiable_loss_particle(model_trace, guide_trace)
            return found
        log_p = sum(site["log_prob_sum"] for site in others)
        entropies = [site["score_parts"].entropy_term for site in own]
        path = sum(term.sum() for term in entropies if not is_identically_zero(term))
        return (sum(site["log_prob_sum"] for site in own) - log_p).detach(), path - log_p


def _sites_of(trace: Trace) -> list[Any]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]
