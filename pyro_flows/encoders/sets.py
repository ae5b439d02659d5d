"""Encoders of sets, which do not depend on the order of the elements; masks and pooling of elements."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..arguments import Activation, Widths, check_integers, check_sizes
from ..compiler_state import is_traced
from .base import Encoder, Standardize
from .rows import hidden_layers
from .training_record import Lengths


class SetEncoder(Encoder):
    """A permutation-invariant network from sets ``(*batch, n, element_dim)`` to contexts ``(*batch, context_dim)``::

        c = ρ(s) + B s,    s = (mean of f_i, Σ_i w_qi f_i, log standard deviation of l_i, log(1 + n))
        f_i = (h_i, l_i),    l_i = (x_i, A x_i),    h_i = φ(x_i, r_i),    w_qi ∝ exp(u_q · h_i)

    with Q learned queries u_q and r_i = (x_i - mean) / standard deviation.  Elements relative to their set, r_i, show
    its shape, such as a correlation, at any place and scale.  Moments of linear features are nearly sufficient for many
    models, and from means alone a network learns a spread slowly.  By the matrix B they also pass as they are: the
    posterior of many elements is narrow, so that small errors of ρ would count.  The size n may differ from call to
    call.  Means do not depend on it, but a posterior narrows with it, so log(1 + n) is one more feature.  Sets of
    different sizes share a batch by a ``mask``.

    Deep Sets (Zaheer et al. 2017, arXiv:1703.06114).  Attention pooling: Attention-based Deep Multiple Instance
    Learning (Ilse, Tomczak, Welling 2018, arXiv:1802.04712).  Learned queries: Set Transformer (Lee et al. 2019,
    arXiv:1810.00825).  Moments: Principal Neighbourhood Aggregation (Corso et al. 2020, arXiv:2004.05718).

    Args:
        element_dim: The number of features of an element.
        context_dim: The width of the context.
        hidden_dims: The widths of the hidden layers, at least one; φ and ρ have the same.
        num_queries: The number of learned queries, each with its own attention over the elements.
        num_moments: The number of linear features whose mean and log standard deviation are taken.
        activation: The class of the elementwise nonlinearity.

    Raises:
        ValueError: If a size is below 1.  In use, if data or mask have another shape, or a mask holds other numbers
            than 0 and 1.

    Example::

        >>> import torch
        >>> x = torch.randn(10, 25, 2)  # 10 sets of 25 pairs
        >>> encoder = SetEncoder(2, context_dim=8)
        >>> encoder.initialize(x)
        >>> encoder(x).shape
        torch.Size([10, 8])
        >>> torch.allclose(encoder(x), encoder(x[:, torch.randperm(25)]), atol=1e-4)
        True
        >>> sizes = torch.randint(1, 26, (10, 1))
        >>> encoder(x, mask=torch.arange(25) < sizes).shape  # the first few of each
        torch.Size([10, 8])
    """

    def __init__(
        self,
        element_dim: int,
        context_dim: int,
        hidden_dims: Widths = (64, 64),
        *,
        num_queries: int = 4,
        num_moments: int = 8,
        activation: Activation = nn.SiLU,
    ) -> None:
        name = type(self).__name__
        check_integers(name, element_dim=element_dim, context_dim=context_dim)
        check_integers(name, num_queries=num_queries, num_moments=num_moments)
        check_sizes(name, hidden_dims=hidden_dims)
        widths = tuple(hidden_dims)
        super().__init__((None, element_dim), context_dim, Standardize((element_dim,)))
        self.element_dim, self.hidden_dims, self.activation = element_dim, widths, activation
        self.num_queries, self.num_moments = num_queries, num_moments
        self.lengths = Lengths(name)
        self.phi = hidden_layers(name, 2 * element_dim, *widths, activation=activation)
        self.queries = nn.Linear(widths[-1], num_queries, bias=False)  # a softmax does not depend on a bias
        self.linear = nn.Linear(element_dim, num_moments, bias=False)
        linear_dim = element_dim + num_moments
        pooled_dim = (num_queries + 1) * (widths[-1] + linear_dim) + linear_dim + 1
        self.rho = hidden_layers(name, pooled_dim, *widths, activation=activation)
        self.output = nn.Linear(widths[-1], context_dim)
        self.direct = nn.Linear(pooled_dim, context_dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode sets.

        Args:
            x: Sets of shape ``(*batch, n, element_dim)``.
            mask: Of shape ``(*batch, n)``, True or 1 for elements of the set; other values are ignored, NaN included.
                A set may be empty.

        Returns:
            Contexts of shape ``(*batch, context_dim)``.

        Raises:
            ValueError: If data or mask have another shape, or a mask holds other numbers than 0 and 1.
        """
        self.check_data(x)
        there = as_mask(type(self).__name__, x, mask, x.shape[:-1])
        self.lengths(there)
        # Zeroed before any product: a weight of zero would not silence a NaN.
        x = self.standardize(x, there).masked_fill(~there[..., None], 0.0)
        size, average = there.sum(-1, keepdim=True).to(x.dtype), pooling_weights(x[..., :0], there)
        linear = torch.cat((x, self.linear(x)), -1)  # (*batch, n, E + M)
        mean = average.mT @ linear  # (*batch, 1, E + M)
        log_spread = 0.5 * (average.mT @ (linear - mean).square() + 1e-6).log()
        relative = ((linear - mean) * torch.exp(-log_spread))[..., : self.element_dim]
        h = self.phi(torch.cat((x, relative), -1))  # (*batch, n, H)
        weights = pooling_weights(self.queries(h), there)  # (*batch, n, 1 + Q)
        pooled = (weights.mT @ torch.cat((h, linear), -1)).flatten(-2)  # (*batch, (1 + Q) (H + E + M))
        summary = torch.cat((pooled, log_spread.squeeze(-2), size.log1p()), -1)
        return self.output(self.rho(summary)) + self.direct(summary)


def as_mask(caller: str, x: Tensor, mask: Tensor | None, *shapes: Sequence[int]) -> Tensor:
    """Return a mask as bools; without one, everything in the data is there.

    A model that draws its mask from a Bernoulli distribution has a mask of the numbers 0 and 1.

    Args:
        caller: The name of the encoder, for errors.
        x: The data.
        mask: Bools, or the numbers 0 and 1.
        *shapes: The shapes that a mask may have; without a mask the first.

    Raises:
        ValueError: If the mask has another shape, or holds other numbers.  ``torch.compile`` and ``torch.func`` skip
            the check of the numbers.
    """
    if mask is None:
        return torch.ones(tuple(shapes[0]), dtype=torch.bool, device=x.device)
    there = mask.bool()
    if tuple(mask.shape) not in map(tuple, shapes):
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        got = f"for data of shape {tuple(x.shape)}, got {tuple(mask.shape)}"
        raise ValueError(f"{caller}: mask must have shape {wanted}, {got}.")
    if not (is_traced() or mask.dtype == torch.bool) and (wrong := mask[mask != there]).numel():
        raise ValueError(f"{caller}: mask must hold True and False, or 1 and 0, got {wrong[0].item():g}.")
    return there


def pooling_weights(scores: Tensor, there: Tensor) -> Tensor:
    """Return the weights of elements in their mean, and under the attention of each query.

    Args:
        scores: The logits of Q queries, ``(*batch, n, Q)``.
        there: True for the elements that count, ``(*batch, n)``.

    Returns:
        Of shape ``(*batch, n, 1 + Q)``, the mean first.  Each column sums to 1, or to 0 if no element counts.
    """
    there = there.unsqueeze(-1)
    # The lowest finite number, not -inf: the softmax of an empty set would be NaN.  There the mask makes it zero.
    attention = scores.masked_fill(~there, torch.finfo(scores.dtype).min).softmax(-2) * there
    size = there.sum(-2, keepdim=True).to(scores.dtype)  # (*batch, 1, 1)
    return torch.cat((there / size.clamp(min=1.0), attention), -1)
