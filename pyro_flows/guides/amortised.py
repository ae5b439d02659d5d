"""Answers of amortised guides: simulated latents as vectors, posteriors of many datasets, the prior of the latents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from pyro import poutine
from torch import Tensor

from ..flows import Flow
from ..programs.engines import View
from ..programs.simulator import Simulator
from ..programs.sites import Values, labels_of
from .blocks import Blocks
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


class OfDatasets:
    """The posteriors of M datasets, whose latents have one vector.

    Values of sites have shape ``(..., M, *site_shape)``.  Their packed, unconstrained vectors z = T(u; context), and
    the coordinates u of the flow's base, have shape ``(..., M, D)``.

    Args:
        at: Returns the distribution of vectors at contexts, with the methods of
            :class:`~pyro_flows.flows.distribution.FlowDistribution`.
        context: The contexts of the datasets, ``(M, context_dim)``; None for a guide of one dataset.
        layout: The map between vectors and values.
        shapes: The shapes of the sites of the latents.
        widens: False if some of them are angles, whose base cannot be widened.

    Attributes:
        q: The distribution of vectors.
        labels: The names of the K numbers of the latents.
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
        self.q = q if q.batch_shape else q.expand((1,))
        self.labels = [label for name, shape in shapes.items() for label in labels_of(name, shape)]
        self.at, self.context, self.layout, self.shapes, self.widens = at, context, layout, shapes, widens

    def values(self, z: Tensor) -> Values:
        """Return the values of vectors."""
        found: Values = self.layout.values(z)
        return found

    def pack(self, values: Values) -> tuple[Tensor, Tensor]:
        """Return the vectors of values, and log|det dz/dvalues| in nats, ``(..., M)``."""
        found: tuple[Tensor, Tensor] = self.layout.pack(values)
        return found

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

    def take(self, index: Tensor) -> OfDatasets:
        """Return the posteriors of some datasets."""
        context = None if self.context is None else self.context[index]
        return OfDatasets(self.at, context, self.layout, self.shapes, widens=self.widens)

    def pick(self, latents: Values) -> Values:
        """Return the values of the posteriors' latents in M simulations."""
        return {name: latents[name] for name in self.shapes}

    @property
    def shared(self) -> OfDatasets:
        """The posteriors of the latents outside of a plate, whose vectors are the first numbers of all."""
        return self

    def sample_all(self, number: int) -> Values:
        """Return draws of all latents, those in all rows of a plate included."""
        return self.sample(number)

    def widened(self, by: float) -> Any:
        """Return the distribution of vectors with the base scaled by a number, unless there are angles."""
        return self.q.widened(by) if self.widens else self.q


class OfRow(OfDatasets):
    """The posteriors of the latents outside of a plate, and in one row of it for each dataset.

    Args:
        posterior: The blocks of the guide: the latents outside of the plate, and those inside.
        rows: The contexts of both, for all rows.
        places: The row of each dataset, ``(M,)``.
    """

    def __init__(self, posterior: Blocks, rows: Sequence[BlockRows], places: Tensor) -> None:
        self.posterior, self.rows, self.places, shapes = posterior, rows, places, dict[str, torch.Size]()
        of_all, of_each = (cast(Tensor, own.contexts) for own in rows)
        own = of_each.gather(1, places.reshape(-1, 1, 1).expand(-1, 1, of_each.shape[-1]))
        for block in posterior.blocks:
            for name, part in block.packing.parts.items():
                shape = list(part.start.shape)
                for dim in block.packing.dims:
                    del shape[dim - part.event_dim]
                shapes[f"{name}[row]" if block.packing.dims else name] = torch.Size(shape)
        q = OneRow(posterior, [rows[0], BlockRows(None, own)])
        super().__init__(lambda _: q, torch.cat((of_all, own[:, 0]), -1), q, shapes)

    def take(self, index: Tensor) -> OfRow:
        rows = [BlockRows(None, cast(Tensor, own.contexts)[index]) for own in self.rows]
        return OfRow(self.posterior, rows, self.places[index])

    def pick(self, latents: Values) -> Values:
        of_shared, of_rows = (block.packing for block in self.posterior.blocks)
        found = {name: latents[name] for name in of_shared.parts}
        for name, part in of_rows.parts.items():
            value, axis = latents[name], of_rows.dims[0] - part.event_dim
            index = self.places.reshape(-1, *(1,) * (value.dim() - 1))
            found[name] = value.gather(axis, index.expand([*value.shape[:axis], 1, *value.shape[axis:][1:]]))
        return found

    @property
    def shared(self) -> OfDatasets:
        block = self.posterior.blocks[0]
        shapes = {name: part.start.shape for name, part in block.packing.parts.items()}
        context = cast(Tensor, self.rows[0].contexts).to(block.packing.dtype)
        return OfDatasets(block.flow, context, block.packing, shapes)

    def sample_all(self, number: int) -> Values:
        return self.posterior.draw(number, self.rows, {})


class OneRow:
    """The distribution of the packed vectors of all blocks, with one row in each of M datasets, and their layout.

    Args:
        posterior: The blocks.
        rows: The contexts of their rows, with a batch of M datasets.
    """

    def __init__(self, posterior: Blocks, rows: Sequence[BlockRows]) -> None:
        self.map, self.batch_shape = posterior.transform(rows), posterior.batch_of(rows)
        self.bases = [block.flow.base() for block in posterior.blocks]
        self.packings = [block.packing for block in posterior.blocks]
        self.sizes = [packing.size for packing in self.packings]

    def values(self, z: Tensor) -> Values:
        """Return the values of vectors."""
        found = Values()
        for packing, part in zip(self.packings, z.split(self.sizes, -1), strict=True):
            found.update(packing.values(part.reshape(*part.shape[:-1], *(1,) * packing.depth, -1)))
        return found

    def pack(self, values: Values) -> tuple[Tensor, Tensor]:
        """Return the vectors of values, and the log-determinant."""
        vectors, total = list[Tensor](), torch.zeros(())
        for packing in self.packings:
            z, log_det = packing.pack(values)
            batch = log_det.shape[: log_det.dim() - packing.depth]
            vectors.append(z.reshape(*batch, -1))
            total = total + log_det.reshape(batch)
        return torch.cat(vectors, -1), total

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Sample the bases, ``(*shape, D)``."""
        return torch.cat([base.sample(torch.Size(shape)) for base in self.bases], -1)

    @torch.no_grad()
    def sample(self, shape: Sequence[int]) -> Tensor:
        """Return draws, ``(*shape, M, D)``."""
        return self.place(self.noise((*shape, *self.batch_shape)))

    def place(self, u: Tensor) -> Tensor:
        """Map base coordinates ``(..., M, D)`` to vectors."""
        return self.map(u.expand(*u.shape[:-2], *self.batch_shape, -1))

    def coordinates(self, z: Tensor) -> Tensor:
        """Map vectors ``(..., M, D)`` to base coordinates."""
        return cast(Tensor, self.map.inv(z))

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log-density of vectors in nats, ``(..., M)``."""
        u = self.coordinates(z)
        log_p = [base.log_prob(part) for base, part in zip(self.bases, u.split(self.sizes, -1), strict=True)]
        return sum(log_p[1:], log_p[0]) - self.map.log_abs_det_jacobian(u, z)


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
        model, data = self.simulator.model, self.simulator.sites.values()
        latents = [name for name, _ in model.single.iter_stochastic_nodes() if name not in data]

        def read(view: View) -> Values:
            drawn = {name: view.read(name) for name in latents if name in view.trace.nodes}
            return {**drawn, "log_p": view.log_prob(self.names.__contains__)}

        def before_data(model: Callable[..., Any], data: Values) -> Callable[..., Any]:
            held = poutine.condition(model, data=data)

            def run(*args: Any, **kwargs: Any) -> None:  # until all latents of the guide are drawn or held
                with contextlib.suppress(Reached), Found("", (), self.names, {}):
                    held(*args, **kwargs)

            return run

        found = model.sample(read, values or {}, size, place=before_data)
        return found, found.pop("log_p")
