"""Log-densities over vectors, and what to do where one breaks down."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode

from ..threads import Threads

LogDensity = Callable[[Tensor], Tensor]  # (N, D) -> (N,), in nats


class NonFiniteDraw(FloatingPointError):
    """A guide's draw is not finite, and so would be the loss of the step: ``fit_svi`` skips it as such a step."""


def or_nan(density: LogDensity) -> LogDensity:
    """A density that is NaN where the model breaks down; the draws at fault are found by halving, if it must be."""

    def guarded(z: Tensor) -> Tensor:
        for mode in (contextlib.nullcontext(), _Singular()):
            try:
                with pyro.validation_enabled(False), mode:
                    return density(z)
            except (ValueError, LinAlgError, FloatingPointError) as error:
                if not is_breakdown(error):
                    raise
                if not isinstance(error, LinAlgError):
                    break
        if len(z) == 1:
            return z.sum(-1) * math.nan
        return torch.cat([guarded(half) for half in z.chunk(2)])

    return guarded


class _Singular(TorchFunctionMode):
    """Lets matrices that have no factor or inverse have one of NaN, in place of an error for all of a batch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (*_FACTORS, *_INVERSES):
            return func(*args, **kwargs)
        matrix, upper = _bound(*args, **kwargs)
        if func in _FACTORS:
            factor, fault = torch.linalg.cholesky_ex(matrix, upper=upper)
            return factor.masked_fill((fault != 0)[..., None, None], math.nan)
        singular = (matrix.diagonal(dim1=-2, dim2=-1) == 0).any(-1)
        return torch.cholesky_inverse(matrix.masked_fill(singular[..., None, None], math.nan), upper=upper)


def _bound(input: Tensor, upper: bool = False) -> tuple[Tensor, bool]:
    return input, upper


_FACTORS = torch.linalg.cholesky, torch.cholesky, torch.Tensor.cholesky
_INVERSES = torch.cholesky_inverse, torch.Tensor.cholesky_inverse


def is_breakdown(error: Exception) -> bool:
    """Whether a draw was so far out that a distribution refused its parameters, a matrix was not positive definite, or
    an equation could not be solved: it counts as one whose density is not finite."""
    broken = isinstance(error, ValueError) and "invalid values" in str(error)
    return broken or isinstance(error, LinAlgError | FloatingPointError)


def value_and_score(density: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return a log-density, ``(N,)``, and its gradient, ``(N, D)``."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = density(leaf)
        total = value.sum()
        score = torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(leaf)
    return value.detach(), score


def score_of(density: LogDensity, z: Tensor) -> Tensor:
    """Return the gradient of a log-density, ``(N, D)``."""
    return value_and_score(density, z)[1]


def number_of_parts(number: int, size: int) -> int:
    """Return into how many parts of about a size some vectors are divided."""
    return max(1, round(number / size))


def in_parts(density: LogDensity, size: int, threads: Threads) -> LogDensity:
    """Return a log-density that finds its gradient part by part, so that the graph of one part alone is in memory.

    The gradient has none of its own.

    Args:
        density: The log-density.
        size: About how many vectors make a part, at most half as many again; parts are work for several threads.
        threads: The number of these.
    """

    def parted(z: Tensor) -> Tensor:
        if 2 * len(z) > size and torch.is_grad_enabled() and z.requires_grad:
            return _InParts.apply(density, size, threads, z)
        return density(z)

    return parted


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, density: LogDensity, size: int, threads: Threads, z: Tensor) -> Tensor:
        found = []
        for part in z.tensor_split(number_of_parts(len(z), size)):
            with threads.turn(len(part)):
                found.append(value_and_score(density, part))
        values, scores = zip(*found, strict=True)
        ctx.save_for_backward(torch.cat(scores))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_log_p: Tensor) -> tuple[None, None, None, Tensor]:
        (score,) = ctx.saved_tensors
        return None, None, None, of_log_p.unsqueeze(-1) * score
