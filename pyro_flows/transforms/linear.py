"""Affine maps of vectors by diagonal, triangular and orthogonal matrices: log-determinants are sums of D numbers.

Dense maps cost O(D²) per vector.  Their trained diagonals are exp(b tanh(a / b)), so that no parameters make them
singular.
"""

import contextlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.linalg import solve_triangular
from torch.nn import functional as F

from ..arguments import as_flags, as_order, check_flags, check_integers, check_numbers, require
from ..bijectors.base import bounded
from ..conditioners import Conditioner
from ..conditioners.base import Paced
from .base import TwoWay, VectorTransform, WithScore
from .elementwise import Conditional


class ActNorm(VectorTransform):
    """An affine map of each feature of a vector ``(*batch, D)``, the identity at the start::

        y = loc + exp(log_scale) x,    log|det dy/dx| = Σ_i log_scale_i

    It replaces batch normalisation, whose density would depend on the other rows of a batch.  Here :meth:`initialize`
    computes location and scale once from data, and training does the rest.

    Glow: Generative Flow with Invertible 1×1 Convolutions (Kingma, Dhariwal 2018, arXiv:1807.03039, section 3.1).

    Args:
        input_dim: The number D of features.
        fixed: For each feature, True if it stays unchanged; by default no feature does.

    Raises:
        ValueError: If ``input_dim`` is not positive, or ``fixed`` does not hold D values.

    Example::

        >>> import torch
        >>> norm = ActNorm(1)
        >>> norm.initialize(torch.tensor([[2.0], [6.0]]))
        >>> norm.inverse_and_log_det(torch.tensor([[2.0], [6.0]]))[0].flatten().tolist()
        [-1.0, 1.0]
    """

    free: Tensor | None

    def __init__(self, input_dim: int, *, fixed: Sequence[bool] | Tensor | None = None) -> None:
        super().__init__(input_dim)
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))
        free = None if fixed is None else 1.0 - as_flags("ActNorm", "fixed", fixed, input_dim).float()
        self.register_buffer("free", free)

    @property
    def fixed(self) -> list[bool] | None:
        """For each feature, True if it stays unchanged; None if every feature is free."""
        return None if self.free is None else (self.free == 0).tolist()

    @torch.no_grad()
    def initialize(self, y: Tensor, context: Tensor | None = None) -> None:
        """Set location and scale so that the data ``(*batch, D)`` go back to mean 0 and standard deviation 1.

        A constant feature keeps the scale 1.
        """
        rows = y.reshape(-1, self.input_dim)
        scale = rows.std(0, correction=0)
        self.loc.copy_(rows.mean(0))
        self.log_scale.copy_(torch.where(scale > 0, scale, 1.0).log())

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, log_scale = self._loc_and_log_scale()
        return torch.addcmul(loc, x, log_scale.exp()), log_scale.sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, log_scale = self._loc_and_log_scale()
        return (y - loc) * torch.exp(-log_scale), -log_scale.sum().expand(y.shape[:-1])

    def _loc_and_log_scale(self) -> tuple[Tensor, Tensor]:
        if self.free is None:
            return self.loc, self.log_scale
        return self.loc * self.free, self.log_scale * self.free


class Factored(VectorTransform):
    """An invertible dense matrix in two triangular factors, and a shift; the identity at the start.

    Args:
        input_dim: The number D of features.
        max_log_scale: The bound b on each log-scale b tanh(a / b), in nats.
    """

    def __init__(self, input_dim: int, max_log_scale: float) -> None:
        super().__init__(input_dim)
        check_numbers(type(self).__name__, above=0, max_log_scale=max_log_scale)
        self.max_log_scale = max_log_scale
        self.factors = nn.Parameter(torch.zeros(input_dim, input_dim))  # L below, U above, a on the diagonal
        self.shift = nn.Parameter(torch.zeros(input_dim))

    @torch.no_grad()
    def set_scale(self, scale: float) -> None:
        """Set the map to a multiple of the identity, or of the rotation if there is one.

        Args:
            scale: The factor, whose logarithm lies within ``max_log_scale``.

        Raises:
            ValueError: If the factor is not positive, or its logarithm is out of range.
        """
        caller, most = f"{type(self).__name__}.set_scale", self.max_log_scale
        check_numbers(caller, above=0, scale=scale)
        if not abs(math.log(scale)) < most:
            raise ValueError(f"{caller}: scale must have a logarithm within ±{most}, got {scale}. Raise max_log_scale.")
        self.factors.copy_(torch.eye(self.input_dim) * (most * math.atanh(math.log(scale) / most)))

    def _log_scale(self) -> Tensor:
        return bounded(self.factors.diagonal(), self.max_log_scale)


class LULinear(Factored):
    """An invertible dense matrix in factors, and a shift, of vectors ``(*batch, D)``::

        y = L U Q x + t,    log|det dy/dx| = Σ_i log U_ii,    U_ii = exp(b tanh(a_i / b))

    with L unit lower and U upper triangular, and Q orthogonal and fixed.  It starts at Q, which is the identity by
    default.  A random Q mixes all features from the start.

    Glow, section 3.2; Neural Spline Flows (Durkan, Bekasov, Murray, Papamakarios 2019, arXiv:1906.04032).

    Args:
        input_dim: The number D of features.
        max_log_scale: The bound b on each log-pivot, in nats.
        rotation_seed: The seed of the orthogonal matrix that it starts as, as in Glow; by default the identity.

    Raises:
        ValueError: If ``input_dim`` is not positive, or ``max_log_scale`` not positive and finite.

    Example::

        >>> import torch
        >>> layer = LULinear(3)
        >>> layer.set_scale(2.0)
        >>> y, log_det = layer.forward_and_log_det(torch.ones(3))
        >>> round(y[0].item(), 4), round(log_det.item(), 4)  # nats: 3 log 2
        (2.0, 2.0794)
    """

    rotation: Tensor | None

    def __init__(self, input_dim: int, *, max_log_scale: float = 8.0, rotation_seed: int | None = None) -> None:
        super().__init__(input_dim, max_log_scale)
        check_integers("LULinear", 0, optional=True, rotation_seed=rotation_seed)
        self.rotation_seed = rotation_seed
        self.register_buffer("rotation", None if rotation_seed is None else _orthogonal(input_dim, rotation_seed))

    def _lower_upper_log_pivots(self) -> tuple[Tensor, Tensor, Tensor]:
        log_pivots = self._log_scale()
        lower = self.factors.tril(-1) + torch.eye(self.input_dim, dtype=log_pivots.dtype, device=log_pivots.device)
        return lower, self.factors.triu(1) + torch.diag(log_pivots.exp()), log_pivots

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper, log_pivots = self._lower_upper_log_pivots()
        matrix = lower @ upper
        if self.rotation is not None:
            matrix = matrix @ _polished(self.rotation)
        return F.linear(x, matrix, self.shift), log_pivots.sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper, log_pivots = self._lower_upper_log_pivots()
        columns = (y - self.shift).reshape(-1, self.input_dim).T  # (D, N)
        columns = solve_triangular(lower, columns, upper=False, unitriangular=True)
        columns = solve_triangular(upper, columns, upper=True)
        if self.rotation is not None:
            columns = _polished(self.rotation).T @ columns
        return columns.T.reshape(y.shape), -log_pivots.sum().expand(y.shape[:-1])


class ScaledLinear(Paced, Factored):
    """An invertible dense matrix and a shift, of vectors ``(*batch, D)``, the identity at the start::

        y = t + exp(s) ∘ (L U x),    log|det dy/dx| = Σ_i s_i,    s_i = b tanh(a_i / b)

    with L unit lower and U unit upper triangular.

    A step of an optimiser moves each feature by a share of the feature's own scale, however much the scales differ.
    The share does not grow with the number of dimensions.  In stochastic gradient descent with one draw both matter:
    the noise of each trained number keeps the loss above its minimum.

    Args:
        input_dim: The number D of features.
        max_log_scale: The bound b on each log-scale, in nats.

    Raises:
        ValueError: If ``input_dim`` is not positive, or ``max_log_scale`` not positive and finite.

    Example::

        >>> import torch
        >>> layer = ScaledLinear(3)
        >>> layer.set_scale(2.0)
        >>> y, log_det = layer.forward_and_log_det(torch.ones(3))
        >>> round(y[0].item(), 4), round(log_det.item(), 4)  # nats: 3 log 2
        (2.0, 2.0794)
    """

    stored = ("factors",)

    def __init__(self, input_dim: int, *, max_log_scale: float = 8.0) -> None:
        super().__init__(input_dim, max_log_scale)

    def unit_at(self, pace: float) -> float:
        return pace / self.input_dim

    def _rescale(self, stored: Tensor, ratio: float) -> None:
        diagonal = stored.diagonal().clone()
        stored.mul_(ratio).diagonal().copy_(diagonal)

    def _below_and_above(self) -> tuple[Tensor, Tensor]:
        """Return L and U without their diagonals of ones."""
        factors = self.paced(self.factors)
        return factors.tril(-1), factors.triu(1)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, (below, above) = self._log_scale(), self._below_and_above()
        x = x + F.linear(x, above)
        y = torch.addcmul(self.shift, x + F.linear(x, below), log_scale.exp())
        return y, log_scale.sum().expand(x.shape[:-1])

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> WithScore:
        with torch.no_grad():  # log|det dy/dx| is the same for all x, so a score is multiplied by the inverse transpose
            below, above = self._below_and_above()
            rows = score.reshape(-1, self.input_dim)
            rows = solve_triangular(above, rows, upper=True, left=False, unitriangular=True)
            rows = solve_triangular(below, rows, upper=False, left=False, unitriangular=True)
            score = (rows * torch.exp(-self._log_scale())).reshape(score.shape)
        return *self.forward_and_log_det(x), score

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, (below, above) = self._log_scale(), self._below_and_above()
        columns = ((y - self.shift) * torch.exp(-log_scale)).reshape(-1, self.input_dim).T  # (D, N)
        columns = solve_triangular(below, columns, upper=False, unitriangular=True)
        columns = solve_triangular(above, columns, upper=True, unitriangular=True)
        return columns.T.reshape(y.shape), -log_scale.sum().expand(y.shape[:-1])


def stretched(rows: Tensor, directions: Tensor, by: Tensor) -> Tensor:
    """Multiply the parts of rows ``(*batch, D)`` along orthonormal directions, ``(D, R)``, by numbers, ``(R,)``."""
    return rows + (rows @ directions * (by - 1)) @ directions.T


class FixedAffine(TwoWay, VectorTransform):
    """A shift and a matrix of vectors ``(*batch, D)``, y = t + L x, that are set and not trained.

    The matrix is triangular or diagonal.  With a rank R it is diagonal times a stretch of R orthonormal directions::

        y = t + s ∘ (x + Q (E - I) Qᵀ x),    log|det dy/dx| = Σ_i log s_i + Σ_r log E_rr

    Until they are set it is the identity.  All are parameters, so that parameter stores and checkpoints hold them, but
    no gradient reaches them.

    It whitens the coordinates of the layers before it: these are then trained at one pace, even if the target is
    ill-conditioned.

    Args:
        input_dim: The number D of features.
        dense: True if the matrix is lower triangular, False if it is diagonal and takes D numbers.
        rank: The number R of stretched directions, 0 if the matrix is dense; they take R (D + 1) numbers.

    Attributes:
        loc: The shift t, ``(D,)``.
        scale: The matrix L, ``(D, D)``, or its diagonal, or the diagonal s of L's first factor, ``(D,)``.
        directions: The directions Q, ``(D, R)``.
        stretch: The diagonal of E, ``(R,)``.

    Raises:
        ValueError: If ``input_dim`` is not positive, or ``rank`` is negative, or positive for a dense matrix.

    Example::

        >>> import torch
        >>> layer = FixedAffine(2)
        >>> layer.set(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [1.0, 3.0]]))
        >>> layer.forward_and_log_det(torch.ones(2))[0].tolist()
        [3.0, 4.0]
    """

    def __init__(self, input_dim: int, *, dense: bool = True, rank: int = 0) -> None:
        super().__init__(input_dim)
        check_flags("FixedAffine", dense=dense)
        check_integers("FixedAffine", 0, rank=rank)
        require(not (dense and rank), "FixedAffine", "rank", "be 0 unless dense=False", rank)
        self.dense, self.rank = dense, rank
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.scale = nn.Parameter(torch.eye(input_dim) if dense else torch.ones(input_dim))
        if rank:
            self.directions = nn.Parameter(torch.zeros(input_dim, rank))
            self.stretch = nn.Parameter(torch.ones(rank))

    @torch.no_grad()
    def set(self, loc: Tensor, scale: Tensor, directions: Tensor | None = None, stretch: Tensor | None = None) -> None:
        """Set the map from N(0, I) to N(t, L Lᵀ), or to its marginals if the matrix is diagonal.

        Args:
            loc: The shift t, ``(D,)``.
            scale: The lower triangular L with a positive diagonal, ``(D, D)``, or the diagonal alone, ``(D,)``.
            directions: The orthonormal directions, ``(D, r)``, at most ``rank`` of them; by default none.
            stretch: The positive numbers that stretch them, ``(r,)``.
        """
        self.loc.copy_(loc)
        if self.dense != (scale.dim() == 2):
            scale = torch.diag(scale) if self.dense else scale.norm(dim=-1)
        self.scale.copy_(scale)
        if self.rank:
            nn.init.zeros_(self.directions)
            nn.init.ones_(self.stretch)
        if directions is not None and stretch is not None:
            self.directions[:, : len(stretch)] = directions
            self.stretch[: len(stretch)] = stretch

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        matrix, loc = self._matrix(), self.loc.detach()
        log_det = (matrix.diagonal() if self.dense else matrix).abs().log().sum()
        if self.rank:
            log_det = log_det + self.stretch.detach().log().sum()
        log_det = log_det.expand(value.shape[:-1])
        if inverse:
            return self._stretched(self._divided(value - loc, transposed=True), inverse), -log_det
        x = self._stretched(value, inverse)
        return loc + (x @ matrix.T if self.dense else x * matrix), log_det

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> WithScore:
        # The stretch is symmetric.
        return *self.forward_and_log_det(x), self._divided(self._stretched(score, inverse=True), transposed=False)

    def _matrix(self) -> Tensor:
        return self.scale.detach().tril() if self.dense else self.scale.detach()

    def _stretched(self, rows: Tensor, inverse: bool) -> Tensor:
        if not self.rank:
            return rows
        by = self.stretch.detach()
        return stretched(rows, self.directions.detach(), 1 / by if inverse else by)

    def _divided(self, rows: Tensor, transposed: bool) -> Tensor:
        matrix = self._matrix()
        if not self.dense:
            return rows / matrix
        matrix, flat = (matrix.T if transposed else matrix), rows.reshape(-1, self.input_dim)
        return solve_triangular(matrix, flat, upper=transposed, left=False).reshape(rows.shape)


@contextlib.contextmanager
def unrotated(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Remove the rotations of all linear maps in some layers within this context."""
    kept = {part: part.rotation for layer in layers for part in layer.modules() if isinstance(part, LULinear)}
    for part in kept:
        part.rotation = None
    try:
        yield
    finally:
        for part, rotation in kept.items():
            part.rotation = rotation


def _orthogonal(dim: int, seed: int) -> Tensor:
    """Draw an orthogonal matrix ``(D, D)`` uniformly (Mezzadri 2006, arXiv:math-ph/0609050)."""
    matrix, source = torch.empty(dim, dim, dtype=torch.float64), torch.Generator().manual_seed(seed)
    return nn.init.orthogonal_(matrix, generator=source).to(torch.get_default_dtype())


def _polished(rotation: Tensor) -> Tensor:
    """Return the rotation up to the square of its rounding, which may be that of a coarser dtype: a Newton step."""
    return 1.5 * rotation - 0.5 * rotation @ (rotation.T @ rotation)


class Isometry(TwoWay, VectorTransform):
    """A map of vectors ``(*batch, D)`` by an orthogonal matrix Q, which maps values and scores alike."""

    @abstractmethod
    def _turn(self, x: Tensor, back: bool) -> Tensor:
        """Return Q x, or Qᵀ x if ``back``."""

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        return self._turn(value, inverse), value.new_zeros(value.shape[:-1])

    def forward_and_score(self, x: Tensor, score: Tensor, context: Tensor | None = None) -> WithScore:
        return *self.forward_and_log_det(x), self._turn(score, False).detach()


class Permute(Isometry):
    """A fixed permutation π of the features of a vector ``(*batch, D)``, y_i = x_{π(i)}, with log-determinant zero.

    It is a buffer: it is saved, loaded and moved with the flow.

    Args:
        permutation: ``permutation[i]`` is the feature of x that becomes feature i of y.

    Raises:
        ValueError: If ``permutation`` is empty or not a permutation of 0 … D - 1.

    Example::

        >>> import torch
        >>> Permute([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0])).tolist()
        [30.0, 10.0, 20.0]
    """

    permutation: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor) -> None:
        order = as_order("Permute", "permutation", permutation)
        super().__init__(len(order))
        self.register_buffer("permutation", torch.tensor(order, device=getattr(permutation, "device", None)))

    def _turn(self, x: Tensor, back: bool) -> Tensor:
        places = torch.argsort(self.permutation) if back else self.permutation
        return x.index_select(-1, places)


class Householder(Isometry):
    """A rotation of vectors ``(*batch, D)``, a product of an even number of reflections, the identity at the start::

        y = Q x,    Q = Π_k (1 - 2 v_k v_kᵀ / |v_k|²),    log|det dy/dx| = 0

    The vectors v start in pairs of two equal random vectors: gradients are not zero, and all pairs differ.  Each
    reflection costs O(D) per vector.

    Improving Variational Auto-Encoders using Householder Flow (Tomczak, Welling 2016, arXiv:1611.09630).

    Args:
        input_dim: The number D of features.
        reflections: The number of reflections, even; some D of them reach every rotation.

    Raises:
        ValueError: If ``input_dim`` is not positive, or ``reflections`` not positive and even.

    Example::

        >>> import torch
        >>> layer = Householder(3, reflections=2)
        >>> layer(torch.ones(3)).tolist()
        [1.0, 1.0, 1.0]
        >>> _ = torch.nn.init.normal_(layer.vectors)
        >>> round(layer(torch.tensor([0.0, 3.0, 4.0])).norm().item(), 4)  # lengths stay
        5.0
    """

    def __init__(self, input_dim: int, reflections: int = 8) -> None:
        super().__init__(input_dim)
        check_integers("Householder", reflections=reflections)
        require(reflections % 2 == 0, "Householder", "reflections", "be positive and even", reflections)
        self.reflections = reflections
        self.vectors = nn.Parameter(torch.randn(reflections // 2, input_dim).repeat_interleave(2, 0))

    def _turn(self, x: Tensor, back: bool) -> Tensor:
        units = unit(self.vectors)
        pairs = (units.flip(0) if back else units).unflatten(0, (-1, 2)).unbind(0)
        for first, second in pairs:
            x = _turn_plane(x, first, second)
        return x


class Orthogonal(Isometry):
    """Any rotation of vectors ``(*batch, D)``, the identity at the start::

        y = Q x,    Q = exp(A - Aᵀ),    log|det dy/dx| = 0

    It costs O(D³) per batch and O(D²) per vector.

    Cheap Orthogonal Constraints in Neural Networks (Lezcano-Casado, Martínez-Rubio 2019, arXiv:1901.08428).

    Args:
        input_dim: The number D of features; the D (D - 1) / 2 parameters are the entries of A below its diagonal.

    Raises:
        ValueError: If ``input_dim`` is not positive.

    Example::

        >>> import torch
        >>> layer = Orthogonal(2)
        >>> layer(torch.tensor([1.0, 0.0])).tolist()
        [1.0, 0.0]
        >>> _ = torch.nn.init.constant_(layer.params, torch.pi / 2)  # a quarter of a turn
        >>> layer(torch.tensor([1.0, 0.0])).round(decimals=4).abs().tolist()
        [0.0, 1.0]
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim)
        self.params = nn.Parameter(torch.zeros(input_dim * (input_dim - 1) // 2))

    def _turn(self, x: Tensor, back: bool) -> Tensor:
        rows, columns = torch.tril_indices(self.input_dim, self.input_dim, -1, device=self.params.device)
        lower = self.params.new_zeros(self.input_dim, self.input_dim).index_put((rows, columns), self.params)
        matrix = torch.linalg.matrix_exp(lower - lower.T)
        return x @ (matrix if back else matrix.T)


def unit(vectors: Tensor) -> Tensor:
    """Scale vectors ``(*, D)`` to length one; vectors too short to have a direction become zero and reflect nothing.

    The division by the largest entry comes first, since squares of small numbers underflow, and a vector that is too
    short reflects by too little.
    """
    tiny = torch.finfo(vectors.dtype).tiny
    vectors = vectors / vectors.detach().abs().amax(-1, keepdim=True).clamp_min(tiny)
    return vectors * vectors.square().sum(-1, keepdim=True).clamp_min(tiny).rsqrt()


def reflect(x: Tensor, units: Tensor) -> Tensor:
    """Reflect along unit vectors, the first one first, ``(*batch, D), (*batch, H, D) -> (*batch, D)``."""
    for v in units.unbind(-2):
        x = torch.addcmul(x, (x * v).sum(-1, keepdim=True), v, value=-2)
    return x


def _turn_plane(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Reflect along ``first``, then along ``second``, ``(*batch, D), (D), (D) -> (*batch, D)``.

    Two reflections turn the plane of their vectors.  With unit vectors v, v' and d = v' - v, 2 v·v' = 2 - |d|², so

        (1 - 2 v vᵀ)(1 - 2 v' v'ᵀ) = 1 + 2 v dᵀ - 2 (d + |d|² v) v'ᵀ:

    in this form two equal vectors are the identity to the last bit.
    """
    gap = first - second
    of_gap, of_first = (x * gap).sum(-1, keepdim=True), (x * first).sum(-1, keepdim=True)
    return x + 2 * (of_gap * second - of_first * (gap + gap.square().sum() * second))


MAX_LOG_SCALE = 8.0  # bound on each log-scale, in nats


class TriangularAffine(Conditional):
    """An affine map of a vector ``(*batch, D)`` by a triangular matrix, the identity at the start::

        y = exp(s) * (x + N x / √D) + t,    log|det dy/dx| = Σ_i s_i

    N is strictly lower triangular.  Each log-scale s is bounded smoothly to ±8.  If x is standard normal, y is normal,
    with any mean and, within the bound, any covariance.  With a conditioner both depend on the context: a last layer of
    this kind learns distributions that are nearly normal from few draws, and the layers before it learn what is left.
    The number of its functions of the context, D (D + 3) / 2, grows quadratically.

    The parameters (s, t, N by rows) are a table that starts at zero.  A conditioner adds to the table what depends on
    the context.

    Using Neural Networks to Model Conditional Multivariate Densities (Williams 1996, Neural Computation 8(4)).

    Args:
        input_dim: The number D of features.
        conditioner: A network from contexts to parameters, with ``input_dim = context_dim``, ``output_dim = 1`` and
            ``num_params = TriangularAffine.count_params(input_dim)``; by default there is no context.

    Raises:
        ValueError: If ``input_dim`` is not positive or the conditioner's sizes do not fit it.  In use, if there is a
            conditioner and no context is given.

    Example::

        >>> import torch
        >>> from pyro_flows.conditioners import MLP
        >>> layer = TriangularAffine(3, MLP(4, 1, TriangularAffine.count_params(3)))
        >>> _ = torch.nn.init.normal_(layer.params)  # as if trained
        >>> y, context = torch.randn(5, 3), torch.randn(4)
        >>> x, log_det = layer.inverse_and_log_det(y, context)
        >>> torch.allclose(layer.forward_and_log_det(x, context)[0], y, atol=1e-3), log_det.shape
        (True, torch.Size([5]))
    """

    def __init__(self, input_dim: int, conditioner: Conditioner | None = None) -> None:
        start = torch.zeros(self.count_params(input_dim))
        super().__init__(input_dim, conditioner, (1, len(start)), start)

    @staticmethod
    def count_params(input_dim: int) -> int:
        """Return the number of parameters, D (D + 3) / 2, that a conditioner has to yield.

        Raises:
            ValueError: If ``input_dim`` is not a positive integer.
        """
        check_integers("TriangularAffine", input_dim=input_dim)
        return input_dim * (input_dim + 3) // 2

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift, below = self._parts(context)
        moved = x + torch.einsum("...ij,...j->...i", below, x)
        y = torch.addcmul(shift, moved, log_scale.exp())
        return y, log_scale.sum(-1).expand(y.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift, below = self._parts(context)
        moved = ((y - shift) * (-log_scale).exp()).unsqueeze(-1)
        x = torch.linalg.solve_triangular(below, moved, upper=False, unitriangular=True).squeeze(-1)
        return x, -log_scale.sum(-1).expand(x.shape[:-1])

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-scales and shifts ``(*batch, D)``, and N / √D, ``(*batch, D, D)``."""
        size = self.input_dim
        log_scale, shift, entries = self._params(context).split((size, size, size * (size - 1) // 2), -1)
        below = torch.ones(size, size, dtype=torch.long, device=entries.device).tril(-1)
        # The place of each entry of N in its list, from 1 by rows; 0 on the diagonal and above.
        place = below.flatten().cumsum(0).unflatten(0, (size, size)) * below
        # The factor keeps sums of order one for any number of features.
        return bounded(log_scale, MAX_LOG_SCALE), shift, F.pad(entries, (1, 0))[..., place] / size**0.5
