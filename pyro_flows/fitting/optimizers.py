"""Optimisers: SOAP for a flow over few latents, Muon for the networks of a flow over many, Adam for all else.

On 218 latents 1,000 steps of Muon for the matrices, and of Adam for the rest, end .07 nats below log Z, and 1,200 of
SOAP .11.  Up to 32 latents 300 steps of SOAP end where 1,000 of Adam do.  Adam: A Method for Stochastic Optimization
(Kingma, Ba 2014, arXiv:1412.6980).
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..training.interrupts import uninterrupted

OTHERS = "others"
# SOAP.
BETAS = 0.9, 0.95  # the decay of the running means of gradients and of their squares
PERIOD = 10  # steps between two updates of the eigenbases
WIDEST = 512  # rows or columns; a longer side of a matrix keeps its basis
DAMPING, EPS = 0.03, 1e-8
# Muon, as in torch.
MOMENTUM = 0.95
COEFFICIENTS, NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315), 5


def optimizers(parameters: list[Tensor], lr: float, *, by_soap: list[Tensor], by_muon: list[Tensor]) -> list[Any]:
    """Return the optimisers that together train all parameters; Adam trains those that no other does.

    Args:
        parameters: The tensors to train.
        lr: The step size.
        by_soap: The tensors for SOAP; those that are not among the parameters are ignored.
        by_muon: The matrices for Muon, likewise.
    """
    soap, muon = set(by_soap), set(by_muon) - set(by_soap)
    rest = [parameter for parameter in parameters if parameter not in soap | muon]
    with uninterrupted():  # the first optimiser imports the compiler
        found: list[Any] = [torch.optim.Adam(rest, lr=lr, fused=True)] if rest else []
    parts = ((kind, [p for p in parameters if p in own]) for kind, own in ((SOAP, soap), (Muon, muon)))
    return [*found, *(kind(part, lr) for kind, part in parts if part)]


class Stacked:
    """Optimiser that moves all matrices of one shape together, as one stack, since flows have many small ones.

    It is not a ``torch.optim.Optimizer``: making the first of these imports the compiler, in almost a second.

    Args:
        parameters: The tensors to train.
        lr: The step size.
    """

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": lr}]
        self.state: dict[str, dict[str, Any]] = {}  # of the matrices of each shape, and of all other tensors

    def state_dict(self) -> dict[str, Any]:
        """Return the state, whose tensors are those in use."""
        return {shape: dict(state) for shape, state in self.state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.state = copy.deepcopy(state)

    @torch.no_grad()
    def step(self) -> None:
        """Move all parameters that have a gradient."""
        alike: dict[str, list[Tensor]] = {}
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                shape = "x".join(map(str, parameter.shape)) if parameter.dim() == 2 else OTHERS
                alike.setdefault(shape, []).append(parameter)
        for shape, members in alike.items():
            is_matrix, gradients = shape != OTHERS, [member.grad for member in members if member.grad is not None]
            stack = torch.stack(gradients) if is_matrix else torch.cat([gradient.reshape(-1) for gradient in gradients])
            state = self.state.setdefault(shape, {})
            if not state or state["mean"].shape != stack.shape:  # new, or other parameters have gradients now
                state.clear()
                state.update(count=0)
            state["count"] += 1
            move, scale = self._move(state, stack, is_matrix)
            parts = move.unbind() if is_matrix else move.split([member.numel() for member in members])
            moves = [part.reshape(member.shape) for part, member in zip(parts, members, strict=True)]
            torch._foreach_add_(members, moves, alpha=-self.param_groups[0]["lr"] * scale)

    def _move(self, state: dict[str, Any], stack: Tensor, is_matrix: bool) -> tuple[Tensor, float]:
        """Return the moves of a stack ``(N, n, m)``, or of a vector ``(n,)`` of all other tensors, and their scale.

        ``state["mean"]`` is a running mean of the gradients.
        """
        raise NotImplementedError


class SOAP(Stacked):
    """Adam in the eigenbases of the gradients of matrices, and Adam for all other tensors.

    For a weight matrix with gradients G, running means of G Gᵀ and Gᵀ G have eigenvectors Q_L and Q_R.  Adam takes its
    steps on Q_Lᵀ G Q_R, and these are rotated back.  Directions that a network shares between its units then converge
    at the same rate.  A fit of an ``AutoFlow`` needs a third of Adam's steps.  One step of power iteration and a QR
    decomposition update the eigenvectors every few steps.  All this is in single precision: it chooses a direction.

    The size of gradients that Adam divides by is damped by 3 % of its root mean square.  Directions with almost no
    gradient, such as those that only extreme draws depend on, would otherwise move at random.  The tails of weights
    would then grow heavy (k-hat 0.7 instead of 0.4 on a banana), and splines would diverge.

    The settings suit fits of some hundred steps, so the means of squares are shorter than Adam's.  SOAP: Improving and
    Stabilizing Shampoo using Adam (Vyas, Morwani, Zhao, Shapira, Brandfonbrener, Janson, Kakade 2024,
    arXiv:2409.11321); Shampoo (Gupta, Koren, Singer 2018, arXiv:1802.09568).

    Args:
        parameters: The tensors to train.
        lr: The step size.

    Example::

        >>> weight = torch.nn.Parameter(torch.ones(3, 2))
        >>> optimizer = SOAP([weight], lr=0.1)
        >>> for _ in range(100):
        ...     weight.grad = None
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> bool(weight.abs().max() < 0.2)
        True
    """

    def _move(self, state: dict[str, Any], stack: Tensor, is_matrix: bool) -> tuple[Tensor, float]:
        stack, (first, second), count = stack.float(), BETAS, state["count"]
        if count == 1:
            state.update(mean=torch.zeros_like(stack), square=torch.zeros_like(stack))
        bases = _update_bases(state, stack) if is_matrix else (None, None)
        stack = _rotated(stack, *bases)
        mean = state["mean"].lerp_(stack, 1 - first)
        square = state["square"].mul_(second).addcmul_(stack, stack, value=1 - second)
        square = square / (1 - second**count)
        least = DAMPING * square.mean((-1, -2) if is_matrix else -1, keepdim=True).sqrt()
        move = (mean / (1 - first**count)).div_(square.sqrt_().add_(least).add_(EPS))
        return _rotated(move, *(None if basis is None else basis.mT for basis in bases)), 1.0


def _update_bases(state: dict[str, Any], stack: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Include gradients ``(N, n, m)``; return the eigenbases of their rows ``(N, n, n)`` and columns ``(N, m, m)``."""
    for side, factor in (("rows", stack), ("columns", stack.mT)):
        if not 1 < factor.shape[1] <= WIDEST:
            continue
        square = factor @ factor.mT
        if side not in state:
            basis = torch.linalg.eigh(square).eigenvectors.contiguous()
            state[side], state[f"{side} basis"] = square * (1 - BETAS[1]), basis
            continue
        state[side].lerp_(square, 1 - BETAS[1])
        if state["count"] % PERIOD == 0:
            before = state[f"{side} basis"]
            after = torch.linalg.qr(state[side] @ before).Q.contiguous()
            turn, mean = after.mT @ before, state["mean"]
            state["mean"] = turn @ mean if side == "rows" else mean @ turn.mT
            state[f"{side} basis"] = after
    return state.get("rows basis"), state.get("columns basis")


def _rotated(stack: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return matrices ``(N, n, m)`` in other bases, Q_Lᵀ G Q_R."""
    stack = stack if rows is None else rows.mT @ stack
    return stack if columns is None else stack @ columns


class Muon(Stacked):
    """The steps of ``torch.optim.Muon`` (torch 2.9 and newer), without weight decay.

    Muon (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982) replaces the momentum of a matrix by the nearest matrix
    with orthonormal rows or columns.  All directions of a layer then converge at the same rate, including those with
    small gradients.  Momentum, coefficients and number of Newton–Schulz steps are torch's defaults.
    """

    def _move(self, state: dict[str, Any], stack: Tensor, is_matrix: bool) -> tuple[Tensor, float]:
        if state["count"] == 1:
            state["mean"] = torch.zeros_like(stack)
        momentum = state["mean"].lerp_(stack, 1 - MOMENTUM)
        rows, columns = stack.shape[1:]
        return _orthonormal(stack.lerp(momentum, MOMENTUM)), math.sqrt(max(1, rows / columns))


def _orthonormal(matrices: Tensor) -> Tensor:
    """Return matrices ``(N, rows, columns)`` with singular values of about one, by Newton–Schulz steps."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).float()  # an approximation anyway
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(NEWTON_SCHULZ):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
