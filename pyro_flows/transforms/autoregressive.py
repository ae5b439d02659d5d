"""Autoregressive scheme: the map of each feature depends on the features before it, in the conditioner's order.

The slow direction is x = f⁻¹(y; θ(x)).
*Sweeps* go rank by rank and run the network incrementally (:func:`~pyro_flows.conditioners.stream`).  *Iterations*
repeat passes of the network at the latest x until nothing changes: k passes make k ranks right, often many more (Song,
Meng, Liao, Ermon 2021, arXiv:2002.03629).  With either, the gradient is the solution of a triangular system, found in
the same way with the transposed Jacobian of the network.

Tokens become known one after the other as well.  The transformer keeps the keys and values of known tokens, so all T
steps cost about one pass, in plain differentiable operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..arguments import BIJECTOR, check_flags, check_kind
from ..bijectors import Bijector
from ..compiler_state import is_mapped
from ..conditioners import MADE, CausalTransformer, Tokens, stream, stream_vjp
from ..vjp import vjp
from .base import FlowTransform
from .elementwise import check_conditioner


def invert_by_passes(bijector: Bijector, net: MADE, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Invert by D passes of the whole network: slow, but made of plain operations, ``(N, D), (N, C) -> (N, D), (N,)``.

    It replaces the sweep in code that is traced, compiled or mapped, and if a gradient is differentiated again.
    """
    x, places = torch.zeros_like(y), torch.arange(y.shape[-1], device=y.device)
    for feature in net.features:
        value, _ = bijector.inverse_and_log_det(y[:, feature], net(x, context)[:, feature])
        x = torch.where(places == feature, value.unsqueeze(-1), x)
    _, log_det = bijector.inverse_and_log_det(y, net(x, context))
    return x, log_det.sum(-1)


def invert_tokens(
    bijector: Bijector, net: CausalTransformer, y: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Invert token by token, ``(N, T, D), (N, C) -> (N, T, D), (N,)``."""
    tokens, known = Tokens(net, context, y.shape[0]), None
    found: list[tuple[Tensor, Tensor]] = []
    for place in net.places:
        known, log_det = bijector.inverse_and_log_det(y[:, place], tokens.step(known))
        found.append((known, log_det))
    values, log_dets = zip(*found, strict=True)
    return torch.stack(values, 1).index_select(1, net.order), torch.stack(log_dets, 1).sum((1, 2))


class _Inversion(torch.autograd.Function):
    """The slow direction with its gradient; only x and the inputs are kept for it."""

    @staticmethod
    def forward(
        ctx: Any, layer: _Layer, names: tuple[str, ...], y: Tensor, context: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, log_det = (layer.iterate if layer.fixed_point else layer.sweep)(y, context)
        ctx.layer, ctx.names = layer, names
        ctx.save_for_backward(x, y, context, *weights)
        return x, log_det

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        x, *inputs = ctx.saved_tensors  # inputs: y, context, weights
        needs = ctx.needs_input_grad[2:]
        again = torch.is_grad_enabled()  # create_graph=True: this gradient will itself be differentiated
        # ``functional_call`` swaps the module's weights, which other threads would see.
        live = dict(ctx.layer.net.named_parameters())
        own = not again and all(live[name] is weight for name, weight in zip(ctx.names, inputs[2:], strict=True))
        for place, (tensor, needed) in enumerate(zip(inputs, needs, strict=True)):
            # Stand-ins, so that a path into one input from upstream of another does not count.
            if tensor is not None and not (own and place >= 2):
                inputs[place] = tensor.view_as(tensor) if again else tensor.detach().requires_grad_(needed)
        wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
        arguments = (x.detach(), *inputs[:2], wanted, (grad_x, grad_log_det))
        if own:
            grads = iter(ctx.layer(*arguments))
        else:  # at the weights that the sweep has seen, which are not the module's, as in a functional call
            weights = {f"net.{name}": weight for name, weight in zip(ctx.names, inputs[2:], strict=True)}
            grads = iter(functional_call(ctx.layer, weights, arguments))
        return None, None, *(next(grads) if needed else None for needed in needs)


class _Layer(nn.Module):
    """An autoregressive layer, whose call is the gradient of its inverse, at the weights of ``functional_call``."""

    def __init__(self, bijector: Bijector, net: MADE, fixed_point: bool) -> None:
        super().__init__()
        self.bijector, self.net, self.fixed_point = bijector, net, fixed_point

    def sweep(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Invert rank by rank, with features as rows, whose slices are contiguous."""
        columns = y.T.contiguous()
        chain, features = stream(self.net, context, columns), columns.unbind(0)
        x: dict[int, Tensor] = {}
        log_det: list[Tensor] = []
        last: Tensor | None = None
        for feature in self.net.features:
            params = chain.step(last)
            assert params is not None
            last, contribution = self.bijector.inverse_and_log_det(features[feature], params.t())
            x[feature] = last
            log_det.append(contribution)
        return torch.stack([x[feature] for feature in range(len(x))], -1), torch.stack(log_det).sum(0)

    def iterate(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Invert by passes over all features until none changes."""
        start = torch.zeros_like(y)
        x, log_det = _fixed_point(lambda x: self.bijector.inverse_and_log_det(y, self.net(x, context)), start)
        return x, log_det.sum(-1)

    def forward(
        self, x: Tensor, y: Tensor, context: Tensor | None, wanted: list[Tensor], grads: tuple[Tensor, Tensor]
    ) -> list[Tensor | None]:
        """Return the gradients of the inputs that are wanted, from those of x and of the log-determinant.

        The total gradient of x solves a triangular system, whose matrix is the network's Jacobian.  That of x_i is its
        own and what the parameters of all later ranks pass back.  Once it is known, the gradients of y, of the weights
        and of the context are those of one ordinary pass over all features.
        """
        if torch.is_grad_enabled():  # this gradient will itself be differentiated
            outputs = invert_by_passes(self.bijector, self.net, y, context)
            return list(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
        if self.fixed_point:
            with torch.enable_grad():
                leaf = x.requires_grad_()
                params = self.net(leaf, context)
        else:
            params, slopes = self.net.params_and_slopes(x, context)
        with torch.enable_grad():
            leaves = y.detach().requires_grad_(), params.detach().requires_grad_()  # (N, D), (N, D, P)
            mapped, log_det = self.bijector.inverse_and_log_det(*leaves)
            dx_dy, dx_dparams = torch.autograd.grad(mapped.sum(), leaves, retain_graph=True, materialize_grads=True)
        of_y, of_params = vjp((log_det,), leaves, (grads[1].unsqueeze(-1),))
        if self.fixed_point:
            total = self._iterated(leaf, params, grads[0], dx_dparams, of_params)
        else:
            total = self._swept(slopes, grads[0], dx_dparams, of_params)
        found: dict[int, Tensor | None] = {id(y): torch.addcmul(of_y, dx_dy, total)}
        if others := [tensor for tensor in wanted if tensor is not y]:
            of_network = torch.addcmul(of_params, dx_dparams, total.unsqueeze(-1))
            of_others = torch.autograd.grad(params, others, of_network, allow_unused=True)
            found.update(zip(map(id, others), of_others, strict=True))
        return [found[id(tensor)] for tensor in wanted]

    def _swept(self, slopes: list[Tensor], own: Tensor, gain: Tensor, fixed: Tensor) -> Tensor:
        """Return the total gradient of x, ``(N, D)``, from its own, ``(N, D)``, and that of the parameters.

        The latter is ``gain * total + fixed``, ``(N, D, P)``.
        """
        chain, passed = stream_vjp(self.net, slopes), None
        own, gain, fixed = own.T, *(part.permute(1, 2, 0).contiguous() for part in (gain, fixed))
        total: dict[int, Tensor] = {}
        for feature in reversed(self.net.features):
            total[feature] = own[feature] if passed is None else own[feature] + passed[0]
            passed = chain.step(torch.addcmul(fixed[feature], gain[feature], total[feature]))  # (P, N)
        return torch.stack([total[feature] for feature in range(len(own))], -1)

    def _iterated(self, x: Tensor, params: Tensor, own: Tensor, gain: Tensor, fixed: Tensor) -> Tensor:
        """Return the total gradient of x, as ``_swept`` does, by passes over all features."""

        def step(total: Tensor) -> tuple[Tensor, ...]:
            of_network = torch.addcmul(fixed, gain, total.unsqueeze(-1))
            (passed,) = torch.autograd.grad(params, x, of_network, retain_graph=True, materialize_grads=True)
            return (own + passed,)

        return _fixed_point(step, own)[0]


def _fixed_point(step: Callable[[Tensor], tuple[Tensor, ...]], start: Tensor) -> tuple[Tensor, ...]:
    """Repeat a step until its first result stays the same, to round-off, as it must after a step for each feature."""
    found: tuple[Tensor, ...] = (start,)
    precision = 2 * torch.finfo(start.dtype).eps
    for _ in range(start.shape[-1]):
        before, found = found[0], step(found[0])
        if ((found[0] - before).abs() <= precision * (1 + found[0].abs())).all():
            break
    return found


class Autoregressive(FlowTransform):
    """An autoregressive layer over the features of a vector ``(D,)``, or over the tokens ``(T, D)`` of a sequence::

        y_i = f(x_i; θ_i(x_<i, c)),    log|det dy/dx| = Σ_i log f'(x_i; θ_i)

    where < is the conditioner's order.  Forward is one pass of the network.  The inverse finds the features one after
    the other, in about the work of one pass and not of D.  IAF samples by the forward direction; MAF scores by it, as
    ``layer.inv`` in a flow.

    Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al. 2016, arXiv:1606.04934); Masked
    Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray 2017, arXiv:1705.07057).

    Args:
        bijector: The map of each feature, or of each number of a token.
        conditioner: The masked network or causal transformer; its ``order`` is the order of the layer.
        fixed_point: True if the slow direction repeats passes over all features until none changes, and does not go
            feature by feature.  It takes at most D passes, and far fewer if features depend weakly on one another.
            Results are the same, to round-off.  It suits few rows of many features, and GPUs; it may be set at any
            time.

    Raises:
        TypeError: If the conditioner is neither a ``MADE`` nor a ``CausalTransformer``.
        ValueError: If bijector and conditioner do not fit, or ``fixed_point`` is not a bool or is True for tokens.  In
            use, if the conditioner takes contexts and none is given.

    Example::

        >>> import torch
        >>> from pyro_flows.bijectors import Affine
        >>> from pyro_flows.conditioners import MADE
        >>> layer = Autoregressive(Affine(), MADE(3, num_params=2))
        >>> _ = torch.nn.init.normal_(layer.conditioner.output.weight)  # as if trained
        >>> x = torch.randn(5, 3)
        >>> y, log_det = layer.forward_and_log_det(x)
        >>> torch.equal(y[:, 0], x[:, 0]), log_det.shape  # the first feature depends on no other
        (True, torch.Size([5]))
        >>> torch.allclose(layer.inverse_and_log_det(y)[0], x, atol=1e-3)
        True
    """

    def __init__(self, bijector: Bijector, conditioner: MADE | CausalTransformer, *, fixed_point: bool = False) -> None:
        known = (MADE, CausalTransformer)
        check_kind("Autoregressive", known, "a MADE or a CausalTransformer", conditioner=conditioner)
        check_kind("Autoregressive", Bijector, BIJECTOR, bijector=bijector)
        super().__init__((conditioner.input_dim, *conditioner.size), conditioner.context_dim)
        check_conditioner("Autoregressive", conditioner, (conditioner.input_dim, bijector.num_params))
        self.bijector, self.conditioner, self.fixed_point = bijector, conditioner, fixed_point
        check_flags("Autoregressive", fixed_point=fixed_point)
        if fixed_point and isinstance(conditioner, CausalTransformer):
            raise ValueError("Autoregressive: fixed_point=True is for a MADE, got a CausalTransformer. Use False.")

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = self.bijector.forward_and_log_det(x, self.conditioner(x, context))
        return y, self.sum_event(log_det)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch, y, context = self._rows_of(y, context)
        if isinstance(self.conditioner, CausalTransformer):
            x, log_det = invert_tokens(self.bijector, self.conditioner, y, context)
        elif is_mapped():
            x, log_det = invert_by_passes(self.bijector, self.conditioner, y, context)
        else:
            names, weights = zip(*self.conditioner.named_parameters(), strict=True)
            layer = _Layer(self.bijector, self.conditioner, self.fixed_point)
            with torch.autocast(y.device.type, enabled=False):  # round-off would add up from feature to feature
                context = None if context is None else context.to(weights[0].dtype)
                x, log_det = _Inversion.apply(layer, names, y.to(weights[0].dtype), context, *weights)
        return x.reshape(batch + self.event_shape), log_det.reshape(batch)

    def compiles(self, inverse: bool) -> bool:
        return not inverse
