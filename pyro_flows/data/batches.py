"""Sources of batches: rows in memory, shuffled in each epoch, or a loader.

A source has the number of batches of an epoch, the next batch, one pass over all batches, and a state to resume from.
All processes of a distributed fit see the batches of process 0, and each takes its share of every batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, random_split

from ..training import distributed
from ..training.randomness import random_state, set_random_state

Batch = tuple[Tensor, Tensor | None]  # rows (N, *event_shape), and contexts (N, ...) or None
PART = 10_000  # rows in a batch of one pass over all
NUMBERS = 250_000  # numbers in such a batch of images
MOST, IMAGES = 256, 64  # rows and images in a batch by default


class Rows:
    """Batches of rows in memory.

    Args:
        x: ``(N, *event_shape)``.
        context: ``(N, ...)``, or None.
        size: The number of rows of a batch, at most N; by default as suits N.  Rows left over in an epoch come in
            another one.

    Attributes:
        steps: The number of batches of an epoch.
        share: The share of the last batch that this process took.
    """

    def __init__(self, x: Tensor, context: Tensor | None, size: int | None = None) -> None:
        self.x, self.context = x, context
        self.size = min(size or min(MOST if x.dim() == 2 else IMAGES, max(32, len(x) // 18)), len(x))
        self.steps, self.share = len(x) // max(1, self.size), 1.0
        self._order, self._place = torch.zeros(0, dtype=torch.long), 0

    def __iter__(self) -> Iterator[Batch]:
        part = PART if self.x.dim() == 2 else max(1, NUMBERS // self.x[0].numel())
        for start in range(0, len(self.x), part):
            yield part_of((self.x, self.context), slice(start, start + part))

    def next(self) -> Batch:
        """Return this process's rows of the next batch."""
        if self._place + self.size > len(self._order):
            self._order, self._place = distributed.broadcast(lambda: torch.randperm(len(self.x))), 0
        chosen = self._order[self._place : self._place + self.size]
        self._place += self.size
        own, self.share = distributed.share(self.size)
        return part_of((self.x, self.context), chosen[own])

    def state_dict(self) -> dict[str, Any]:
        return {"order": self._order, "place": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order, self._place = state["order"], state["place"]


class Stream:
    """Batches of a loader, or of any iterable that can be iterated again.

    The place of a loader cannot be saved in a file.  The state holds the random state at the start of the epoch and the
    number of batches taken since; to resume, the stream skips as many batches.

    Args:
        loader: The iterable of items.
        read: A function from an item to a batch.

    Attributes:
        steps: The number of items, known after one pass.
        again: True if the loader samples rows with replacement.
        share: The share of the last batch that this process took.
    """

    caller = "fit_density"

    def __init__(self, loader: Iterable[Any], read: Callable[[Any], Batch]) -> None:
        self.loader, self.read = loader, read
        samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
        self.steps, self.share, self.again = 0, 1.0, bool(getattr(samplers[0], "replacement", False))
        owners = [loader, *samplers, getattr(samplers[1], "sampler", None)]
        generators = (getattr(owner, "generator", None) for owner in owners)
        self._generators = list({id(g): g for g in generators if g is not None}.values())
        self._start: dict[str, Any] = {}
        self._taken, self._items = 0, self._epochs()

    def __iter__(self) -> Iterator[Batch]:
        self.steps = 0
        items = ((item,) for item in self.loader)  # process 0 alone iterates over the loader
        while (item := distributed.broadcast(lambda: next(items, None))) is not None:
            self.steps += 1
            yield self.read(*item)

    def next(self) -> Batch:
        """Return this process's rows of the next batch."""
        batch = self.read(distributed.broadcast(lambda: next(self._items)))
        own, self.share = distributed.share(len(batch[0]))
        return part_of(batch, own)

    def _epochs(self) -> Iterator[Any]:
        """Yield the items of one epoch after the other, each of at most ``steps`` items."""
        while True:
            self._start, self._taken = self._random(), 0
            for item in islice(self.loader, self.steps):
                self._taken += 1
                yield item
            if not self._taken:
                words = "the loader, which had batches before, yields no more; it must start anew"
                raise ValueError(f"{self.caller}: {words}.")

    def _random(self) -> dict[str, Any]:
        """Return the random state of this process and of the loader's own generators."""
        return {"random": random_state(), "own": [generator.get_state() for generator in self._generators]}

    def _set_random(self, state: dict[str, Any]) -> None:
        set_random_state(state["random"])
        for generator, own in zip(self._generators, state["own"], strict=True):
            generator.set_state(own)

    def state_dict(self) -> dict[str, Any]:
        start = self._start if self._taken < self.steps else {}  # the next epoch starts with new random numbers
        return {"start": start, "taken": self._taken, "own": self._random()["own"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start, self._taken, self._items = {}, 0, self._epochs()
        now = {"random": random_state(), "own": state["own"]}
        if state["start"] and distributed.rank() == 0:
            self._set_random(state["start"])
            for _ in range(state["taken"]):
                next(self._items)
        self._set_random(now)


Source = Rows | Stream


def mean_of(loss: Callable[[Batch], Tensor], source: Source) -> float:
    """Return the mean loss of all rows of a source; each process computes its share."""
    total, number = 0.0, 0
    for batch in source:
        number += len(batch[0])
        own, share = distributed.share(len(batch[0]))
        if share:
            mine = part_of(batch, own)
            total += float(loss(mine)) * len(mine[0])
    return sum(distributed.all_gather(lambda: total)) / number


def part_of(batch: Batch, own: Tensor | slice) -> Batch:
    """Return some rows of a batch and their contexts."""
    x, context = batch
    return x[own], None if context is None else context[own]


def divided(batch: Batch, share: float, size: int | None) -> tuple[Rows, Rows]:
    """Divide rows into those to train on, in batches of a size, and a share to hold out."""
    # Rows may be sorted, so they are shuffled; a fixed seed lets a resumed run hold out the same rows.
    number = len(batch[0])
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    kept, out = order.tensor_split([max(1, number - math.ceil(share * number))])
    return Rows(*part_of(batch, kept), size), Rows(*part_of(batch, out))


def split(loader: Any, share: float) -> tuple[DataLoader, DataLoader]:
    """Split the dataset of a loader, with a fixed seed, into two loaders: one to train on, one of rows held out.

    Raises:
        ValueError: If the loader has a custom sampler or no dataset with indices.
    """
    is_plain = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    number, sampler = len(loader.dataset) if is_plain else 0, getattr(loader, "sampler", None)
    shuffled = type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == number
    in_order = is_plain and (shuffled or type(sampler) is SequentialSampler)
    if not in_order or type(loader.batch_sampler) is not BatchSampler:
        what = f"x is a {type(loader).__name__} whose rows have no indices or a custom sampler"
        way = "give others to judge by: validation=x, (x, context) or a loader"
        raise ValueError(f"fit_density: {what}, and no rows of it can be held out; {way}.")
    held = min(math.ceil(share * number), number - 1)
    kept, out = random_split(loader.dataset, [number - held, held], generator=torch.Generator().manual_seed(0))
    names = (
        "batch_size", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn",
        "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers",
    )  # fmt: skip
    like = {name: getattr(loader, name) for name in names}
    train = DataLoader(kept, shuffle=True, drop_last=loader.drop_last and len(kept) >= loader.batch_size, **like)
    return train, DataLoader(out, **like)
