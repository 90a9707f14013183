"""The few PTX instructions that the Triton kernels use, so that Triton's interpreter can run them.

``install()`` teaches it. Elements of a tensor that are neighbours in its last dimension are taken for neighbours in a
register: that this is so on a GPU, too, is what the gate on compiled code checks (no data movement between a load of 16
bytes and the tensor core).
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import torch

PREFETCHED: list[list[int]] = []  # addresses, of each instruction


def install() -> None:
    """Let the interpreter of this process run inline assembly."""
    from triton.runtime import interpreter

    def create_inline_asm(self, asm, constraints, values, types, is_pure, pack):
        shape = values[0].data.shape
        if asm.startswith("prefetch.global.L2"):
            PREFETCHED.append(values[0].data.reshape(-1).tolist())
            zeros = interpreter.TensorHandle(np.zeros(shape, np.int32), scalar(types[0]))
            return SimpleNamespace(get_result=lambda i: zeros)
        inputs = [np.ascontiguousarray(v.data).reshape(-1).view(np.uint32) for v in values]
        each = [scalar(kind).primitive_bitwidth * pack // 32 for kind in types]
        registers = run(asm, inputs, sum(each))
        results, first = [], 0
        for kind, count in zip(types, each, strict=True):
            words = np.stack(registers[first : first + count], -1).reshape(-1)
            dtype = np.float16 if scalar(kind).is_fp16() else f"u{scalar(kind).primitive_bitwidth // 8}"
            dtype = np.int8 if str(scalar(kind)) == "int8" else dtype
            results.append(interpreter.TensorHandle(words.view(dtype).reshape(shape), scalar(kind)))
            first += count
        return SimpleNamespace(get_result=lambda i: results[i])

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm


def scalar(kind):
    """The dtype of an element."""
    return getattr(kind, "scalar", kind)


def run(asm: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Registers $0, $1 ... of every thread after ``asm``, which reads those that follow."""
    names: dict[str, np.ndarray] = {f"${outputs + i}": words for i, words in enumerate(inputs)}

    def value(text: str) -> np.ndarray:
        return names[text] if text in names else np.full_like(inputs[0], int(text, 0))

    for line in re.sub(r"[{}]", " ", asm).split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        instruction, rest = line.strip().split(None, 1)
        target, *arguments = re.split(r"\s*,\s*", rest.strip())
        names[target] = INSTRUCTIONS[instruction](*map(value, arguments))
    return [names[f"${i}"] for i in range(outputs)]


def _lop3(a, b, c, table):
    result = np.zeros_like(a)
    for row in range(8):  # of the truth table: bits of a, b, c
        if int(table[0]) >> row & 1:
            terms = [word if row >> (2 - i) & 1 else ~word for i, word in enumerate((a, b, c))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def _prmt(a, b, selector):
    own = np.stack([a, b], -1).view(np.uint8)
    chosen = [own[..., int(selector[0]) >> (4 * i) & 7] for i in range(4)]
    return np.stack(chosen, -1).view(np.uint32)[..., 0]


def _fma(dtype: torch.dtype):
    def halves(words: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(words.view(np.int16).copy()).view(dtype).double()

    def fma(a, b, c):
        exact = halves(a) * halves(b) + halves(c)
        return exact.to(dtype).view(torch.int16).numpy().view(np.uint32)

    return fma


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _fma(torch.bfloat16),
    "fma.rn.f16x2": _fma(torch.float16),
}
