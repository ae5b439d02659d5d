"""What a guide knows of each row of a plate: what an encoder makes of the row's data, or a vector learned for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioners.paced import Paced
from .encoding import encode, finite, probe
from .look import Rows, look
from .rows import places_of, take_rows


class RowContexts(Paced):
    """Contexts of a plate's rows, ``(rows, width)``.

    Args:
        plate: The plate's name.
        encoder: A network or function from the model's arguments to them; without one they are parameters.
        embedding_dim: How many random numbers a row's parameters then start with, beside some zeros.

    Attributes:
        pace: How far a row's context moves when an optimiser moves its parameters.
    """

    pace: float = 1.0

    def __init__(self, plate: str, encoder: Callable[..., Tensor] | None, embedding_dim: int) -> None:
        super().__init__()
        if isinstance(embedding_dim, bool) or not isinstance(embedding_dim, int) or embedding_dim < 1:
            raise ValueError(f"AutoPlateFlow: embedding_dim must be an integer of at least 1, got {embedding_dim!r}.")
        self.embedding_dim = embedding_dim
        self.plate, self.encoder, self.width = plate, encoder, 0
        self.embedding: nn.Embedding | None = None

    def setup(
        self,
        model: Callable[..., Any],
        rows: Rows,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        like: Tensor,
        num_zeros: int,
    ) -> None:
        """Learn the width from the encoder, or make for each row a vector of zeros and then random numbers."""
        if self.encoder is None:
            self.width = num_zeros + self.embedding_dim
            start = torch.cat(
                (torch.zeros(rows.full_size, num_zeros), torch.randn(rows.full_size, self.embedding_dim)), 1
            )
            self.embedding = nn.Embedding.from_pretrained(start.to(like), freeze=False)
        else:
            context = probe("AutoPlateFlow", self.encoder, model, args, kwargs)
            self._check(context, rows.size, rows.full_size)
            self.width = context.shape[-1]

    @torch.no_grad()
    def set_pace(self, pace: float | None) -> None:
        """Change the pace, by default to 1, and keep the contexts; exact in floating point for powers of 2."""
        pace = pace or 1.0
        if self.embedding is not None:
            self.embedding.weight.mul_(self.pace / pace)
        self.pace = pace

    @property
    def unit(self) -> float:
        return self.pace

    def _paced_names(self) -> Iterable[str]:
        return ("embedding.weight",)

    def of(
        self, model: Callable[..., Any], plate: Any, indices: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The contexts of the rows at ``indices`` of a plate."""
        places = places_of(indices, plate.size)
        is_data = places is not None and places is not indices
        if is_data and not any(value is indices for value in (*args, *kwargs.values())):
            raise ValueError(
                f"AutoPlateFlow: the data that plate {self.plate!r} is given as subsample= must be an argument of the "
                "model, as it is, or their order cannot be told. Write subsample=x, or leave it out."
            )
        if self.embedding is not None:
            self._check_known(plate.size)
            if places is None:
                raise ValueError(
                    f"AutoPlateFlow: plate {self.plate!r} is given the data of {len(indices)} of {plate.size} rows as "
                    "subsample=, and without an encoder the guide must know which rows they are. Give an encoder, or "
                    "the rows' indices as subsample=."
                )
            return self.pace * self.embedding(places.to(self.embedding.weight.device))
        if places is None:  # the arguments are of these rows alone
            context = self._encode(model, args, kwargs)
            self._check(context, len(indices), len(indices))
            return context
        if len(places) < plate.size:
            args, kwargs = take_rows(args, kwargs, places, plate.size)
        elif places is indices and not torch.equal(indices, torch.arange(plate.size, device=indices.device)):
            raise ValueError(
                f"AutoPlateFlow: plate {self.plate!r} takes all of its rows in another order, by subsample=; whether "
                "the arguments are in that order cannot be told. Leave subsample= out where all rows are taken."
            )
        context = self._encode(model, args, kwargs)
        self._check(context, len(places), plate.size)
        return context if len(context) == len(places) else context[places]

    def of_all(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The contexts of all rows that the arguments tell of."""
        if self.embedding is not None:
            if model is not None:  # which saved guides are without
                rows = look(model, args, kwargs, plate=self.plate, until=()).rows
                assert rows is not None
                self._check_known(rows.full_size)
            return self.pace * self.embedding.weight
        context = self._encode(model, args, kwargs)
        self._check(context, len(context), len(context))
        finite("AutoPlateFlow", context)
        return context

    def _check_known(self, full_size: int) -> None:
        if self.embedding is not None and full_size != self.embedding.num_embeddings:
            raise ValueError(
                f"AutoPlateFlow: without an encoder the guide knows the {self.embedding.num_embeddings} rows of plate "
                f"{self.plate!r} that it was built for, not {full_size}. Give it an encoder, or build another guide."
            )

    def _encode(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert self.encoder is not None
        return encode("AutoPlateFlow", self.encoder, model, args, kwargs, self.width)

    def _check(self, context: Tensor, present: int, all_rows: int) -> None:
        if context.dim() != 2 or len(context) not in (present, all_rows):
            raise ValueError(
                f"AutoPlateFlow: the encoder must return one vector for each of the {all_rows} rows of plate "
                f"{self.plate!r}, ({all_rows}, context_dim), got shape {tuple(context.shape)}."
            )
