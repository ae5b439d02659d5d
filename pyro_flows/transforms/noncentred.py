"""Effects of a hierarchy in units of their priors, as a map of vectors that needs no model.

A vector holds effects next to the numbers that their priors depend on.  In units of its prior an effect is independent
of those numbers, unless data determine it.  Then the effect itself is.  Between the two lies the product of the prior
and a Gaussian *potential*, which stands in for the likelihood of the effect.  The map takes a standard normal to this
product.  So the neck of a funnel is no narrower than its mouth, and effects that data determine stay where they are.

A General Framework for the Parametrization of Hierarchical Models (Papaspiliopoulos, Roberts, Sköld 2007, Statistical
Science 22) compares the parametrisations; Automatic Reparameterisation of Probabilistic Programs (Gorinova, Moore,
Hoffman 2020, arXiv:1906.03028) learns a degree between them for each effect.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..arguments import check_flags, check_integers, require
from .base import TwoWay, VectorTransform
from .small_triangular import (
    Triangle,
    Vector,
    cholesky_of_one_plus,
    congruent,
    correlation_factor,
    solve,
    times,
    total,
    transposed_solve,
    transposed_times,
)

LARGEST = 40.0  # the largest logarithm of a scale; float32 holds the square of its exponential
STEEPEST = 20.0  # the largest unconstrained correlation; float32 holds 1 / cosh³ of it
FLOOR = 1e-2  # the least precision of a potential, in units of the prior


class Effects(nn.Module):
    """R effects of d numbers, each with a prior N(m, L Lᵀ) and a potential exp(-½ e·Λe + h·e)::

        e = m + L C⁻ᵀ (x + C⁻¹ Lᵀ (h - Λ m)),    C Cᵀ = I + Lᵀ Λ L,    log|det de/dx| = log|L| - log|C|

    The locations m, the logarithms of the scales, and the unconstrained numbers of the correlations in L are linear in
    P parents, which are other features.  Like the potentials they are set, and not trained.

    Attributes:
        columns: The features of the effects, ``(d, R)``.
        prior: The coefficients of the d locations, the d logarithms and the d (d - 1) / 2 correlations of each effect
            in the parents and in 1, ``(d (d + 3) / 2, R, P + 1)``.
        precision: The matrices Λ, ``(R, d, d)``.
        field: The vectors h, ``(R, d)``.
    """

    columns: Tensor

    def __init__(self, columns: Tensor, num_parents: int) -> None:
        super().__init__()
        size, rows = columns.shape
        self.register_buffer("columns", columns, persistent=False)
        self.prior = nn.Parameter(torch.zeros(size * (size + 3) // 2, rows, num_parents + 1))
        self.precision = nn.Parameter(torch.zeros(rows, size, size))
        self.field = nn.Parameter(torch.zeros(rows, size))

    def priors(self, parents: Tensor) -> tuple[Vector, Triangle]:
        """Return the locations m and the factors L, of numbers ``(R, N)``, given the parents, ``(P, N)``."""
        size, coefficients = len(self.columns), self.prior.detach()
        numbers = (coefficients[..., :-1] @ parents + coefficients[..., -1:]).unbind()
        scales = [number.clamp(-LARGEST, LARGEST).exp() for number in numbers[size : 2 * size]]
        if size == 1:
            return numbers[:size], [scales]
        shape = correlation_factor([number.clamp(-STEEPEST, STEEPEST) for number in numbers[2 * size :]], size)
        return numbers[:size], [[scale * entry for entry in row] for scale, row in zip(scales, shape, strict=True)]

    def map(self, value: Tensor, parents: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Map x to effects, or effects to x, each ``(d, R, N)``, given the parents; return also the log-determinant.

        The log-determinant, ``(N,)``, is that of the way to effects.
        """
        loc, scale = self.priors(parents)
        precision = [[part.unsqueeze(-1) for part in row.unbind(-1)] for row in self.precision.detach().unbind(1)]
        field = [part.unsqueeze(-1) for part in self.field.detach().unbind(-1)]  # numbers (R, 1)
        moved = [total(entry * m for entry, m in zip(row, loc, strict=True)) for row in precision]  # Λ m
        c = cholesky_of_one_plus(congruent(scale, precision))
        shift = solve(c, transposed_times(scale, [h - move for h, move in zip(field, moved, strict=True)]))
        if inverse:
            unit = solve(scale, [number - m for number, m in zip(value, loc, strict=True)])
            found = [number - move for number, move in zip(transposed_times(c, unit), shift, strict=True)]
        else:
            unit = transposed_solve(c, [number + move for number, move in zip(value, shift, strict=True)])
            found = [number + m for number, m in zip(times(scale, unit), loc, strict=True)]
        log_det = total((own[-1] / other[-1]).log().sum(0) for own, other in zip(scale, c, strict=True))
        return torch.stack(found), log_det

    @torch.no_grad()
    def set_potentials(self, e: Tensor, parents: Tensor, precision: Tensor) -> None:
        """Set the potentials so that the product with the priors has a mean and a precision in units of the priors.

        Args:
            e: The mean of all features, ``(D,)``.
            parents: That of the parents, ``(P,)``.
            precision: The precision of the features in units of the priors, ``(D, D)``.
        """
        loc, scale = self.priors(parents.unsqueeze(-1))
        factor = torch.zeros_like(self.precision)
        for i, row in enumerate(scale):
            for j, entry in enumerate(row):
                factor[:, i, j] = entry[:, 0]
        rows, eye = self.columns.T, torch.eye(len(loc)).to(e)
        values, vectors = torch.linalg.eigh(precision[rows.unsqueeze(-1), rows.unsqueeze(-2)] - eye)
        root = vectors * values.clamp_min(FLOOR).sqrt().unsqueeze(-2)
        root = torch.linalg.solve_triangular(factor.mT, root, upper=True)
        self.precision.copy_(root @ root.mT)
        mean, shift = e[rows].unsqueeze(-1), e[rows].unsqueeze(-1) - torch.stack([*loc], 1)
        self.field.copy_((self.precision @ mean + torch.cholesky_solve(shift, factor)).squeeze(-1))

    @torch.no_grad()
    def drop_potentials(self) -> None:
        """Set the potentials to zero, so that x are effects in units of their priors."""
        self.precision.zero_()
        self.field.zero_()


class NonCentred(TwoWay, VectorTransform):
    """A map from effects in units of their priors to effects, the identity until it is set::

        e = E(x; e),    y = W e

    E maps each effect by its prior and its potential, given its parents among e, and leaves other features as they are.
    W is the identity, or unit triangular and set: it joins effects whose locations form a long chain.

    Args:
        input_dim: The number D of features.
        effects: The features of each effect, for example ``[[1, 2], [3, 4]]`` for two effects of two numbers.
        parents: The features that the priors of effects depend on.
        levels: The depth of the hierarchy: the most effects in a chain whose priors depend on the one before.
        chained: True for a matrix W.

    Attributes:
        groups: The priors and potentials of the effects of each size.
        loc: The matrix W, ``(D, D)``; None for the identity.

    Raises:
        ValueError: If a number is not positive, or a feature is in two effects or is none of the D.

    Example::

        >>> import torch
        >>> funnel = NonCentred(2, [[1]], [0])  # the first number is a log-variance
        >>> funnel.groups[0].prior.data[1, 0, 0] = 0.5
        >>> y, log_det = funnel.forward_and_log_det(torch.tensor([2.0, 1.0]))
        >>> [round(number, 3) for number in (*y.tolist(), log_det.item())]  # e = 2.718
        [2.0, 2.718, 1.0]
    """

    groups: Sequence[Effects]

    def __init__(
        self,
        input_dim: int,
        effects: Sequence[Sequence[int]],
        parents: Sequence[int],
        levels: int = 1,
        *,
        chained: bool = False,
    ) -> None:
        super().__init__(input_dim)
        check_integers("NonCentred", levels=levels)
        check_flags("NonCentred", chained=chained)
        self.effects, self.parents = [list(effect) for effect in effects], list(parents)
        self.levels, self.chained = levels, chained
        named = [feature for effect in self.effects for feature in effect]
        for argument, value, features in (("effects", self.effects, named), ("parents", self.parents, self.parents)):
            fits = all(0 <= feature < input_dim for feature in features) and len(set(features)) == len(features)
            require(fits, "NonCentred", argument, f"name features below {input_dim} once each", value)
        sizes = sorted({len(effect) for effect in self.effects})
        of_size = [torch.tensor([effect for effect in self.effects if len(effect) == size]).T for size in sizes]
        groups = [Effects(columns, len(self.parents)) for columns in of_size]
        self.groups = nn.ModuleList(groups)  # type: ignore[assignment]
        self.loc = nn.Parameter(torch.eye(input_dim)) if chained else None

    @torch.no_grad()
    def reset(self) -> None:
        """Set the map to the identity."""
        for group in self.groups:
            for parameter in group.parameters():
                parameter.zero_()
        if self.loc is not None:
            nn.init.eye_(self.loc)

    def set_potentials(self, y: Tensor, precision: Tensor) -> None:
        """Set the potentials by the mean of the features y, ``(D,)``, and the precision of x, ``(D, D)``."""
        e = self._unchained(y.unsqueeze(-1)).squeeze(-1)
        for group in self.groups:
            group.set_potentials(e, e[self.parents], precision)

    def drop_potentials(self) -> None:
        """Set all potentials to zero, so that x are effects in units of their priors."""
        for group in self.groups:
            group.drop_potentials()

    def _map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        flat = value.reshape(-1, self.input_dim).T
        flat = self._unchained(flat) if inverse else flat
        found, log_det = flat, flat.new_zeros(flat.shape[1])
        for _ in range(1 if inverse else self.levels):
            found, log_det = self._level(flat, found[self.parents], inverse)
        if self.loc is not None and not inverse:
            found = self.loc.detach() @ found
        return found.T.reshape(value.shape), (-log_det if inverse else log_det).reshape(value.shape[:-1])

    def _level(self, flat: Tensor, parents: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Map all effects once, among features ``(D, N)``."""
        found, log_det = flat, flat.new_zeros(flat.shape[1])
        for group in self.groups:
            columns = group.columns.flatten()
            value = flat[columns].reshape(*group.columns.shape, -1)
            mapped, change = group.map(value, parents, inverse)
            found, log_det = found.index_copy(0, columns, mapped.flatten(0, 1)), log_det + change
        return found, log_det

    def _unchained(self, y: Tensor) -> Tensor:
        """Return e, given y, each ``(D, N)``."""
        if self.loc is None:
            return y
        return torch.linalg.solve_triangular(self.loc.detach(), y, upper=False, unitriangular=True)
