"""Running a compiled graph again without Python: what CUDA graphs are on a GPU, for a CPU.

A decoded token is some hundred short calls, between which Inductor's wrapper spends a third of the time. When a graph
is called a second time with the same sizes and the same memory of weights and caches, what it calls is written down
(``native/tape.h``): Inductor's kernels with the addresses that they get, and our own ops. From then on such calls are
repeated from the tape. Small inputs that nothing writes to, such as token ids, may be anywhere: they are copied to
where the recorded run read them. What the graph returns is copied out.

A graph that calls anything else is not recorded and runs as it is; ``Replay.refusal`` has the reason.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from itertools import compress
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph
from torch.utils._python_dispatch import TorchDispatchMode

from . import native

KEPT = 4  # recordings of one graph: of as many caches
MOST_COPIED = 2**20  # bytes of an input that may be anywhere
MOST_SERIAL = 2**16  # bytes of activations up to which a kernel of Inductor's has one thread; else threads of its own
MOST_HELD = 32 * 2**20  # bytes that a recording may hold: activations of a token, not of a long prompt

_RECORDED = {f"{native.LIBRARY}::{name}" for name in ("linear", "linears", "scaled_linear", "scaled_linears", "attend")}
"""The ops that put themselves on a tape."""

_HARMLESS = {"assert_size_stride", "assert_alignment", "empty_strided_cpu", "reinterpret_tensor"}
"""Names that Inductor's wrapper may use: none of them computes anything but by an op."""


class _Refused(Exception):
    """Why a graph cannot be recorded."""


class Replay:
    """A graph, ``run``, that is repeated from a tape where it can be; called like it, with a list that it empties.

    compiled: what Inductor made of its pieces. weights: indices of inputs that rarely change. ``refusal``: why it is
    not recorded; "" when nothing is in the way so far.
    """

    _boxed_call = True

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        compiled: Sequence[Any],
        graph: Graph,
        weights: Sequence[int],
    ) -> None:
        self.run, self.compiled = run, compiled
        inputs, rarely = [node for node in graph.nodes if node.op == "placeholder"], set(weights)
        self.is_weight = [i in rarely for i in range(len(inputs))]
        self.others = [i for i, is_weight in enumerate(self.is_weight) if not is_weight]
        written = _written(graph)
        self.written = {i for i, node in enumerate(inputs) if node in written}
        self.refusal = ""
        self.recordings: OrderedDict[Any, _Recording | None] = OrderedDict()
        self._seen: deque[Any] = deque(maxlen=KEPT)
        self._lock = threading.Lock()

    def __call__(self, arguments: list[Any]) -> Sequence[Any]:
        if self.refusal or not self._lock.acquire(blocking=False):  # another thread is in the recorded memory
            return self.run(arguments)
        try:
            return self._again(arguments)
        finally:
            self._lock.release()

    def _again(self, arguments: list[Any]) -> Sequence[Any]:
        copied, key = self._key(arguments)
        if key in self.recordings:
            self.recordings.move_to_end(key)
            recording = self.recordings[key]
        elif key in self._seen:
            return self._record(key, arguments, copied)
        else:
            self._seen.append(key)
            recording = None
        if recording is None:
            return self.run(arguments)
        inputs = [arguments[i] for i in copied]
        arguments.clear()
        return recording.play(inputs)

    def _key(self, arguments: list[Any]) -> tuple[list[int], Any]:
        """Which inputs are copied, and all that a recording depends on: sizes, numbers, addresses of the others."""
        copied: list[int] = []
        facts: list[Any] = [*map(Tensor.data_ptr, compress(arguments, self.is_weight))]
        for i in self.others:
            value = arguments[i]
            if not isinstance(value, Tensor):
                facts.append(value)
            else:
                facts += (value.shape, value.stride())
                if i in self.written or value.nbytes > MOST_COPIED or not value.is_contiguous():
                    facts.append(value.data_ptr())
                else:
                    copied.append(i)
        return copied, tuple(facts)

    def _record(self, key: Any, arguments: list[Any], copied: list[int]) -> Sequence[Any]:
        """Run the graph while a tape is written; returns what it returns."""
        inputs = list(arguments)
        arguments.clear()
        with torch.inference_mode(False):  # a slot is written to in whatever mode a later call is made
            for i in copied:
                inputs[i] = inputs[i].clone()
        recording = _Recording([inputs[i] for i in copied], [x for x in inputs if isinstance(x, Tensor)])
        try:
            outputs = recording.write(self.run, inputs, _kernels(self.compiled))
        except _Refused as refused:
            self.refusal = str(refused)
            return self.run(inputs)
        self.refusal = recording.refusal
        self.recordings[key] = None if recording.refusal or recording.is_too_large else recording
        if len(self.recordings) > KEPT:
            self.recordings.popitem(last=False)
        return outputs


class _Recording(TorchDispatchMode):
    """A tape, the inputs that it reads in their place, and the memory that it uses."""

    def __init__(self, slots: list[Tensor], inputs: list[Tensor]) -> None:
        super().__init__()
        self.tape = torch.classes.qcompile_cpu.Tape()
        self.slots, self.outputs = slots, list[Any]()
        self.refusal, self.bytes = "", 0
        self._given = {x.untyped_storage().data_ptr() for x in inputs}
        self._held: dict[int, Tensor] = {}
        self._thread = threading.get_ident()

    def write(self, run: Callable, inputs: list[Any], kernels: Sequence[_Kernel]) -> list[Any]:
        """Run a graph and note what it calls; returns its outputs."""
        for kernel in kernels:
            kernel.module[kernel.name] = functools.partial(self._kernel, kernel)
        try:
            self.tape.begin()
            with self:
                self.outputs = list(run(inputs))
        finally:
            self.tape.end()
            for kernel in kernels:
                kernel.module[kernel.name] = kernel.function
        copies = self._copies()
        for x, copy in zip(self.outputs, copies, strict=True):
            if isinstance(x, Tensor) and (self._is_given(x) or copy.stride() != x.stride()):
                self.refusal = self.refusal or "it returns what it was given, or memory that overlaps"
        return self.outputs if self.refusal else copies

    def play(self, inputs: list[Tensor]) -> list[Any]:
        """Everything again, for other values of the inputs in ``slots``."""
        self.tape.run(self.slots, inputs)
        return self._copies()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function._schema.name in _RECORDED:
            for tensor in result if isinstance(result, list | tuple) else [result]:
                self._hold(tensor)
        elif function is torch.ops.aten.mm.out:
            self._product(result, None, *args)
        elif function is torch.ops.aten.addmm.out and kwargs.get("alpha", 1) == kwargs.get("beta", 1) == 1:
            self._product(result, *args)
        elif not _only_views(function):
            self.refusal = self.refusal or f"it calls {function}"
        return result

    def _kernel(self, kernel: _Kernel, *args: Any) -> None:
        kernel.function(*args)
        if threading.get_ident() != self._thread or self.refusal or self.is_too_large:
            return
        for x in args:
            if isinstance(x, Tensor):
                self._hold(x)
            elif type(x) is not int:
                self.refusal = f"{kernel.name} takes a {type(x).__name__}"
                return
        made = [x.untyped_storage() for x in args if isinstance(x, Tensor) and not self._is_given(x)]
        apart = any(memory.nbytes() > MOST_SERIAL for memory in made)
        self.tape.kernel(kernel.address, [x.data_ptr() if isinstance(x, Tensor) else x for x in args], apart)

    def _product(self, out: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> None:
        for tensor in (out, a, b) if bias is None else (out, bias, a, b):
            self._hold(tensor)
        self.tape.product(out, bias, a, b)

    def _hold(self, tensor: Tensor) -> None:
        """Keep memory that was made in the recorded run, so that nobody else gets it; past the limit, keep nothing."""
        storage = tensor.untyped_storage()
        if self.is_too_large or self._is_given(tensor) or storage.data_ptr() in self._held:
            return
        self._held[storage.data_ptr()] = tensor
        self.bytes += storage.nbytes()
        if self.is_too_large:
            self.tape.drop()
            self._held.clear()

    @property
    def is_too_large(self) -> bool:
        """Whether the run needs more memory than a recording may hold."""
        return self.bytes > MOST_HELD

    def _is_given(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._given

    def _copies(self) -> list[Any]:
        return [x.clone() if isinstance(x, Tensor) else x for x in self.outputs]


class _Kernel(NamedTuple):
    """A kernel of Inductor's: the globals in which its wrapper finds it, its name there, itself, its address."""

    module: dict[str, Any]
    name: str
    function: Callable
    address: int


def _kernels(compiled: Sequence[Any]) -> list[_Kernel]:
    """Every kernel that the wrappers of compiled pieces call; raises _Refused if they call anything else."""
    found: dict[tuple[int, str], _Kernel] = {}
    for piece in compiled:
        wrapper = getattr(piece, "current_callable", None)
        code, module = getattr(wrapper, "__code__", None), getattr(wrapper, "__globals__", None)
        if code is None or module is None or code.co_freevars:  # such as a wrapper in C++
            raise _Refused(f"Inductor's wrapper is {wrapper}, not Python that calls kernels by name")
        for name in code.co_names:
            value = module.get(name)
            address = _address(value)
            if address:
                found[id(module), name] = _Kernel(module, name, value, address)
            elif callable(value) and name not in _HARMLESS:
                raise _Refused(f"its wrapper calls {name}")
    return list(found.values())


def _address(function: Any) -> int:
    """Where the C function is that ``function`` binds; 0 if it is no such binding of Inductor's."""
    path = getattr(getattr(function, "__self__", None), "__file__", None)
    if not isinstance(function, BuiltinFunctionType) or path is None:
        return 0
    return ctypes.cast(getattr(ctypes.CDLL(path), function.__name__), ctypes.c_void_p).value or 0


def _only_views(function: Any) -> bool:
    """Whether an op computes nothing: what it returns is memory of what it got."""
    returned = [r.alias_info for r in function._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def _written(graph: Graph) -> set[Any]:
    """The nodes that others write to."""
    found = set()
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    found.add(value)
    return found
