"""The pretend NPU: Python behind the aclnn calls of torch_npu.

torch_npu's own host code runs: its checks, shapes, dtypes, formats and choice of operation. What it then asks of the
device arrives here. A declaration says what an operation's arguments are, and a function in plain torch computes it;
device memory is memory of this process. A call outside of the documented contract is refused as CANN refuses it, by an
error code that torch_npu turns into its own error; so is one for an operation that is not declared.

    @aclnn("Name", "x scale? axis:int > y")
    def name(x, scale, axis): return y

declares tensors x, scale (which may be missing), an integer, and a tensor y that is written. Kinds besides: ``bool``,
``float`` (32 bits), ``double``, ``text``, ``scalar``, ``ints``, ``bools``, ``list`` (of tensors, may be missing),
``out`` and ``outs`` for a written tensor that the function sees too, and ``operand`` for a tensor with its format. What
is after ``>`` is written where the function returns something for it.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from npu_goldens import Refused
from torch import Tensor

ND_FORMATS = {-1, 0, 2, 3, 30, 47}  # undefined, NCHW, ND, NC1HWC0, NCDHW, NCL: the last is the fastest
FRACTAL_NZ = 29
TYPES = {  # aclDataType
    0: torch.float32, 1: torch.float16, 2: torch.int8, 3: torch.int32, 4: torch.uint8, 6: torch.int16, 9: torch.int64,
    10: torch.int64, 11: torch.float64, 12: torch.bool, 27: torch.bfloat16,
}  # fmt: skip
NUMBERS = {dtype: number for number, dtype in reversed(TYPES.items())}
OLDER = ("TransData", "Identity")  # operations that torch_npu calls by another interface than aclnn
INVALID, INTERNAL = 161002, 561000  # ACLNN_ERR_PARAM_INVALID, ACLNN_ERR_INNER


class _Object(ctypes.Structure):
    """``object`` of cann/opapi.c."""


_Object._fields_ = [
    ("count", ctypes.c_int64), ("sizes", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
    ("offset", ctypes.c_int64), ("stored_count", ctypes.c_int64), ("stored", ctypes.POINTER(ctypes.c_int64)),
    ("type", ctypes.c_int64), ("format", ctypes.c_int64), ("data", ctypes.c_void_p),
    ("items", ctypes.POINTER(ctypes.POINTER(_Object))), ("bits", ctypes.c_int64),
]  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """A tensor of a call: its numbers in the device's memory, and how torch_npu described them."""

    values: Tensor
    format: int
    stored: Tensor | None = None  # in the order of memory

    def __str__(self) -> str:
        strides = "" if self.values.is_contiguous() else f" strides {list(self.values.stride())}"
        nz = " FRACTAL_NZ" if self.format == FRACTAL_NZ else ""
        name = str(self.values.dtype).removeprefix("torch.")
        return f"{name}{list(self.values.shape)}{strides}{nz}".replace(", ", ",")


@dataclass(frozen=True)
class Argument:
    """One of a declaration."""

    name: str
    kind: str
    optional: bool
    hidden: bool  # after ">": the function does not get it

    @property
    def written(self) -> bool:
        return self.hidden or self.kind in ("out", "outs")


@dataclass(frozen=True)
class Call:
    """An operation that was asked for, with its arguments by name, as a line of a snapshot."""

    name: str
    arguments: dict[str, str]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.arguments.items())})"


Emulation = Callable[..., Any]
DECLARED: dict[str, tuple[list[Argument], Emulation]] = {}


def aclnn(name: str, declaration: str) -> Callable[[Emulation], Emulation]:
    """Declare an operation that the decorated function computes."""
    given, _, written = declaration.partition(">")
    arguments = [_argument(text, False) for text in given.split()] + [_argument(text, True) for text in written.split()]

    def register(function: Emulation) -> Emulation:
        DECLARED[name if name in OLDER else f"aclnn{name}"] = arguments, function
        return function

    return register


def _argument(text: str, hidden: bool) -> Argument:
    name, _, kind = text.partition(":")
    return Argument(name.removesuffix("?"), kind or "tensor", name.endswith("?"), hidden)


# ----------------------------------------------------------------------------------------------- reading arguments


def _numbers(pointer: Any, count: int) -> list[int]:
    return [pointer[i] for i in range(count)]


def _operand(made: _Object) -> Operand:
    """A tensor over the device's memory; FRACTAL_NZ is undone into a copy, since its numbers are in another order."""
    dtype, sizes, strides = TYPES[made.type], _numbers(made.sizes, made.count), _numbers(made.strides, made.count)
    stored = _numbers(made.stored, made.stored_count)
    if not math.prod(sizes):
        return Operand(torch.empty(sizes, dtype=dtype), made.format)
    if made.format in ND_FORMATS:
        memory = (ctypes.c_char * (math.prod(stored) * dtype.itemsize)).from_address(made.data)
        flat = torch.frombuffer(memory, dtype=dtype)
        return Operand(flat.as_strided(sizes, strides, made.offset), made.format, flat)
    if made.format != FRACTAL_NZ:
        raise Refused(f"format {made.format}")
    if made.offset:
        raise Refused("a part of a FRACTAL_NZ tensor")
    in_order = _nz_memory(made.data, dtype, stored)
    return Operand(_from_nz(in_order, sizes, strides[-1] != 1), made.format, in_order)


def _nz_memory(address: int, dtype: torch.dtype, stored: Sequence[int]) -> Tensor:
    """[..., n / c, k / 16, 16, c], where c numbers are 32 bytes.

    A weight that became FRACTAL_NZ as int8, two int4 each, and is seen as int32 since is the same memory.
    """
    memory = (ctypes.c_char * (math.prod(stored[:-1]) * 32)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(*stored[:-1], -1)


def _from_nz(stored: Tensor, sizes: Sequence[int], transposed: bool) -> Tensor:
    """The same as [..., k, n], or as its transposed view."""
    k, n = reversed(sizes[-2:]) if transposed else sizes[-2:]
    weight = stored.movedim(-4, -2).flatten(-4, -3).flatten(-2)[..., :k, :n].contiguous()
    return weight.transpose(-1, -2) if transposed else weight


def to_nz(weight: Tensor, stored: Tensor) -> None:
    """Write [..., k, n] into memory as [..., n / c, k / 16, 16, c]."""
    *_, blocks, rows, sixteen, columns = stored.shape
    k, n = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight, (0, blocks * columns - n, 0, rows * sixteen - k))
    stored.copy_(padded.unflatten(-1, (blocks, columns)).unflatten(-3, (rows, sixteen)).movedim(-2, -4))


def _read(kind: str, word: int, optional: bool) -> Any:
    if kind == "int":
        return word
    if kind == "bool":
        return bool(word & 0xFF)
    if kind == "text":
        return ctypes.string_at(word).decode() if word else ""
    if not word:
        if not optional and kind not in ("list", "ints", "bools"):
            raise Refused("a tensor that must be there is missing")
        return None
    made = _Object.from_address(word)
    if kind in ("list", "outs"):
        return [_operand(made.items[i].contents) for i in range(made.count)] or None
    if kind in ("ints", "bools"):
        return _numbers(made.sizes, made.count)
    if kind == "scalar":
        return torch.frombuffer(bytearray(made.bits.to_bytes(8, "little", signed=True)), dtype=TYPES[made.type])[
            0
        ].item()
    return _operand(made)


def _real(kind: str, register: float) -> float:
    """A float is the lower half of its register."""
    return struct.unpack("<f", struct.pack("<d", register)[:4])[0] if kind == "float" else register


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _values(value: Any) -> Any:
    if isinstance(value, list):
        return [_values(item) for item in value]
    return value.values if isinstance(value, Operand) else value


# --------------------------------------------------------------------------------------------------------- the device


class Device:
    """The pretend NPU of this process. ``calls`` are those since it was last emptied; ``fault`` is the last refusal."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.fault = ""
        self._runtime = ctypes.CDLL("libascendcl.so")
        self._handler = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_double)
        )(self._handle)
        self._runtime.pretend_set_handler(self._handler)

    def _handle(self, name: bytes, words: Any, reals: Any) -> int:
        status, self.fault = 0, ""
        try:
            self._compute(name.decode(), words, reals)
        except Refused as refusal:
            status, self.fault = INVALID, f"{name.decode()}: {refusal}"
        except Exception as error:  # it must not pass through the caller, which is C++
            status, self.fault = INTERNAL, f"{name.decode()}: {type(error).__name__}: {error}"
        if status:
            self._runtime.pretend_set_message(self.fault.encode())
        return status

    def _compute(self, name: str, words: Any, reals: Any) -> None:
        if name not in DECLARED:
            raise Refused("the pretend NPU does not have this operation; declare it in tests/npu")
        declared, function = DECLARED[name]
        word = real = 0
        given: dict[str, Any] = {}
        for argument in declared:
            if argument.kind in ("float", "double"):
                given[argument.name] = _real(argument.kind, reals[real])
                real += 1
            else:
                given[argument.name] = _read(argument.kind, words[word], argument.optional)
                word += 1
        self.calls.append(Call(name, {key: _shown(value) for key, value in given.items() if value is not None}))
        inputs = [given[a.name] if a.kind == "operand" else _values(given[a.name]) for a in declared if not a.hidden]
        outputs = [given[a.name] for a in declared if a.written]
        with torch.inference_mode():
            results = function(*inputs)
        for output, result in zip(outputs, results if isinstance(results, tuple) else (results,), strict=False):
            if output is not None and result is not None:
                _write(output[0] if isinstance(output, list) else output, result)


def _write(output: Operand, result: Tensor) -> None:
    if not output.values.numel() and not result.numel():
        return
    if output.values.shape != result.shape or output.values.dtype != result.dtype:
        raise Refused(f"the output is {output}, but what is computed is {Operand(result, 2)}")
    output.values.copy_(result)
