"""The checks that all recipes make of their sizes, and flows of their values, contexts and dtypes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .. import arguments
from ..arguments import check_dense, check_integers, is_integer, quoted
from ..transforms.tracing import is_traced

HALF = torch.float16, torch.bfloat16


def check_sizes(name: str, input_dim: int, context_dim: int, num_transforms: int, hidden_dims: Sequence[int]) -> None:
    """Raise one clear error that names the recipe, the argument and its value."""
    check_integers(name, input_dim=input_dim)
    check_integers(name, 0, context_dim=context_dim)
    check_integers(name, num_transforms=num_transforms)
    arguments.check_sizes(name, hidden_dims=hidden_dims)


def check_tensor(caller: str, argument: str, value: object, *, floating: bool = True) -> None:
    """Raise one clear error unless a value is a tensor, be it of floats or of integers."""
    if not isinstance(value, Tensor):
        way = "torch.as_tensor(array, dtype=torch.float32)" if floating else "torch.as_tensor(array), of integers"
        got = f"{type(value).__name__}; use {way}, and frame.to_numpy() for a data frame"
        raise TypeError(f"{caller}: {argument} must be a tensor, got {got}.")
    check_dense(caller, argument, value)


def parameter_of(modules: Iterable[nn.Module]) -> Tensor | None:
    """Return the first floating parameter of modules, or None; None too in a graph, which knows its dtypes."""
    return None if torch.compiler.is_compiling() else _first(modules)


def _first(modules: Iterable[nn.Module | None]) -> Tensor | None:
    """By hand, since ``nn.Module.parameters()`` takes as long as a layer of a small flow."""
    for module in modules:
        if module is None:
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                return parameter
        found = _first(module._modules.values())
        if found is not None:
            return found
    return None


def check_precision(caller: str, like: Tensor | None) -> None:
    """Raise a ValueError if a flow with the parameter ``like`` calculates in 16 bits."""
    if like is not None and like.dtype in HALF:
        raise ValueError(
            f"{caller}: the flow must be float32 or float64, got {like.dtype}, in which densities lose their digits. "
            "Use flow.float(); fit_density(..., mixed_precision=True) trains its networks in bfloat16."
        )


def check_like(caller: str, argument: str, value: Tensor, like: Tensor | None) -> None:
    """Raise a ValueError unless a tensor is floating and has the dtype and the device of a flow's parameter ``like``.

    Under autocast dtypes may differ.
    """
    if not value.is_floating_point():
        raise ValueError(f"{caller}: {argument} must be of a floating dtype, got {value.dtype}; use .float().")
    if like is None or (value.dtype == like.dtype and value.device == like.device):
        return
    if value.device != like.device and (value.dim() or value.is_meta or like.is_meta):
        way = f"use {argument}.to({str(like.device)!r}), or move the flow"
        if like.is_meta:
            way = 'the parameters of the flow hold no numbers: use flow.to_empty(device="cpu") and load their state'
        raise ValueError(
            f"{caller}: {argument} must lie on the flow's device, {like.device}, got one on {value.device}; {way}."
        )
    if value.dtype != like.dtype and not torch.is_autocast_enabled(value.device.type):
        ways = {torch.float32: "float()", torch.float64: "double()"}
        of_flow = f", or flow.{ways[value.dtype]}" if value.dtype in ways else ""
        raise ValueError(
            f"{caller}: {argument} must have the flow's dtype, {like.dtype}, got {value.dtype}; use "
            f"{argument}.{ways.get(like.dtype, f'to({like.dtype})')}{of_flow}."
        )


def check_value(
    value: Tensor,
    event_shape: torch.Size,
    like: Tensor | None = None,
    caller: str = "log_prob",
    argument: str = "value",
) -> None:
    """Raise one clear error unless a value is a floating tensor with the event shape on the right, like a parameter."""
    check_tensor(caller, argument, value)
    check_event(caller, argument, value, event_shape)
    check_like(caller, argument, value, like)


def check_event(caller: str, argument: str, value: Tensor, event_shape: torch.Size) -> None:
    """Raise a ValueError unless a value has the event shape on the right."""
    shape, event = tuple(value.shape), tuple(event_shape)
    if shape[max(len(shape) - len(event), 0) :] != event:
        raise ValueError(f"{caller}: {argument} must have the event shape {event} on the right, got shape {shape}.")


def as_size(sample_shape: Sequence[int], argument: str = "sample_shape") -> torch.Size:
    """Return a shape of draws, or raise one clear error unless it holds integers of at least 0."""
    if is_traced():  # where sizes may be symbols or tensors
        return torch.Size(sample_shape)
    whole = isinstance(sample_shape, Sequence) and not isinstance(sample_shape, str | bytes)
    if not whole or not all(is_integer(size) and size >= 0 for size in sample_shape):
        such = f"({sample_shape},)" if is_integer(sample_shape) else "(5,)"
        raise TypeError(f"Flow: {argument} must be a tuple of sizes, such as {such}, got {quoted(sample_shape)}.")
    return torch.Size(sample_shape)


def check_context(context: Tensor | None, width: int, like: Tensor | None = None, what: str = "context") -> None:
    """Raise one clear error unless a context is there, floating, of the right width and like a parameter, or neither
    given nor due."""
    if context is None:
        if width:
            raise ValueError(f"Flow: context is missing; this flow takes contexts of width {width}.")
        return
    shape = tuple(context.shape)
    if not width:
        raise ValueError(f"Flow: context of shape {shape} is unexpected; build the flow with context_dim > 0.")
    if shape[-1:] != (width,):
        raise ValueError(f"Flow: {what} must have width {width} on the right, got shape {shape}.")
    check_like("Flow", what, context, like)


def taken_by(encoder: nn.Module) -> str:
    """What a user gives for a context, in words."""
    if hasattr(encoder, "num_classes"):
        return f"labels of {encoder.num_classes} classes, (*batch,) of integers"
    if shape := getattr(encoder, "data_shape", None):
        return f"contexts of shape (*batch, {', '.join('n' if size is None else str(size) for size in shape)})"
    return f"contexts that {type(encoder).__name__} encodes"
