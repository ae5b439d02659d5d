"""Recordings of functions of tensors: one run, as a flat list of torch's own operations.

The function runs once on real tensors.  Python, Pyro's handlers and autograd have then done their work, and what is
left are calls of torch's operations, gradients included.  A tensor that the function finds elsewhere, such as data, is
a constant.  A parameter that requires a gradient is an input, which is read anew in each call.

A list of operations equals the function only while Python calls the same operations.  A truth value that depends on the
inputs, such as a check of arguments or a branch, is a guard: the list holds for inputs that give the same one.  A
recording is refused if the function reads other numbers that depend on its inputs.  Reads by NumPy or into lists count
too.  A recording is refused as well if the function writes into tensors of others.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..compiler_state import CALLS

Function = Callable[..., Sequence[Tensor | None]]
Results = tuple[Tensor | None, ...]
Operation = Any  # torch._ops.OpOverload
aten = torch.ops.aten
READS = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
LIKE = aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.rand_like, aten.randn_like
NEW = aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.new_empty_strided
# In training they write into their running mean and variance, which their schemas do not say.
BATCH_NORMS = aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default
TO_PYTHON = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__}
OF_LISTS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}  # they read the tensors in a list
MOST = 20_000  # operations in a recording; longer lists, as of a loop over draws, cost more than they gain
SHAPED = {*LIKE, *NEW}  # they read the shape of a tensor and none of its numbers


class Unrecordable(Exception):
    """A function whose operations may depend on the values of its inputs, or are too many for a list."""


class Traits(NamedTuple):
    """The traits of an operation.

    Attributes:
        is_random: True if it draws random numbers.
        is_read: True if Python reads the numbers that it is given.
        written: The arguments that it writes into, each by its place and its name.
    """

    is_random: bool = False
    is_read: bool = False
    written: tuple[tuple[int, str], ...] = ()


@functools.cache
def _traits_of(operation: torch._ops.OpOverload) -> Traits:
    arguments = enumerate(operation._schema.arguments)
    written = ((place, one.name) for place, one in arguments if one.alias_info and one.alias_info.is_write)
    is_random = torch.Tag.nondeterministic_seeded in operation.tags
    return Traits(is_random, any(tag in operation.tags for tag in READS), tuple(written))


class Call:
    """A call of one of torch's operations, or of a traced function.

    Attributes:
        is_inner: True for a traced function.
        given: The tensors among the arguments.
        returned: The tensors in the result.
        written: The tensors that the call writes into.
        read: The tensors whose numbers Python reads by the call, such as masks that decide a shape.
        is_random: True if the call draws random numbers.
    """

    __slots__ = "args", "given", "is_inner", "is_random", "kwargs", "operation", "read", "result", "returned", "written"

    def __init__(self, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.operation, self.args, self.kwargs, self.result = operation, args, kwargs, result
        self.is_inner = not isinstance(operation, torch._ops.OpOverload)
        traits = Traits() if self.is_inner else _traits_of(operation)
        self.given, self.returned = tensors_in((*args, *kwargs.values())), tensors_in(result)
        written = (args[place] if place < len(args) else kwargs.get(name) for place, name in traits.written)
        self.written, self.is_random = tensors_in((*written,)), traits.is_random
        self.read = self.given if traits.is_read else []
        if operation in BATCH_NORMS and args[5]:
            self.written = tensors_in(args[3:5])
        if operation is aten.index.Tensor:
            self.read = [index for index in self.given[1:] if index.dtype in (torch.bool, torch.uint8)]


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in an argument or a result of an operation."""
    found = list[Tensor]()
    for part in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (list, tuple)):
            found += tensors_in(part)
    return found


def place_of(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor shares with its views; one of its own if it has no numbers."""
    return tensor.untyped_storage().data_ptr() or -id(tensor)


def record(function: Function, inputs: Sequence[Tensor]) -> tuple[Results, list[Call]]:
    """Run a function of tensors; return its results and the calls of operations."""
    with _Recorder() as recorder, _Reads():
        token = CALLS.set(recorder.calls)
        try:
            return tuple(function(*inputs)), recorder.calls
        finally:
            CALLS.reset(token)


def call_inner(function: Function, inputs: Sequence[Tensor]) -> Results:
    """Call a traced function inside one that is recorded, which counts as one operation."""
    calls, token = CALLS.get(), CALLS.set(None)
    try:
        with _disable_current_modes(), torch.no_grad():
            found = tuple(function(*inputs))
    finally:
        CALLS.reset(token)
    if calls is not None:
        calls.append(Call(function, tuple(inputs), {}, found))
    return found


class _Recorder(TorchDispatchMode):
    """Handler that lists all calls; it keeps their tensors, so that identities and places stay unique.

    A matrix without a Cholesky factor has one of NaN in the list, since graphs raise no errors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._call(func, *args, **(kwargs or {}))
        if func != aten.linalg_cholesky_ex.default:
            return result
        factor, fault = result
        failed = self._call(aten.ne.Scalar, fault, 0)
        for _ in range(2):
            failed = self._call(aten.unsqueeze.default, failed, -1)
        return self._call(aten.masked_fill.Scalar, factor, failed, math.nan), fault

    def _call(self, operation: Operation, *args: Any, **kwargs: Any) -> Any:
        result = operation(*args, **kwargs)
        if len(self.calls) <= MOST:
            self.calls.append(Call(operation, args, kwargs, result))
        return result


class _Reads(TorchFunctionMode):
    """Handler that lists reads of numbers that are no calls of operations, as if each were a read of one number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (func in TO_PYTHON or func in OF_LISTS) and (calls := CALLS.get()) is not None:
            given = (*args, *(kwargs or {}).values())
            read = given if func in TO_PYTHON else [value for value in given if isinstance(value, list | tuple)]
            calls += [Call(aten._local_scalar_dense.default, (tensor,), {}, None) for tensor in tensors_in([*read])]
        return func(*args, **(kwargs or {}))


class Recording:
    """A run of a function, and what in it depends on the inputs.

    Args:
        inputs: The inputs of the function.
        outputs: Its results, and None in place of some.
        calls: The calls of operations.

    Attributes:
        inputs: The inputs, and the parameters that the function has found.
        found: The constants: other tensors that the function has found.
        written: The places into which some call writes.
        changing: The places of numbers that depend on inputs or random numbers.
        guards: The truth values that Python has read, with the tensors that they depend on.

    Raises:
        Unrecordable: If the operations may depend on the values of the inputs, or are too many.
    """

    def __init__(self, inputs: Sequence[Tensor], outputs: Results, calls: list[Call]) -> None:
        if len(calls) > MOST:
            raise Unrecordable(f"it calls more than {MOST:,} operations")
        self.inputs, self.outputs, self.calls, self.found = list(inputs), outputs, calls, list[Tensor]()
        self.written = {place_of(tensor) for call in self.calls for tensor in call.written}
        self.changing = {place_of(tensor) for tensor in inputs}
        self._seen, self.guards = {id(tensor) for tensor in inputs}, list[tuple[Tensor, bool]]()
        # Parameters first, because other tensors that share their memory change with them.
        made = {id(tensor) for call in self.calls for tensor in call.returned}
        for tensor in itertools.chain(*(call.given for call in self.calls), tensors_in(self.outputs)):
            if tensor.requires_grad and tensor.is_leaf and id(tensor) not in made and id(tensor) not in self._seen:
                self._find(tensor)
        for number in range(len(self.calls)):
            self._include(number)
        for tensor in tensors_in(self.outputs):
            if id(tensor) not in self._seen:
                self._find(tensor)

    def is_constant(self, tensor: Tensor) -> bool:
        """True if the numbers of a tensor are the same in each run."""
        return place_of(tensor) not in self.changing

    def _find(self, tensor: Tensor) -> None:
        self._seen.add(id(tensor))
        if not self.is_constant(tensor):
            raise Unrecordable("a tensor shares its memory with one that depends on the inputs")
        if place_of(tensor) in self.written:
            raise Unrecordable("the function writes into a tensor that it has not made")
        if tensor.requires_grad and tensor.is_leaf:
            self.inputs.append(tensor)
            self.changing.add(place_of(tensor))
        else:
            self.found.append(tensor)

    def _include(self, number: int) -> None:
        call = self.calls[number]
        for tensor in call.given:
            if id(tensor) not in self._seen:
                self._find(tensor)
        depends = getattr(call.operation, "overloadpacket", None) not in SHAPED and not all(
            map(self.is_constant, call.given)
        )
        if call.read and not all(map(self.is_constant, call.read)):
            if not isinstance(call.result, bool) or len(call.read) > 1 or place_of(call.read[0]) in self.written:
                raise Unrecordable(f"Python reads numbers that depend on the inputs, by {call.operation}")
            self.guards.append((call.read[0], call.result))
        if any(isinstance(value, torch.Generator) for value in call.kwargs.values()):
            raise Unrecordable("random numbers come from a generator of their own, which comparisons would advance")
        if call.is_random and (depends or self._is_shared(number)):
            raise Unrecordable(f"random numbers depend on the inputs, by {call.operation}")
        made = call.returned
        if depends or call.is_random:
            self.changing.update(map(place_of, (*made, *call.written)))
        self._seen.update(map(id, made))

    def _is_shared(self, number: int) -> bool:
        """True if a random call reads numbers that others write, or writes into memory that is used by other names."""
        call, later = self.calls[number], self.calls[number + 1 :]
        own = {id(tensor): place_of(tensor) for tensor in call.written}
        if any(place_of(tensor) in self.written for tensor in call.given if id(tensor) not in own):
            return True
        before = [tensor for other in self.calls[:number] for tensor in other.returned]
        others = {id(one) for one in before if id(one) not in own and place_of(one) in own.values()}
        used = [tensor for other in later for tensor in other.given] + tensors_in(self.outputs)
        return any(id(tensor) in others for tensor in used)
