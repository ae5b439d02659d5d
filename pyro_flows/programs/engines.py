"""Many draws in one run of a program: under an outer plate, by vmap over a single run, or in a loop.

* ``"plate"``: the program runs once inside a plate of draws, to the left of its other plates.  It must broadcast.
* ``"vmap"``: ``torch.func.vmap`` maps a single run over draws, whatever shapes the program uses.
* ``"loop"``: one run per draw, for programs that call ``.item()`` or branch on values.

All three read the same tensors off the trace of a run, see :class:`View`, and return them with the draws in front.

vmap refuses some of what single runs can do: distributions of torch and Pyro write into new tensors, branch on their
parameters, fill empty tensors at random, or read ``tensor.data``.  :class:`VmapRules` are rules for these.
"""

import re
import sys
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors

from ..arguments import is_integer
from .sites import Site, Values, value_of

DRAWS = "_pyro_flows_draws"  # the plate of draws
INSTALLED = re.compile("(site|dist)-packages")  # folders of libraries
REFUSALS = "vmap: ", "Batching rule not implemented", "In order to use an autograd.Function"  # torch's first words

_weighs: ContextVar[bool] = ContextVar("weighs", default=False)


def is_weighing() -> bool:
    """True inside :func:`run`, where draws are weighed: a draw without a density has weight 0 and is no error."""
    return _weighs.get()


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
        met, known = ({*trace.observation_nodes, *trace.stochastic_nodes} for trace in (self.trace, self.single))
        if other := sorted(met ^ known):
            fault = f"the program has other sites from run to run: {other[0]!r} is in some runs only"
            way = "Let it draw the same sites each time, and mask those that do not count: with poutine.mask(mask=...)"
            raise ValueError(f"{fault}. {way}.")

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
        depth = -1 - self.nesting
        rows = log_prob.unsqueeze(0) if log_prob.dim() <= self.nesting else log_prob.movedim(depth, 0)
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
                return read(once(values, None))

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
    if not is_integer(batch_size, 1):
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
    parts = []
    for start in range(0, number, batch_size):
        size = min(batch_size, number - start)
        parts.append(step({name: value[start : start + size] for name, value in held.items()}, size))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class DrawsDiffer(RuntimeError):
    """A library branches on a value that differs between draws."""


def is_refusal(error: Exception) -> bool:
    """True if vmap refused what a program does, or if draws differ in a branch of a library."""
    return isinstance(error, DrawsDiffer) or (isinstance(error, RuntimeError) and str(error).startswith(REFUSALS))


class VmapRules(TorchFunctionMode):
    """Rules for one run of a program under vmap.

    * A write into a tensor that the run has created, and that is the same for all draws, makes one of each draw of it.
      Random writes count.
    * A branch of a library is taken if all draws agree on it.  Branches of users are refused, since the few draws that
      choose an engine may agree by chance.

    Args:
        draw: The index of the draw, a tensor that differs between draws.
    """

    def __init__(self, draw: Tensor) -> None:
        super().__init__()
        self._draw = draw
        self._created: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DATA:
            return args[0].detach()
        if func in _READS and INSTALLED.search(sys._getframe(1).f_code.co_filename):
            args = tuple(map(_common, args))
        if func is Tensor.__getitem__ and isinstance(args[1], slice):
            args = args[0], slice(*map(_common, (args[1].start, args[1].stop, args[1].step)))
        if func in (torch.equal, Tensor.equal):
            return args[0].shape == args[1].shape and bool(_common((args[0] == args[1]).all()))
        if func is Tensor.__setitem__ and not isinstance(args[2], Tensor):
            index = args[1]
            if isinstance(index, Tensor) and index.dtype == torch.bool and index.shape == args[0].shape:
                func = Tensor.masked_fill_  # vmap has no rule for a mask as an index
        found = self._written(func, args, kwargs or {})
        if func in _CREATORS:
            self._created[id(found)] = found
        return found

    def _written(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function; if it fails to write into a tensor of this run, let the tensor differ between draws.

        A part of such a tensor no longer belongs to it then, since ``x[1:] += y`` assigns the part to its place.
        """
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if func is Tensor.__format__:
                return "a number per draw"
            written = args[0] if args and isinstance(args[0], Tensor) else None
            if written is None or (id(written) not in self._created and id(written._base) not in self._created):
                raise
            self._created.pop(id(written), None)
            swap_tensors(written, torch.where(self._draw >= 0, written, written))
            return func(*args, **kwargs)


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_READS = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item, torch.arange}
_LIKE = torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like
_NEW = Tensor.new, Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor
_FULL = torch.tensor, torch.empty, torch.zeros, torch.ones, torch.full, torch.eye
_CREATORS = {*_FULL, *_LIKE, *_NEW, torch.clone, Tensor.clone}


def _common(value: Any) -> Any:
    """Return the value that all draws have in common, or a value that is no tensor unchanged."""
    return _Common.apply(value) if isinstance(value, Tensor) else value


class _Common(torch.autograd.Function):
    """The value that all draws have in common."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, None]:
        rows = x.movedim(in_dims[0], 0)
        if (rows != rows[:1]).any():
            raise DrawsDiffer("draws differ in a value on which a library branches")
        return rows[0].detach().clone(), None
