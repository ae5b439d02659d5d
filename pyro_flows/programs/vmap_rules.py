"""Rules for what ``torch.func.vmap`` refuses though single runs can do it, local to one run of a program.

Distributions of torch and Pyro write into new tensors, branch on their parameters, fill empty tensors at random, or
read ``tensor.data``.
"""

from __future__ import annotations

import copy
import sys
from types import FrameType
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors

INSTALLED = "site-packages", "dist-packages"  # folders of libraries
REFUSALS = "vmap: ", "Batching rule not implemented", "In order to use an autograd.Function"  # torch's first words


class DrawsDiffer(RuntimeError):
    """A library branches on a value that differs between draws."""


def is_refusal(error: Exception) -> bool:
    """True if vmap refused what a program does, or if draws differ in a branch of a library."""
    return isinstance(error, DrawsDiffer) or (isinstance(error, RuntimeError) and str(error).startswith(REFUSALS))


class VmapRules(TorchFunctionMode):
    """Rules for one run of a program under vmap.

    * A write into a tensor that the run has created, and that is the same for all draws, makes one of each draw of it.
      Random writes count.
    * A branch of a library is taken if all draws agree on it.  Branches of users are refused, since the few draws that
      choose an engine may agree by chance.

    Args:
        draw: The index of the draw, a tensor that differs between draws.
    """

    def __init__(self, draw: Tensor) -> None:
        super().__init__()
        self._draw = draw
        self._created: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DATA:
            return args[0].detach()
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
        """Call a function; if it fails to write into a tensor of this run, let the tensor differ between draws.

        A part of such a tensor no longer belongs to it then, since ``x[1:] += y`` assigns the part to its place.
        """
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if func is Tensor.__format__:
                return "a number per draw"
            written = args[0] if args and isinstance(args[0], Tensor) else None
            if written is None or (id(written) not in self._created and id(written._base) not in self._created):
                raise
            self._created.pop(id(written), None)
            swap_tensors(written, torch.where(self._draw >= 0, written, written))
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


def mappable(fn: Any) -> Any:
    """Return a distribution whose log-density runs by vmap: an equal one for hidden Markov models, or the same."""
    if type(fn) is dist.DiscreteHMM:
        return _DiscreteHMM(fn.initial_logits, fn.transition_logits, fn.observation_dist, False, fn.duration)
    base = getattr(fn, "base_dist", None)
    if base is None or (new := mappable(base)) is base:
        return fn
    other = copy.copy(fn)
    other.base_dist = new
    return other


class _DiscreteHMM(dist.DiscreteHMM):
    """Pyro's hidden Markov model without its ``safe_log``, a function that has no rule for vmap."""

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.unsqueeze(-1 - self.observation_dist.event_dim)
        steps = self.transition_logits + self.observation_dist.log_prob(value).unsqueeze(-2)  # (*batch, T, S, S)
        while (number := steps.shape[-3]) > 1:
            pairs, last = steps[..., : number // 2 * 2, :, :], steps[..., number // 2 * 2 :, :, :]
            steps = torch.cat((_log_matmul(pairs[..., ::2, :, :], pairs[..., 1::2, :, :]), last), -3)
        return (self.initial_logits + steps.squeeze(-3).logsumexp(-1)).logsumexp(-1)


def _log_matmul(x: Tensor, y: Tensor) -> Tensor:
    """Return ``log(exp(x) @ exp(y))``, with gradient 0 where it is -inf."""
    least = torch.finfo(x.dtype).min
    x_top, y_top = x.detach().amax(-1, True).clamp(min=least), y.detach().amax(-2, True).clamp(min=least)
    total = (x - x_top).exp() @ (y - y_top).exp()
    never = total == 0
    return total.masked_fill(never, 1.0).log().masked_fill(never, -torch.inf) + x_top + y_top
