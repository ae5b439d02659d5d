"""Autoregressive scheme: y_i = f(x_i; θ_i(x_<i, context)), where < is the conditioner's order.

Forward, one pass of the network.  Backward, the features become known one after the other; the network is then run
incrementally (:func:`~pyro_flows.conditioners.stream`), in about the work of one pass and not of D, and so is the
gradient.  Features are numbers, or the tokens of a sequence (:mod:`~pyro_flows.transforms.tokens`).  IAF (Kingma et al.
2016, arXiv:1606.04934) uses the forward direction to sample; MAF (Papamakarios, Pavlakou, Murray 2017,
arXiv:1705.07057) uses it to score.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..bijectors import Bijector
from ..conditioners import MADE, CausalTransformer, costream, stream
from .base import FlowTransform, is_traced
from .elementwise import check_params
from .tokens import invert_tokens


class Autoregressive(FlowTransform):
    """An autoregressive layer over the features of a vector, or over the tokens ``(T, D)`` of a sequence.

    Args:
        bijector: The map of each feature, or of each number of a token.
        conditioner: The masked network or causal transformer; its ``order`` is the order of the layer.

    Example::

        >>> import torch
        >>> from pyro_flows.bijectors import Affine
        >>> from pyro_flows.conditioners import MADE
        >>> layer = Autoregressive(Affine(), MADE(3, num_params=2))
        >>> y, log_det = layer.forward_and_log_det(torch.randn(5, 3))
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(self, bijector: Bijector, conditioner: MADE | CausalTransformer) -> None:
        super().__init__((conditioner.input_dim, *conditioner.size), conditioner.context_dim)
        check_params("Autoregressive", bijector, conditioner, conditioner.input_dim)
        self.bijector = bijector
        self.conditioner = conditioner

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = self.bijector.forward_and_log_det(x, self.conditioner(x, context))
        return y, log_det.sum(tuple(range(-len(self.event_shape), 0)))

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if isinstance(self.conditioner, CausalTransformer):
            return invert_tokens(self.bijector, self.conditioner, y, context)
        batch = y.shape[:-1] if context is None else torch.broadcast_shapes(y.shape[:-1], context.shape[:-1])
        y = y.expand(*batch, y.shape[-1]).reshape(batch.numel(), y.shape[-1])  # (N, D)
        if context is not None:
            context = context.expand(*batch, context.shape[-1]).reshape(len(y), context.shape[-1])
        if is_traced():
            x, log_det = invert_by_passes(self.bijector, self.conditioner, y, context)
        else:
            names, weights = zip(*self.conditioner.named_parameters(), strict=True)
            with torch.autocast(y.device.type, enabled=False):  # round-off would add up from feature to feature
                y = y.to(weights[0].dtype)
                context = None if context is None else context.to(y.dtype)
                x, log_det = _Sweep.apply(self.bijector, self.conditioner, names, y, context, *weights)
        return x.reshape(*batch, x.shape[-1]), log_det.reshape(batch)

    def compiles(self, inverse: bool) -> bool:
        return not inverse


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


def _sweep(bijector: Bijector, net: MADE, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Invert rank by rank: ``(N, D), (N, C) -> (N, D), (N,)``, with features as rows, whose slices are contiguous."""
    columns = y.T.contiguous()
    chain, features = stream(net, context, columns), columns.unbind(0)
    x: dict[int, Tensor] = {}
    log_det: list[Tensor] = []
    last: Tensor | None = None
    for feature in net.features:
        params = chain.step(None if last is None else last.unsqueeze(0))
        assert params is not None
        last, contribution = bijector.inverse_and_log_det(features[feature], params.t())
        x[feature] = last
        log_det.append(contribution)
    return torch.stack([x[feature] for feature in range(len(x))], -1), torch.stack(log_det).sum(0)


class _Sweep(torch.autograd.Function):
    """:func:`_sweep` with its gradient by a second sweep, from the last rank to the first.

    With x = f⁻¹(y; θ(x)), the total cotangent of x solves a triangular system whose matrix is the network's Jacobian:
    the cotangent of x_i is its own plus what the parameters of all later ranks pass back.  Once it is known, the
    gradients of y, of the weights and of the context are those of one ordinary pass over all features at once.  Only x
    and y are kept between the two sweeps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        bijector: Bijector,
        net: MADE,
        names: tuple[str, ...],
        y: Tensor,
        context: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x, log_det = _sweep(bijector, net, y, context)
        ctx.bijector, ctx.net, ctx.names = bijector, net, names
        ctx.save_for_backward(x, y, context, *weights)
        return x, log_det

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        x, *inputs = ctx.saved_tensors  # inputs: y, context, weights
        needs = ctx.needs_input_grad[3:]
        again = torch.is_grad_enabled()  # create_graph=True: this gradient will itself be differentiated
        live = dict(ctx.net.named_parameters())
        own = not again and all(live[name] is weight for name, weight in zip(ctx.names, inputs[2:], strict=True))
        for place, (tensor, needed) in enumerate(zip(inputs, needs, strict=True)):
            # Stand-ins, so that what is upstream of one input does not count as a path from another.
            if tensor is not None and not (own and place >= 2):
                inputs[place] = tensor.view_as(tensor) if again else tensor.detach().requires_grad_(needed)
        y, context, *weights = inputs
        pullback = _Pullback(ctx.bijector, ctx.net)
        wanted = [t for t, n in zip(inputs, needs, strict=True) if n]
        arguments = (x.detach(), y, context, wanted, grad_x, grad_log_det, again)
        if own:
            grads = iter(pullback(*arguments))
        else:  # run at the weights that the sweep has seen, which are no longer (or never were) the module's
            named = {f"net.{name}": weight for name, weight in zip(ctx.names, weights, strict=True)}
            grads = iter(functional_call(pullback, named, arguments))
        return None, None, None, *(next(grads) if n else None for n in needs)


class _Pullback(nn.Module):
    """The gradient of a sweep; a module, so that it can be run at the weights that the sweep has seen."""

    def __init__(self, bijector: Bijector, net: MADE) -> None:
        super().__init__()
        self.bijector = bijector
        self.net = net

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
        own, gain, fixed = grad_x.T, *(t.permute(1, 2, 0).contiguous() for t in (dx_dparams, of_params))
        chain, passed = costream(self.net, slopes), None
        total, of_network = {}, {}
        for feature in reversed(self.net.features):
            total[feature] = own[feature] if passed is None else own[feature] + passed[0]
            of_network[feature] = torch.addcmul(fixed[feature], gain[feature], total[feature])  # (P, N)
            passed = chain.step(of_network[feature])
        cotangents = torch.stack([total[feature] for feature in range(len(own))], -1)  # (N, D)
        cotangent_params = torch.stack([of_network[feature] for feature in range(len(own))]).permute(2, 0, 1)
        grads = {id(y): torch.addcmul(of_y, dx_dy, cotangents)}
        others = [t for t in wanted if t is not y]
        if others:
            found = torch.autograd.grad(params, others, cotangent_params, allow_unused=True)
            grads.update({id(t): g for t, g in zip(others, found, strict=True) if g is not None})
        return [grads.get(id(t)) for t in wanted]
