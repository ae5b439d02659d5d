"""The base class of encoders: networks c = f(x) from data to a context vector."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .standardize import Standardize, ends_with, learning


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


@contextlib.contextmanager
def at_rest(encoder: Any) -> Iterator[None]:
    """Put a network into evaluation mode for a block, without dropout or batch statistics; then restore its modes."""
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    flags = [module.training for module in modules]
    if any(flags):
        encoder.eval()
    try:
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
