"""Bring data to a mean of 0 and a standard deviation of 1, where networks learn fast: z = (x - loc) / scale.

Efficient BackProp (LeCun, Bottou, Orr, Müller 1998, section 4.3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..arguments import as_shape


class Standardize(nn.Module):
    """A fixed affine map of each feature, z = (x - loc) / scale, the identity until ``initialize`` has seen data.

    Location and scale are parameters, so that parameter stores and checkpoints hold them, but no gradient reaches them.

    Efficient BackProp (LeCun, Bottou, Orr, Müller 1998, section 4.3).

    Args:
        shape: The shape of location and scale, that of the last dimensions of the data; a size of 1 is shared by all
            that lies along its dimension, so that ``(channels, 1, 1)`` gives an image one pair for each channel.

    Example::

        >>> import torch
        >>> standardize = Standardize((2,))
        >>> standardize.initialize(torch.tensor([[2, 5], [6, 5]]))
        >>> standardize
        Standardize((2,), loc=[4, 5], scale=[2, 1])
        >>> standardize(torch.tensor([[2, 5], [6, 5]])).tolist()
        [[-1.0, 0.0], [1.0, 0.0]]
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(as_shape("Standardize", "shape", shape))
        self.loc = nn.Parameter(torch.zeros(self.shape))
        self.scale = nn.Parameter(torch.ones(self.shape))

    @property
    def is_fresh(self) -> bool:
        """Whether it is still the identity."""
        return bool((self.loc == 0).all() and (self.scale == 1).all())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Standardise data.

        Args:
            x: Data of shape ``(*batch, *shape)``, where a size of 1 in ``shape`` stands for any; of any real dtype.
            mask: Of shape ``batch``; it changes nothing here, but what it leaves out does not count for
                :meth:`initialize`.

        Returns:
            Of the shape of x and the dtype of this module.

        Raises:
            ValueError: If the data do not end with ``shape``.
        """
        self._trailing(x)
        return (x.to(self.loc.dtype) - self.loc.detach()) / self.scale.detach()

    @torch.no_grad()
    def initialize(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set location and scale to the mean and the standard deviation of data.

        A feature that is constant in the data gets the scale 1.

        Args:
            x: Data of shape ``(*batch, *shape)``, at least one row.
            mask: Of shape ``batch`` and boolean; only the rows where it is True count.

        Raises:
            ValueError: If the data do not fit ``shape``, hold nothing, or hold values that are NaN or infinite in the
                dtype of this module.
        """
        x = x if mask is None else x[mask]
        trailing = self._trailing(x)
        if x.numel() == 0:
            raise ValueError(f"Standardize: data must hold at least one row, got the shape {tuple(x.shape)}.")
        # In the network's own dtype first, since that is what it will see; then the sums in full precision, on the CPU,
        # as not every device has float64.
        x = x.to(self.loc.dtype).to("cpu", torch.float64)
        if bad := x.numel() - int(x.isfinite().sum()):
            got = f"{bad} NaN or infinite of {x.numel()}"
            raise ValueError(f"Standardize: data must be finite in {self.loc.dtype}, got {got}.")
        rows = x.reshape(-1, *trailing)
        shared = (0, *(place for place, size in enumerate(self.shape, start=1) if size == 1))
        low, high = rows.amin(shared).reshape(self.shape), rows.amax(shared).reshape(self.shape)
        # Round-off must not push the mean out of the data: a constant feature would seem to vary.
        loc = rows.mean(shared).reshape(self.shape).clamp(low, high)
        spread = torch.where(high > low, high - low, 1.0)  # divided out, lest the squares of huge values overflow
        relative = ((rows - loc) / spread).square().mean(shared).reshape(self.shape).sqrt()
        scale = (relative * spread).to(self.scale.dtype)
        self.loc.copy_(loc)
        self.scale.copy_(torch.where(scale > 0, scale, 1.0))

    def _trailing(self, x: Tensor) -> torch.Size:
        """The sizes of the last dimensions of data, which must be those of ``shape``."""
        if not ends_with(x, self.shape, free=1):
            raise ValueError(f"Standardize: data must end with the shape {self.shape}, got {tuple(x.shape)}.")
        return x.shape[x.dim() - len(self.shape) :]

    def extra_repr(self) -> str:
        return f"{self.shape}, loc={_brief(self.loc)}, scale={_brief(self.scale)}"


def ends_with(x: Tensor, shape: Sequence[int | None], *, free: int | None) -> bool:
    """True if data end with a shape, in which ``free`` stands for any size."""
    start = x.dim() - len(shape)
    return start >= 0 and all(size in (free, given) for size, given in zip(shape, x.shape[start:], strict=True))


@contextlib.contextmanager
def learning(parts: Sequence[Standardize]) -> Iterator[None]:
    """Let what reaches some parts of a network set them; the rest of it does not run once all of them are."""
    waiting = set(parts)

    def learn(part: Standardize, inputs: tuple[Tensor, ...]) -> None:
        if part in waiting:
            part.initialize(*inputs)
            waiting.remove(part)
        if not waiting:
            raise _Enough

    hooks = [part.register_forward_pre_hook(learn) for part in parts]
    try:
        with torch.no_grad():
            yield
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()


class _Enough(BaseException):
    """All have seen their data."""


def _brief(values: Tensor) -> str:
    """The first few of many numbers."""
    shown = [f"{value:.4g}" for value in values.flatten()[:4].tolist()]
    return f"[{', '.join(shown + ['…'] * (values.numel() > 4))}]"
