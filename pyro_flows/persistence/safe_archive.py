"""Plain data and tensors in a file of ``torch.save``, read without trusting what the file says about itself.

The file is a zip archive of a pickle and of the tensors' bytes.  Reading takes time and memory in proportion to the
size of the file: parts are stored uncompressed, and a tensor has at most as many numbers as its part.  The data have at
most as many nodes as the pickle has bytes, so that no shared node stands for thousands.

The pickle may hold the few opcodes that ``torch.save`` writes.  They are those of the standard library's unpickler in
Python: the one in C allocates whatever size a pickle claims.  Names are looked up in a table, and never imported.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

DEPTH = 100  # of containers in containers
LONGEST = 1000  # characters of a name
CHUNK = 2**20  # bytes
MOST_ARGUMENTS = 8  # of the functions that torch.save names
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
OPCODES = (
    "PROTO STOP MARK BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL BINPERSID REDUCE BUILD NONE NEWTRUE NEWFALSE BININT "
    "BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS "
    "EMPTY_DICT SETITEM SETITEMS"
)
CODES = {getattr(pickle, name)[0] for name in OPCODES.split()}


class Damaged(ValueError):
    """Error for a part of a file with a wrong checksum; its text is the name of the part."""


class Foreign(ValueError):
    """Error for a pickle of more than plain data and tensors."""


class Archive:
    """Content of a file of ``torch.save``.

    Args:
        file: The file, open for reading.

    Attributes:
        content: The data.
        tensors: The number of tensors that share no memory.
        nbytes: Their bytes.
        squares: The sum of the squared longer sides of matrices: masks between features are that large.

    Raises:
        zipfile.BadZipFile: If it is no archive, or was cut off.
        Damaged: If the checksum of a part is wrong.
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
        self._storages: dict[str, Tensor] = {}
        self._matrices: set[int] = set()
        self.squares = 0
        data = self._bytes(pickles[0]).tobytes()
        order = f"{self._root}byteorder"
        self._swapped = order in self._parts and self._bytes(order).tobytes().decode() != sys.byteorder
        names = {"torch._utils _rebuild_tensor_v2": self._tensor, "torch._utils _rebuild_parameter": _parameter}
        self.content = _PlainUnpickler(data, {**DTYPES, **names}, self._storage).load()
        check_size(self.content, len(data))
        self.nbytes = sum(values.nbytes for values in self._storages.values())
        self.tensors = len(self._storages)

    def _check_parts(self, size: int) -> None:
        parts = self._zip.infolist()
        if len({info.filename.casefold() for info in parts}) < len(parts):
            raise ValueError("it has parts of one name")
        if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in parts):
            raise ValueError("its parts are compressed or encrypted, which torch.save does not do")
        if sum(info.file_size for info in parts) > size:
            raise ValueError("its parts claim to be larger than it is")

    def _bytes(self, name: str) -> np.ndarray:
        """Return the bytes of a part, ``(size,)``, after a check of their sum."""
        found = np.empty(self._parts[name].file_size, dtype=np.uint8)
        try:
            with self._zip.open(name) as stream:
                # One chunk at a time, since the stream copies what it reads.
                chunks = (found[start : start + CHUNK] for start in range(0, len(found), CHUNK))
                number = sum(stream.readinto(chunk) for chunk in chunks)  # type: ignore[attr-defined]
        except zipfile.BadZipFile as error:
            raise Damaged(name) from error
        if number < len(found):
            raise Damaged(name)
        return found

    def _storage(self, dtype: object, key: object, numel: object) -> Tensor:
        """Return all numbers of a part."""
        if not isinstance(dtype, torch.dtype) or type(key) is not str or type(numel) is not int:
            raise ValueError("it names a part that cannot belong to a tensor")
        if key not in self._storages:
            name = f"{self._root}data/{key}"
            if name not in self._parts or self._parts[name].file_size != numel * dtype.itemsize:
                raise ValueError(f"a tensor is to have {numel} numbers, which its part {key!r:.40} has not")
            own = self._bytes(name)
            if self._swapped and dtype.itemsize > 1:
                own.view(f"u{dtype.itemsize}").byteswap(inplace=True)
            self._storages[key] = torch.from_numpy(own).view(dtype) if numel else torch.empty(0, dtype=dtype)
        values = self._storages[key]
        if values.dtype != dtype or len(values) != numel:
            raise ValueError(f"its part {key!r:.40} is to be of {values.dtype} and of {dtype}")
        return values

    def _tensor(self, values: Any, offset: Any, size: Any, stride: Any, *_: object) -> Tensor:
        """Return a view of a part's numbers, which holds each number at most once."""
        if not (isinstance(values, Tensor) and _are_counts((offset,)) and _are_counts(size) and _are_counts(stride)):
            raise ValueError("it describes a tensor that cannot exist")
        number = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if number else -1
        if number > len(values) or last >= len(values):
            raise ValueError(f"a tensor of shape {size!s:.60} is to be made of {len(values)} numbers")
        if number and len(size) > 1 and id(values) not in self._matrices:
            self._matrices.add(id(values))
            self.squares += max(size) ** 2
        return values.as_strided(size, stride, offset) if number else values.new_empty(size)


class _PlainUnpickler(pickle._Unpickler):
    """Unpickler of numbers, strings, tuples, lists, dictionaries and tensors.

    Args:
        data: The pickle.
        names: The values of the names that the pickle may hold; ``OrderedDict`` is known.
        storage: Returns the values of a storage, given its dtype, its key and its length.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code in CODES
    }

    def __init__(self, data: bytes, names: Mapping[str, Any], storage: Callable[[object, object, object], Any]) -> None:
        super().__init__(io.BytesIO(data))
        # Without arguments: keys that are nested tuples would take for ever to hash.
        self._names = {**names, "collections OrderedDict": lambda: OrderedDict()}
        self._storage = storage

    def load(self) -> Any:
        """Return the content of the pickle.

        Raises:
            Foreign: If it holds anything else.
            ValueError: If it is broken.
        """
        try:
            return super().load()
        except ValueError:
            raise
        except KeyError as error:
            raise Foreign(f"the opcode {error}") from error
        except Exception as error:
            raise ValueError(f"its pickle is broken ({error!s:.60})") from error

    def find_class(self, module: str, name: str) -> Any:
        if (found := self._names.get(f"{module} {name}")) is None:
            raise Foreign(f"{module} {name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        if type(pid) is not tuple or len(pid) != 5:
            raise ValueError("it names a part that cannot belong to a tensor")
        _, dtype, key, _, numel = pid
        return self._storage(dtype, key, numel)

    def load_reduce(self) -> None:
        """Call a function with a short tuple of arguments, because others take memory beyond that of the file."""
        if type(self.stack[-1]) is not tuple or len(self.stack[-1]) > MOST_ARGUMENTS:
            raise ValueError("its pickle calls a function with arguments that torch.save does not write")
        super().load_reduce()  # type: ignore[misc]

    def _set_items(self, pairs: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or any(type(key) not in (str, int) for key in pairs[::2]):
            raise ValueError("its pickle has keys that are neither strings nor integers")
        self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_build(self) -> None:
        """Drop the attributes of an ordered dictionary, which a ``state_dict`` has."""
        self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict:
            raise Foreign("the state of an object")

    dispatch.update({pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.BUILD[0]: load_build})
    dispatch[pickle.REDUCE[0]] = load_reduce


def _parameter(value: Tensor, *_: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError("it describes a parameter that is no tensor")
    return value


def _are_counts(numbers: object) -> bool:
    return isinstance(numbers, tuple) and len(numbers) <= 64 and all(type(n) is int and 0 <= n < 2**62 for n in numbers)


def check_size(content: Any, limit: int) -> None:
    """Raise ValueError if data are nested too deeply, or have more nodes than a limit, with shared nodes repeated."""
    count, waiting = 0, [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if not isinstance(value, dict | list | tuple):
            continue
        if isinstance(value, dict):
            count += len(value)  # its keys
            if any(isinstance(key, str) and len(key) > LONGEST for key in value):
                raise ValueError(f"its data have names of more than {LONGEST} letters")
        if depth == DEPTH:
            raise ValueError(f"its data are nested more than {DEPTH} deep")
        if count + len(value) + len(waiting) > limit:
            raise ValueError(f"its data unfold to more than the {limit} values that {limit} bytes can hold")
        waiting.extend((part, depth + 1) for part in (value.values() if isinstance(value, dict) else value))
