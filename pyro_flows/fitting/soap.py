"""SOAP: Adam in the eigenbases of each matrix's gradients, for a flow that learns from many draws a step.

For a weight matrix with gradients G, running means of G Gᵀ and Gᵀ G have eigenvectors Q_L and Q_R; Adam takes its steps
on Q_Lᵀ G Q_R, and these are turned back.  Directions that a network shares between its units then learn at one pace.  A
fit of an ``AutoFlow`` ends after a third of Adam's steps where Adam ends.  The eigenvectors are followed by one step of
power iteration and a QR decomposition now and then.  All this is in single precision: it chooses a direction.

The size of gradients that Adam divides by is damped here by 3 % of its root mean square.  Directions whose
gradients are next to nothing, such as those that only draws far out tell of, would else move at random: the tails of
weights then grow heavy (k-hat 0.7 in place of 0.4 on a banana), and splines explode.

SOAP: Improving and Stabilizing Shampoo using Adam (Vyas, Morwani, Zhao, Shapira, Brandfonbrener, Janson, Kakade 2024,
arXiv:2409.11321); Shampoo (Gupta, Koren, Singer 2018, arXiv:1802.09568); Adam (Kingma, Ba 2014, arXiv:1412.6980).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

WIDEST = 512  # rows or columns, beyond which a side of a matrix keeps its own basis
EPS = 1e-8
DAMPING = 0.03
OTHERS = "others"


class SOAP:
    """Adam in the eigenbases of the gradients of matrices, and Adam for all other tensors.

    Matrices of one shape are moved together, as one stack.  The settings suit fits of some hundred steps, so the means
    of squares are shorter than Adam's.  It is no ``torch.optim.Optimizer``: the first of these to be made imports the
    compiler, in most of a second.

    Args:
        parameters: The tensors to train.
        lr: The step size.
        betas: The decay of the running means of gradients and of their squares.
        period: After how many steps the eigenbases are computed anew.

    Example::

        >>> weight = torch.nn.Parameter(torch.ones(3, 2))
        >>> optimizer = SOAP([weight], lr=0.1)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     weight.square().sum().backward()
        ...     optimizer.step()
        >>> bool(weight.abs().max() < 0.2)
        True
    """

    def __init__(
        self, parameters: list[Tensor], lr: float, *, betas: tuple[float, float] = (0.9, 0.95), period: int = 10
    ) -> None:
        group = {"params": list(parameters), "lr": lr, "betas": betas, "period": period}
        self.param_groups: list[dict[str, Any]] = [group]
        self.state: dict[str, dict[str, Any]] = {}  # of the matrices of each shape, and of all other tensors

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state, whose tensors are those in use."""
        return {shape: dict(state) for shape, state in self.state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
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
            self._move(self.param_groups[0], members, shape)

    def _move(self, group: dict[str, Any], members: list[Tensor], shape: str) -> None:
        is_matrix, gradients = shape != OTHERS, [parameter.grad for parameter in members if parameter.grad is not None]
        stack = torch.stack(gradients) if is_matrix else torch.cat([gradient.reshape(-1) for gradient in gradients])
        stack = stack.float()
        state = self.state.setdefault(shape, {})
        if not state or state["mean"].shape != stack.shape:  # new, or other parameters have gradients now
            state.clear()
            state.update(count=0, mean=torch.zeros_like(stack), square=torch.zeros_like(stack))
        state["count"] += 1
        (first, second), count = group["betas"], state["count"]
        bases = self._bases(state, stack, second, group["period"]) if is_matrix else (None, None)
        stack = _turned(stack, *bases)
        mean = state["mean"].lerp_(stack, 1 - first)
        square = state["square"].mul_(second).addcmul_(stack, stack, value=1 - second)
        square = square / (1 - second**count)
        least = DAMPING * square.mean((-1, -2) if is_matrix else -1, keepdim=True).sqrt()
        move = (mean / (1 - first**count)).div_(square.sqrt_().add_(least).add_(EPS))
        move = _turned(move, *(None if basis is None else basis.mT for basis in bases))
        parts = move.unbind() if is_matrix else move.split([parameter.numel() for parameter in members])
        moves = [part.reshape(parameter.shape) for part, parameter in zip(parts, members, strict=True)]
        torch._foreach_add_(members, moves, alpha=-group["lr"])

    def _bases(
        self, state: dict[str, Any], stack: Tensor, decay: float, period: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the eigenbases of the rows and of the columns, ``(N, n, n)``, after a look at new gradients."""
        for side, factor in (("rows", stack), ("columns", stack.mT)):
            if not 1 < factor.shape[1] <= WIDEST:
                continue
            square = factor @ factor.mT
            if side not in state:
                basis = torch.linalg.eigh(square).eigenvectors.contiguous()
                state[side], state[f"{side} basis"] = square * (1 - decay), basis
                continue
            state[side].lerp_(square, 1 - decay)
            if state["count"] % period == 0:
                before = state[f"{side} basis"]
                after = torch.linalg.qr(state[side] @ before).Q.contiguous()
                turn, mean = after.mT @ before, state["mean"]
                state["mean"] = turn @ mean if side == "rows" else mean @ turn.mT
                state[f"{side} basis"] = after
        return state.get("rows basis"), state.get("columns basis")


def _turned(stack: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return matrices ``(N, n, m)`` in other bases, Q_Lᵀ G Q_R."""
    stack = stack if rows is None else rows.mT @ stack
    return stack if columns is None else stack @ columns
