"""Scores and vector–Jacobian products by autograd, and checks that hand-written ones may replace them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LogDensity = Callable[[Tensor], Tensor]  # (N, D) -> (N,), in nats


def value_and_score(density: Callable[..., Tensor], z: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """Return a log-density, ``(N,)``, of vectors and perhaps other tensors, and its gradient in z, ``(N, D)``."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = density(leaf, *others)
        total = value.sum()
        score = torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(leaf)
    return value.detach(), score


def score_of(density: LogDensity, z: Tensor) -> Tensor:
    """Return the gradient of a log-density, ``(N, D)``."""
    return value_and_score(density, z)[1]


def vjp(outputs: Sequence[Tensor], sources: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Return the gradients of the sources, given those of the outputs; zero where no output depends on a source.

    A gradient of None is zero.  The graph is kept.
    """
    with torch.enable_grad():
        # ``torch.autograd.grad`` takes gradients of outputs too, but then imports sympy, which takes half a second.
        parts = [(y * g).sum() for y, g in zip(outputs, gradients, strict=True) if g is not None and y.requires_grad]
        if not parts:
            return tuple(torch.zeros_like(source) for source in sources)
        found = torch.autograd.grad(sum(parts[1:], parts[0]), sources, retain_graph=True, materialize_grads=True)
    return tuple(part.detach() for part in found)  # on torch 2.4 zeros that replace None require gradients


def graph_of(value: Tensor) -> Iterator[Any]:
    """Iterate over the nodes of the autograd graph of a tensor."""
    seen, front = set(), [value.grad_fn]
    while front:
        node = front.pop()
        if node is not None and node not in seen:
            seen.add(node)
            front.extend(parent for parent, _ in node.next_functions)
            yield node


def keeps(thing: object, kind: type, *methods: str) -> bool:
    """True if the class of an object inherits these methods of ``kind`` and does not override them.

    The hand-written derivatives of ``kind`` hold for its own methods only.
    """
    return all(getattr(type(thing), method) is getattr(kind, method) for method in methods)


def is_plain(modules: Iterable[nn.Module]) -> bool:
    """True if modules have no hooks and no parametrisations, so that their classes define what they compute."""
    return not any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or "parametrizations" in part._modules
        for module in modules
        for part in module.modules()
    )
