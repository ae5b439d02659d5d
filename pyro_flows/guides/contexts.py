"""What a guide knows of each row of a plate: what an encoder makes of the row's data, or a vector learned for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_integers
from ..conditioners.base import Paced
from .encoding import encode, finite, probe
from .guide_call import Call
from .prototype import Rows, look
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
        check_integers("AutoPlateFlow", embedding_dim=embedding_dim)
        self.embedding_dim = embedding_dim
        self.plate, self.encoder, self.width = plate, encoder, 0
        self.embedding: nn.Embedding | None = None

    def setup(self, call: Call, rows: Rows, like: Tensor, num_zeros: int) -> None:
        """Learn the width from the encoder, or make for each row a vector of zeros and then random numbers."""
        if self.encoder is None:
            self.width = num_zeros + self.embedding_dim
            noise = torch.randn(rows.full_size, self.embedding_dim)
            start = torch.cat((torch.zeros(rows.full_size, num_zeros), noise), 1)
            self.embedding = nn.Embedding.from_pretrained(start.to(like), freeze=False)
        else:
            context = probe(call, self.encoder)
            self._check(context, rows.size, rows.full_size)
            self.width = context.shape[-1]

    def restore(self, width: int, embedding: Tensor | None) -> None:
        """Take over the parts of contexts that were saved."""
        self.width = width
        if embedding is not None:
            self.embedding = nn.Embedding.from_pretrained(embedding, freeze=False)

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

    def of(self, call: Call, plate: Any, indices: Tensor) -> Tensor:
        """The contexts of the rows at ``indices`` of a plate."""
        places = places_of(indices, plate.size)
        is_data = places is not None and places is not indices
        if is_data and not any(value is indices for value in (*call.args, *call.kwargs.values())):
            fault = (
                f"the data that plate {self.plate!r} is given as subsample= must be an argument of the model, as it is"
            )
            raise ValueError(f"AutoPlateFlow: {fault}. Write subsample=x, or leave it out.")
        if self.embedding is not None:
            self._check_known(plate.size)
            if places is None:
                got = f"plate {self.plate!r} is given the data of {len(indices)} of {plate.size} rows as subsample="
                raise ValueError(f"AutoPlateFlow: {got}. Give an encoder, or the rows' indices as subsample=.")
            return self.pace * self.embedding(places.to(self.embedding.weight.device))
        if places is None:  # the arguments are of these rows alone
            return self._encode(call, len(indices))
        if len(places) < plate.size:
            call = take_rows(call, places, plate.size)
        elif places is indices and not torch.equal(indices, torch.arange(plate.size, device=indices.device)):
            fault = f"plate {self.plate!r} takes all of its rows in another order, by subsample="
            raise ValueError(f"AutoPlateFlow: {fault}. Leave subsample= out where all rows are taken.")
        context = self._encode(call, len(places), plate.size)
        return context if len(context) == len(places) else context[places]

    def of_all(self, call: Call) -> Tensor:
        """The contexts of all rows that the arguments tell of."""
        if self.embedding is not None:
            if call.model is not None and (rows := look(call, until=()).rows):  # saved guides are without a model
                self._check_known(rows.full_size)
            return self.pace * self.embedding.weight
        context = self._encode(call)
        finite("AutoPlateFlow", context)
        return context

    def _check_known(self, full_size: int) -> None:
        if self.embedding is not None and full_size != self.embedding.num_embeddings:
            known = f"the {self.embedding.num_embeddings} rows of plate {self.plate!r} that it was built for"
            way = "Give it an encoder, or build another guide"
            raise ValueError(f"AutoPlateFlow: without an encoder the guide knows {known}, not {full_size}. {way}.")

    def _encode(self, call: Call, *numbers: int) -> Tensor:
        assert self.encoder is not None
        context = encode(call, self.encoder, self.width)
        self._check(context, *numbers)
        return context

    def _check(self, context: Tensor, *numbers: int) -> None:
        """Refuse contexts of another number of rows than those, if any; the last is that of all rows."""
        all_rows = numbers[-1] if numbers else len(context)
        if context.dim() != 2 or len(context) not in (*numbers, all_rows):
            wanted = f"one vector for each of the {all_rows} rows of plate {self.plate!r}, ({all_rows}, context_dim)"
            raise ValueError(f"AutoPlateFlow: the encoder must return {wanted}, got shape {tuple(context.shape)}.")
