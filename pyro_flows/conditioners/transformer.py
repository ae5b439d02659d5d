"""Causal transformers, the conditioners of autoregressive flows over tokens.

While tokens become known one after the other, the keys and values of the earlier ones are kept, so that all of them
together cost about one pass.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import as_image, as_order, check_integers, require
from ..attention import AttentionLayer
from .base import Conditioner, zero_


class CausalTransformer(Conditioner):
    """A causal transformer from sequences of tokens to the parameters of their numbers: θ_t depends only on x_<t::

        h_t = E x_{t-1} + p_t + U c,    h ← h + attention(norm(h)),    h ← h + V a(W norm(h)),    θ_t = O norm(h_t)

    It takes ``(*batch, T, D)`` to ``(*batch, T, D, num_params)`` and conditions
    :class:`~pyro_flows.transforms.Autoregressive` layers.  Their inverse evaluates it token by token, by
    :class:`Tokens`.

    Attention Is All You Need (Vaswani et al. 2017, arXiv:1706.03762); Normalizing Flows are Capable Generative Models
    (Zhai et al. 2024, arXiv:2412.06329).

    Args:
        length: The number T of tokens, at least 1.
        token_dim: The number D of numbers in a token, at least 1.
        num_params: The number of parameters of each of these (``bijector.num_params``).
        hidden_dim: The width, a multiple of ``num_heads``.
        num_layers: The number of layers, at least 1.
        num_heads: The number of attention heads in each layer, at least 1.
        context_dim: The number of context features, which condition every token; optional with ``context_shape``.
        context_shape: The shape ``(K, H, W)`` of contexts that are flattened images.  Tokens are then T square patches
            of an image.  The part of the context in a token's patch conditions this token and all later ones.
        order: The rank of each token, ``order[t]``; by default their own order.

    Raises:
        ValueError: If a size is out of its range, ``hidden_dim`` is not a multiple of ``num_heads``, ``order`` is not a
            permutation, or ``context_shape`` does not fit ``length`` or ``context_dim``.  In use, if the network takes
            contexts and none is given.

    Example::

        >>> import torch
        >>> net = CausalTransformer(length=6, token_dim=3, num_params=2, hidden_dim=16)
        >>> net(torch.randn(7, 6, 3)).shape
        torch.Size([7, 6, 3, 2])
        >>> _ = torch.nn.init.normal_(net.output.weight)  # as if trained
        >>> x = torch.randn(6, 3)
        >>> change = net(x) - net(x + torch.eye(6)[3].unsqueeze(-1))  # of token 3
        >>> (change.abs().amax((1, 2)) > 1e-3).tolist()
        [False, False, False, False, True, True]
    """

    order: Tensor

    def __init__(
        self,
        length: int,
        token_dim: int,
        num_params: int,
        hidden_dim: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        context_dim: int = 0,
        *,
        context_shape: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        caller = "CausalTransformer"
        check_integers(caller, length=length, token_dim=token_dim, num_layers=num_layers, num_heads=num_heads)
        check_integers(caller, hidden_dim=hidden_dim)
        require(
            hidden_dim % num_heads == 0, caller, "hidden_dim", f"be a multiple of num_heads={num_heads}", hidden_dim
        )
        order = list(range(length)) if order is None else as_order(caller, "order", order, length)
        image = None if context_shape is None else as_image(caller, "context_shape", context_shape)
        super().__init__(length, length, num_params, (hidden_dim,) * num_layers, 0 if image else context_dim)
        self.length, self.token_dim, self.size = length, token_dim, (token_dim,)
        self.hidden_dim, self.num_layers, self.num_heads = hidden_dim, num_layers, num_heads
        self.context_shape = image
        if image is not None:
            channels, height, width = image
            self.context_dim = channels * height * width
            self.side = math.isqrt(height * width // length)
            if self.side**2 * length != height * width or context_dim not in (0, self.context_dim):
                fault = f"context_shape must be images of {length} square patches, got {image}"
                raise ValueError(f"CausalTransformer: {fault} with context_dim={context_dim}.")
            self.from_context = nn.Linear(channels * self.side**2, hidden_dim, bias=False)
        self.embed = nn.Linear(token_dim, hidden_dim)
        self.position = nn.Parameter(torch.randn(length, hidden_dim) * 0.1)
        layers = (AttentionLayer(hidden_dim, num_heads, expansion=4, causal=True) for _ in range(num_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(hidden_dim)
        self.output = zero_(nn.Linear(hidden_dim, num_params * token_dim))
        self.register_buffer("order", torch.tensor(order))
        self._set_places()
        self.register_load_state_dict_post_hook(CausalTransformer._set_places)

    def _set_places(self, _keys: object = None) -> None:
        """Derive the places of tokens from their order, also after a state is loaded."""
        self.places: tuple[int, ...] = tuple(torch.argsort(self.order).tolist())  # of the token of each rank

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        before = self.embed(x[..., list(self.places[:-1]), :])  # by rank, without the last
        h = self.starts(context) + F.pad(before, (0, 0, 1, 0))
        batch, h = h.shape[:-2], h.reshape(math.prod(h.shape[:-2]), *h.shape[-2:])
        for layer in self.layers:
            h = layer(h)
        params = self.read(h).index_select(1, self.order)
        return params.reshape(*batch, *params.shape[1:])

    def starts(self, context: Tensor | None) -> Tensor:
        """Return the terms of a token's position and of its context, ``(*batch, context_dim)``, in h, by rank.

        Returns:
            Of shape ``(*batch, T, hidden_dim)``, or ``(T, hidden_dim)`` without a context.

        Raises:
            ValueError: If the network takes contexts and none is given.
        """
        if self.context_shape is not None and context is not None:
            patches = F.pixel_unshuffle(context.unflatten(-1, self.context_shape), self.side).flatten(-2).mT
            context = patches[..., list(self.places), :]
        elif context is not None:
            context = context.unsqueeze(-2)
        return self.add_context(self.position, context)

    def read(self, h: Tensor) -> Tensor:
        """Return the parameters ``(N, T, D, P)`` of the results of the last layer, ``(N, T, hidden_dim)``."""
        return self.output(self.norm(h)).unflatten(-1, (self.num_params, self.token_dim)).mT


class Tokens:
    """The evaluation of a causal transformer token by token, from the first rank to the last.

    It keeps the keys and values of the tokens so far, so that all steps together cost about one pass.  It serves one
    batch of N sequences and stores nothing on the network.

    Args:
        net: The network.
        context: Contexts ``(N, context_dim)``, or None if ``net.context_dim`` is 0.
        number: The number N of sequences.

    Raises:
        ValueError: If the network takes contexts and none is given.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import CausalTransformer
        >>> net = CausalTransformer(length=3, token_dim=2, num_params=2, hidden_dim=16)
        >>> _, x = torch.nn.init.normal_(net.output.weight), torch.randn(5, 3, 2)
        >>> tokens = Tokens(net, None, number=5)
        >>> params = [tokens.step(known) for known in (None, x[:, 0], x[:, 1])]
        >>> torch.allclose(torch.stack(params, 1), net(x), atol=1e-4)
        True
    """

    def __init__(self, net: CausalTransformer, context: Tensor | None, number: int) -> None:
        self.net = net
        self.starts = net.starts(context)  # (T, hidden_dim), or (N, T, hidden_dim)
        self.caches = [_Cache(net.length) for _ in net.layers]
        self.number, self.rank = number, 0

    def step(self, token: Tensor | None) -> Tensor:
        """Take the last token, ``(N, D)``, None at first, and return the parameters of the next, ``(N, D, P)``."""
        h = self.starts[..., self.rank, :].expand(self.number, -1)
        if token is not None:
            h = h + self.net.embed(token)
        h = h.unsqueeze(1)  # (N, 1, hidden_dim)
        for layer, cache in zip(self.net.layers, self.caches, strict=True):
            h = layer(h, append=cache.append)
        self.rank += 1
        return self.net.read(h).squeeze(1)


class _Cache:
    """The keys and values of up to ``length`` tokens; without gradients, in memory that is allocated once."""

    def __init__(self, length: int) -> None:
        self.length, self.number = length, 0
        self.both: Tensor | None = None

    def append(self, new: Tensor) -> Tensor:
        """Add the key and value ``(2, N, heads, 1, d)`` of a token; return all of them, ``(2, N, heads, t, d)``."""
        self.number += 1
        if torch.is_grad_enabled():
            self.both = new if self.both is None else torch.cat((self.both, new), 3)
            return self.both
        if self.both is None:
            self.both = new.new_empty(*new.shape[:3], self.length, new.shape[4])
        self.both[..., self.number - 1, :] = new.squeeze(3)
        return self.both[..., : self.number, :]
