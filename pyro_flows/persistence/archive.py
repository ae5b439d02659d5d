"""Plain data and tensors in a file of ``torch.save``, read without trust in what the file says of itself.

The file is a zip archive of a pickle and of the tensors' bytes.  The pickle is carried out here, opcode by opcode,
where it makes numbers, words, tuples, lists, dictionaries and tensors, and nothing else.  Reading takes time and memory
in proportion to the size of the file: parts are stored and not compressed, a tensor has no more numbers than its part
has, and the data have no more nodes than the pickle has bytes, so that no shared node stands for thousands.
"""

from __future__ import annotations

import math
import sys
import zipfile
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .pickles import Machine, Named

DEPTH = 100  # of containers in containers
LONGEST = 1000  # letters of a name
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
        data = bytes(self._bytes(pickles[0]).numpy())
        order = self._parts.get(f"{self._root}byteorder")
        self._swapped = order is not None and bytes(self._bytes(order.filename).numpy()).decode() != sys.byteorder
        self.content = Machine(self.storage, self.tensor, DTYPES).run(data)
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
        if number and len(size) > 1 and id(values) not in self._seen:
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
            if isinstance(value, dict):
                count += len(value)  # its keys
                if any(isinstance(key, str) and len(key) > LONGEST for key in value):
                    raise ValueError(f"its data have names of more than {LONGEST} letters")
            if depth == DEPTH:
                raise ValueError(f"its data are nested more than {DEPTH} deep")
            if count + len(value) + len(waiting) > limit:
                raise ValueError(f"its data unfold to more than the {limit} values that {limit} bytes can hold")
            waiting.extend((part, depth + 1) for part in (value.values() if isinstance(value, dict) else value))
