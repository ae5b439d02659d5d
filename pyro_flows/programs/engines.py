"""Many draws in one run of a program: under an outer plate, by vmap over a single run, or in a loop.

* ``"plate"``: the program runs once inside a plate of draws, to the left of its other plates.  It must broadcast.
* ``"vmap"``: ``torch.func.vmap`` maps a single run over draws, whatever shapes the program uses.
* ``"loop"``: one run per draw, for programs that call ``.item()`` or branch on values.

All three read the same tensors off the trace of a run, see :class:`View`, and return them with the draws in front.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..arguments import is_integer
from .masks import counted_data, is_masked
from .vmap_rules import VmapRules, mappable

DRAWS = "_pyro_flows_draws"  # the plate of draws
Site = dict[str, Any]
Values = dict[str, Tensor]

_weighs: ContextVar[bool] = ContextVar("weighs", default=False)


def is_weighing() -> bool:
    """True inside :func:`run`, where draws are weighed: a draw without a density has weight 0 and is no error."""
    return _weighs.get()


def value_of(site: Site) -> Tensor:
    """Return the value of a site as a tensor."""
    return torch.as_tensor(site["value"])


def row_log_prob(site: Site) -> Tensor:
    """Return the log-density of each row of a site without the scale of its plates, 0 for masked rows."""
    value = counted_data(site) if is_masked(site) else site["value"]
    return scale_and_mask(site["fn"].log_prob(value, *site["args"], **site["kwargs"]), mask=site["mask"])


class View(NamedTuple):
    """A trace of N draws under the plate of draws, or of one draw.

    Attributes:
        trace: The trace, without the rows of subsampled plates.
        single: A trace of one draw, which shows the shape of each site.
        size: The number N of draws, or None for one draw without the plate.
        nesting: The number of dimensions that the plates of the program take.
    """

    trace: Trace
    single: Trace
    size: int | None
    nesting: int

    def check_structure(self) -> None:
        """Raise ValueError unless the trace has the sites of the single one."""
        met, known = (
            {name for name, site in nodes.items() if site["type"] == "sample"}
            for nodes in (self.trace.nodes, self.single.nodes)
        )
        if other := sorted(met ^ known):
            raise ValueError(
                f"the program has other sites from run to run: {other[0]!r} is in some runs only. Let it draw the same "
                "sites each time, and mask those that do not count: with poutine.mask(mask=...)."
            )

    def read(self, name: str, what: Callable[[Site], Tensor] = value_of) -> Tensor:
        """Return a tensor of a site, by default its value: ``(N, *shape)``, or ``shape`` for one draw."""
        found = what(self.trace.nodes[name])
        if self.size is None:
            return found
        shape = what(self.single.nodes[name]).shape
        if found.numel() == self.size * shape.numel():
            return found.reshape(self.size, *shape)
        if found.numel() == shape.numel():  # it is the same for all draws
            return found.reshape(shape).expand(self.size, *shape)
        raise ValueError(
            f"site {name!r} has shape {tuple(shape)} for one draw but {tuple(found.shape)} for {self.size} draws at "
            'once; let the model broadcast to the left of its plates, or give pf.Program(model, vectorize="vmap").'
        )

    def log_prob(self, among: Callable[[str], bool] = lambda name: True) -> Tensor:
        """Return the log-density of each draw, ``(N,)``, or of the one, ``()``: the sum over some sites, in nats."""
        self.trace.compute_log_prob(lambda name, _: among(name))
        sites = [site for name, site in self.trace.nodes.items() if site["type"] == "sample" and among(name)]
        total = sum((self.total(site["log_prob"]) for site in sites), torch.zeros(()))
        return total if self.size is None else total.expand(self.size)

    def total(self, log_prob: Tensor) -> Tensor:
        """Return the sum of a log-density over all dimensions except the draws, ``(N,)`` or ``()``."""
        return log_prob.sum() if self.size is None else self.by_draw(log_prob).reshape(self.size, -1).sum(-1)

    def by_draw(self, log_prob: Tensor) -> Tensor:
        """Return a log-density with the draws' dimension in front, if any, and the others as in a single run."""
        if self.size is None:
            return log_prob
        if log_prob.dim() <= self.nesting:
            return log_prob.expand(self.size, *log_prob.shape)
        rows = log_prob.movedim(-1 - self.nesting, 0)
        return rows.expand(self.size, *rows.shape[1:])


Read = Callable[[View], Values]
Run = Callable[..., Values]  # run(read, held, size) reads tensors off a run for N draws
NONE: Mapping[str, Tensor] = MappingProxyType({})


def run(engine: str, once: Callable[[Values, int | None], View], read: Read, held: Values, size: int) -> Values:
    """Run a program for N draws and read some tensors, each ``(N, *shape)``.

    Args:
        engine: ``"plate"``, ``"vmap"`` or ``"loop"``.
        once: Function that runs the program, either with the values of N draws and N, or with those of one draw and
            None.
        read: The function that reads tensors off the run.
        held: The values, ``(N, *site_shape)``.
        size: The number N of draws.
    """
    token = _weighs.set(True)
    try:
        if engine == "plate":
            return read(once(held, size))
        if engine == "loop":
            rows = [read(once({name: value[row] for name, value in held.items()}, None)) for row in range(size)]
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

        def alone(draw: Tensor, values: Values) -> Values:
            with VmapRules(draw):
                view = once(values, None)
                for site in view.trace.nodes.values():
                    if site["type"] == "sample":
                        site["fn"] = mappable(site["fn"])
                return read(view)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*performance drop because we have not yet implemented")
            found: Values = torch.func.vmap(alone, randomness="different")(torch.arange(size), held)
            return found
    finally:
        _weighs.reset(token)


def in_batches(step: Callable[[Values, int], Values], held: Values, number: int, batch_size: int) -> Values:
    """Call a function on batches of draws, and return its results for all draws.

    Args:
        step: Function of the values held in a batch and its size N; returns tensors ``(N, *shape)``.
        held: The values of all draws, ``(number, *shape)``.
        number: The number of draws.
        batch_size: The largest number in a batch.
    """
    if not is_integer(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    parts = []
    for start in range(0, number, batch_size):
        size = min(batch_size, number - start)
        parts.append(step({name: value[start : start + size] for name, value in held.items()}, size))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def plate_like(frame: Any) -> Any:
    """Return a new plate with a frame's name, sizes and dimension; a size of -1 in the frame means no size."""
    if frame.size < 0:
        return pyro.plate(frame.name, dim=frame.dim)
    return pyro.plate(frame.name, frame.full_size or frame.size, frame.size, dim=frame.dim)


def with_room(site: Site, value: Tensor, nesting: int) -> Tensor:
    """Return values ``(N, *site_shape)`` with a dimension of 1 for each plate that the site does not lie in.

    Args:
        site: The site in the trace of a single run.
        value: The values; unconstrained ones may have other event dimensions.
        nesting: The number of dimensions that the plates take.
    """
    plates = site["value"].dim() - site["fn"].event_dim
    return value.reshape(len(value), *(1,) * (nesting - plates), *value.shape[1:])
