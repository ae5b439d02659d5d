"""Encoders: functions or networks that compute the context of a conditional flow from the model's arguments.

Amortised inference: one network serves all data (Gershman, Goodman 2014; Kingma, Welling 2013, arXiv:1312.6114).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from ..encoders import Standardize
from ..encoders.base import at_rest
from ..encoders.standardize import learning
from .guide_call import Call


def check_encoder(owner: str, encoder: object) -> None:
    """Raise TypeError unless an encoder is None or can be called; a class is refused too."""
    if encoder is not None and (isinstance(encoder, type) or not callable(encoder)):
        words = "a network or function of the model's arguments, such as encoders.MLPEncoder(input_dim, context_dim)"
        raise TypeError(f"{owner}: encoder must be {words}, got {encoder!r:.100}.")


def encode(call: Call, encoder: Any, width: int | None = None) -> Tensor:
    """Return the context that an encoder computes from the arguments of a call, ``(*batch, width)``.

    Raises:
        ValueError: If the encoder fails, or returns no floating tensor of that width.
    """
    places, names = _arranged(call)
    try:
        context = encoder(*places, **names)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        seen = [str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in (*places, *names.values())]
        fault = f"the encoder fails on the arguments that the model is given, {', '.join(seen) or 'none at all'}"
        way = "It must take all of them, in the model's order; wrap it in an nn.Module that does"
        raise ValueError(f"{call.owner}: {fault}: {error!s:.300}. {way}.") from error
    if not isinstance(context, Tensor) or not context.dim() or not context.is_floating_point():
        what = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise ValueError(f"{call.owner}: the encoder must return a floating tensor (*batch, context_dim), got {what}.")
    if width is not None and context.shape[-1] != width:
        got = f"width {context.shape[-1]} (shape {tuple(context.shape)})"
        raise ValueError(f"{call.owner}: the encoder returned {got}, but the guide was built for width {width}.")
    return context


def _arranged(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call in the order of the model's signature, so that encoders need no names.

    Keyword-only arguments of the model keep their names.
    """
    program = poutine.unwrap(call.model)
    try:
        signature = inspect.signature(program.forward if isinstance(program, nn.Module) else program)
        bound = signature.bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):  # Python does not know the signature, or the arguments do not fit it
        return call.args, call.kwargs
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    named = bound.kwargs  # with those after an argument that was left out, which Python passes by name
    by_name = {n: v for n, v in named.items() if kinds.get(n) is not inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return (*bound.args, *(value for name, value in named.items() if name not in by_name)), by_name


def check_finite(owner: str, context: Tensor | None) -> None:
    """Raise ValueError if a context holds NaN or infinite numbers."""
    if context is not None and not context.isfinite().all():
        bad = f"{int((~context.isfinite()).sum())} NaN or infinite numbers of {context.numel()}"
        raise ValueError(f"{owner}: the encoder returned {bad}; are the data finite?")


def initialize(call: Call, encoder: Callable[..., Any] | None) -> None:
    """Initialise each new ``Standardize`` layer in an encoder from the data that the encoder will be trained on.

    Encoders without trained parameters are left alone.
    """
    if not isinstance(encoder, nn.Module) or not any(p.requires_grad for p in encoder.parameters()):
        return
    if fresh := [part for part in encoder.modules() if isinstance(part, Standardize) and part.is_fresh]:
        with at_rest(encoder), learning(fresh):
            encode(call, encoder)


def probe(call: Call, encoder: Callable[..., Any]) -> Tensor:
    """Return a first context, which shows its width and the number of rows.

    Raises:
        ValueError: If the encoder is a function of parameters that the guide cannot see, and so would not train.
    """
    with at_rest(encoder), torch.enable_grad():
        context = encode(call, encoder)
    own = {id(parameter) for parameter in encoder.parameters()} if isinstance(encoder, nn.Module) else set()
    if any(isinstance(leaf, nn.Parameter) and id(leaf) not in own for leaf in _leaves_of(context)):
        fault = "the encoder is a function of parameters that the guide cannot see, and would never train"
        raise ValueError(f"{call.owner}: {fault}. Give the network itself, or an nn.Module that holds it.")
    return context.detach()


def _leaves_of(value: Tensor) -> list[Tensor]:
    """Return the leaves of the autograd graph of a tensor."""
    found, seen, front = [], set(), [value.grad_fn]
    while front:
        node = front.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                found.append(node.variable)
            front.extend(parent for parent, _ in node.next_functions)
    return found


def width_for_one(call: Call, encoder: Callable[..., Any] | None) -> int:
    """Return the width of the context of one dataset, 0 without an encoder."""
    if encoder is None:
        return 0
    shape = tuple(probe(call, encoder).shape)
    if len(shape) != 1:
        raise ValueError(f"{call.owner}: for one dataset the encoder must return one vector (n,), got shape {shape}.")
    return shape[0]
