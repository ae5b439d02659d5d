"""Plain data and tensors in a file of ``torch.save``, read without trust in what the file says of itself.

The file is a zip archive of a pickle and of the tensors' bytes.  Of the pickle's opcodes those are carried out that
make numbers, words, tuples, lists, dictionaries and tensors, and no others; nothing that it names is ever looked up.
Reading takes time and memory in proportion to the size of the file: parts are stored and not compressed, a tensor has
no more numbers than its part has, and the data have no more nodes than the pickle has bytes, so that no shared node
stands for thousands.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

DEPTH = 100  # of containers in containers
LONGEST = 1000  # letters of a name
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
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.BINPUT, pickle.BINGET, pickle.LONG_BINPUT, pickle.LONG_BINGET),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2),
    *(pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.GLOBAL),
    *(pickle.BINPERSID, pickle.REDUCE),
)


class Foreign(ValueError):
    """A file that holds more than plain data and tensors."""


class Damaged(ValueError):
    """A part of a file whose sum is wrong; the text is its name."""


class Archive:
    """The content of a file of ``torch.save``.

    Args:
        file: The file, open for reading.

    Attributes:
        content: The data.
        tensors: How many tensors there are that share no numbers.
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
        self.squares = 0
        self._seen: set[int] = set()
        data, order = self._bytes(pickles[0]), f"{self._root}byteorder"
        self._swapped = order in self._parts and self._bytes(order).decode() != sys.byteorder
        self.content = _Unpickler(data, self).load()
        check_size(self.content, len(data))
        self.nbytes = sum(values.nbytes for _, values in self._storages.values())
        self.tensors = len(self._storages)

    def _check_parts(self, size: int) -> None:
        parts = self._zip.infolist()
        if len({info.filename.casefold() for info in parts}) < len(parts):
            raise ValueError("it has parts of one name")
        if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in parts):
            raise ValueError("its parts are compressed or encrypted, which torch.save does not do")
        if sum(info.file_size for info in parts) > size:
            raise ValueError("its parts claim to be larger than it is")

    def _bytes(self, name: str) -> bytearray:
        """Return the bytes of a part, whose sum is right."""
        try:
            content = bytearray(self._zip.read(name))
        except (zipfile.BadZipFile, EOFError) as error:
            raise Damaged(name) from error
        if len(content) < self._parts[name].file_size:
            raise Damaged(name)
        return content

    def storage(self, dtype: object, key: object, numel: object) -> Tensor:
        """Return all numbers of a part, ``(numel,)``."""
        if not isinstance(dtype, torch.dtype) or type(key) is not str or type(numel) is not int:
            raise ValueError("it names a part that cannot be one of a tensor")
        name = f"{self._root}data/{key}"
        if key not in self._storages:
            if name not in self._parts or self._parts[name].file_size != numel * dtype.itemsize:
                raise ValueError(f"a tensor is to have {numel} numbers, which its part {key!r:.40} has not")
            own = self._bytes(name)
            if self._swapped:
                np.frombuffer(own, f"u{dtype.itemsize}").byteswap(inplace=True)
            self._storages[key] = dtype, torch.frombuffer(own, dtype=dtype) if numel else torch.empty(0, dtype=dtype)
        known, values = self._storages[key]
        if known != dtype or len(values) != numel:
            raise ValueError(f"its part {key!r:.40} is to be of {known} and of {dtype}")
        return values

    def tensor(self, values: object, offset: object, size: object, stride: object, *_: object) -> Tensor:
        """Return a view of a part's numbers, each there at most once."""
        if not (isinstance(values, Tensor) and _are_counts((offset,)) and _are_counts(size) and _are_counts(stride)):
            raise ValueError("it describes a tensor that cannot be one")
        assert isinstance(size, tuple) and isinstance(stride, tuple) and isinstance(offset, int)  # noqa: PT018
        number = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if number else -1
        if number > len(values) or last >= len(values):
            raise ValueError(f"a tensor of shape {size!s:.60} is to be made of {len(values)} numbers")
        if number and len(size) > 1 and id(values) not in self._seen:
            self._seen.add(id(values))
            self.squares += max(size) ** 2
        return values.as_strided(size, stride, offset) if number else values.new_empty(size)


def _are_counts(numbers: object) -> bool:
    return isinstance(numbers, tuple) and len(numbers) <= 64 and all(type(n) is int and 0 <= n < 2**62 for n in numbers)


class _Unpickler(pickle._Unpickler):  # the one in Python, since the one in C has all opcodes
    """Make plain data and tensors of a pickle.

    Args:
        data: The pickle.
        archive: What makes its tensors.
    """

    stack: list[Any]

    def __init__(self, data: bytearray, archive: Archive) -> None:
        super().__init__(io.BytesIO(data))
        self._archive = archive
        self._named = DTYPES | {
            "collections OrderedDict": _ordered,
            "torch._utils _rebuild_tensor_v2": archive.tensor,
            "torch._utils _rebuild_parameter": _parameter,
        }

    def load(self) -> Any:
        """Return the data.

        Raises:
            Foreign: If there is anything else.
            ValueError: If the pickle is broken.
        """
        try:
            return super().load()
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"its pickle is broken ({error!s:.60})") from error

    def find_class(self, module: str, name: str) -> Any:
        if (found := self._named.get(f"{module} {name}")) is None:
            raise Foreign(f"{module} {name}")
        return found

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, numel = pid
        return self._archive.storage(dtype, key, numel)

    def _refuse(self) -> None:
        raise Foreign("an opcode")

    def _set_item(self) -> None:
        self._update([self.stack.pop(-2), self.stack.pop()])

    def _set_items(self) -> None:
        self._update(self.pop_mark())  # type: ignore[attr-defined]

    def _update(self, pairs: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict) or any(type(key) not in (str, int) for key in pairs[::2]):
            raise ValueError("its pickle has keys that are neither words nor numbers")  # others may take for ever
        self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))

    def _build(self) -> None:
        """Drop the attributes that an ordered dictionary has beside its items, as a ``state_dict`` does."""
        self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict:
            raise Foreign("the state of an object")

    dispatch: ClassVar[dict[int, Any]] = {
        **dict.fromkeys(range(256), _refuse),
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in OPCODES},
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.BUILD[0]: _build,
    }


def _ordered() -> OrderedDict[Any, Any]:
    return OrderedDict()


def _parameter(data: object, *_: object) -> Tensor:
    if not isinstance(data, Tensor):
        raise Foreign("a call")
    return data


def check_size(content: Any, limit: int) -> None:
    """Refuse data with more nodes than a limit, each counted as often as it is met, or nested too deeply."""
    count, waiting = 0, [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if isinstance(value, dict | list | tuple):
            if isinstance(value, dict):
                count += len(value)  # its keys
                if any(isinstance(key, str) and len(key) > LONGEST for key in value):
                    raise ValueError(f"its data have names of more than {LONGEST} letters")
            if depth == DEPTH:
                raise ValueError(f"its data are nested more than {DEPTH} deep")
            if count + len(value) + len(waiting) > limit:
                raise ValueError(f"its data unfold to more than the {limit} values that {limit} bytes can hold")
            waiting.extend((part, depth + 1) for part in (value.values() if isinstance(value, dict) else value))
