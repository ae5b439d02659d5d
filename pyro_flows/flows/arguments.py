"""Checks of the sizes of recipes, and of the values and dtypes of flows."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from ..arguments import Widths, check_integers, check_sizes, is_integer, quoted
from ..compiler_state import is_traced

HALF = torch.float16, torch.bfloat16


class Sizes(NamedTuple):
    """The sizes that recipes over vectors share, checked by :func:`checked_sizes`."""

    input_dim: int
    context_dim: int
    num_transforms: int
    hidden_dims: Widths


def checked_sizes(name: str, *sizes: Any) -> Sizes:
    """Return the fields of :class:`Sizes`, or raise ValueError, which names the recipe, unless they are in range."""
    checked = Sizes(*sizes)
    check_integers(name, input_dim=checked.input_dim)
    check_integers(name, 0, context_dim=checked.context_dim)
    check_integers(name, num_transforms=checked.num_transforms)
    check_sizes(name, hidden_dims=checked.hidden_dims)
    return checked


def check_dense(caller: str, argument: str, value: Tensor) -> None:
    """Raise ValueError with a way out unless a tensor is dense, real and not quantised."""
    must = "be a dense tensor"
    if value.is_nested:
        got, way = "a nested one", f"give its parts one by one, {argument}.unbind()"
    elif value.is_quantized:
        got, way = f"a quantised one, {value.dtype}", f"use {argument}.dequantize()"
    elif value.layout != torch.strided:
        got, way = f"a sparse one, {value.layout}", f"use {argument}.to_dense()"
    elif value.is_complex():
        must, got, way = "hold real numbers", f"{value.dtype}", f"use torch.view_as_real({argument}).flatten(-2)"
    else:
        return
    raise ValueError(f"{caller}: {argument} must {must}, got {got}; {way}.")


def check_tensor(caller: str, argument: str, value: object, *, floating: bool = True) -> None:
    """Raise TypeError unless a value is a tensor, and ValueError unless it is dense and real."""
    if not isinstance(value, Tensor):
        way = "torch.as_tensor(array, dtype=torch.float32)" if floating else "torch.as_tensor(array), of integers"
        got = f"{type(value).__name__}; use {way}, and frame.to_numpy() for a data frame"
        raise TypeError(f"{caller}: {argument} must be a tensor, got {got}.")
    check_dense(caller, argument, value)


def check_context(caller: str, context: Tensor, width: int) -> None:
    """Raise ValueError unless contexts are vectors of a width."""
    if context.shape[-1:] != (width,):
        way = "Add a dimension, context[..., None]" if width == 1 else "Stack its numbers along the last dimension"
        raise ValueError(f"{caller}: context must have shape (*batch, {width}), got {tuple(context.shape)}. {way}.")


def parameter_of(modules: Iterable[nn.Module | None]) -> Tensor | None:
    """Return the first floating-point parameter of modules, or None if there is none or the code is being compiled."""
    if torch.compiler.is_compiling():  # a graph guards dtypes and devices itself
        return None
    for module in modules:  # by hand, since nn.Module.parameters() takes as long as a layer of a small flow
        if module is None:
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                return parameter
        if (found := parameter_of(module._modules.values())) is not None:
            return found
    return None


def check_precision(caller: str, like: Tensor | None) -> None:
    """Raise ValueError if a flow with the parameter ``like`` calculates in 16 bits."""
    if like is not None and like.dtype in HALF:
        must = f"the flow must be float32 or float64, got {like.dtype}, in which densities lose their digits"
        way = "Use flow.float(); fit_density(..., mixed_precision=True) trains its networks in bfloat16."
        raise ValueError(f"{caller}: {must}. {way}")


def check_like(caller: str, argument: str, value: Tensor, like: Tensor | None) -> None:
    """Raise ValueError unless a floating-point tensor has the dtype and the device of a flow's parameter ``like``.

    Under autocast dtypes may differ.
    """
    if not value.is_floating_point():
        raise ValueError(f"{caller}: {argument} must be of a floating dtype, got {value.dtype}; use .float().")
    if like is None:
        return
    if value.device != like.device and (value.dim() or value.is_meta or like.is_meta):
        must = f"lie on the flow's device, {like.device}, got one on {value.device}"
        way = f"use {argument}.to({str(like.device)!r}), or move the flow; use flow.to_empty(...) if it is on 'meta'"
    elif value.dtype != like.dtype and not torch.is_autocast_enabled(value.device.type):
        must = f"have the flow's dtype, {like.dtype}, got {value.dtype}"
        way = f"use {argument}.to({like.dtype}){', or flow.double()' * (value.dtype == torch.float64)}"
    else:
        return
    raise ValueError(f"{caller}: {argument} must {must}; {way}.")


def check_value(
    value: Tensor, event_shape: Size, like: Tensor | None = None, caller: str = "log_prob", argument: str = "value"
) -> None:
    """Raise an error unless a value is a floating-point tensor ``(*batch, *event_shape)`` like a flow's parameter."""
    check_tensor(caller, argument, value)
    check_event(caller, argument, value, event_shape)
    check_like(caller, argument, value, like)


def check_event(caller: str, argument: str, value: Tensor, event_shape: Size) -> None:
    """Raise ValueError unless a value has the event shape on the right."""
    shape, event = tuple(value.shape), tuple(event_shape)
    if shape[max(len(shape) - len(event), 0) :] != event:
        raise ValueError(f"{caller}: {argument} must have the event shape {event} on the right, got shape {shape}.")


def as_size(sample_shape: Sequence[int]) -> Size:
    """Return a shape of draws, or raise TypeError unless it holds integers of at least 0."""
    if is_traced():  # sizes may be symbols or tensors
        return Size(sample_shape)
    whole = isinstance(sample_shape, Sequence) and not isinstance(sample_shape, str | bytes)
    if not whole or not all(is_integer(size) and size >= 0 for size in sample_shape):
        such = f"({sample_shape},)" if is_integer(sample_shape) else "(5,)"
        raise TypeError(f"Flow: sample_shape must be a tuple of sizes, such as {such}, got {quoted(sample_shape)}.")
    return Size(sample_shape)
