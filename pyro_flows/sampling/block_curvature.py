"""Mean derivatives of a density over a block structure, by differences of its scores.

In one difference move all latents that share no neighbour, so a few differences give all second derivatives of the
structure (Curtis, Powell, Reid 1974, *On the Estimation of Sparse Jacobian Matrices*).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..vjp import LogDensity, score_of
from .block_conditionals import BlockStructure, Conditional, Layout, Precision


@dataclass(frozen=True)
class Differences:
    """Settings of differences of scores.

    Attributes:
        shift: The size of a move in conditional standard deviations, where the density is nearly quadratic.
        numbers: The numbers of draws to hold at once, for memory.
        faint: The size of a coupling, relative to the largest, that is round-off.
        rounds: The largest number of rounds of conjugate gradients.
        precise: Their relative error at the end; the step that they give is damped anyway.
    """

    shift: float = 0.1
    numbers: int = 20_000_000
    faint: float = 1e-4
    rounds: int = 30
    precise: float = 0.02


DIFFERENCES = Differences()


class Curvature:
    """The derivatives of a density over a block structure.

    Args:
        density: The log-density in double precision.
        structure: The structure.

    Attributes:
        is_coupled: True once blocks turn out to be coupled that are no parents of each other, such as effects of users
            and items.
    """

    def __init__(self, density: LogDensity, structure: BlockStructure) -> None:
        self._density, self._structure, self.is_coupled = density, structure, False
        self._colours = [_colours(layout) for layout in structure.layouts]
        self.directions = sum(map(len, self._colours))

    def precision(self, z: Tensor, present: Sequence[Precision], first: int = 0) -> list[Precision]:
        """Return minus the mean second derivatives at some draws, for all blocks or from block ``first`` on.

        Args:
            z: The draws, ``(S, D)``.
            present: The present precision, which gives the sizes of the moves.
            first: 1 to leave out the root.
        """
        sizes = DIFFERENCES.shift * self._deviations(present)
        colours = [of_block if place >= first else [] for place, of_block in enumerate(self._colours)]
        found = self._responses(z, [places for of_block in colours for places in of_block], sizes)
        responses = found.split([len(of_block) for of_block in colours])
        self.is_coupled |= self._sees_couplings(responses)
        return [self._derivatives(place, responses, sizes) for place in range(first, len(responses))]

    def of_root(
        self, blocks: Sequence[Conditional], present: Sequence[Precision], noise: Tensor
    ) -> tuple[Tensor, Precision]:
        """Return the mean score of the root, where the other blocks move with it, and minus its mean derivative."""

        def total(root: Tensor) -> Tensor:
            z = self._structure.placed(blocks, noise.repeat(len(root) // len(noise), 1), root)
            return self._density(z) + sum(block.log_det(root) for block in blocks[1:])

        root = self._structure.root_of(blocks, noise)
        size = DIFFERENCES.shift * present[0].diagonal[0, 0].diagonal().rsqrt()
        moves = torch.diag(size).unsqueeze(1)  # (G, 1, G)
        moved = torch.cat((root.unsqueeze(0), root + moves, root - moves)).flatten(0, 1)
        scores = torch.cat([score_of(total, part) for part in moved.split(len(noise))]).nan_to_num(0.0, 0.0, 0.0)
        own, forth, back = scores.reshape(-1, *root.shape).mean(1).split((1, *[len(size)] * 2))
        second = (back - forth) / (2 * size.unsqueeze(-1))
        return own[0], Precision(((second + second.mT) / 2)[None, None], present[0].lower, ())

    def joint(
        self,
        z: Tensor,
        score: Tensor,
        found: Sequence[Precision],
        present: Sequence[Precision],
        blocks: Sequence[Conditional],
    ) -> Tensor:
        """Return the moves of all blocks but the root that follow from couplings between the blocks, too.

        They are found by conjugate gradients, with the inverse of the precision without these couplings as a
        preconditioner (Hestenes, Stiefel 1952).

        Args:
            z: Draws at which the second derivatives are taken.
            score: The mean score, ``(D,)``.
            found: The precision without these couplings.
            present: The present precision, which gives the sizes of the moves.
            blocks: The present distribution, whose covariance is the preconditioner.

        Returns:
            The change of the mean and, for each latent of the root, the move per unit, ``(1 + G, D)``.
        """
        root, deviations = self._structure.root, self._deviations(present)
        wanted = torch.zeros(1 + len(root), len(score)).to(score)
        wanted[0] = score
        for layout, own in zip(self._structure.layouts, found, strict=True):
            for (parent, _), cross in zip(layout.parents, own.cross, strict=True):
                if parent == 0 and self._structure.has_root:
                    wanted[1:, layout.places.flatten(1)] = -cross.movedim(-1, 0)
        wanted[:, root] = 0.0

        def precondition(x: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for layout, block in zip(self._structure.layouts, blocks, strict=True):
                out[:, layout.places] = block.solved(x[:, layout.places])
            return out.index_fill(1, root, 0.0)

        def product(steps: Tensor) -> Tensor:
            scale = DIFFERENCES.shift / (steps / deviations).abs().amax(-1, keepdim=True).clamp_min(1e-30)
            return (self._changes(z, (scale * steps).unsqueeze(1)) / scale).index_fill(1, root, 0.0)

        return _conjugate_gradients(product, precondition, wanted)

    def _deviations(self, present: Sequence[Precision]) -> Tensor:
        """Return the conditional standard deviation of each latent, ``(D,)``."""
        found = [own.diagonal.diagonal(dim1=-2, dim2=-1).rsqrt().flatten() for own in present]
        return torch.cat(found)[self._structure.order]

    def _responses(self, z: Tensor, colours: Sequence[Tensor], sizes: Tensor) -> Tensor:
        """Return minus the mean changes of the score if the latents of each colour move, ``(colours, D)``."""
        found, together = [], max(1, DIFFERENCES.numbers // (2 * z.numel()))
        for start in range(0, len(colours), together):
            part = colours[start : start + together]
            steps = z.new_zeros(len(part), 1, z.shape[-1])
            for step, places in zip(steps, part, strict=True):
                step[0, places] = sizes[places]
            found.append(self._changes(z, steps))
        return torch.cat(found)

    def _changes(self, z: Tensor, steps: Tensor) -> Tensor:
        """Return minus the mean changes of the score in some steps, ``(K, 1, D) -> (K, D)``."""
        moved = torch.cat((z + steps, z - steps), 1)  # (K, 2 S, D)
        forth, back = score_of(self._density, moved.flatten(0, 1)).reshape(moved.shape).chunk(2, 1)
        return (back - forth).nan_to_num(0.0, 0.0, 0.0).mean(1) / 2

    def _sees_couplings(self, responses: Sequence[Tensor]) -> bool:
        """True if moves of a block change the scores of another one that is no parent or child of it."""
        layouts = self._structure.layouts
        above = [{parent for parent, _ in layout.parents} for layout in layouts]
        for place, response in enumerate(responses):
            strangers = [
                layout.places.flatten()
                for other, layout in enumerate(layouts)
                if other != place and other not in above[place] and place not in above[other]
            ]
            if len(response) and strangers:
                changes = response.abs()
                if changes[:, torch.cat(strangers)].max() > DIFFERENCES.faint * changes.max():
                    return True
        return False

    def _derivatives(self, block: int, responses: Sequence[Tensor], sizes: Tensor) -> Precision:
        """Return the rows of the precision of a block, given the responses to moves of these sizes in each block."""
        places, parents = self._structure.layouts[block]
        rows, steps, width = places.shape
        own, size = responses[block][:, places], sizes[places]
        apart, step = len(own) // width, torch.arange(steps)
        columns = own.reshape(apart, width, rows, steps, width).movedim(1, -1)  # (apart, N, T, d, d)
        diagonal = columns[step % apart, :, step].movedim(0, 1) / size.unsqueeze(-2)
        lower = torch.zeros_like(diagonal)
        if apart > 1:
            first, second = step[:-1], step[1:]
            below = columns[first % apart, :, second].movedim(0, 1) / size[:, :-1].unsqueeze(-2)
            above = columns[second % apart, :, first].movedim(0, 1) / size[:, 1:].unsqueeze(-2)
            lower[:, 1:] = (below + above.mT) / 2
        cross = []
        for parent, row in parents:
            size = sizes[self._structure.layouts[parent].places[row].flatten(1)].unsqueeze(-2)  # (N, 1, d_p)
            if len(found := responses[parent]):
                cross.append(found[:, places].flatten(-2).permute(1, 2, 0) / size)  # (N, T d, d_p)
            else:
                cross.append(torch.zeros_like(size).expand(-1, steps * width, -1))
        return Precision((diagonal + diagonal.mT) / 2, lower, tuple(cross))


def _colours(layout: Layout) -> list[Tensor]:
    """Divide the places of a block into sets, so that no two latents of a set share a neighbour."""
    _, steps, width = layout.places.shape
    apart = 1 if steps == 1 else 3  # steps of a sequence that share no neighbour
    return [layout.places[:, k::apart, j].flatten() for k in range(apart) for j in range(width)]


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], wanted: Tensor
) -> Tensor:
    """Solve linear equations with several right sides, ``(K, D)``, given products with a positive definite matrix."""
    solution, rest = torch.zeros_like(wanted), wanted
    step = ready = precondition(rest)
    size = (rest * ready).sum(-1, keepdim=True)
    least, tiny = DIFFERENCES.precise**2 * size, torch.finfo(size.dtype).tiny
    for _ in range(DIFFERENCES.rounds):
        bent = product(step)
        length = size / (step * bent).sum(-1, keepdim=True).clamp_min(tiny)
        solution, rest = solution + length * step, rest - length * bent
        ready, last = precondition(rest), size
        size = (rest * ready).sum(-1, keepdim=True)
        if (size <= least).all():
            break
        step = ready + size / last.clamp_min(tiny) * step
    return solution
