"""Contexts of conditional flows: encoded from the model's arguments, or learned for each row of a plate.

Amortised inference: one network serves all data (Gershman, Goodman 2014; Kingma, Welling 2013, arXiv:1312.6114).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn

from ..arguments import check_integers
from ..conditioners.base import Paced
from ..encoders import Standardize
from ..encoders.base import at_rest
from ..encoders.standardize import learning
from ..programs.plate_minibatches import Shuffled
from ..programs.traces import signature_of
from ..vjp import graph_of
from .guide_call import Call, Rows, frame_of


def check_encoder(owner: str, encoder: object) -> None:
    """Raise TypeError unless an encoder is None or can be called; a class is refused too."""
    if encoder is not None and (isinstance(encoder, type) or not callable(encoder)):
        words = "a network or function of the model's arguments, such as encoders.MLPEncoder(input_dim, context_dim)"
        raise TypeError(f"{owner}: encoder must be {words}, got {encoder!r:.100}.")


def encode(call: Call, encoder: Any, width: int | None = None) -> Tensor:
    """Return the context that an encoder computes from the arguments of a call, ``(*batch, width)``.

    Raises:
        TypeError: If the encoder fails without arguments, or on data that are no tensors.
        ValueError: If it fails otherwise, or returns no floating tensor of that width.
    """
    places, names = _arranged(call)
    try:
        context = encoder(*places, **names)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        values = (*places, *names.values())
        seen = [str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in values]
        fault = f"the encoder fails on the arguments that the model is given, {', '.join(seen) or 'none at all'}"
        way = "It must take all of them, in the model's order; wrap it in an nn.Module that does"
        if not values:
            must = "the encoder must get the model's data, got no arguments"
            raise TypeError(f"{call.owner}: {must}. Give them, as in guide.sample(1000, x).") from error
        if arrays := [type(value).__name__ for value in values if isinstance(value, np.ndarray | list)]:
            must = f"the data for the encoder must be tensors, got {arrays[0]}"
            raise TypeError(f"{call.owner}: {must}. Use torch.as_tensor(...).") from error
        raise ValueError(f"{call.owner}: {fault}: {f'{error!s:.300}'.rstrip('.')}. {way}.") from error
    if not isinstance(context, Tensor) or not context.dim() or not context.is_floating_point():
        what = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise ValueError(f"{call.owner}: the encoder must return a floating tensor (*batch, context_dim), got {what}.")
    if width is not None and context.shape[-1] != width:
        got = f"width {context.shape[-1]} (shape {tuple(context.shape)})"
        raise ValueError(f"{call.owner}: the encoder returned {got}, but the guide was built for width {width}.")
    return context


def _arranged(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call in the order of the model's signature, so that encoders need no names.

    Keyword-only arguments of the model keep their names.
    """
    try:
        signature = signature_of(call.model)
        bound = signature.bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):  # Python does not know the signature, or the arguments do not fit it
        return call.args, call.kwargs
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    named = bound.kwargs  # with those after an argument that was left out, which Python passes by name
    by_name = {n: v for n, v in named.items() if kinds.get(n) is not inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return (*bound.args, *(value for name, value in named.items() if name not in by_name)), by_name


def check_finite(owner: str, context: Tensor | None) -> None:
    """Raise ValueError if a context holds NaN or infinite numbers."""
    if context is not None and not context.isfinite().all():
        bad = f"{int((~context.isfinite()).sum())} NaN or infinite numbers of {context.numel()}"
        raise ValueError(f"{owner}: the encoder returned {bad}; are the data finite?")


def initialize(call: Call, encoder: Callable[..., Any] | None) -> None:
    """Initialise each new ``Standardize`` layer in an encoder from the data that the encoder will be trained on.

    Encoders without trained parameters are left alone.
    """
    if not isinstance(encoder, nn.Module) or not any(p.requires_grad for p in encoder.parameters()):
        return
    if fresh := [part for part in encoder.modules() if isinstance(part, Standardize) and part.is_fresh]:
        with at_rest(encoder), learning(fresh):
            encode(call, encoder)


def probe(call: Call, encoder: Callable[..., Any]) -> Tensor:
    """Return a first context, which shows its width and the number of rows.

    Raises:
        ValueError: If the encoder is a function of parameters, which the guide cannot see and so would not train.
    """
    with at_rest(encoder), torch.enable_grad():
        context = encode(call, encoder)
    own = {id(parameter) for parameter in encoder.parameters()} if isinstance(encoder, nn.Module) else set()
    leaves = [getattr(node, "variable", None) for node in graph_of(context)]
    if any(isinstance(leaf, nn.Parameter) and id(leaf) not in own for leaf in leaves):
        fault = "the encoder is a function of parameters that the guide cannot see, and would never train"
        raise ValueError(f"{call.owner}: {fault}. Give the network itself, or an nn.Module that holds it.")
    return context.detach()


def width_for_one(call: Call, encoder: Callable[..., Any] | None) -> int:
    """Return the width of the context of one dataset, 0 without an encoder."""
    if encoder is None:
        return 0
    shape = tuple(probe(call, encoder).shape)
    if len(shape) != 1:
        raise ValueError(f"{call.owner}: for one dataset the encoder must return one vector (n,), got shape {shape}.")
    return shape[0]


def places_of(given: Tensor, full_size: int) -> Tensor | None:
    """Return the indices of the rows that a plate is given as ``subsample=``, or None if they cannot be told.

    Pyro allows indices, and the data of the rows themselves: all of them in their order, or some.
    """
    whole, order = len(given) == full_size, torch.arange(full_size, device=given.device)
    if given.dim() == 1 and not given.is_floating_point() and given.dtype != torch.bool:
        in_range = bool(((given >= 0) & (given < full_size)).all())
        if in_range and (not whole or torch.equal(given, order) or torch.equal(given.sort().values, order)):
            return given
    return order if whole else None


class InTurn(Messenger):
    """Handler that lets a subsampled plate take its rows in turn, unless its rows are given or replayed."""

    def __init__(self, name: str, rows: Shuffled) -> None:
        super().__init__()
        self.name, self.rows = name, rows

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if msg["name"] == self.name and isinstance(fn, _Subsample) and (fn.subsample_size or fn.size) < fn.size:
            fn.sample = lambda *_: self.rows.next(fn.size, fn.subsample_size)


def check_tied(call: Call, rows: Rows) -> None:
    """Raise ValueError if the data in a subsampled plate do not depend on its indices: no row can be learned then."""
    if rows.chosen is not None or rows.size == rows.full_size:
        return
    name, seen = call.plate, []
    for indices in [torch.randperm(rows.full_size)[: rows.size] for _ in range(10)]:  # a few rows may be alike
        found = call.look(indices=indices)  # all with the same random numbers: only the indices differ
        seen.append([site["value"] for site in found.observed.values() if frame_of(site, name)])
    if seen[0] and all(torch.equal(a, b) for other in seen for a, b in zip(seen[0], other, strict=True)):
        part = f"plate {name!r} is subsampled ({rows.size} of {rows.full_size} rows)"
        way = f"take rows by its indices, `with pyro.plate({name!r}, ...) as i: ... obs=y[i]`, or by subsample=i"
        fault = "but its data are the same whatever its indices"
        raise ValueError(f"AutoPlateFlow: {part}, {fault}. Use an encoder, or {way}.")


class RowContexts(Paced):
    """Contexts of a plate's rows, ``(rows, width)``.

    Args:
        plate: The plate's name.
        encoder: A network or function from the model's arguments to the contexts; without one they are parameters.
        embedding_dim: The number of random numbers in a row's parameters at the start; the others are zero.

    Attributes:
        pace: How far a row's context moves if an optimiser moves its parameters by 1.
    """

    pace: float | None = 1.0

    def __init__(self, plate: str, encoder: Callable[..., Tensor] | None, embedding_dim: int) -> None:
        super().__init__()
        check_integers("AutoPlateFlow", embedding_dim=embedding_dim)
        self.embedding_dim = embedding_dim
        self.plate, self.encoder, self.width = plate, encoder, 0
        self.embedding: nn.Embedding | None = None

    def setup(self, call: Call, rows: Rows, like: Tensor, num_zeros: int) -> None:
        """Find the width by the encoder, or make a vector of zeros and then random numbers for each row."""
        if self.encoder is None:
            noise = torch.randn(rows.full_size, self.embedding_dim)
            start = torch.cat((torch.zeros(rows.full_size, num_zeros), noise), 1)
            self.restore(num_zeros + self.embedding_dim, start.to(like))
        else:
            self.width = self._checked(probe(call, self.encoder), rows.size, rows.full_size).shape[-1]

    def restore(self, width: int, embedding: Tensor | None) -> None:
        """Set the width and the rows' parameters."""
        self.width = width
        if embedding is not None:
            self.embedding = nn.Embedding.from_pretrained(embedding, freeze=False)

    def _paced_names(self) -> Iterable[str]:
        return () if self.embedding is None else ("embedding.weight",)

    def of(self, call: Call, plate: Any, indices: Tensor) -> Tensor:
        """Return the contexts of the rows at ``indices`` of a plate."""
        places = places_of(indices, plate.size)
        is_data = places is not None and places is not indices
        if is_data and not any(value is indices for value in (*call.args, *call.kwargs.values())):
            fault = f"the data that plate {self.plate!r} is given as subsample= must be an argument of the model"
            raise ValueError(f"AutoPlateFlow: {fault}, as it is. Write subsample=x, or leave it out.")
        if self.embedding is not None:
            self._check_known(plate.size)
            if places is None:
                got = f"plate {self.plate!r} is given the data of {len(indices)} of {plate.size} rows as subsample="
                raise ValueError(f"AutoPlateFlow: {got}. Give an encoder, or the rows' indices as subsample=.")
            return self.paced(self.embedding(places.to(self.embedding.weight.device)))
        if places is None:  # the arguments hold these rows alone
            return self._encode(call, len(indices))
        if len(places) < plate.size:
            call = _take_rows(call, places, plate.size)
        elif places is indices and not torch.equal(indices, torch.arange(plate.size, device=indices.device)):
            fault = f"plate {self.plate!r} takes all of its rows in another order, by subsample="
            raise ValueError(f"AutoPlateFlow: {fault}. Leave subsample= out where all rows are taken.")
        context = self._encode(call, len(places), plate.size)
        return context if len(context) == len(places) else context[places]

    def of_all(self, call: Call) -> Tensor:
        """Return the contexts of all rows in the arguments."""
        if self.embedding is not None:
            if call.model is not None and (rows := call.look(until=()).rows):
                self._check_known(rows.full_size)
            return self.paced(self.embedding.weight)
        context = self._encode(call)
        check_finite("AutoPlateFlow", context)
        return context

    def _check_known(self, full_size: int) -> None:
        if self.embedding is not None and full_size != self.embedding.num_embeddings:
            known = f"the {self.embedding.num_embeddings} rows of plate {self.plate!r} that it was built for"
            fault = f"without an encoder the guide knows {known}, not {full_size}"
            raise ValueError(f"AutoPlateFlow: {fault}. Give it an encoder, or build another guide.")

    def _encode(self, call: Call, *numbers: int) -> Tensor:
        return self._checked(encode(call, self.encoder, self.width), *numbers)

    def _checked(self, context: Tensor, *numbers: int) -> Tensor:
        """Return contexts, or raise ValueError unless they have one of these numbers of rows, if any.

        The last is the number of all rows.
        """
        all_rows = numbers[-1] if numbers else len(context)
        if context.dim() != 2 or len(context) not in (*numbers, all_rows):
            wanted = f"one vector for each of the {all_rows} rows of plate {self.plate!r}, ({all_rows}, context_dim)"
            raise ValueError(f"AutoPlateFlow: the encoder must return {wanted}, got shape {tuple(context.shape)}.")
        return context


def _take_rows(call: Call, indices: Tensor, full_size: int) -> Call:
    """Return a call with some rows of each tensor that has one row for each row of the plate."""

    def take(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == full_size:
            return value[indices.to(value.device)]
        return value

    kwargs = {name: take(value) for name, value in call.kwargs.items()}
    return call._replace(args=tuple(map(take, call.args)), kwargs=kwargs)
