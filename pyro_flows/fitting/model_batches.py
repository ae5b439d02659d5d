"""Batches of a DataLoader as arguments of a model, a new one in each step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from ..data.batches import Stream
from ..programs.model_and_guide import Task
from ..training import distributed


def find_loader(args: tuple[Any, ...], kwargs: dict[str, Any]) -> DataLoader | None:
    """Return the loader among the arguments of a model, or None.

    Raises:
        ValueError: If there are two, or one is a keyword argument.
    """
    for name, value in kwargs.items():
        if isinstance(value, DataLoader):
            raise ValueError(f"fit_svi: {name}= is a DataLoader. Give it as a positional argument.")
    loaders = [value for value in args if isinstance(value, DataLoader)]
    if len(loaders) > 1:
        raise ValueError("fit_svi: the model has two DataLoaders among its arguments. Give one, of tuples of tensors.")
    return loaders[0] if loaders else None


class ModelBatches(Stream):
    """Arguments of a model with the values of a loader's next batch in place of the loader.

    A batch that is a tuple or list is several arguments, any other value one.  Each of several processes takes its
    share of the rows of all tensors that have as many as the first.

    Args:
        loader: The loader.
        args: The arguments, with the loader.
    """

    caller = "fit_svi"

    def __init__(self, loader: DataLoader, args: tuple[Any, ...]) -> None:
        super().__init__(loader, lambda item: item)
        self._args, self.loader = args, loader
        self.others = tuple(value for value in args if value is not loader)
        try:
            self.steps = len(loader)
        except TypeError:  # the dataset has no length, or no end
            self.steps = sys.maxsize
        if not self.steps:
            raise ValueError("fit_svi: the DataLoader has no batches.")

    def next(self) -> tuple[Any, ...]:
        """Return the arguments of the model with this process's rows of the next batch."""
        item = distributed.broadcast(lambda: next(self._items))
        if isinstance(item, Mapping):
            raise TypeError("fit_svi: a batch of the DataLoader is a dict; give tuples, by collate_fn or the dataset.")
        values = tuple(item) if isinstance(item, tuple | list) else (item,)
        number = next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 0)
        own, self.share = distributed.share(number)
        taken = tuple(_rows(value, own, number) for value in values)
        found: list[Any] = []
        for value in self._args:
            found += taken if value is self.loader else [value]
        return tuple(found)

    def feed(self, task: Task, *, is_lifted: bool) -> None:
        """Give the next batch to a model and its guide.

        Args:
            task: The model and the guide.
            is_lifted: True if an engine runs the model, which then has the rows of the first batch.
        """
        args, model = self.next(), task.model
        if (is_lifted or model.enumerated) and _sizes(args) != _sizes(model.args):
            seen = f"{_sizes(args)} numbers of rows after {_sizes(model.args)}"
            why = "its discrete latents are summed out" if model.enumerated else f"the model{model.fault}"
            fault = f"the batches of the DataLoader have {seen}, and they must have the same, as {why}"
            raise ValueError(f"fit_svi: {fault}. Give DataLoader(..., drop_last=True).")
        model.args = task.guide.args = args


def _rows(value: Any, own: slice, number: int) -> Any:
    return value[own] if isinstance(value, Tensor) and value.dim() and len(value) == number else value


def _sizes(args: tuple[Any, ...]) -> list[int]:
    return [len(value) for value in args if isinstance(value, Tensor) and value.dim()]
