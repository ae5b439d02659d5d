"""Rules for what ``torch.func.vmap`` refuses though single runs can do it, local to one run of a program.

Distributions of torch and Pyro write into new tensors, branch on their parameters, fill empty tensors at random, or
read ``tensor.data``.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from pyro.ops import special
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors

INSTALLED = "site-packages", "dist-packages"  # folders of libraries


class DrawsDiffer(RuntimeError):
    """A library branches on a value that differs between draws."""


def is_refusal(error: Exception) -> bool:
    """True if vmap refused what a program does, or if draws differ in a branch of a library."""
    return isinstance(error, DrawsDiffer) or (isinstance(error, RuntimeError) and str(error).startswith("vmap: "))


class VmapRules(TorchFunctionMode):
    """Rules for one run of a program under vmap.

    * A write into a tensor that the run has created, and that is the same for all draws, makes one of each draw of it.
      Random writes count.
    * A branch of a library is taken if all draws agree on it.  Branches of users are refused, since the few draws that
      choose an engine may agree by chance.
    * Pyro's ``safe_log``, for hidden Markov models, has no rule for vmap and gets one.

    Args:
        draw: The index of the draw, a tensor that differs between draws.
    """

    def __init__(self, draw: Tensor) -> None:
        super().__init__()
        self._draw = draw
        self._created: dict[int, Tensor] = {}

    def __enter__(self) -> VmapRules:
        self._safe_log, special._SafeLog = special._SafeLog, _SafeLog
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        special._SafeLog = self._safe_log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DATA:
            return args[0].detach()
        if func is Tensor.__format__:
            return "a number per draw"
        if func in _READS and _is_library(sys._getframe(1)):
            args = tuple(map(_common, args))
        if func is Tensor.__getitem__ and isinstance(args[1], slice):
            args = args[0], slice(*map(_common, (args[1].start, args[1].stop, args[1].step)))
        if func in _EQUAL:
            return args[0].shape == args[1].shape and bool(_common((args[0] == args[1]).all()))
        if func is Tensor.__setitem__ and _is_fill(*args):
            func = Tensor.masked_fill_  # vmap has no rule for a mask as an index
        found = self._written(func, args, kwargs or {})
        if func in _CREATORS:
            self._created[id(found)] = found
        return found

    def _written(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function; if it fails to write into a tensor of this run, let the tensor differ between draws."""
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if not args or self._created.pop(id(args[0]), None) is None:
                raise
            swap_tensors(args[0], torch.where(self._draw >= 0, args[0], args[0]))
            return func(*args, **kwargs)


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_READS = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item, torch.arange}
_EQUAL = torch.equal, Tensor.equal
_LIKE = torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like
_NEW = Tensor.new, Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor
_CREATORS = {torch.tensor, torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, *_LIKE, *_NEW}
_CREATORS |= {torch.clone, Tensor.clone}


def _is_library(frame: FrameType) -> bool:
    return any(folder in frame.f_code.co_filename for folder in INSTALLED)


def _is_fill(written: Tensor, index: Any, value: Any) -> bool:
    """True if an assignment puts one number wherever a mask of the tensor's shape is True."""
    is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and index.shape == written.shape
    return is_mask and not isinstance(value, Tensor)


def _common(value: Any) -> Any:
    return _Common.apply(value) if isinstance(value, Tensor) else value


class _Common(torch.autograd.Function):
    """The value that all draws have in common."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, None]:
        rows = x.movedim(in_dims[0], 0)
        if (rows != rows[:1]).any():
            raise DrawsDiffer("draws differ in a value on which a library branches")
        return rows[0].detach().clone(), None


class _SafeLog(special._SafeLog):
    """Pyro's logarithm, whose gradient is finite at 0, with a rule for vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
