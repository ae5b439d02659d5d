"""Chains of transforms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..arguments import check_kind, quoted
from ..vjp import keeps
from .base import FlowTransform, TwoWay, WithScore, chained


class Compose(TwoWay):
    """A chain of transforms, y = t_n(… t_1(x)), whose log-determinants add up; each network is run once.

    A context reaches the transforms that take one.

    Args:
        transforms: At least one transform; all share one event shape, and those with contexts one ``context_dim``.

    Raises:
        TypeError: If an element is not a transform of this library, such as one of torch's.
        ValueError: If ``transforms`` is empty, or they differ in event shape or in ``context_dim``.

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
        self.domain, self.codomain = transforms[0].domain, transforms[-1].codomain
        self.transforms = nn.ModuleList(transforms)  # type: ignore[assignment]

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return chained(self.transforms, value, context, inverse=inverse)

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> WithScore:
        if not keeps(self, Compose, "forward_and_log_det"):
            return super().forward_and_score(x, score, context)
        total = torch.zeros(())
        for transform in self.transforms:
            x, log_det, score = transform.forward_and_score(x, score, context if transform.context_dim else None)
            total = total + log_det
        return x, total, score

    @torch.no_grad()
    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Initialise each transform from what reaches it when the data ``y`` go back to the base."""
        for transform in reversed(self.transforms):
            own = context if transform.context_dim else None
            transform.initialize(y, own)
            y, _ = transform.inverse_and_log_det(y, own)


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
            fault = f"transforms[{number}] must act on events of shape {tuple(transforms[0].event_shape)}"
            raise ValueError(f"{owner}: {fault}, as transforms[0] does, got {tuple(transform.event_shape)}.")
    sizes = {transform.context_dim for transform in transforms} - {0}
    if len(sizes) > 1:
        raise ValueError(f"{owner}: transforms must share one context_dim, got {sorted(sizes)}.")
    return transforms, sizes.pop() if sizes else 0
