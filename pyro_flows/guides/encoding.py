"""Encoders: any function or network of the model's arguments that yields the context of a conditional flow.

Amortised inference: one network answers for all data (Gershman, Goodman 2014; Kingma, Welling 2013, arXiv:1312.6114).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn


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
    """Arguments as the model's signature orders them: by place wherever it allows, so that encoders need no names."""
    signature = signature_of(model)
    try:
        bound = signature.bind(*args, **kwargs) if signature else None
    except TypeError:
        bound = None
    return (bound.args, bound.kwargs) if bound else (args, kwargs)


def check_encoder(owner: str, encoder: object) -> None:
    """Refuse what cannot be called, and a class in place of an object."""
    if encoder is not None and (isinstance(encoder, type) or not callable(encoder)):
        raise TypeError(
            f"{owner}: encoder must be a network or function of the model's arguments, such as "
            f"encoders.MLPEncoder(input_dim, context_dim), got {encoder!r:.100}."
        )


@contextlib.contextmanager
def at_rest(encoder: Any) -> Iterator[None]:
    """Let a network answer as it does after training: without dropout, and alike for one row and for many."""
    training = isinstance(encoder, nn.Module) and encoder.training
    if training:
        encoder.eval()
    try:
        yield
    finally:
        if training:
            encoder.train()


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
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = [getattr(value, "shape", type(value).__name__) for value in (*places, *names.values())]
        seen = ", ".join(str(tuple(shape)) if isinstance(shape, torch.Size) else str(shape) for shape in shapes)
        raise ValueError(f"{owner}: the encoder fails on arguments of shape {seen}: {error!s:.300}") from error
    if not isinstance(context, Tensor) or not context.dim() or not context.is_floating_point():
        what = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise ValueError(f"{owner}: the encoder must return a floating tensor (*batch, context_dim), got {what}.")
    if width is not None and context.shape[-1] != width:
        raise ValueError(
            f"{owner}: the encoder returned a context of width {context.shape[-1]} (shape {tuple(context.shape)}), but "
            f"the guide was built for width {width}."
        )
    return context


@torch.no_grad()
def probe(
    owner: str, encoder: Callable[..., Any], model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """A first context, from which a guide learns the width and the number of rows."""
    with at_rest(encoder):
        return encode(owner, encoder, model, args, kwargs)


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
