"""Graphs: recordings without needless operations, in segments that can be compiled.

Operations whose results nobody uses go, and so do operations that repeat others.  Results that depend on constants
alone are constants.  Random numbers are drawn before the rest runs, by the same operations in the same order.  Truth
values that Python has read are results too, which must be those of the recording.

A traced function that the function calls has a graph of its own, which others share.  It cuts the graph into segments,
one before the call and one after it.  So the segments of a training step that belong to the flow are the same for all
models of as many latents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .code import Code, source_of
from .recording import Call, Recording, Results, Unrecordable, aten, place_of, tensors_in

SAME = aten.detach.default, aten.lift_fresh.default, aten.alias.default
RESHAPED = aten.view.default, aten.expand.default
CHECKS = (aten._linalg_check_errors.default,)  # where a check fails, results are not finite
LITERALS = bool | int | float | complex | str | None | torch.dtype | torch.layout | torch.memory_format | torch.device


class Unlike(Exception):
    """Inputs at which the function would call other operations than those of its graph."""


class Statement(NamedTuple):
    """A line of the source.

    Attributes:
        targets: The names that it assigns.
        text: The line.
        uses: The names in it.
        writes: The places that it writes into.
        touches: The places of the tensors that it uses.
        inner: The traced function that it calls, or None.
    """

    targets: list[str]
    text: str
    uses: list[str]
    writes: set[int]
    touches: set[int]
    inner: Callable[..., Results] | None


class Graph:
    """A function of tensors as a flat list of operations.

    Args:
        recording: A recording of the function.

    Attributes:
        eps: The rounding error of the least precise numbers in the graph.

    Raises:
        Unrecordable: If an operation has an argument that is neither a tensor nor a literal.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording, self._names, self._tensors = recording, dict[int, str](), dict[str, Tensor]()
        self._operations, self._draws = dict[str, Any](), dict[str, Call]()
        for number, tensor in enumerate(recording.inputs):
            self._named(tensor, f"x{number}")
        statements = self._statements()
        self._results = ["None" if one is None else self._name_of(one) for one in recording.outputs]
        self._guards = {self._name_of(tensor): value for tensor, value in recording.guards}
        self._needed = {*self._results, *self._guards}
        kept = self._used(statements)
        used = self._needed.union(*(statement.uses for statement in kept))
        self._parameters = [one for one in recording.inputs if one.requires_grad and one.is_leaf]
        self._constants = {name: one.detach() for name, one in self._tensors.items() if name[0] == "c" and name in used}
        self._watched = [(one, one._version) for one in recording.found if not one.is_inference()]
        floating = [one for one in self._tensors.values() if one.is_floating_point() or one.is_complex()]
        self.eps = max((torch.finfo(one.dtype).eps for one in floating), default=0.0)
        self._steps = self._segments(kept)
        del self._recording, self._names, self._tensors

    @property
    def is_random(self) -> bool:
        """True if the graph draws random numbers."""
        return bool(self._draws)

    @property
    def is_current(self) -> bool:
        """True unless constants were changed in place since they were recorded."""
        return all(tensor._version == version for tensor, version in self._watched)

    def run(self, inputs: Sequence[Tensor]) -> Results:
        """Return the results, given the inputs.

        Raises:
            Unlike: If the function would call other operations.
        """
        values: dict[str, Any] = {f"x{number}": one for number, one in enumerate((*inputs, *self._parameters))}
        values.update(self._constants)
        values.update({name: _drawn(call) for name, call in self._draws.items()})
        for step, arguments, targets in self._steps:
            values.update(zip(targets, step([values[name] for name in arguments]), strict=True))
        guards = [values[name].reshape(()) for name in self._guards]
        if guards and torch.stack(guards).tolist() != [*self._guards.values()]:  # one read of numbers
            raise Unlike
        # Who gets the results may write into them.
        given = {id(one) for one in (*inputs, *self._parameters, *self._constants.values())}
        found = list[Tensor | None]()
        for name in self._results:
            one: Tensor | None = values.get(name)
            found.append(one.clone() if one is not None and id(one) in given else one)
            given.add(id(one))
        return tuple(found)

    def _statements(self) -> list[Statement]:
        """Return the lines that depend on inputs or draws, or prepare memory for these."""
        found, known = list[Statement](), dict[str, list[str]]()
        written = self._recording.written
        for call in self._recording.calls:
            made = call.returned
            is_pure = not (written and any(place_of(tensor) in written for tensor in (*made, *call.given)))
            if call.operation in CHECKS or (made and is_pure and all(map(self._recording.is_constant, made))):
                continue
            if call.is_random:
                self._names.pop(id(made[0]), None)
                self._draws[self._named(made[0], f"r{len(self._draws)}")] = call
                continue
            if call.operation in SAME or (call.operation in RESHAPED and _is_same(made[0], call.args[0])):
                self._names[id(made[0])] = self._name_of(call.args[0])
                continue
            uses, text = [self._name_of(tensor) for tensor in call.given], self._text_of(call)
            if is_pure and text in known:
                self._names.update(zip(map(id, made), known[text], strict=True))
                continue
            targets = [self._named(tensor, f"v{len(found)}_{number}") for number, tensor in enumerate(made)]
            known[text] = targets
            line = f"{_assigned(call.result, iter(targets))} = {text}" if targets else text
            places = {place_of(tensor) for tensor in call.given}, {place_of(tensor) for tensor in call.written}
            inner = call.operation if call.is_inner else None
            found.append(Statement(targets, line, uses, places[1], places[0], inner))
        return found

    def _used(self, statements: list[Statement]) -> list[Statement]:
        """Return the statements that the results depend on."""
        names, kept = {*self._needed}, list[Statement]()
        places = {place_of(tensor) for tensor in tensors_in(self._recording.outputs)}
        for statement in reversed(statements):
            if names.intersection(statement.targets) or places & statement.writes:
                names.update(statement.uses)
                places |= statement.touches
                kept.append(statement)
        return kept[::-1]

    def _segments(self, statements: list[Statement]) -> list[tuple[Callable[..., Any], list[str], list[str]]]:
        """Return the steps of a run: each a function of a list of tensors, its arguments, and the names it assigns."""
        found: list[tuple[Callable[..., Any], list[str], list[str]]] = []
        needed, block = {*self._needed}, list[Statement]()
        for statement in (*reversed(statements), None):
            if statement is not None and statement.inner is None:
                block.insert(0, statement)
                continue
            if block:
                made, arguments = dict[str, None](), dict[str, None]()
                for one in block:  # an operation in place makes again what it uses
                    arguments.update(dict.fromkeys(name for name in one.uses if name not in made))
                    made.update(dict.fromkeys(one.targets))
                targets = [name for name in made if name in needed]
                found.append((self._code(block, [*arguments], targets), [*arguments], targets))
                needed.update(arguments)
                block = []
            if statement is not None:
                inner = statement.inner
                found.append((lambda given, call=inner: call(*given), statement.uses, statement.targets))
                needed.update(statement.uses)
        return found[::-1]

    def _code(self, block: list[Statement], arguments: list[str], targets: list[str]) -> Code:
        given = [self._tensors[name] for name in arguments]
        places = set(map(place_of, given))
        source = source_of(arguments, [(one.text, (*one.targets, *one.uses)) for one in block], targets)
        operations = {name: call for name, call in self._operations.items() if f"{name}(" in source}
        return Code(source, operations, given, self.eps, is_pure=not any(places & one.writes for one in block))

    def _named(self, tensor: Tensor, name: str) -> str:
        """Return the name of a tensor, by default a new one."""
        found = self._names.setdefault(id(tensor), name)
        self._tensors[found] = tensor
        return found

    def _name_of(self, tensor: Tensor) -> str:
        """Return the name of a tensor; one that no statement has made is a constant."""
        return self._named(tensor, f"c{len(self._tensors)}")

    def _text_of(self, call: Call) -> str:
        name = f"inner_{id(call.operation)}" if call.is_inner else _name_of_operation(call.operation)
        self._operations[name] = call.operation
        given = [self._literal(value) for value in call.args]
        given += [f"{name}={self._literal(value)}" for name, value in call.kwargs.items()]
        return f"{name}({', '.join(given)})"

    def _literal(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self._name_of(value)
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._literal, value))}]"
        if not isinstance(value, LITERALS):
            raise Unrecordable(f"an operation has an argument of type {type(value).__name__}")
        return repr(value)


@functools.cache
def _name_of_operation(operation: torch._ops.OpOverload) -> str:
    return str(operation).replace(".", "_").replace("::", "_")


def _assigned(result: Any, names: Iterator[str]) -> str:
    """Return the left side of a statement, where an operation may leave out some of its results."""
    if isinstance(result, Tensor):
        return next(names)
    return "".join(f"{'_' if part is None else next(names)}, " for part in result)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype


def _drawn(call: Call) -> Tensor:
    """Draw again; numbers that the call writes into are copies."""
    own = {id(tensor) for tensor in call.written}
    given = [value.clone() if id(value) in own else value for value in call.args]
    found: Tensor = call.operation(*given, **call.kwargs)
    return found
