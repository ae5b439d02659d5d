"""The base class of encoders, networks c = f(x) from data to a context vector, and the standardisation of data."""

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import as_shape


class Standardize(nn.Module):
    """A fixed affine map of each feature, z = (x - loc) / scale, the identity until ``initialize`` has seen data.

    Location and scale are parameters, so that parameter stores and checkpoints contain them.  They have no gradient.

    Efficient BackProp (LeCun, Bottou, Orr, Müller 1998, section 4.3).

    Args:
        shape: The shape of location and scale, which are the last dimensions of the data.  A size of 1 is shared along
            its dimension, so that ``(channels, 1, 1)`` gives an image one pair for each channel.

    Example::

        >>> import torch
        >>> standardize = Standardize((2,))
        >>> standardize.initialize(torch.tensor([[2, 5], [6, 5]]))
        >>> standardize.loc.tolist(), standardize.scale.tolist()
        ([4.0, 5.0], [2.0, 1.0])
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
        """True if it is still the identity."""
        return bool((self.loc == 0).all() and (self.scale == 1).all())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Standardise data.

        Args:
            x: Data of shape ``(*batch, *shape)``, with any size in place of a size of 1 in ``shape``; of any real
                dtype.
            mask: Of shape ``batch``, or of the shape of x; only :meth:`initialize` uses it.

        Returns:
            Of the shape of x and the dtype of this module.

        Raises:
            ValueError: If the data do not end with ``shape``.
        """
        self._check(x)
        return (x.to(self.loc.dtype) - self.loc.detach()) / self.scale.detach()

    @torch.no_grad()
    def initialize(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Set location and scale to the mean and the standard deviation of data.

        A feature that is constant in the data gets the scale 1.  A feature that the mask hides everywhere keeps the
        location 0 too.

        Args:
            x: Data of shape ``(*batch, *shape)``, at least one row.
            mask: Boolean.  Of shape ``batch``: only the rows where it is True count.  Of the shape of x: only the
                entries where it is True count.

        Raises:
            ValueError: If the data do not fit ``shape``, are empty, or hold values that are NaN or infinite in the
                dtype of this module.
        """
        self._check(x)
        mask = torch.ones((), dtype=torch.bool) if mask is None else mask.cpu()
        counts = mask.reshape(*mask.shape, *(1,) * (x.dim() - mask.dim())).expand(x.shape)
        # First in the network's own dtype, which is what it will use; then the sums in full precision, on the CPU,
        # since not every device has float64.
        seen = x.to(self.loc.dtype).to("cpu", torch.float64)
        bad, number = int((counts & ~seen.isfinite()).sum()), int(counts.sum())
        if not number:
            raise ValueError(f"Standardize: data must hold at least one row, got the shape {tuple(x.shape)}.")
        if bad:
            got = f"{bad} NaN or infinite of {number}"
            raise ValueError(f"Standardize: data must be finite in {self.loc.dtype}, got {got}.")
        # What does not count is NaN, which the sums below leave out.
        rows = seen.masked_fill(~counts, torch.nan).reshape(-1, *x.shape[x.dim() - len(self.shape) :])
        shared = (0, *(place for place, size in enumerate(self.shape, start=1) if size == 1))
        low = rows.nan_to_num(nan=torch.inf).amin(shared, keepdim=True)[0]
        high = rows.nan_to_num(nan=-torch.inf).amax(shared, keepdim=True)[0]
        # Round-off must not push the mean out of the data: a constant feature would seem to vary.
        loc = rows.nanmean(shared, keepdim=True)[0].clamp(low, high)
        spread = torch.where(high > low, high - low, 1.0)  # divided out, lest the squares of huge values overflow
        relative = ((rows - loc) / spread).square().nanmean(shared, keepdim=True)[0].sqrt()
        scale = (relative * spread).to(self.scale.dtype)
        self.loc.copy_(loc.nan_to_num(nan=0.0))
        self.scale.copy_(torch.where(scale > 0, scale, 1.0))

    def _check(self, x: Tensor) -> None:
        if not ends_with(x, [None if size == 1 else size for size in self.shape]):
            raise ValueError(f"Standardize: data must end with the shape {self.shape}, got {tuple(x.shape)}.")


class Encoder(nn.Module):
    """A network c = f(x) that maps each row of the data to ``context_dim`` numbers, a learned summary.

    Amortised inference conditions one flow on the summary.  This class is the abstract base of our encoders.  Flows and
    guides take any ``torch.nn.Module`` from data to contexts.  Rows are independent: a row's context is the same in any
    batch.  Data of any real dtype, integers and bools included, are converted to the network's own.

    A subclass calls ``super().__init__`` and defines :meth:`forward`.  This first calls :meth:`check_data`.  Then it
    passes the data, and optionally a mask, to ``self.standardize``, which :meth:`initialize` sets from these arguments.

    BayesFlow: Learning Complex Stochastic Models with Invertible Neural Networks (Radev et al. 2020, arXiv:2003.06281).

    Args:
        data_shape: The shape of one row; None is any size, such as the size of a set.
        context_dim: The width of the context.
        standardize: The layer that gives data mean 0 and standard deviation 1; ``initialize`` sets it.

    Example::

        >>> import torch
        >>> from pyro_flows.encoders import Standardize
        >>> class MeanAndSpread(Encoder):  # of series of any length
        ...     def __init__(self):
        ...         super().__init__((None,), context_dim=2, standardize=Standardize((1,)))
        ...     def forward(self, x):
        ...         self.check_data(x)
        ...         z = self.standardize(x)
        ...         return torch.stack((z.mean(-1), z.std(-1)), -1)
        >>> encoder = MeanAndSpread()
        >>> encoder.initialize(torch.tensor([[2, 4, 6], [12, 14, 16]]))
        >>> encoder.standardize.loc.item()
        9.0
        >>> encoder(torch.full((5, 100), 9)).shape
        torch.Size([5, 2])
        >>> encoder(torch.tensor(9.0))
        Traceback (most recent call last):
        ValueError: MeanAndSpread: data must have shape (*batch, n), got ().
    """

    def __init__(self, data_shape: Sequence[int | None], context_dim: int, standardize: Standardize) -> None:
        super().__init__()
        self.data_shape, self.context_dim = tuple(data_shape), context_dim
        self.standardize = standardize

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Encode data.

        Args:
            x: Data of shape ``(*batch, *data_shape)``, of any real dtype, with any number of batch dimensions, zero
                included.

        Returns:
            Contexts of shape ``(*batch, context_dim)``.

        Raises:
            ValueError: If the data do not end with ``data_shape``.
        """

    def initialize(self, *data: Any, **named: Any) -> None:
        """Set the standardisation from data, once, before training.

        Every ``Standardize`` layer is set from the data that ``forward`` passes to it.

        Args:
            *data: The arguments of ``forward``, such as a batch of data ``(*batch, *data_shape)``.
            **named: Keyword arguments of ``forward``.

        Raises:
            ValueError: If the data do not end with ``data_shape``, are empty, or hold NaN or infinite values.
        """
        with learning([part for part in self.modules() if isinstance(part, Standardize)]):
            self(*data, **named)

    def check_data(self, x: Tensor) -> None:
        """Check the shape of data.

        Args:
            x: Data of shape ``(*batch, *data_shape)``.

        Raises:
            ValueError: If they do not end with ``data_shape``.  The message states both shapes.
        """
        if not ends_with(x, self.data_shape):
            wanted = ", ".join("n" if size is None else str(size) for size in self.data_shape)
            name = type(self).__name__
            has_numbers = self.data_shape == (None, 1) and x.dim()
            way = f" If each element is one number, give Scalars({name}(...))." if has_numbers else ""
            raise ValueError(f"{name}: data must have shape (*batch, {wanted}), got {tuple(x.shape)}.{way}")


def ends_with(x: Tensor, shape: Sequence[int | None]) -> bool:
    """True if the last dimensions of data have a shape, in which None is any size."""
    start = x.dim() - len(shape)
    return start >= 0 and all(size in (None, given) for size, given in zip(shape, x.shape[start:], strict=True))


@contextlib.contextmanager
def learning(parts: Sequence[Standardize]) -> Iterator[None]:
    """Set each part from the data that reach it in a block, and leave the block once all of them are set.

    The block runs a network on all of the data at once, and later layers could need more memory than there is.
    """
    waiting = set(parts)

    def learn(part: Standardize, inputs: tuple[Tensor, ...]) -> None:
        if part in waiting:
            part.initialize(*inputs)
            waiting.remove(part)
        if not waiting:
            raise _AllSet

    with contextlib.ExitStack() as hooks, contextlib.suppress(_AllSet), torch.no_grad():
        for part in parts:
            hooks.enter_context(part.register_forward_pre_hook(learn))
        yield


class _AllSet(BaseException):
    """Signal that ends the block of :func:`learning`; ``except Exception`` in a network does not catch it."""


@contextlib.contextmanager
def at_rest(encoder: Any) -> Iterator[None]:
    """Put a network into evaluation mode for a block, without dropout or batch statistics; then restore its modes."""
    modes = {part: part.training for part in encoder.modules()} if isinstance(encoder, nn.Module) else {}
    if any(modes.values()):
        encoder.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
