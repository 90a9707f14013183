"""From stored codes (``layouts.py``) to the left operand of a dot, without moving a number between threads.

``PTX`` is inline assembly of NVIDIA's: exponent bits are set beside a code, which makes the number offset + code exact.
It looks like an elementwise operation on four bytes, but nibbles of one byte go to different places of its results;
that is right because Triton keeps the four bytes of a word in one register. Without it (AMD, the interpreter) the same
codes are taken apart by portable operations. ``WIDE`` computes in float32, for the interpreter, which has no bfloat16.
"""

import triton
import triton.language as tl

_NIBBLES = """
    lop3.b32 $0, $4, 0x000F000F, {magic}, 0xEA; shr.u32 t, $4, 4;
    lop3.b32 $1, t, 0x000F000F, {magic}, 0xEA; shr.u32 t, $4, 8;
    lop3.b32 $2, t, 0x000F000F, {magic}, 0xEA; shr.u32 t, $4, 12;
    lop3.b32 $3, t, 0x000F000F, {magic}, 0xEA;"""
_CENTER = """
    fma.rn.{kind} $0, $0, {one}, {shift}; fma.rn.{kind} $1, $1, {one}, {shift};
    fma.rn.{kind} $2, $2, {one}, {shift}; fma.rn.{kind} $3, $3, {one}, {shift};"""


def _four_bits(magic: str, center: str = "") -> tl.constexpr:
    """128 + q (bfloat16) or 1024 + q (float16) of the eight codes of a word; centered: q - 8."""
    return tl.constexpr("{ .reg .b32 t;" + _NIBBLES.format(magic=magic) + center + "}")


def _constants(kind: str, one: str, shift: str) -> str:  # fma, because sub.bf16x2 needs sm_90
    registers = f".reg .b32 o, z; mov.b32 o, {one}; mov.b32 z, {shift};"
    return registers + _CENTER.format(kind=kind, one="o", shift="z")


_BF16_OFFSET = _four_bits("0x43004300")
_FP16_OFFSET = _four_bits("0x64006400")
_BF16_CENTERED = _four_bits("0x43004300", _constants("bf16x2", "0x3F803F80", "0xC308C308"))
_FP16_CENTERED = _four_bits("0x64006400", _constants("f16x2", "0x3C003C00", "0xE408E408"))

# Of four bytes q ^ 0x80: q - 128. bfloat16 has seven bits of fraction, so the sign bit is subtracted by itself.
_BF16_BYTES = tl.constexpr(
    """{ .reg .b32 u, v, s, m; mov.b32 m, 0xBF80BF80;
    prmt.b32 u, $2, 0, 0x4140; lop3.b32 v, u, 0x007F007F, 0x43004300, 0xEA; lop3.b32 s, u, 0x00800080, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, s, m, v;
    prmt.b32 u, $2, 0, 0x4342; lop3.b32 v, u, 0x007F007F, 0x43004300, 0xEA; lop3.b32 s, u, 0x00800080, 0x43004300, 0xEA;
    fma.rn.bf16x2 $1, s, m, v; }"""
)
_FP16_BYTES = tl.constexpr(
    """{ .reg .b32 u, o, z, m; mov.b32 o, 0x3C003C00; mov.b32 z, 0xE480E480; mov.b32 m, 0x64646464;
    prmt.b32 u, $2, m, 0x4140; xor.b32 u, u, 0x00800080; fma.rn.f16x2 $0, u, o, z;
    prmt.b32 u, $2, m, 0x4342; xor.b32 u, u, 0x00800080; fma.rn.f16x2 $1, u, o, z; }"""
)

_BF16_ADD = tl.constexpr("{ .reg .b32 o; mov.b32 o, 0x3F803F80; fma.rn.bf16x2 $0, $1, o, $2; }")
_FP16_ADD = tl.constexpr("{ .reg .b32 o; mov.b32 o, 0x3C003C00; fma.rn.f16x2 $0, $1, o, $2; }")
_BF16_MUL = tl.constexpr("{ .reg .b32 o; mov.b32 o, 0x80008000; fma.rn.bf16x2 $0, $1, $2, o; }")
_FP16_MUL = tl.constexpr("{ .reg .b32 o; mov.b32 o, 0x80008000; fma.rn.f16x2 $0, $1, $2, o; }")

# Of two's complement nibbles: 16 times each, as int8.
_INT8_HIGH_NIBBLES = tl.constexpr(
    "{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $0, t, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }"
)


@triton.jit
def nibbles(stored, CENTERED: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """uint8 [...] -> [..., 2] of ``DTYPE``: q - 8, or q plus the offset of the dtype."""
    if PTX:
        if DTYPE == tl.bfloat16:
            code: tl.constexpr = _BF16_CENTERED if CENTERED else _BF16_OFFSET
            low, high = tl.inline_asm_elementwise(
                code, "=r,=r,=r,=r,r", [stored], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            code: tl.constexpr = _FP16_CENTERED if CENTERED else _FP16_OFFSET
            low, high = tl.inline_asm_elementwise(
                code, "=r,=r,=r,=r,r", [stored], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
    else:
        offset: tl.constexpr = -8.0 if CENTERED else (128.0 if DTYPE == tl.bfloat16 else 1024.0)
        low = ((stored & 0xF).to(tl.float32) + offset).to(DTYPE)
        high = ((stored >> 4).to(tl.float32) + offset).to(DTYPE)
    return tl.join(low, high)


@triton.jit
def signed_bytes(stored, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """uint8 q ^ 0x80 [...] -> q - 128 in ``DTYPE``."""
    if PTX:
        if DTYPE == tl.bfloat16:
            result = tl.inline_asm_elementwise(_BF16_BYTES, "=r,=r,r", [stored], tl.bfloat16, is_pure=True, pack=4)
        else:
            result = tl.inline_asm_elementwise(_FP16_BYTES, "=r,=r,r", [stored], tl.float16, is_pure=True, pack=4)
    else:
        result = stored.to(tl.int8, bitcast=True).to(tl.float32).to(DTYPE)
    return result


@triton.jit
def multiply_or_add(a, b, ADD: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """a + b or a * b, two numbers an instruction."""
    if PTX:
        if DTYPE == tl.bfloat16:
            code: tl.constexpr = _BF16_ADD if ADD else _BF16_MUL
            result = tl.inline_asm_elementwise(code, "=r,r,r", [a, b], tl.bfloat16, is_pure=True, pack=2)
        else:
            code: tl.constexpr = _FP16_ADD if ADD else _FP16_MUL
            result = tl.inline_asm_elementwise(code, "=r,r,r", [a, b], tl.float16, is_pure=True, pack=2)
    else:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        result = (a + b if ADD else a * b).to(DTYPE)
    return result


@triton.jit
def float_operand(
    stored, BN: tl.constexpr, BK: tl.constexpr, BITS: tl.constexpr, WGMMA: tl.constexpr, CENTERED: tl.constexpr,
    DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A tile of codes, uint8 [BN / 16, 16 * BK * BITS / 8], as the weight [BN, BK] before zero points and scales."""
    R: tl.constexpr = BN // 16
    T: tl.constexpr = BK * BITS // 256
    codes = tl.reshape(stored, (R, T, 8, 4, 4, 4))  # tile of rows, of columns, lane, word, byte
    if BITS == 8:
        w = signed_bytes(codes, DTYPE, PTX)
        if WGMMA:  # R T g c s b h e -> R h g T s b c e
            w = tl.trans(tl.reshape(w, (R, T, 8, 4, 2, 2, 2, 2)), 0, 6, 2, 1, 4, 5, 3, 7)
        else:  # R T g c s h j -> R h g T s c j
            w = tl.trans(tl.reshape(w, (R, T, 8, 4, 2, 2, 4)), 0, 5, 2, 1, 4, 3, 6)
    else:
        w = nibbles(codes, CENTERED, DTYPE, PTX)
        if WGMMA:
            w = tl.reshape(w, (R, T, 8, 4, 4, 2, 2, 2))
            if PTX:  # R T g c s h e b -> R h g T s b c e
                w = tl.trans(w, 0, 5, 2, 1, 4, 7, 3, 6)
            else:  # R T g c s e b h
                w = tl.trans(w, 0, 7, 2, 1, 4, 6, 3, 5)
        else:
            w = tl.reshape(w, (R, T, 8, 4, 2, 2, 2, 2, 2))
            if PTX:  # R T g c s h q e p -> R h g T s c p q e
                w = tl.trans(w, 0, 5, 2, 1, 4, 3, 8, 6, 7)
            else:  # R T g c s h e p q
                w = tl.trans(w, 0, 5, 2, 1, 4, 3, 7, 8, 6)
    return tl.reshape(w, (BN, BK))


@triton.jit
def dot(w, x, acc, WIDE: tl.constexpr):
    """``w @ x + acc``."""
    if WIDE:
        result = tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    else:
        result = tl.dot(w, x, acc)
    return result


@triton.jit
def scales_of(word, DTYPE: tl.constexpr):
    """The lower halves of words, the scales, as float32."""
    if DTYPE == tl.bfloat16:
        scales = (word << 16).to(tl.float32, bitcast=True)
    else:
        scales = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return scales


@triton.jit
def shifts_of(word, DTYPE: tl.constexpr):
    """The upper halves of words: what is added to codes."""
    return (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def spread(values, BN: tl.constexpr, BK: tl.constexpr):
    """One number of each row [BN], or of each group [BN, parts], for every column: [BN, BK]."""
    if len(values.shape) == 1:
        result = values[:, None].broadcast_to(BN, BK)
    else:
        parts: tl.constexpr = values.shape[1]
        result = tl.reshape(values[:, :, None].broadcast_to(BN, parts, BK // parts), (BN, BK))
    return result


@triton.jit
def int8_operand(stored, BN: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr):
    """A tile of four-bit codes in two's complement, uint8 [BN / 16, 8 * BK], as 16 times the numbers: int8 [BN, BK]."""
    R: tl.constexpr = BN // 16
    T: tl.constexpr = BK // 64
    codes = tl.reshape(stored, (R, T, 8, 4, 4, 4))
    if PTX:
        low, high = tl.inline_asm_elementwise(
            _INT8_HIGH_NIBBLES, "=r,=r,r", [codes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        low = (codes << 4).to(tl.int8, bitcast=True)
        high = (codes & 0xF0).to(tl.int8, bitcast=True)
    w = tl.reshape(tl.join(low, high), (R, T, 8, 4, 2, 2, 4, 2))  # R T g c s b j h -> R h g T s b c j
    return tl.reshape(tl.trans(w, 0, 7, 2, 1, 4, 5, 3, 6), (BN, BK))


@triton.jit
def int8_halves(w, BN: tl.constexpr, BK: tl.constexpr):
    """An operand [BN, 64] of ``int8_operand`` as two of 32 columns."""
    tl.static_assert(BK == 64)
    halves = tl.trans(tl.reshape(w, (BN, 2, BK // 2)), 0, 2, 1)
    return tl.split(halves)
