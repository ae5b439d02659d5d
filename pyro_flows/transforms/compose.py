"""Composition: y = t_n(… t_1(x)), log-determinants added, each network run once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..arguments import check_kind, quoted
from ..vjp import keeps
from .base import Carried, FlowTransform, Gradients, Scored


class Compose(FlowTransform):
    """A chain of transforms, y = t_n(… t_1(x)), whose log-determinants add up; each network is run once.

    A context reaches the transforms that take one.

    Args:
        transforms: At least one transform; all share one event shape, and those with contexts one ``context_dim``.

    Raises:
        TypeError: If one of them is no transform of this library, such as one of torch's.
        ValueError: If there are none, or they differ in event shape or in ``context_dim``.

    Example::

        >>> import torch
        >>> from pyro_flows.transforms import ActNorm, Permute
        >>> chain = Compose([Permute([1, 0]), ActNorm(2)])
        >>> y, log_det = chain.forward_and_log_det(torch.tensor([[1.0, 2.0]]))
        >>> y.tolist(), log_det.tolist()
        ([[2.0, 1.0]], [0.0])
    """

    transforms: Sequence[FlowTransform]

    def __init__(self, transforms: Iterable[FlowTransform]) -> None:
        transforms, context_dim = checked_chain("Compose", transforms)
        super().__init__(transforms[0].event_shape, context_dim)
        self.transforms = nn.ModuleList(transforms)  # type: ignore[assignment]

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return chained(self.transforms, x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return chained(self.transforms, y, context, inverse=True)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> Scored:
        if not keeps(self, Compose, "forward_and_log_det"):
            return super().forward_and_score(x, score, context)
        total = torch.zeros(())
        for transform in self.transforms:
            own = context if transform.context_dim else None
            x, log_det, score = transform.forward_and_score(x, score, own)
            total = total + log_det
        return x, total, score

    def carry(self, x: Tensor, score: Tensor) -> Carried:
        if not keeps(self, Compose, "forward_and_log_det", "forward_and_score"):
            return super().carry(x, score)
        return carried_along(self.transforms, x, score)

    @torch.no_grad()
    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Initialise each transform from what reaches it when the data ``y`` go back to the base."""
        for transform in reversed(self.transforms):
            own = context if transform.context_dim else None
            transform.initialize(y, own)
            y, _ = transform.inverse_and_log_det(y, own)


def chained(
    transforms: Sequence[FlowTransform], value: Tensor, context: Tensor | None, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """What transforms, at least one, make of a value, from the first to the last or the way back, and log|det|."""
    total: Tensor | None = None
    for transform in reversed(transforms) if inverse else transforms:
        verb = transform.inverse_and_log_det if inverse else transform.forward_and_log_det
        value, log_det = verb(value, context if transform.context_dim else None)
        total = log_det if total is None else total + log_det
    assert total is not None
    return value, total


def carried_along(transforms: Iterable[FlowTransform], x: Tensor, score: Tensor) -> Carried:
    """Map a value by transforms without contexts and carry its score along, outside of autograd."""
    pulls, total = [], torch.zeros(())
    for transform in transforms:
        x, log_det, score, pull = transform.carry(x, score)
        pulls.append(pull)
        total = total + log_det

    def pull_all(g: Tensor) -> tuple[Tensor, Gradients]:
        found: Gradients = []
        for pull in reversed(pulls):
            g, gradients = pull(g)
            found += gradients
        return g, found

    return Carried(x, total, score, pull_all)


def checked_chain(owner: str, transforms: Iterable[FlowTransform]) -> tuple[list[FlowTransform], int]:
    """Return transforms that fit together, and the context size that they share, 0 if none takes a context."""
    if not isinstance(transforms, Iterable) or isinstance(transforms, str | bytes):
        raise TypeError(f"{owner}: transforms must be a list of transforms, got {quoted(transforms)}.")
    transforms = list(transforms)
    if not transforms:
        raise ValueError(f"{owner}: transforms must not be empty.")
    for number, transform in enumerate(transforms):
        check_kind(owner, FlowTransform, "a pyro_flows transform", **{f"transforms[{number}]": transform})
        if transform.event_shape != transforms[0].event_shape:
            raise ValueError(
                f"{owner}: transforms[{number}] acts on events of shape {tuple(transform.event_shape)}, "
                f"but transforms[0] on {tuple(transforms[0].event_shape)}."
            )
    sizes = {transform.context_dim for transform in transforms} - {0}
    if len(sizes) > 1:
        raise ValueError(f"{owner}: the transforms disagree on context_dim: {sorted(sizes)}.")
    return transforms, sizes.pop() if sizes else 0
