"""Mean derivatives of a density over a block structure, by differences of its scores.

In one difference move all latents that share no neighbour, so a few differences give all second derivatives of the
structure (Curtis, Powell, Reid 1974, *On the Estimation of Sparse Jacobian Matrices*).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..vjp import LogDensity, score_of
from .block_conditionals import Blocks, BlockStructure, Precision, Precisions


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
        directions: The number of differences that give all second derivatives.
    """

    def __init__(self, density: LogDensity, structure: BlockStructure) -> None:
        self._density, self._structure, self.is_coupled = density, structure, False
        dim, self._colours, self._strangers = len(structure.order), list[Tensor](), list[Tensor]()
        above = [{parent for parent, *_ in parents} for parents in structure.above]
        for place, (places, _) in enumerate(structure.layouts):
            apart = 1 if places.shape[1] == 1 else 3  # steps of a sequence that share no neighbour
            moves = [places[:, k::apart, j].flatten() for k in range(apart) for j in range(places.shape[2])]
            self._colours.append(torch.stack([torch.zeros(dim).index_fill(0, move, 1.0) for move in moves]))
            near = [one in {place, *above[place]} or place in above[one] for one in range(len(above))]
            known = [of.places.flatten() for of, is_near in zip(structure.layouts, near, strict=True) if is_near]
            self._strangers.append(torch.ones(dim).index_fill(0, torch.cat(known), 0.0))
        self.directions = sum(map(len, self._colours))

    def precision(self, z: Tensor, present: Precisions, first: int = 0) -> list[Precision]:
        """Return minus the mean second derivatives at some draws, for all blocks or from block ``first`` on.

        Args:
            z: The draws, ``(S, D)``.
            present: The present precision, which gives the sizes of the moves.
            first: 1 to leave out the root.
        """
        sizes = DIFFERENCES.shift * self._deviations(present)
        parts = torch.cat(self._colours[first:]).split(max(1, DIFFERENCES.numbers // (2 * z.numel())))
        found = torch.cat([_changes(self._density, z, (part.to(z) * sizes).unsqueeze(1)) for part in parts])
        left_out = [torch.zeros_like(colours).to(z) for colours in self._colours[:first]]
        responses = [*left_out, *found.split([len(colours) for colours in self._colours[first:]])]
        for changes, strangers in zip(responses[first:], self._strangers[first:], strict=True):
            faint = DIFFERENCES.faint * changes.abs().max()
            self.is_coupled |= bool((changes.abs() * strangers.to(z)).max() > faint)
        return [self._derivatives(place, responses, sizes) for place in range(first, len(responses))]

    def of_root(self, blocks: Blocks, present: Precisions, noise: Tensor, curved: int) -> tuple[Tensor, Precision]:
        """Return the mean score of the root, where the other blocks move with it, and minus its mean derivative.

        The derivative is a mean over the first ``curved`` draws, as it takes two scores for each latent of the root.
        """

        def total(root: Tensor, noise: Tensor) -> Tensor:
            z = self._structure.placed(blocks, noise, root)
            return self._density(z) + sum(block.log_det(root) for block in blocks[1:])

        few = partial(total, noise=noise[:curved].repeat(2, 1))  # moved forth and back
        root, size = self._structure.root_of(blocks, noise), present[0].diagonal[0, 0].diagonal().rsqrt()
        moves = (DIFFERENCES.shift * size).diag().unsqueeze(1)  # (G, 1, G)
        second = torch.cat([_changes(few, root[:curved], move.unsqueeze(0)) for move in moves])
        second = second / (DIFFERENCES.shift * size.unsqueeze(-1))
        own = Precision(((second + second.mT) / 2)[None, None], *present[0][1:])
        return score_of(partial(total, noise=noise), root).nan_to_num(0.0, 0.0, 0.0).mean(0), own

    def joint(self, z: Tensor, score: Tensor, found: Precisions, present: Precisions, blocks: Blocks) -> Tensor:
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
        structure, root, deviations = self._structure, self._structure.root, self._deviations(present)
        wanted = torch.zeros(1 + len(root), len(score)).to(score)
        wanted[0] = score
        for layout, shared, own in zip(structure.layouts, structure.shared, found, strict=True):
            if shared:
                wanted[1:, layout.places.flatten(1)] = -own.cross[..., :shared].movedim(-1, 0)
        wanted[:, root] = 0.0

        def precondition(x: Tensor) -> Tensor:
            pairs = zip(structure.layouts, blocks, strict=True)
            parts = [block.solved(x[:, of.places]).flatten(1) for of, block in pairs]
            return torch.cat(parts, -1)[:, structure.order].index_fill(1, root, 0.0)

        def product(steps: Tensor) -> Tensor:
            scale = DIFFERENCES.shift / (steps / deviations).abs().amax(-1, keepdim=True).clamp_min(1e-30)
            return (_changes(self._density, z, (scale * steps).unsqueeze(1)) / scale).index_fill(1, root, 0.0)

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

    def _deviations(self, present: Precisions) -> Tensor:
        """Return the conditional standard deviation of each latent, ``(D,)``."""
        found = [own.diagonal.diagonal(dim1=-2, dim2=-1).rsqrt().flatten() for own in present]
        return torch.cat(found)[self._structure.order]

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
        cross = [sizes.new_zeros(rows, steps * width, 0)]
        for parent, row in parents:
            size = sizes[self._structure.layouts[parent].places[row].flatten(1)].unsqueeze(-2)  # (N, 1, d_p)
            cross.append(responses[parent][:, places].flatten(-2).permute(1, 2, 0) / size)  # (N, T d, d_p)
        return Precision((diagonal + diagonal.mT) / 2, lower, torch.cat(cross, -1))


def _changes(density: LogDensity, z: Tensor, steps: Tensor) -> Tensor:
    """Return minus the mean changes of the score of a density in some steps, ``(K, 1, D) -> (K, D)``."""
    moved = torch.cat((z + steps, z - steps), 1)  # (K, 2 S, D)
    forth, back = score_of(density, moved.flatten(0, 1)).reshape(moved.shape).chunk(2, 1)
    return (back - forth).nan_to_num(0.0, 0.0, 0.0).mean(1) / 2
