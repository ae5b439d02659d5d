"""Draws and their scores mapped outside of autograd: one pass forwards, and one backwards for the gradients.

A guide's default layers are small, and autograd would take longer to record them than they take to run.  So the
derivatives of affine couplings with multilayer perceptrons are written by hand, here and nowhere else.  They hold for
these very classes.  Any other layer is differentiated by autograd, alone.

Products of matrices take half the time in single precision.  As long as the layers act on numbers of order one, the
rounding of a gradient is far below the noise of its draws.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..bijectors import Affine, SoftplusAffine
from ..conditioners import MLP
from ..conditioners.base import Linear
from ..conditioners.jacobian import SLOPES
from ..vjp import is_plain, vjp
from .base import FlowTransform
from .coupling import Coupling
from .elementwise import Elementwise
from .linear import ScaledLinear
from .wrapped import Compose

Gradients = list[tuple[Tensor, Tensor]]  # of some parameters: each with its gradient


class Carried(NamedTuple):
    """Values of a transform with their scores and derivatives.

    Attributes:
        y: The values.
        log_det: The log-determinants.
        score: The scores of the values.
        pull: The vector–Jacobian product: the gradient of y -> that of x, and those of the transform's parameters.
    """

    y: Tensor
    log_det: Tensor
    score: Tensor
    pull: Callable[[Tensor], tuple[Tensor, Gradients]]


def carry_draws(transforms: Sequence[FlowTransform], x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Map draws and their scores by transforms without contexts, at least one.

    Returns:
        The mapped draws and, without gradients, the sum of the log-determinants and the scores of the mapped draws.
    """
    trained = dict.fromkeys(p for layer in transforms for p in layer.parameters() if p.requires_grad)
    found: tuple[Tensor, Tensor, Tensor] = _Carried.apply(transforms, x, score, *trained)
    return found


def can_be_carried(transforms: Sequence[FlowTransform]) -> bool:
    """True unless a trace, ``torch.func``, autocast or a hook has to see each operation."""
    watched = torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active()
    cast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return not (watched or cast) and is_plain(transforms)


class _Carried(torch.autograd.Function):
    """The autograd function of ``carry_draws``; draws and trained parameters have gradients."""

    @staticmethod
    def forward(
        ctx: Any, transforms: Sequence[FlowTransform], x: Tensor, score: Tensor, *trained: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, total, score, ctx.pull = carried_along(transforms, x, score)
        ctx.trained = trained
        ctx.save_for_backward(*trained)
        ctx.mark_non_differentiable(total, score)
        return y, total, score

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # autograd raises an error here if a parameter was changed in place
        found: dict[Tensor, Tensor | None] = dict.fromkeys(ctx.trained)
        g, gradients = ctx.pull(g)
        for parameter, gradient in gradients:
            if parameter in found:
                known = found[parameter]
                found[parameter] = gradient if known is None else known + gradient
        return None, g if ctx.needs_input_grad[1] else None, None, *found.values()


def carried_along(transforms: Sequence[FlowTransform], x: Tensor, score: Tensor) -> Carried:
    """Map ``x`` by transforms without contexts and carry its score along."""
    pulls, total = [], torch.zeros(())
    for transform in transforms:
        x, log_det, score, pull = carry(transform, x, score)
        pulls.append(pull)
        total = total + log_det

    def pull_all(g: Tensor) -> tuple[Tensor, Gradients]:
        found: Gradients = []
        for pull in reversed(pulls):
            g, gradients = pull(g)
            found += gradients
        return g, found

    return Carried(x, total, score, pull_all)


def carry(transform: FlowTransform, x: Tensor, score: Tensor) -> Carried:
    """Map ``x`` by a transform without a context and carry its score along."""
    if isinstance(transform, InSingle):
        return transform.carry(x, score)
    if type(transform) is Compose:
        return carried_along(transform.transforms, x, score)
    if type(transform) is Coupling and type(affine := transform.bijector) is Affine:
        net: Any = transform.conditioner
        known = type(net) is MLP and not (net.skip or net.residual) and net.activation in SLOPES
        if known and all(type(layer) is Linear for layer in (*net.hidden, net.output)):
            return _carry_affine(transform, affine, net, x, score)
    trained = [parameter for parameter in transform.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y, log_det, score = transform.forward_and_score(x, score)

    def pull(g: Tensor) -> tuple[Tensor, Gradients]:
        of_x, *rest = vjp((y,), (x, *trained), (g,))
        return of_x, list(zip(trained, rest, strict=True))

    return Carried(y.detach(), log_det.detach(), score, pull)


def _carry_affine(coupling: Coupling, affine: Affine, net: MLP, x: Tensor, score: Tensor) -> Carried:
    # The Jacobian is block triangular, so its transpose is solved in this pass, without a way back.
    (kept, mapped), (of_kept, of_mapped) = coupling.part(x), coupling.part(score)
    outputs, pull_network = _outputs_and_pull(net, kept)
    a, t = outputs.unflatten(-1, (2, -1)).unbind(-2)
    s = affine.log_scale(a, 1)
    scale = s.exp()
    stretched = mapped * scale
    slope = affine.slope - (affine.slope / affine.max_log_scale**2) * s * s  # ds/da
    of_mapped = of_mapped * torch.exp(-s)
    of_s = torch.addcmul(torch.ones_like(s), of_mapped, stretched)
    of_kept = of_kept - pull_network(torch.stack((of_s * slope, of_mapped), -2), None)

    def pull(g: Tensor) -> tuple[Tensor, Gradients]:
        gradients: Gradients = []
        g_kept, g_mapped = coupling.part(g)
        through = pull_network(torch.stack((g_mapped * stretched * slope, g_mapped), -2), gradients)
        return coupling.join(g_kept + through, g_mapped * scale), gradients

    y = coupling.join(kept, stretched + t)
    return Carried(y, coupling.sum_event(s), coupling.join(of_kept, of_mapped), pull)


def _outputs_and_pull(net: MLP, x: Tensor) -> tuple[Tensor, Callable[[Tensor, Gradients | None], Tensor]]:
    """Return the outputs of a perceptron, and its product of the gradient of these and the Jacobian.

    The latter appends the gradients of the parameters to a list.
    """
    *hidden, last = layers = [*net.hidden, net.output]
    rows = x.detach().reshape(-1, net.input_dim)
    size, slope_of = len(rows), SLOPES[net.activation]
    # The points that centre the units go through the layers in the same products as the inputs.
    inputs, slopes = [torch.cat((rows, net.points)) if net.centered else rows], []
    for layer in hidden:
        a = layer(inputs[-1])
        h = net.act(a)
        inputs.append(h)
        slopes.append(slope_of(a, h))
    if net.centered:
        inputs[-1] = h[:size] - h[size:].mean(0)

    def pull(g: Tensor, gradients: Gradients | None) -> Tensor:
        g = g.reshape(size, -1)
        for number in reversed(range(len(layers))):
            if number < len(hidden):
                g = g * slopes[number][: len(g)]
            g = layers[number].paced(g)
            if gradients is not None:
                gradients += [(layers[number].weight, g.mT @ inputs[number]), (layers[number].bias, g.sum(0))]
            g = g @ layers[number].weight
            if number == len(hidden) and gradients is not None and net.centered:
                g = torch.cat((g, (g.sum(0) / -len(net.points)).expand(len(net.points), -1)))
        return g[:size].reshape(x.shape)

    return last(inputs[-1]).reshape(*x.shape[:-1], -1), pull


class InSingle(Compose):
    """A chain of transforms in double precision that carries draws, scores and gradients along in single precision.

    It holds copies of the transforms, which take all numbers in single precision in each call of :meth:`carry`.  The
    transforms themselves do everything else.

    Args:
        transforms: The transforms.
    """

    def __init__(self, transforms: Sequence[FlowTransform]) -> None:
        super().__init__(transforms)
        self._copies = [copy.deepcopy(transform) for transform in transforms]  # in a list, so not registered
        self._places = [*_places(self._copies, transforms)]

    @staticmethod
    def suits(transforms: Sequence[FlowTransform]) -> bool:
        """Return True for plain affine maps and couplings in double precision."""
        double = all(p.dtype == torch.float64 for transform in transforms for p in transform.parameters())
        return bool(transforms) and double and is_plain(transforms) and all(map(_is_affine, transforms))

    def carry(self, x: Tensor, score: Tensor) -> Carried:
        """Map ``x`` and carry its score along; numbers beyond the range of single precision become infinite."""
        owners: dict[Tensor, Tensor] = {}
        for held, name, own in self._places:
            held[name] = own.detach().float().requires_grad_(own.requires_grad)
            owners[held[name]] = own
        y, log_det, of_y, pull = carried_along(self._copies, x.float(), score.float())

        def pulled(g: Tensor) -> tuple[Tensor, Gradients]:
            size = g.abs().max().clamp_min(1.0)  # gradients of models far from the posterior would overflow
            g, gradients = pull((g / size).float())
            return g.double() * size, [(owners[copied], gradient.double() * size) for copied, gradient in gradients]

        return Carried(y.double(), log_det.double(), of_y.double(), pulled)


def _places(
    copies: Sequence[FlowTransform], transforms: Sequence[FlowTransform]
) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yield where copies hold each parameter and buffer of floating point, its name there, and the original."""
    for copied, own in zip(copies, transforms, strict=True):
        for part, of_own in zip(copied.modules(), own.modules(), strict=True):
            for held, numbers in ((part._parameters, of_own._parameters), (part._buffers, of_own._buffers)):
                for name, number in numbers.items():
                    if number is not None and number.is_floating_point():
                        yield held, name, number


def _is_affine(transform: FlowTransform) -> bool:
    if type(transform) is Elementwise:
        return type(transform.bijector) in (Affine, SoftplusAffine) and transform.conditioner is None
    if type(transform) is Coupling:
        return type(transform.bijector) is Affine and type(transform.conditioner) is MLP
    return type(transform) is ScaledLinear
