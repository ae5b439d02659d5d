"""Encoders: any function or network of the model's arguments that yields the context of a conditional flow.

Amortised inference: one network answers for all data (Gershman, Goodman 2014; Kingma, Welling 2013, arXiv:1312.6114).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from ..encoders import Standardize
from ..encoders.base import at_rest as at_rest
from ..encoders.standardize import learning


def signature_of(model: Callable[..., Any]) -> inspect.Signature | None:
    """The parameters of a model, whatever handlers it is wrapped in; None where Python does not know them."""
    program = poutine.unwrap(model)
    try:
        return inspect.signature(program.forward if isinstance(program, nn.Module) else program)
    except (TypeError, ValueError):
        return None


def arranged(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that are given, in the order of the model's signature and by place, so that encoders need no names.

    Only those that a model takes by name alone keep their names.
    """
    signature = signature_of(model)
    try:
        given = signature.bind(*args, **kwargs).arguments if signature else None
    except TypeError:
        given = None
    if signature is None or given is None:
        return args, kwargs
    places: list[Any] = []
    names: dict[str, Any] = {}
    for name, value in given.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            places += value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            names |= value
        elif kind is inspect.Parameter.KEYWORD_ONLY:
            names[name] = value
        else:
            places.append(value)
    return tuple(places), names


def check_encoder(owner: str, encoder: object) -> None:
    """Refuse what cannot be called, and a class in place of an object."""
    if encoder is not None and (isinstance(encoder, type) or not callable(encoder)):
        raise TypeError(
            f"{owner}: encoder must be a network or function of the model's arguments, such as "
            f"encoders.MLPEncoder(input_dim, context_dim), got {encoder!r:.100}."
        )


def encode(
    owner: str,
    encoder: Callable[..., Any],
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    width: int | None = None,
) -> Tensor:
    """What an encoder makes of arguments, ``(*batch, width)``.

    Raises:
        ValueError: If it fails, or returns no floating tensor of that width.
    """
    places, names = arranged(model, args, kwargs)
    try:
        context = encoder(*places, **names)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        seen = [str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in (*places, *names.values())]
        raise ValueError(
            f"{owner}: the encoder fails on the arguments that the model is given, {', '.join(seen) or 'none at all'}: "
            f"{error!s:.300}. It is called with all of them, in the model's order, as tensors where they are data; to "
            "use some, wrap it in an nn.Module whose forward takes all."
        ) from error
    if not isinstance(context, Tensor) or not context.dim() or not context.is_floating_point():
        what = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise ValueError(f"{owner}: the encoder must return a floating tensor (*batch, context_dim), got {what}.")
    if width is not None and context.shape[-1] != width:
        raise ValueError(
            f"{owner}: the encoder returned a context of width {context.shape[-1]} (shape {tuple(context.shape)}), but "
            f"the guide was built for width {width}."
        )
    return context


def finite(owner: str, context: Tensor | None) -> Tensor | None:
    """A context as it is.

    Raises:
        ValueError: If it is not finite.
    """
    if context is not None and not context.isfinite().all():
        raise ValueError(
            f"{owner}: the encoder returned {int((~context.isfinite()).sum())} NaN or infinite numbers of "
            f"{context.numel()}; are the data finite?"
        )
    return context


def initialize(
    owner: str,
    encoder: Callable[..., Any] | None,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Let the data that an encoder will be trained on set each ``Standardize`` in it, before that.

    One that was set before stays as it is, and so does an encoder that is not trained.
    """
    if not isinstance(encoder, nn.Module) or not any(p.requires_grad for p in encoder.parameters()):
        return
    if fresh := [part for part in encoder.modules() if isinstance(part, Standardize) and part.is_fresh]:
        with at_rest(encoder), learning(fresh):
            encode(owner, encoder, model, args, kwargs)


def probe(
    owner: str, encoder: Callable[..., Any], model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """A first context, from which a guide learns the width and the number of rows.

    Raises:
        ValueError: If the encoder is a function of networks that the guide would not train.
    """
    with at_rest(encoder), torch.enable_grad():
        context = encode(owner, encoder, model, args, kwargs)
    own = {id(parameter) for parameter in encoder.parameters()} if isinstance(encoder, nn.Module) else set()
    if any(isinstance(leaf, nn.Parameter) and id(leaf) not in own for leaf in leaves_of(context)):
        raise ValueError(
            f"{owner}: the encoder is a function of parameters that the guide cannot see, and would never train. Give "
            "the network itself, or an nn.Module that holds it and whose forward does what the function does."
        )
    return context.detach()


def leaves_of(value: Tensor) -> list[Tensor]:
    """The leaves that a tensor has gradients for."""
    found, seen, front = [], set(), [value.grad_fn]
    while front:
        node = front.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        front.extend(parent for parent, _ in node.next_functions)
    return found


def width_for_one(
    owner: str,
    encoder: Callable[..., Any] | None,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> int:
    """The width of the context of one data set, 0 without an encoder."""
    if encoder is None:
        return 0
    context = probe(owner, encoder, model, args, kwargs)
    if context.dim() != 1:
        raise ValueError(
            f"{owner}: for one data set the encoder must return one vector (context_dim,), got shape "
            f"{tuple(context.shape)}."
        )
    return len(context)
