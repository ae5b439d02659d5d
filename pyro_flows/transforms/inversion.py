"""The slow direction of autoregressive layers, x = f⁻¹(y; θ(x)), and its gradient.

*Sweeps* go rank by rank, with the network run incrementally (:func:`~pyro_flows.conditioners.stream`).  *Iterations*
put what is known of x into the network, and so on until nothing changes: k passes make k ranks right, often many more
(Song, Meng, Liao, Ermon 2021, arXiv:2002.03629).  With either, the gradient is the solution of a triangular system,
found in the same way with the transposed Jacobian of the network.

Tokens become known one after the other as well.  The transformer keeps the keys and values of those that it knows, so
all T steps cost about one pass, in plain differentiable operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..bijectors import Bijector
from ..conditioners import MADE, CausalTransformer, Tokens, stream, stream_vjp


def invert_by_passes(bijector: Bijector, net: MADE, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Invert by D passes of the whole network: slow, but plain operations that any transformation can see through.

    ``(N, D), (N, C) -> (N, D), (N,)``.  It stands in for the sweep where code is traced, compiled or mapped and where
    a gradient is differentiated again.
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
    tokens, known = Tokens(net, context, len(y)), None
    found: list[tuple[Tensor, Tensor]] = []
    for place in net.places:
        known, log_det = bijector.inverse_and_log_det(y[:, place], tokens.step(known))
        found.append((known, log_det))
    values, log_dets = zip(*found, strict=True)
    return torch.stack(values, 1).index_select(1, net.order), torch.stack(log_dets, 1).sum((1, 2))


def _sweep(bijector: Bijector, net: MADE, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Invert rank by rank: ``(N, D), (N, C) -> (N, D), (N,)``, with features as rows, whose slices are contiguous."""
    columns = y.T.contiguous()
    chain, features = stream(net, context, columns), columns.unbind(0)
    x: dict[int, Tensor] = {}
    log_det: list[Tensor] = []
    last: Tensor | None = None
    for feature in net.features:
        params = chain.step(last)
        assert params is not None
        last, contribution = bijector.inverse_and_log_det(features[feature], params.t())
        x[feature] = last
        log_det.append(contribution)
    return torch.stack([x[feature] for feature in range(len(x))], -1), torch.stack(log_det).sum(0)


def _iterate(bijector: Bijector, net: MADE, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Invert by passes over all features until none changes: ``(N, D), (N, C) -> (N, D), (N,)``."""
    log_det = torch.zeros_like(y)

    def step(x: Tensor) -> Tensor:
        nonlocal log_det
        value, log_det = bijector.inverse_and_log_det(y, net(x, context))
        return value

    x = _fixed_point(step, torch.zeros_like(y))
    return x, log_det.sum(-1)


def _fixed_point(step: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Repeat a step until its result stays the same, to round-off, as it must after a step for each feature."""
    value, precision = start, 2 * torch.finfo(start.dtype).eps
    for _ in range(start.shape[-1]):
        before, value = value, step(value)
        if ((value - before).abs() <= precision * (1 + value.abs())).all():
            break
    return value


class Inversion(torch.autograd.Function):
    """The slow direction with its gradient.

    The total cotangent of x solves a triangular system whose matrix is the network's Jacobian:
    the cotangent of x_i is its own plus what the parameters of all later ranks pass back.  Once it is known, the
    gradients of y, of the weights and of the context are those of one ordinary pass over all features at once.  Only x
    and y are kept until then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        bijector: Bijector,
        net: MADE,
        fixed_point: bool,
        names: tuple[str, ...],
        y: Tensor,
        context: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, log_det = (_iterate if fixed_point else _sweep)(bijector, net, y, context)
        ctx.bijector, ctx.net, ctx.fixed_point, ctx.names = bijector, net, fixed_point, names
        ctx.save_for_backward(x, y, context, *weights)
        return x, log_det

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        x, *inputs = ctx.saved_tensors  # inputs: y, context, weights
        needs = ctx.needs_input_grad[4:]
        again = torch.is_grad_enabled()  # create_graph=True: this gradient will itself be differentiated
        live = dict(ctx.net.named_parameters())
        own = not again and all(live[name] is weight for name, weight in zip(ctx.names, inputs[2:], strict=True))
        for place, (tensor, needed) in enumerate(zip(inputs, needs, strict=True)):
            # Stand-ins, so that what is upstream of one input does not count as a path from another.
            if tensor is not None and not (own and place >= 2):
                inputs[place] = tensor.view_as(tensor) if again else tensor.detach().requires_grad_(needed)
        y, context, *weights = inputs
        pullback = _Pullback(ctx.bijector, ctx.net, ctx.fixed_point)
        wanted = [t for t, n in zip(inputs, needs, strict=True) if n]
        arguments = (x.detach(), y, context, wanted, grad_x, grad_log_det, again)
        if own:
            grads = iter(pullback(*arguments))
        else:  # run at the weights that the sweep has seen, which are no longer (or never were) the module's
            named = {f"net.{name}": weight for name, weight in zip(ctx.names, weights, strict=True)}
            grads = iter(functional_call(pullback, named, arguments))
        return None, None, None, None, *(next(grads) if n else None for n in needs)


class _Pullback(nn.Module):
    """The gradient of an inversion; a module, so that it can be run at the weights that this has seen."""

    def __init__(self, bijector: Bijector, net: MADE, fixed_point: bool) -> None:
        super().__init__()
        self.bijector = bijector
        self.net = net
        self.fixed_point = fixed_point

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        context: Tensor | None,
        wanted: list[Tensor],
        grad_x: Tensor,
        grad_log_det: Tensor,
        again: bool,
    ) -> list[Tensor | None]:
        if again:
            outputs = invert_by_passes(self.bijector, self.net, y, context)
            return list(
                torch.autograd.grad(outputs, wanted, (grad_x, grad_log_det), create_graph=True, allow_unused=True)
            )
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
            if log_det.requires_grad:
                weighted = grad_log_det.unsqueeze(-1).expand_as(log_det)
                of_y, of_params = torch.autograd.grad(log_det, leaves, weighted, materialize_grads=True)
            else:
                of_y, of_params = torch.zeros_like(dx_dy), torch.zeros_like(dx_dparams)
        if self.fixed_point:
            total = self._iterated(leaf, params, grad_x, dx_dparams, of_params)
        else:
            total = self._swept(slopes, grad_x, dx_dparams, of_params)
        grads = {id(y): torch.addcmul(of_y, dx_dy, total)}
        others = [t for t in wanted if t is not y]
        if others:
            of_network = torch.addcmul(of_params, dx_dparams, total.unsqueeze(-1))
            found = torch.autograd.grad(params, others, of_network, allow_unused=True)
            grads.update({id(t): g for t, g in zip(others, found, strict=True) if g is not None})
        return [grads.get(id(t)) for t in wanted]

    def _swept(self, slopes: list[Tensor], own: Tensor, gain: Tensor, fixed: Tensor) -> Tensor:
        """The total cotangent of x, ``(N, D)``, from its own, ``(N, D)``, and that of the parameters, which is
        ``gain * total + fixed``, ``(N, D, P)``."""
        chain, passed = stream_vjp(self.net, slopes), None
        own, gain, fixed = own.T, *(part.permute(1, 2, 0).contiguous() for part in (gain, fixed))
        total: dict[int, Tensor] = {}
        for feature in reversed(self.net.features):
            total[feature] = own[feature] if passed is None else own[feature] + passed[0]
            passed = chain.step(torch.addcmul(fixed[feature], gain[feature], total[feature]))  # (P, N)
        return torch.stack([total[feature] for feature in range(len(own))], -1)

    def _iterated(self, x: Tensor, params: Tensor, own: Tensor, gain: Tensor, fixed: Tensor) -> Tensor:
        """The same, by passes over all features."""

        def step(total: Tensor) -> Tensor:
            of_network = torch.addcmul(fixed, gain, total.unsqueeze(-1))
            return own + torch.autograd.grad(params, x, of_network, retain_graph=True, materialize_grads=True)[0]

        return _fixed_point(step, own)
