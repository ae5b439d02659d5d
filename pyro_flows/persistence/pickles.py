"""A pickle of plain data and tensors, read by the few opcodes that ``torch.save`` writes.

The opcodes are those of Python's own unpickler in Python: the one in C allocates whatever size a pickle claims.  Names
are looked up in a table, and never imported.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

OPCODES = (
    "PROTO STOP MARK BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL BINPERSID REDUCE BUILD NONE NEWTRUE NEWFALSE BININT "
    "BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS "
    "EMPTY_DICT SETITEM SETITEMS"
)
CODES = {getattr(pickle, name)[0] for name in OPCODES.split()}


class Foreign(ValueError):
    """Error for a pickle of more than plain data and tensors."""


class PlainUnpickler(pickle._Unpickler):
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
        _, dtype, key, _, numel = pid
        return self._storage(dtype, key, numel)

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
