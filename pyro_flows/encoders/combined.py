"""Encoders made of other networks: of some of the model's arguments, of several networks, of single numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import is_integer, quoted
from ..user_code import warn_user
from .training_record import judges, records

Network = Callable[..., Tensor]


class Arguments(nn.Module):
    """A network of some of the model's arguments; a guide calls its encoder with all of them.

    An argument is told by its position in the signature of the model, from 0, or by its name.  An argument that a call
    leaves out is None, which is an error if all of training has given it.

    Args:
        network: A network or function from these arguments to contexts.
        *positions: The positions or names of the arguments that ``network`` takes by position.
        **named: The positions or names of the arguments that it takes by name.

    Raises:
        TypeError: If ``network`` cannot be called, or a position is neither an integer of at least 0 nor a name.
        ValueError: If there are no positions.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_flows import AutoFlow
        >>> from pyro_flows.encoders import SetEncoder
        >>> def model(n, x=None, mask=None):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     mask = pyro.sample("mask", dist.Bernoulli(0.7).expand([n]).to_event(1), obs=mask)
        ...     values = dist.Normal(mean[..., None, None].expand(*mask.shape, 1), 1.0).mask(mask[..., None].bool())
        ...     return pyro.sample("x", values.to_event(2), obs=x)
        >>> guide = AutoFlow(model, encoder=Arguments(SetEncoder(1, context_dim=4), 1, mask=2))
        >>> x, mask = torch.randn(20, 1), torch.arange(20) < 15
        >>> guide.sample(5, 20, x, mask)["mean"].shape
        torch.Size([5])
        >>> Arguments(SetEncoder(1, context_dim=4), 1.5)
        Traceback (most recent call last):
        TypeError: Arguments: positions must be integers of at least 0 or names of arguments of the model, got 1.5.
    """

    seen: Tensor  # for each argument, whether training left it out and whether it gave it

    def __init__(self, network: Network, /, *positions: int | str, **named: int | str) -> None:
        super().__init__()
        _check_network("Arguments: network", network)
        for name, place in [*(("positions", place) for place in positions), *named.items()]:
            if not (isinstance(place, str) or is_integer(place, 0)):
                must = "integers of at least 0 or names of arguments of the model"
                raise TypeError(f"Arguments: {name} must be {must}, got {quoted(place)}.")
        if not positions and not named:
            raise ValueError("Arguments: positions must name an argument of the model, got none. Give 0 for the first.")
        self.network, self.positions, self.named = network, positions, named
        self.register_buffer("seen", torch.zeros(len(positions) + len(named), 2, dtype=torch.bool))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Encode some of the arguments.

        Args:
            *args: The positional arguments of the model, in its order.
            **kwargs: Its keyword-only arguments.

        Returns:
            The contexts of the network, ``(*batch, context_dim)``.

        Raises:
            ValueError: If an argument is left out that all of training has given, such as a mask.

        Warns:
            UserWarning: If an argument is given that none of training has given.
        """

        def find(place: int | str) -> Any:
            if isinstance(place, str):
                return kwargs.get(place)
            return args[place] if place < len(args) else None

        values, named = [find(place) for place in self.positions], {n: find(place) for n, place in self.named.items()}
        self._check_given([*values, *named.values()])
        return self.network(*values, **named)

    def _check_given(self, values: Sequence[Any]) -> None:
        """Record in a fit which arguments are given, and compare with it in use."""
        given = [value is not None for value in values]
        if records():
            self.seen |= torch.tensor([[not one, one] for one in given], device=self.seen.device)
        if not judges():
            return
        labels = [*map(_label, self.positions), *(f"{name} ({_label(place)})" for name, place in self.named.items())]
        for label, one, (left_out, was_given) in zip(labels, given, self.seen.tolist(), strict=True):
            if one and left_out and not was_given:
                warn_user(f"Arguments: {label} was never given in training. Leave it out, or train with it.")
            if was_given and not (left_out or one):
                way = "Give ones if nothing is missing" if label.startswith("mask") else "Give it"
                raise ValueError(f"Arguments: {label} must be given, as in all of training, got None. {way}.")


class Joined(nn.Module):
    """Several encoders of the same arguments, whose contexts follow one another in one vector.

    Each gets all arguments of the model, or those that :class:`Arguments` chooses.

    Args:
        networks: The networks or functions, at least one.

    Raises:
        TypeError: If one of them cannot be called.
        ValueError: If ``networks`` is empty.  In use, if the batches of the contexts differ.

    Example::

        >>> import torch
        >>> from pyro_flows.encoders import Arguments, MLPEncoder, SetEncoder
        >>> encoder = Joined([Arguments(MLPEncoder(3, context_dim=4), 0), Arguments(SetEncoder(2, context_dim=8), 1)])
        >>> encoder(torch.randn(5, 3), torch.randn(5, 20, 2)).shape
        torch.Size([5, 12])
    """

    def __init__(self, networks: Sequence[Network]) -> None:
        super().__init__()
        if not networks:
            raise ValueError("Joined: networks must hold at least one network, got none.")
        for place, network in enumerate(networks):
            _check_network("Joined: networks", network)
            if isinstance(network, nn.Module):
                self.add_module(str(place), network)
        self.networks = tuple(networks)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Encode the arguments.

        Args:
            *args: The positional arguments of the model, in its order.
            **kwargs: Its keyword-only arguments.

        Returns:
            The contexts of the networks, ``(*batch, context_dim)``.
        """
        return self.join([network(*args, **kwargs) for network in self.networks])

    def join(self, contexts: Sequence[Tensor]) -> Tensor:
        """Return the contexts of all networks in one vector, ``(*batch, context_dim)``."""
        if len({context.shape[:-1] for context in contexts}) > 1:
            shapes = ", ".join(str(tuple(context.shape)) for context in contexts)
            raise ValueError(f"Joined: networks must return contexts of one batch (*batch, n), got shapes {shapes}.")
        return torch.cat(list(contexts), -1)


class Scalars(nn.Module):
    """An encoder of series or sets whose elements are single numbers, ``(*batch, n)``.

    Args:
        network: An encoder of elements with one feature each, ``(*batch, n, 1)``.

    Raises:
        TypeError: If ``network`` cannot be called.

    Example::

        >>> import torch
        >>> from pyro_flows.encoders import GRUEncoder
        >>> encoder = Scalars(GRUEncoder(1, context_dim=8))
        >>> encoder(torch.randn(5, 30), mask=torch.rand(5, 30) < 0.9).shape
        torch.Size([5, 8])
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        _check_network("Scalars: network", network)
        self.network = network

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Encode series or sets.

        Args:
            x: Data of shape ``(*batch, n)``.
            *args: Further arguments of the network, such as times and masks.
            **kwargs: Its keyword arguments.

        Returns:
            The contexts of the network, ``(*batch, context_dim)``.

        Raises:
            ValueError: If the data are a single number.
        """
        if not x.dim():
            raise ValueError("Scalars: data must have shape (*batch, n), got ().")
        return self.network(x.unsqueeze(-1), *args, **kwargs)


def _check_network(name: str, network: object) -> None:
    if isinstance(network, type) or not callable(network):
        raise TypeError(f"{name} must be a network or a function, got {quoted(network)}.")


def _label(place: int | str) -> str:
    return repr(place) if isinstance(place, str) else f"argument {place} of the model"
