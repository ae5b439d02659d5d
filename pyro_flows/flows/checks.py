"""The checks that all recipes make of their sizes, and flows of their values and contexts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def check_sizes(name: str, input_dim: int, context_dim: int, num_transforms: int, hidden_dims: Sequence[int]) -> None:
    """Raise one clear error that names the recipe, the argument and its value."""
    for argument, value, least in (
        ("input_dim", input_dim, 1),
        ("context_dim", context_dim, 0),
        ("num_transforms", num_transforms, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: {argument} must be an integer of at least {least}, got {value!r}.")
    if isinstance(hidden_dims, int) or not hidden_dims or any(width < 1 for width in hidden_dims):
        raise ValueError(
            f"{name}: hidden_dims must be a sequence of positive widths such as (64, 64), got {hidden_dims!r}."
        )


def check_tensor(caller: str, argument: str, value: object, *, floating: bool = True) -> None:
    """Raise one clear error unless a value is a tensor, be it of floats or of integers."""
    if not isinstance(value, Tensor):
        way = "torch.as_tensor(array, dtype=torch.float32)" if floating else "torch.as_tensor(array), of integers"
        raise TypeError(
            f"{caller}: {argument} must be a tensor, got {type(value).__name__}; use {way}, and frame.to_numpy() for "
            "the array of a data frame."
        )


def check_value(value: Tensor, event_shape: torch.Size, caller: str = "log_prob", argument: str = "value") -> None:
    """Raise one clear error unless a value is a floating tensor with the event shape on the right."""
    check_tensor(caller, argument, value)
    shape, event = tuple(value.shape), tuple(event_shape)
    if shape[len(shape) - len(event) :] != event:
        raise ValueError(f"{caller}: {argument} must have the event shape {event} on the right, got shape {shape}.")
    if not value.is_floating_point():
        raise ValueError(
            f"{caller}: {argument} must be of a floating dtype, got {value.dtype}; use {argument}.float()."
        )


def as_size(sample_shape: Sequence[int]) -> torch.Size:
    """A shape of draws, or one clear error where it is a number."""
    if isinstance(sample_shape, int):
        raise TypeError(f"Flow: sample_shape must be a tuple of sizes, such as ({sample_shape},), got {sample_shape}.")
    return torch.Size(sample_shape)


def check_context(context: Tensor | None, width: int, what: str = "context") -> None:
    """Raise one clear error unless a context is there, floating and of the right width, or neither given nor due."""
    if context is None:
        if width:
            raise ValueError(f"Flow: context is missing; this flow takes contexts of width {width}.")
        return
    if not width:
        raise ValueError(
            f"Flow: context of shape {tuple(context.shape)} is unexpected; build the flow with context_dim > 0."
        )
    if context.dim() == 0 or context.shape[-1] != width:
        raise ValueError(f"Flow: {what} must have width {width} on the right, got shape {tuple(context.shape)}.")
    if not context.is_floating_point():
        raise ValueError(f"Flow: {what} must be of a floating dtype, got {context.dtype}.")


def taken_by(encoder: nn.Module) -> str:
    """What a user gives for a context, in words."""
    if (classes := getattr(encoder, "num_classes", None)) is not None:
        return f"labels of {classes} classes, (*batch,) of integers"
    if shape := getattr(encoder, "data_shape", None):
        return f"contexts of shape (*batch, {', '.join('n' if size is None else str(size) for size in shape)})"
    return f"contexts that {type(encoder).__name__} encodes"
