"""The layer of a transformer."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

Append = Callable[[Tensor], Tensor]  # (2, N, heads, 1, d), of one token -> (2, N, heads, t, d), of all so far


class AttentionLayer(nn.Module):
    """Attention, then a map of each token; each is added to its input::

        h ← h + attention(norm(h)),    h ← h + V a(W norm(h))

    Attention Is All You Need (Vaswani et al. 2017, arXiv:1706.03762).

    Args:
        hidden_dim: The width, a multiple of ``num_heads``.
        num_heads: The number of attention heads.
        expansion: The width of the map of each token, in multiples of ``hidden_dim``.
        causal: True if a token attends only to itself and to earlier tokens.

    Example::

        >>> import torch
        >>> AttentionLayer(16, num_heads=4, expansion=2)(torch.randn(10, 25, 16)).shape
        torch.Size([10, 25, 16])
    """

    def __init__(self, hidden_dim: int, num_heads: int, expansion: int, *, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.norm = nn.LayerNorm(hidden_dim)
        self.projections = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.mixed = nn.Linear(hidden_dim, hidden_dim)
        wide = expansion * hidden_dim
        self.feed = nn.Sequential(
            nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, wide), nn.GELU(), nn.Linear(wide, hidden_dim)
        )

    def forward(self, h: Tensor, bias: Tensor | None = None, append: Append | None = None) -> Tensor:
        """Map tokens.

        Args:
            h: Tokens of shape ``(*batch, T, hidden_dim)``, or one more, ``(N, 1, hidden_dim)``, after those of a cache.
            bias: Numbers to add to the logits of attention, which broadcast to ``(*batch, heads, T, T)``.
            append: A function that adds the key and value of a token to a cache, and returns all of them.

        Returns:
            Tokens of the shape of ``h``.
        """
        heads = self.projections(self.norm(h)).unflatten(-1, (3, self.num_heads, -1)).movedim((-3, -2), (0, -3))
        query, (key, value) = heads[0], heads[1:] if append is None else append(heads[1:])
        causal = self.causal and append is None
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal)
        h = h + self.mixed(attended.transpose(-2, -3).flatten(-2))
        return h + self.feed(h)
