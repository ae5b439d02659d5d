"""A pickle of plain data and tensors, carried out opcode by opcode; nothing that it names is ever looked up."""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import Tensor

ORDERED, TENSOR, PARAMETER = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
LITERALS = "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Foreign(ValueError):
    """A file that holds more than plain data and tensors."""


class Named(NamedTuple):
    """A class or function that a pickle names; it is never looked up."""

    name: str


class Machine:
    """Carries out a pickle that makes numbers, words, tuples, lists, dictionaries and tensors.

    Args:
        storage: Returns the numbers of a part, given its kind, its key and how many they are.
        tensor: Returns a tensor, given such numbers, an offset, a shape and strides.
        kinds: The names of the kinds of parts.
    """

    def __init__(self, storage: Callable[..., Tensor], tensor: Callable[..., Tensor], kinds: Collection[str]) -> None:
        self._storage, self._tensor, self._kinds = storage, tensor, kinds
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Return what a pickle makes.

        Raises:
            Foreign: If it makes anything else.
            ValueError: If it is broken.
        """
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
        """Skip the number of the protocol; nothing depends on it."""

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
        if name not in (*self._kinds, ORDERED, TENSOR, PARAMETER):
            raise Foreign(name)
        self._stack.append(Named(name))

    def _do_binpersid(self, _: object) -> None:
        _, kind, key, _, numel = self._stack.pop()
        self._stack.append(self._storage(kind, key, numel))

    def _do_reduce(self, _: object) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if function == Named(ORDERED) and arguments == ():
            self._stack.append(OrderedDict())
        elif function == Named(TENSOR):
            self._stack.append(self._tensor(*arguments))
        elif function == Named(PARAMETER) and isinstance(arguments[0], Tensor):
            self._stack.append(arguments[0])
        else:
            raise Foreign("a call")

    def _do_build(self, _: object) -> None:
        """Drop the attributes that an ordered dictionary has beside its items, as a ``state_dict`` does."""
        self._stack.pop()
        if type(self._stack[-1]) is not OrderedDict:
            raise Foreign("the state of an object")
