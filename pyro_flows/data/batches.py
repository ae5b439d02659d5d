"""Where batches come from: rows in memory, shuffled anew in each epoch, or a loader.

Each source knows how many batches an epoch has, hands out one after the other, goes once through all for those who want
to see the whole, and has a state from which it goes on as if it had never stopped.  Of several processes, all have the
same batches, from process 0, and each is handed its share of every one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, random_split

from ..training import distributed
from ..training.randomness import random_state, set_random_state

Batch = tuple[Tensor, Tensor | None]  # rows (N, *event_shape), and contexts (N, ...) where there are some
PART = 10_000  # rows that are looked at together
NUMBERS = 250_000  # in the images that are
_END = object()


class Epochs:
    """Which rows come next: shuffled anew in each epoch.

    Attributes:
        steps: How many batches an epoch has.
        share: What share of the last batch was this process's.
    """

    in_common = True  # its state is that of all processes

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size, self.steps = number, size, number // size
        self.order, self.place = torch.zeros(0, dtype=torch.long), 0
        self.share = 1.0

    def next(self) -> Tensor:
        """This process's rows of the next batch."""
        if self.place + self.size > len(self.order):
            self.order, self.place = distributed.broadcast(lambda: torch.randperm(self.number)), 0
        self.place += self.size
        own, self.share = distributed.share(self.size)
        return self.order[self.place - self.size : self.place][own]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.place = state["order"], state["place"]


def suited_size(number: int, asked: int | None = None, most: int = 256) -> int:
    """How many rows a batch takes: what is asked for, or some 256, and fewer where there are few rows."""
    return min(asked or min(most, max(32, number // 18)), number)


class Rows:
    """Batches of rows in memory.

    Args:
        x: ``(N, *event_shape)``.
        context: ``(N, ...)``, or None.
        size: How many rows a batch has, at most N; rows that an epoch does not reach come in another one.
    """

    again = False
    in_common = True

    def __init__(self, x: Tensor, context: Tensor | None, size: int = PART) -> None:
        self.x, self.context = x, context
        self.epochs = Epochs(len(x), size)
        self.steps = self.epochs.steps

    @property
    def share(self) -> float:
        return self.epochs.share

    def __iter__(self) -> Iterator[Batch]:
        part = PART if self.x.dim() == 2 else max(1, NUMBERS // self.x[0].numel())
        for start in range(0, len(self.x), part):
            yield part_of((self.x, self.context), slice(start, start + part))

    def next(self) -> Batch:
        return part_of((self.x, self.context), self.epochs.next())

    def state_dict(self) -> dict[str, Any]:
        return self.epochs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs.load_state_dict(state)


class Stream:
    """Batches of a loader, or of anything that can be gone through again and again.

    A loader's place cannot be kept in a file.  What is kept is where the random numbers stood when its epoch began, and
    how many batches were taken since; to go on, as many are passed over.

    Args:
        loader: Yields items.
        read: Makes a batch of an item.

    Attributes:
        steps: How many items it yields, known once it was gone through.
        again: Whether it may yield a row again and again.
        share: What share of the last batch was this process's.
    """

    in_common = True

    def __init__(self, loader: Iterable[Any], read: Callable[[Any], Batch]) -> None:
        self.loader, self.read = loader, read
        self.steps, self.again = 0, bool(getattr(getattr(loader, "sampler", None), "replacement", False))
        self._items: Iterator[Any] | None = None
        self._start: dict[str, Any] = {}
        self._taken = 0
        self.share = 1.0

    def __iter__(self) -> Iterator[Batch]:
        self.steps = 0
        items = ((item,) for item in self.loader)  # process 0 alone goes through the loader
        while (item := distributed.broadcast(lambda: next(items, None))) is not None:
            self.steps += 1
            yield self.read(*item)

    def next(self) -> Batch:
        """This process's rows of the next batch."""
        batch = self.read(distributed.broadcast(self._next_item))
        own, self.share = distributed.share(len(batch[0]))
        return part_of(batch, own)

    def _next_item(self) -> Any:
        item = _END if self._items is None else next(self._items, _END)
        if item is _END:  # an epoch may also be shorter than the first was
            item = next(self._begin(), _END)
        if item is _END:
            raise ValueError("fit_density: the loader, which had batches before, yields no more; it must start anew.")
        self._taken += 1
        if self._taken == self.steps:
            self._items = None
        return item

    def _begin(self) -> Iterator[Any]:
        self._start = {"random": random_state(), "own": self._own_state()}
        self._items, self._taken = iter(self.loader), 0
        return self._items

    def _generators(self) -> list[torch.Generator]:
        """Random numbers that belong to the loader alone."""
        samplers = [getattr(self.loader, name, None) for name in ("sampler", "batch_sampler")]
        owners = [self.loader, *samplers, getattr(samplers[1], "sampler", None)]
        found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners) if g is not None}
        return list(found.values())

    def _own_state(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def _set_own_state(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)

    def state_dict(self) -> dict[str, Any]:
        midway = self._items is not None
        return {"start": self._start if midway else {}, "taken": self._taken, "own": self._own_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._items = None
        if state["start"] and distributed.rank() == 0:
            now = random_state()
            set_random_state(state["start"]["random"])
            self._set_own_state(state["start"]["own"])
            items = self._begin()
            for _ in range(state["taken"]):
                next(items)
            self._taken = state["taken"]
            set_random_state(now)
        self._set_own_state(state["own"])


Source = Rows | Stream


def sum_of(loss: Callable[[Batch], Tensor], source: Source) -> float:
    """A loss of rows summed over all batches of a source, of which each process sees its share."""
    total = 0.0
    for batch in source:
        own, share = distributed.share(len(batch[0]))
        if share:
            mine = part_of(batch, own)
            total += float(loss(mine)) * len(mine[0])
    return sum(distributed.all_gather(lambda: total))


def part_of(batch: Batch, own: Tensor | slice) -> Batch:
    """Some rows of a batch, and their contexts."""
    x, context = batch
    return x[own], None if context is None else context[own]


def split(caller: str, loader: Any, share: float) -> tuple[DataLoader, DataLoader]:
    """Two loaders like one that goes through all rows of a data set: of rows to train on, and of a share held out.

    The share is the same each time.

    Raises:
        ValueError: If the loader draws its rows in a way of its own, which cannot be divided.
    """
    if reason := _indivisible(loader):
        words = f"{caller}: x is {reason}, and no rows of it can be held out"
        raise ValueError(f"{words}; give others to judge by: validation=x, (x, context) or a loader.")
    number = len(loader.dataset)
    held = min(math.ceil(share * number), number - 1)
    kept, out = random_split(loader.dataset, [number - held, held], generator=torch.Generator().manual_seed(0))
    names = (
        "batch_size", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn",
        "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers",
    )  # fmt: skip
    like = {name: getattr(loader, name) for name in names}
    train = DataLoader(kept, shuffle=True, drop_last=loader.drop_last and len(kept) >= loader.batch_size, **like)
    return train, DataLoader(out, **like)


def _indivisible(loader: Any) -> str:
    """Why a loader cannot be divided, or an empty string."""
    if not isinstance(loader, DataLoader):
        return f"a {type(loader).__name__} of batches"
    if isinstance(loader.dataset, IterableDataset):
        return "a loader of a data set without places"
    sampler, number = loader.sampler, len(loader.dataset)  # type: ignore[arg-type]
    plain = type(sampler) is SequentialSampler
    if type(sampler) is RandomSampler:
        plain = not sampler.replacement and sampler.num_samples == number
    if number < 2:
        return "a loader of one row"
    return "" if plain and type(loader.batch_sampler) is BatchSampler else "a loader with a sampler of its own"
