"""The contract of an encoder: a network from data to a context vector, c = f(x).

Amortised inference conditions one flow on c, so c is to say about x what matters for the latents: a learned summary.
BayesFlow: Learning Complex Stochastic Models with Invertible Neural Networks (Radev et al. 2020, arXiv:2003.06281).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .standardize import Standardize, ends_with, learning


class Encoder(nn.Module, ABC):
    """A network c = f(x) that turns each row of the data into ``context_dim`` numbers, a learned summary.

    It is the abstract base class of our encoders; flows and guides take any ``torch.nn.Module`` that does as much.
    Rows do not touch each other: a row's context is the same in any batch.  Data of any real dtype, integers and bools
    too, are converted to the network's own.

    A subclass calls ``super().__init__`` and defines :meth:`forward`, which first calls :meth:`check_data`, then sends
    the data through ``self.standardize``, with a mask, if there is one, as its second argument.  From what arrives
    there :meth:`initialize` learns.

    BayesFlow: Learning Complex Stochastic Models with Invertible Neural Networks (Radev et al. 2020, arXiv:2003.06281).

    Args:
        data_shape: The shape of one row; None stands for any size, as that of a set.
        context_dim: The width of the context.
        standardize: What brings the data to a mean of 0 and a standard deviation of 1; ``initialize`` sets it.

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

    data_shape: tuple[int | None, ...]
    context_dim: int

    def __init__(self, data_shape: Sequence[int | None], context_dim: int, standardize: Standardize) -> None:
        super().__init__()
        self.data_shape = tuple(data_shape)
        self.context_dim = context_dim
        self.standardize = standardize

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Encode data.

        Args:
            x: Data of shape ``(*batch, *data_shape)``, of any real dtype, with any number of batch dimensions, also
                none.

        Returns:
            Contexts of shape ``(*batch, context_dim)``.

        Raises:
            ValueError: If the data do not end with ``data_shape``.
        """

    def initialize(self, *data: Any, **named: Any) -> None:
        """Let data set the standardisation, once, before training: what :meth:`forward` makes of them first counts.

        Args:
            *data: The arguments of :meth:`forward`, such as a batch of data ``(*batch, *data_shape)``.
            **named: Those by name.

        Raises:
            ValueError: If the data do not end with ``data_shape``, hold nothing, or hold NaN or infinite values.
        """
        with learning([self.standardize]):
            self(*data, **named)

    def check_data(self, x: Tensor) -> None:
        """Check the shape of data.

        Args:
            x: Data of shape ``(*batch, *data_shape)``.

        Raises:
            ValueError: If they do not end with ``data_shape``; it says both shapes.
        """
        if not ends_with(x, self.data_shape, free=None):
            wanted = ", ".join("n" if size is None else str(size) for size in self.data_shape)
            raise ValueError(f"{type(self).__name__}: data must have shape (*batch, {wanted}), got {tuple(x.shape)}.")


@contextlib.contextmanager
def at_rest(encoder: Any) -> Iterator[None]:
    """Let a network answer as it does after training: without dropout, and alike for one row and for many."""
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    flags = [module.training for module in modules]
    if any(flags):
        encoder.eval()
    try:
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
