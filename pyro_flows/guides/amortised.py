"""Answers of amortised guides: simulated latents as vectors, posteriors of many datasets, the prior of the latents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from ..flows import Flow
from ..programs.engines import Values, View
from ..programs.quantities import labels_of
from ..programs.simulator import Simulator
from .blocks import Blocks, BlockTransform
from .contexts import BlockRows
from .guide_call import Found, Reached

Packed = list[tuple[Tensor, Tensor]]  # vectors of each flow, and log|det| of their packing in nats
EACH = 8  # rows of each dataset that are scored, enough to train the flow of rows


class SimulatedVectors(NamedTuple):
    """Vectors that a flow scores.

    Attributes:
        flow: The flow.
        z: The vectors, ``(M, D)``.
        context: Their contexts, ``(M, context_dim)``.
        log_det: The log-determinant of their packing in nats, ``(M,)``.
    """

    flow: Flow
    z: Tensor
    context: Tensor
    log_det: Tensor


class Posteriors:
    """The posteriors of M datasets: of all latents, or of those outside of a plate and in one row.

    ``take(index)`` returns those of some datasets, and ``pick(latents)`` the values of the posterior's latents from M
    simulations.  ``shared`` are the posteriors of the latents outside of a plate, whose vectors are the first numbers
    of all.  ``sample_all(number)`` draws all latents, those in all rows of a plate included.

    Values of sites have shape ``(..., M, *site_shape)``.  Their packed, unconstrained vectors z = T(u; context), and
    the coordinates u of the flow's base, have shape ``(..., M, D)``.

    Args:
        q: The distribution of vectors, with the methods of :class:`~pyro_flows.flows.distribution.FlowDistribution`.
        context: The contexts of the datasets, ``(M, context_dim)``; None for a guide of one dataset.
        labels: The names of the K numbers of the latents.
        layout: The map between vectors and values.
    """

    def __init__(self, q: Any, context: Tensor | None, labels: list[str], layout: Any) -> None:
        self.q, self.context, self.labels, self.layout = q, context, labels, layout

    def values(self, z: Tensor) -> Values:
        """Return the values of vectors."""
        return self.layout.values(z)

    def pack(self, values: Values) -> tuple[Tensor, Tensor]:
        """Return the vectors of values, and log|det dz/dvalues| in nats, ``(..., M)``."""
        return self.layout.pack(values)

    def sample(self, number: int) -> Values:
        """Return draws."""
        return self.values(self.q.sample((number,)))

    def log_prob(self, values: Values) -> Tensor:
        """Return the log-density of values in nats, ``(..., M)``."""
        z, log_det = self.pack(values)
        found: Tensor = self.q.log_prob(z) + log_det
        return found

    def numbers(self, z: Tensor) -> Tensor:
        """Return the numbers of the latents as columns, ``(..., M, K)``, from vectors."""
        return torch.cat([value.reshape(*z.shape[:-1], -1) for value in self.values(z).values()], -1)


class OfJoint(Posteriors):
    """The posteriors of latents that have one vector.

    Args:
        at: Returns the distribution of vectors at contexts.
        context: The contexts.
        layout: The packing of the latents.
        shapes: The shapes of their sites.
        widens: False if some of them are angles, whose base cannot be widened.
    """

    def __init__(
        self,
        at: Callable[[Tensor | None], Any],
        context: Tensor | None,
        layout: Any,
        shapes: dict[str, torch.Size],
        *,
        widens: bool = True,
    ) -> None:
        q = at(context)
        labels = [label for name, shape in shapes.items() for label in labels_of(name, shape)]
        super().__init__(q if q.batch_shape else q.expand((1,)), context, labels, layout)
        self.at, self.shapes, self.widens = at, shapes, widens

    def take(self, index: Tensor) -> OfJoint:
        context = None if self.context is None else self.context[index]
        return OfJoint(self.at, context, self.layout, self.shapes, widens=self.widens)

    def pick(self, latents: Values) -> Values:
        return {name: latents[name] for name in self.shapes}

    @property
    def shared(self) -> OfJoint:
        return self

    def sample_all(self, number: int) -> Values:
        return self.sample(number)

    def widened(self, by: float) -> Any:
        """Return the distribution of vectors with the base scaled by a number, unless there are angles."""
        return self.q.widened(by) if self.widens else self.q


class OfRow(Posteriors):
    """The posteriors of the latents outside of a plate, and in one row of it for each dataset.

    Args:
        posterior: The blocks of the guide: the latents outside of the plate, and those inside.
        rows: The contexts of both, for all rows.
        places: The row of each dataset, ``(M,)``.
    """

    def __init__(self, posterior: Blocks, rows: Sequence[BlockRows], places: Tensor) -> None:
        self.posterior, self.rows, self.places = posterior, rows, places
        of_all, of_each = (own.contexts for own in rows)
        assert of_all is not None
        assert of_each is not None
        index = places.reshape(-1, 1, 1).expand(-1, 1, of_each.shape[-1])
        own = of_each.gather(1, index)
        labels = [
            label
            for block in posterior.blocks
            for name, part in block.packing.parts.items()
            for label in _labels(name, part, block.packing.dims)
        ]
        q = OneRow(posterior, [rows[0], BlockRows(None, own)])
        super().__init__(q, torch.cat((of_all, own[:, 0]), -1), labels, RowLayout(posterior))

    def take(self, index: Tensor) -> OfRow:
        rows = [BlockRows(None, own.contexts[index]) for own in self.rows if own.contexts is not None]
        return OfRow(self.posterior, rows, self.places[index])

    def pick(self, latents: Values) -> Values:
        of_shared, of_rows = (block.packing for block in self.posterior.blocks)
        found = {name: latents[name] for name in of_shared.parts}
        for name, part in of_rows.parts.items():
            value, axis = latents[name], of_rows.dims[0] - part.event_dim
            index = self.places.reshape(-1, *(1,) * (value.dim() - 1))
            shape = list(value.shape)
            shape[axis] = 1
            found[name] = value.gather(axis, index.expand(shape))
        return found

    @property
    def shared(self) -> OfJoint:
        block = self.posterior.blocks[0]
        shapes = {name: part.start.shape for name, part in block.packing.parts.items()}
        context = None if self.rows[0].contexts is None else self.rows[0].contexts.to(block.packing.dtype)
        return OfJoint(block.flow, context, block.packing, shapes)

    def sample_all(self, number: int) -> Values:
        return self.posterior.draw(number, self.rows, {})


class RowLayout:
    """The map between packed vectors and values of the latents outside of a plate, and in one row of it."""

    def __init__(self, posterior: Blocks) -> None:
        self._posterior = posterior

    def values(self, z: Tensor) -> Values:
        """Return the values of vectors."""
        found = Values()
        parts = z.split([block.packing.size for block in self._posterior.blocks], -1)
        for block, part in zip(self._posterior.blocks, parts, strict=True):
            aligned = part.reshape(*part.shape[:-1], *(1,) * block.packing.depth, -1)
            found.update(block.packing.values(aligned))
        return found

    def pack(self, values: Values) -> tuple[Tensor, Tensor]:
        """Return the vectors of values, and the log-determinant."""
        vectors, total = list[Tensor](), torch.zeros(())
        for block in self._posterior.blocks:
            z, log_det = block.packing.pack(values)
            batch = log_det.shape[: log_det.dim() - block.packing.depth]
            vectors.append(z.reshape(*batch, -1))
            total = total + log_det.reshape(batch)
        return torch.cat(vectors, -1), total


class OneRow:
    """The distribution of the packed vectors of all blocks, with one row in each of M datasets.

    Args:
        posterior: The blocks.
        rows: The contexts of their rows, with a batch of M datasets.
    """

    def __init__(self, posterior: Blocks, rows: Sequence[BlockRows]) -> None:
        self.map, self.batch = BlockTransform(posterior, rows), posterior.batch_of(rows)
        self.bases = [block.flow.base() for block in posterior.blocks]
        self.sizes = [block.packing.size for block in posterior.blocks]

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Sample the bases, ``(*shape, D)``."""
        return torch.cat([base.sample(torch.Size(shape)) for base in self.bases], -1)

    @torch.no_grad()
    def sample(self, shape: Sequence[int]) -> Tensor:
        """Return draws, ``(*shape, M, D)``."""
        return self.place(self.noise((*shape, *self.batch)))

    def place(self, u: Tensor) -> Tensor:
        """Map base coordinates ``(..., M, D)`` to vectors."""
        return self.map(u.expand(*u.shape[:-2], *self.batch, -1))

    def coordinates(self, z: Tensor) -> Tensor:
        """Map vectors ``(..., M, D)`` to base coordinates."""
        found: Tensor = self.map.inv(z)
        return found

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of vectors in nats, ``(..., M)``."""
        u = self.coordinates(z)
        log_p = [base.log_prob(part) for base, part in zip(self.bases, u.split(self.sizes, -1), strict=True)]
        return sum(log_p[1:], log_p[0]) - self.map.log_abs_det_jacobian(u, z)


def _labels(name: str, part: Any, dims: tuple[int, ...]) -> list[str]:
    """Return the names of a site's numbers, outside of a plate or in one row of it."""
    shape = list(part.start.shape)
    if dims:
        del shape[dims[0] - part.event_dim]
        name = f"{name}[row]"
    return labels_of(name, torch.Size(shape))


OfDatasets = OfJoint | OfRow


class LatentPrior:
    """The prior of the latents that a guide shows.

    Args:
        simulator: The model.
        names: The latent sites of the guide.
    """

    def __init__(self, simulator: Simulator, names: list[str]) -> None:
        self.simulator, self.names = simulator, names

    @property
    def is_complete(self) -> bool:
        """True if the model draws nothing else before the guide's latents, so that their prior has a known density."""
        before = [name for name, _ in self.simulator.model.single.iter_stochastic_nodes()]
        return set(before[: len(self.names)]) == set(self.names)

    def run(self, size: int, values: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Return draws of the guide's latents from the prior, or given ones, and their log-density, ``(size,)``.

        The latents before them are included.
        """
        data = self.simulator.sites.values()
        latents = [name for name, _ in self.simulator.model.single.iter_stochastic_nodes() if name not in data]

        def read(view: View) -> Values:
            drawn = {name: view.read(name) for name in latents if name in view.trace.nodes}
            return {**drawn, "log_p": view.log_prob(self.names.__contains__)}

        found = self.simulator.model.sample(read, values or {}, size, place=self._before_data)
        return found, found.pop("log_p")

    def _before_data(self, model: Callable[..., Any], data: Values) -> Callable[..., Any]:
        """Return a program that ends when all latents of the guide are drawn or held."""
        held = poutine.condition(model, data=data)

        def run(*args: Any, **kwargs: Any) -> None:
            with contextlib.suppress(Reached), Found("", (), self.names, {}):
                held(*args, **kwargs)

        return run
