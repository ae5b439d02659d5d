"""Plain data and tensors in a file of ``torch.save``, read without trust in what the file says of itself.

The file is a zip archive of a pickle and of the tensors' bytes.  The pickle is carried out here, opcode by opcode,
where it makes numbers, words, tuples, lists, dictionaries and tensors, and nothing else.  Reading takes time and memory
in proportion to the size of the file: parts are stored and not compressed, a tensor has no more numbers than its part
has, and the data have no more nodes than the pickle has bytes, so that no shared node stands for thousands.
"""

from __future__ import annotations

import math
import pickletools
import sys
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

DEPTH = 100  # of containers in containers
CHUNK = 2**20  # bytes
DTYPES = {
    "torch BoolStorage": torch.bool,
    "torch ByteStorage": torch.uint8,
    "torch CharStorage": torch.int8,
    "torch ShortStorage": torch.int16,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
}
ORDERED, TENSOR, PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
LITERALS = "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Damaged(ValueError):
    """A part of a file whose sum is wrong; the text is its name."""


class Foreign(ValueError):
    """A file that holds more than plain data and tensors."""


class Named(NamedTuple):
    """A class or function that a pickle names; it is never looked up."""

    name: str


class Archive:
    """The content of a file of ``torch.save``.

    Args:
        file: The file, open for reading.

    Attributes:
        content: The data.
        tensors: How many tensors there are.
        nbytes: How many bytes they have.
        squares: The longer sides of matrices, squared and added up: masks between features are that large.

    Raises:
        zipfile.BadZipFile: If it is no archive, or was cut off.
        Damaged: If the sum of a part is wrong.
        Foreign: If it holds more than plain data and tensors.
        ValueError: If it is no file of ``torch.save``, or claims more than it holds.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._zip = zipfile.ZipFile(file)
        self._parts = {info.filename: info for info in self._zip.infolist()}
        self._check_parts(file.seek(0, 2))
        pickles = [name for name in self._parts if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")
        self._storages: dict[str, tuple[torch.dtype, Tensor]] = {}
        self.tensors = self.squares = 0
        self._seen: set[int] = set()
        data = bytes(self._bytes(pickles[0]).numpy())
        order = self._parts.get(f"{self._root}byteorder")
        self._swapped = order is not None and bytes(self._bytes(order.filename).numpy()).decode() != sys.byteorder
        self.content = _Machine(self).run(data)
        check_size(self.content, len(data))
        self.nbytes = sum(values.nbytes for _, values in self._storages.values())

    def _check_parts(self, size: int) -> None:
        parts = self._zip.infolist()
        if len({info.filename.casefold() for info in parts}) < len(parts):
            raise ValueError("it has parts of one name")
        if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in parts):
            raise ValueError("its parts are compressed or encrypted, which torch.save does not do")
        if sum(info.file_size for info in parts) > size:
            raise ValueError("its parts claim to be larger than it is")

    def _bytes(self, name: str) -> Tensor:
        """The bytes of a part, ``(size,)``, whose sum is right."""
        found, place = np.empty(self._parts[name].file_size, dtype=np.uint8), 0
        try:
            with self._zip.open(name) as stream:
                while part := stream.read(CHUNK):
                    found[place : place + len(part)] = np.frombuffer(part, np.uint8)
                    place += len(part)
        except zipfile.BadZipFile as error:
            raise Damaged(name) from error
        if place < len(found):
            raise Damaged(name)
        return torch.from_numpy(found)

    def storage(self, kind: object, key: object, numel: object) -> Tensor:
        """All numbers of a part, ``(numel,)``."""
        if not isinstance(kind, Named) or kind.name not in DTYPES or type(key) is not str or type(numel) is not int:
            raise ValueError("it names a part that cannot be one of a tensor")
        dtype, name = DTYPES[kind.name], f"{self._root}data/{key}"
        if key not in self._storages:
            if name not in self._parts or self._parts[name].file_size != numel * dtype.itemsize:
                raise ValueError(f"a tensor is to have {numel} numbers, which its part {key!r:.40} has not")
            own = self._bytes(name)
            if self._swapped and dtype.itemsize > 1:
                own.numpy().view(f"u{dtype.itemsize}").byteswap(inplace=True)
            self._storages[key] = dtype, own.view(dtype) if numel else torch.empty(0, dtype=dtype)
        known, values = self._storages[key]
        if known != dtype or len(values) != numel:
            raise ValueError(f"its part {key!r:.40} is to be of {known} and of {dtype}")
        return values

    def tensor(self, values: object, offset: object, size: object, stride: object, *_: object) -> Tensor:
        """A view of a part's numbers, each there at most once."""
        if not (isinstance(values, Tensor) and _are_counts((offset,)) and _are_counts(size) and _are_counts(stride)):
            raise ValueError("it describes a tensor that cannot be one")
        assert isinstance(size, tuple) and isinstance(stride, tuple) and isinstance(offset, int)  # noqa: PT018
        number = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if number else -1
        if number > len(values) or last >= len(values):
            raise ValueError(f"a tensor of shape {size!s:.60} is to be made of {len(values)} numbers")
        self.tensors += 1
        if len(size) > 1 and id(values) not in self._seen:
            self._seen.add(id(values))
            self.squares += max(size) ** 2
        return values.as_strided(size, stride, offset) if number else values.new_empty(size)


def _are_counts(numbers: object) -> bool:
    return isinstance(numbers, tuple) and len(numbers) <= 64 and all(type(n) is int and 0 <= n < 2**62 for n in numbers)


def check_size(content: Any, limit: int) -> None:
    """Refuse data with more nodes than a limit, each counted as often as it is met, or nested too deeply."""
    count, waiting = 0, [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if isinstance(value, dict | list | tuple) and not isinstance(value, Named):
            count += len(value) if isinstance(value, dict) else 0  # its keys
            if depth == DEPTH:
                raise ValueError(f"its data are nested more than {DEPTH} deep")
            if count + len(value) + len(waiting) > limit:
                raise ValueError(f"its data unfold to more than the {limit} values that {limit} bytes can hold")
            waiting.extend((part, depth + 1) for part in (value.values() if isinstance(value, dict) else value))


class _Machine:
    """Carries out a pickle that makes plain data and tensors."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Return what a pickle makes."""
        try:
            for opcode, argument, _ in pickletools.genops(data):
                name = opcode.name
                if name in LITERALS:
                    self._stack.append(argument)
                elif name in CONSTANTS:
                    self._stack.append(CONSTANTS[name])
                elif (step := getattr(self, f"_do_{name.lower()}", None)) is not None:
                    step(argument)
                else:
                    raise Foreign(f"the opcode {name}")
            return self._stack.pop()
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its pickle is broken ({error!s:.60})") from error

    def _since_mark(self) -> list[Any]:
        place = self._marks.pop()
        found = self._stack[place:]
        del self._stack[place:]
        return found

    def _do_proto(self, _: object) -> None:
        """The number of the protocol, of which nothing depends."""

    def _do_stop(self, _: object) -> None:
        """The last opcode."""

    def _do_mark(self, _: object) -> None:
        self._marks.append(len(self._stack))

    def _do_binput(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def _do_binget(self, place: int) -> None:
        self._stack.append(self._memo[place])

    _do_long_binput, _do_long_binget = _do_binput, _do_binget

    def _do_empty_list(self, _: object) -> None:
        self._stack.append([])

    def _do_empty_dict(self, _: object) -> None:
        self._stack.append({})

    def _do_tuple(self, _: object) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _do_tuple1(self, _: object) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _do_tuple2(self, _: object) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _do_tuple3(self, _: object) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _do_append(self, _: object) -> None:
        self._extend([self._stack.pop()])

    def _do_appends(self, _: object) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("its pickle appends to what is no list")
        self._stack[-1].extend(values)

    def _do_setitem(self, _: object) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _do_setitems(self, _: object) -> None:
        self._update(self._since_mark())

    def _update(self, pairs: list[Any]) -> None:
        if not isinstance(self._stack[-1], dict) or any(type(key) not in (str, int) for key in pairs[::2]):
            raise ValueError("its pickle has keys that are neither words nor numbers")  # others may take for ever
        self._stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    def _do_global(self, name: str) -> None:
        if name not in (*DTYPES, ORDERED, TENSOR, PARAMETER):
            raise Foreign(name)
        self._stack.append(Named(name))

    def _do_binpersid(self, _: object) -> None:
        _, kind, key, _, numel = self._stack.pop()
        self._stack.append(self._archive.storage(kind, key, numel))

    def _do_reduce(self, _: object) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if function == Named(ORDERED) and arguments == ():
            self._stack.append(OrderedDict())
        elif function == Named(TENSOR):
            self._stack.append(self._archive.tensor(*arguments))
        elif function == Named(PARAMETER) and isinstance(arguments[0], Tensor):
            self._stack.append(arguments[0])
        else:
            raise Foreign("a call")

    def _do_build(self, _: object) -> None:
        """What an ordered dictionary has beside its items, as a ``state_dict`` does."""
        self._stack.pop()
        if type(self._stack[-1]) is not OrderedDict:
            raise Foreign("the state of an object")
