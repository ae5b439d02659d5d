"""Contexts of conditional flows: encoded from the model's arguments, or learned for each row of some plates.

Amortised inference: one network serves all data (Gershman, Goodman 2014; Kingma, Welling 2013, arXiv:1312.6114).
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn

from ..conditioners.base import Paced
from ..encoders import Arguments, Joined, Standardize
from ..encoders.base import at_rest, learning
from ..encoders.training_record import unjudged
from ..programs.plate_rows import Shuffled
from ..vjp import graph_of
from .guide_call import Call, Key, Rows, frame_of

REMOTE = 10.0  # standard deviations of the data of training


def check_encoder(owner: str, encoder: object, name: str = "encoder") -> None:
    """Raise TypeError unless an encoder is None or can be called; a class is refused too."""
    if encoder is not None and (isinstance(encoder, type) or not callable(encoder)):
        words = "a network or function of the model's arguments, such as encoders.MLPEncoder(input_dim, context_dim)"
        raise TypeError(f"{owner}: {name} must be {words}, got {encoder!r:.100}.")


def encode(call: Call, encoder: Any, width: int | None = None) -> Tensor:
    """Return the context that an encoder computes from the arguments of a call, ``(*batch, width)``.

    Raises:
        TypeError: If the encoder fails without arguments, or on data that are no tensors.
        ValueError: If it fails otherwise, or returns no floating tensor of that width.
    """
    if isinstance(encoder, Joined):
        context = encoder.join([encode(call, network) for network in encoder.networks])
    else:
        places, names = _arranged(call, encoder)
        try:
            context = encoder(*places, **names)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise _failure(call.owner, [*places, *names.values()], error) from error
    if not isinstance(context, Tensor) or not context.dim() or not context.is_floating_point():
        what = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise ValueError(f"{call.owner}: the encoder must return a floating tensor (*batch, context_dim), got {what}.")
    if width is not None and context.shape[-1] != width:
        got = f"width {context.shape[-1]} (shape {tuple(context.shape)})"
        raise ValueError(f"{call.owner}: the encoder returned {got}, but the guide was built for width {width}.")
    return context


def _failure(owner: str, values: list[Any], error: Exception) -> Exception:
    """Return the error of an encoder with the shapes of its arguments."""
    seen = [str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in values]
    if not values:
        must = "the encoder must get the model's data, got no arguments"
        return TypeError(f"{owner}: {must}. Give them, as in guide.sample(1000, x).")
    if arrays := [type(value).__name__ for value in values if isinstance(value, np.ndarray | list)]:
        must = f"the data for the encoder must be tensors, got {arrays[0]}"
        return TypeError(f"{owner}: {must}. Use torch.as_tensor(...).")
    fault = f"the encoder fails on the arguments that the model is given, {', '.join(seen)}"
    way = " It must take all of them, in the model's order; choose some by encoders.Arguments(network, 0)."
    end = "" if isinstance(error, ValueError) else way  # others do not know that they encode a model's data
    return ValueError(f"{owner}: {fault}: {f'{error!s:.300}'.rstrip('.')}.{end}")


def _arranged(call: Call, encoder: Any) -> tuple[Sequence[Any], dict[str, Any]]:
    """Return the arguments of a call in the order of the model's signature, so that encoders need no names.

    Keyword-only arguments of the model keep their names.  ``Arguments`` may choose any argument by its name or by its
    position in the signature; one that was left out is None.
    """
    try:
        if (signature := call.signature) is None:
            return call.args, call.kwargs
        given = signature.bind(*call.args, **call.kwargs).arguments
    except (TypeError, ValueError) as error:  # Python does not know the signature, or the arguments do not fit it
        if call.model is None:
            raise TypeError(f"{call.owner}: the arguments must be those of the model: {error}.") from error
        return call.args, call.kwargs
    places, names, kinds = list[Any](), dict[str, Any](), signature.parameters
    chooses = isinstance(encoder, Arguments)
    for name, parameter in kinds.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            places += given.get(name, ())
        elif parameter.kind is parameter.VAR_KEYWORD:
            names |= given.get(name, {})
        else:
            if parameter.kind is not parameter.KEYWORD_ONLY and (chooses or name in given):
                places.append(given.get(name))
            if name in given and (chooses or parameter.kind is parameter.KEYWORD_ONLY):
                names[name] = given[name]
    wanted = [*encoder.positions, *encoder.named.values()] if chooses else []
    if unknown := [name for name in wanted if isinstance(name, str) and name not in kinds and name not in names]:
        raise ValueError(f"{call.owner}: Arguments takes {unknown[0]!r}, but the model has {', '.join(kinds)}.")
    return places, names


def check_finite(owner: str, context: Tensor | None) -> None:
    """Raise ValueError if a context holds NaN or infinite numbers."""
    if context is not None and not context.isfinite().all():
        bad = f"{int((~context.isfinite()).sum())} NaN or infinite numbers of {context.numel()}"
        raise ValueError(f"{owner}: the encoder returned {bad}; are the data finite?")


def remoteness(call: Call, encoders: Sequence[Any]) -> str:
    """Return words for how far the arguments of a call lie from the data of training, "" if that is not far."""
    standard, contexts = list[Tensor](), list[Tensor]()
    with unjudged(), torch.no_grad(), contextlib.ExitStack() as stack:
        for encoder in encoders:
            stack.enter_context(at_rest(encoder))
            for part in encoder.modules() if isinstance(encoder, nn.Module) else ():
                if isinstance(part, Standardize) and not part.is_fresh:
                    stack.enter_context(part.register_forward_hook(lambda _, __, seen: standard.append(seen)))
            contexts.append(encode(call, encoder))
    largest = max((float(seen.abs().nan_to_num(0.0).max()) for seen in standard or contexts if seen.numel()), default=0)
    if largest < REMOTE:
        return ""
    if standard:
        return f"the data lie up to {largest:.2g} standard deviations from the mean of those in training"
    return f"the contexts of the data reach {largest:.2g}"


def initialize(call: Call, encoder: Callable[..., Any] | None) -> None:
    """Initialise each new ``Standardize`` layer in an encoder from the data that the encoder will be trained on.

    Encoders without trained parameters are left alone.
    """
    standardise(encoder, lambda: encode(call, encoder))


def standardise(network: Any, run: Callable[[], Any]) -> None:
    """Initialise each new ``Standardize`` layer in a network from the data that it sees in a run."""
    if not isinstance(network, nn.Module) or not any(p.requires_grad for p in network.parameters()):
        return
    if fresh := [part for part in network.modules() if isinstance(part, Standardize) and part.is_fresh]:
        with at_rest(network), learning(fresh):
            run()


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


def _is_given(plate: Any) -> bool:
    """True unless a plate of the guide has chosen its rows itself."""
    return bool(getattr(plate, "is_given", True))


class InTurn(Messenger):
    """Handler that lets a subsampled plate take its rows in turn, unless its rows are given or replayed."""

    def __init__(self, name: str, rows: Shuffled) -> None:
        super().__init__()
        self.name, self.rows = name, rows

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if msg["name"] == self.name and isinstance(fn, _Subsample) and (fn.subsample_size or fn.size) < fn.size:
            fn.sample = lambda *_: self.rows.next(fn.size, fn.subsample_size)


def check_tied(call: Call, name: str, rows: Rows) -> None:
    """Raise ValueError if the data in a subsampled plate do not depend on its indices: no row can be learned then."""
    if rows.chosen is not None or rows.size == rows.full_size:
        return
    seen = []
    for indices in [torch.randperm(rows.full_size)[: rows.size] for _ in range(10)]:  # a few rows may be alike
        found = call.look(indices={name: indices})  # all with the same random numbers: only the indices differ
        seen.append([site["value"] for site in found.observed.values() if frame_of(site, name)])
    if seen[0] and all(torch.equal(a, b) for other in seen for a, b in zip(seen[0], other, strict=True)):
        part = f"plate {name!r} is subsampled ({rows.size} of {rows.full_size} rows)"
        way = f"take rows by its indices, `with pyro.plate({name!r}, ...) as i: ... obs=y[i]`, or by subsample=i"
        fault = "but its data are the same whatever its indices"
        raise ValueError(f"{call.owner}: {part}, {fault}. Use an encoder, or {way}.")


class BlockRows(NamedTuple):
    """The rows of a block for which it is drawn or scored.

    Attributes:
        places: Their places among all rows that the block was set up for, ``(*rows)``; None if there is no frame.
        contexts: Their contexts, ``(*rows, width)``, or ``(*batch, *rows, width)`` for a batch of datasets.  None for
            latents outside of all rows, unless they depend on the data.
    """

    places: Tensor | None = None
    contexts: Tensor | None = None


class RowContexts(Paced):
    """Contexts of the rows of some plates, ``(*rows, width)``.

    Args:
        plates: The names of the plates, the outermost first.
        encoder: A network or function from the model's arguments to the contexts of the rows of a single plate; without
            one they are parameters.  Its contexts may be followed by parameters, 0 for rows that are not known.

    Attributes:
        sizes: The numbers of all rows that the contexts were set up for.
    """

    def __init__(self, plates: Key, encoder: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.sizes = (0,) * len(plates)
        self.plates, self.encoder, self.width = plates, encoder, 0
        self.embedding: Any = None

    def setup(self, call: Call, rows: Sequence[Rows], like: Tensor, num_zeros: int, noise: int) -> None:
        """Find the width by the encoder, and make a vector of zeros and then random numbers for each row."""
        sizes, encoded = tuple(row.full_size for row in rows), 0
        if self.encoder is not None:
            context = probe(call, self.encoder)
            encoded = self._checked(call, context, rows[0].size, sizes[0]).shape[-1]
        number, start = math.prod(sizes), None
        if num_zeros + noise:
            start = torch.cat((torch.zeros(number, num_zeros), torch.randn(number, noise)), 1).to(like)
        self.restore(encoded + num_zeros + noise, start, sizes)

    def restore(self, width: int, embedding: Tensor | None, sizes: tuple[int, ...]) -> None:
        """Set the width and the rows' parameters."""
        self.width, self.sizes = width, sizes
        if embedding is not None:
            self.embedding = nn.Embedding.from_pretrained(embedding, freeze=False)
            self.stored = ("embedding.weight",)

    @property
    def number(self) -> int:
        """The number of all rows that the contexts were set up for."""
        return math.prod(self.sizes)

    def parts(self) -> tuple[Any, ...]:
        """Return the parts that a file holds, for :meth:`restore`."""
        return self.width, None if self.embedding is None else self.embedding.weight, self.sizes

    def of(self, call: Call, plates: Sequence[Any], indices: Sequence[Tensor]) -> BlockRows:
        """Return the rows at ``indices`` of the plates."""
        places = [self._places(call, plate, rows) for plate, rows in zip(plates, indices, strict=True)]
        if self.encoder is None:
            device = self.embedding.weight.device
            flat = torch.zeros((), dtype=torch.long, device=device)  # the places in the table of parameters
            for plate, rows, found, size in zip(plates, indices, places, self.sizes, strict=True):
                self._check_known(call, plate.name, plate.size)
                if found is None:
                    got = f"plate {plate.name!r} is given the data of {len(rows)} of {plate.size} rows as subsample="
                    raise ValueError(f"{call.owner}: {got}. Give an encoder, or the rows' indices as subsample=.")
                flat = flat.unsqueeze(-1) * size + found.to(device)
            return BlockRows(flat, self.paced(self.embedding(flat)))
        (plate,), (rows,), (found,) = plates, indices, places
        if found is None:  # the arguments hold these rows alone
            return BlockRows(None, self._corrected(self._encode(call, len(rows)), None))
        if len(found) < plate.size:

            def take(value: Any) -> Any:  # some rows of each tensor that has one for each row of the plate
                whole = isinstance(value, Tensor) and value.dim() and len(value) == plate.size
                return value[found.to(value.device)] if whole else value

            kwargs = {name: take(value) for name, value in call.kwargs.items()}
            call = call._replace(args=tuple(map(take, call.args)), kwargs=kwargs)
        elif found is rows and _is_given(plate) and not torch.equal(rows, torch.arange(plate.size, device=rows.device)):
            fault = f"plate {plate.name!r} takes all of its rows in another order, by subsample="
            raise ValueError(f"{call.owner}: {fault}. Leave subsample= out where all rows are taken.")
        context = self._encode(call, len(found), plate.size)
        context = context if len(context) == len(found) else context[found]
        return BlockRows(None, self._corrected(context, found if plate.size == self.number else None))

    def _corrected(self, context: Tensor, places: Tensor | None) -> Tensor:
        """Append the vectors of rows to their encoded contexts, 0 for rows without a place."""
        if self.embedding is None:
            return context
        if places is None:
            return nn.functional.pad(context, (0, self.embedding.embedding_dim))
        vectors = self.paced(self.embedding(places.to(self.embedding.weight.device)))
        return torch.cat((context, vectors.to(context).expand(*context.shape[:-1], -1)), -1)

    def _places(self, call: Call, plate: Any, indices: Tensor) -> Tensor | None:
        """Return the indices of the rows that a plate takes, or None if it is given other data of rows."""
        if not _is_given(plate):
            return indices
        places = places_of(indices, plate.size)
        is_data = places is not None and places is not indices
        if is_data and not any(value is indices for value in (*call.args, *call.kwargs.values())):
            fault = f"the data that plate {plate.name!r} is given as subsample= must be an argument of the model"
            raise ValueError(f"{call.owner}: {fault}, as it is. Write subsample=x, or leave it out.")
        return places

    def of_all(self, call: Call) -> BlockRows:
        """Return all rows in the arguments, of one dataset or, with an encoder, of a batch of them.

        An encoder's vectors belong to as many rows as they were made for.
        """
        if self.encoder is None:
            for plate, rows in call.look(until=()).rows.items() if call.model is not None else ():
                if plate in self.plates:
                    self._check_known(call, plate, rows.full_size)
            places = torch.arange(self.number, device=self.embedding.weight.device).reshape(self.sizes)
            return BlockRows(places, self.paced(self.embedding.weight).reshape(*self.sizes, -1))
        context = self._encode(call)
        check_finite(call.owner, context)
        known = torch.arange(self.number, device=context.device) if context.shape[-2] == self.number else None
        return BlockRows(None, self._corrected(context, known))

    def _check_known(self, call: Call, plate: str, full_size: int) -> None:
        if full_size != (size := self.sizes[self.plates.index(plate)]):
            known = f"the {size} rows of plate {plate!r} that it was built for"
            fault = f"without an encoder the guide knows {known}, not {full_size}"
            raise ValueError(f"{call.owner}: {fault}. Give the arguments of those rows, or an encoder.")

    def _encode(self, call: Call, *numbers: int) -> Tensor:
        own = 0 if self.embedding is None else self.embedding.embedding_dim
        return self._checked(call, encode(call, self.encoder, self.width - own), *numbers)

    def _checked(self, call: Call, context: Tensor, *numbers: int) -> Tensor:
        """Return contexts, or raise ValueError unless they have one of these numbers of rows, if any.

        The last is the number of all rows.
        """
        found = context.shape[-2] if context.dim() >= 2 else 0
        all_rows = numbers[-1] if numbers else found
        if (context.dim() != 2 and (numbers or context.dim() < 2)) or found not in (*numbers, all_rows):
            each = f"each of the {all_rows} rows" if numbers else "each row"
            wanted = f"one vector for {each} of plate {self.plates[0]!r}, ({all_rows or 'rows'}, context_dim)"
            raise ValueError(f"{call.owner}: the encoder must return {wanted}, got shape {tuple(context.shape)}.")
        return context
