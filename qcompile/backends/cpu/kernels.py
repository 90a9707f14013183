"""ATen's low-bit matrix products on the CPU.

Measured on 2 cores, 3072 x 1024 weights, against a bfloat16 ``F.linear``: int4pack and int8pack are 3 to 5 times as
fast at one row and half as fast at 128 rows; the int8 product is 4 times as fast at one row and 1.6 times at 128. In
float32 the weight-only ones are scalar code and slower than dequantizing, so they refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import numerics
from ...kernels import NO_PARAMS, Kernel, finish_scaled
from ...types import PackedWeight, Scheme, Site

_REDUCED = (torch.bfloat16, torch.float16)
_GROUPS = (32, 64, 128, 256)  # what _weight_int4pack_mm_for_cpu takes
_LONGEST = 2**16 - 1  # products (x - z) * w of 2 ** 15 at most, whose sum int32 holds
_VECTOR = 32  # columns of int8pack are padded to a multiple of this
_ROWS = 64  # output channels are padded to full blocks, so that one layout rule holds for all of them


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _pad_columns(x: Tensor, columns: int) -> Tensor:
    """Append zeros to each row of x [..., n] up to ``columns``; without any, no operation at all."""
    missing = columns - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


class Int4Pack(Kernel):
    """Weight-only int4: ``aten::_weight_int4pack_mm_for_cpu``.

    Tensors: packed uint8 [out', in' / 2] and scales with shifted zeros [in' / group, out', 2] in the activations'
    dtype, where out' and in' are padded with zero weights (exact). The kernel computes ``(q - 8) * s + t`` with
    ``t = (8 - z) * s`` rounded to that dtype. A weight per output channel is stored in groups of 128. Of a group with
    scale 0, whose weights are 0 whatever its zero point is, ``restore`` returns the zero point 8.
    """

    name = "int4pack"
    scales_like_input = True
    kinds = ("linear",)

    def computes(self, scheme: Scheme) -> bool:
        return scheme.weight.number == "int" and scheme.weight.bits == 4 and not scheme.activation

    def refuses(self, site: Site, scheme: Scheme) -> str:
        if not self.computes(scheme):
            return f"computes int4 weights with float activations, not {scheme}"
        if site.dtype not in _REDUCED:
            return f"fast in bfloat16 and float16 only, not {site.dtype}"
        if scheme.weight.group_size not in (None, *_GROUPS):
            return f"group size {scheme.weight.group_size} is none of {_GROUPS}"
        return ""

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        group = scheme.weight.group_size or 128
        out, inn = _round_up(site.out_features, _ROWS), _round_up(site.in_features, group)
        return out * inn // 2 + inn // group * out * 2 * site.dtype.itemsize

    def prepare(self, packed: PackedWeight) -> list[Tensor]:
        weight, (out, inn) = packed.scheme.weight, packed.shape
        group = weight.group_size or 128
        groups = -(-inn // group)
        rows, columns = _round_up(out, _ROWS) - out, groups * group - inn
        zeros = packed.zeros if packed.zeros is not None else torch.full_like(packed.scales, 8, dtype=torch.uint8)
        codes = F.pad(numerics.unpack_codes(packed.codes, 4, inn), (0, columns, 0, rows), value=8)
        step = _round_up(max(1, numerics.CHUNK // max(1, codes.shape[1])), _ROWS)  # bounds the int32 temporaries
        blocks = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(c.to(torch.int32), 1) for c in codes.split(step)]
        scales = F.pad(packed.scales.expand(out, groups), (0, 0, 0, rows))
        shift = (8.0 - F.pad(zeros.expand(out, groups), (0, 0, 0, rows), value=8).float()) * scales.float()
        scales_and_shifts = torch.stack([scales, shift.to(scales.dtype)], -1).transpose(0, 1).contiguous()
        tensors = [torch.cat(blocks), scales_and_shifts]
        return tensors if packed.permutation is None else [*tensors, packed.permutation]

    def restore(
        self,
        tensors: Sequence[Tensor],
        scheme: Scheme,
        shape: tuple[int, ...],
        activation: Mapping[str, Tensor] = NO_PARAMS,
    ) -> PackedWeight:
        packed, scales_and_shifts, *permutation = tensors
        out, inn = shape
        groups = scheme.weight.groups(inn)
        scales, shift = scales_and_shifts.transpose(0, 1)[:out, :groups].unbind(-1)
        zeros = None
        if not scheme.weight.symmetric:
            safe = torch.where(scales == 0, torch.ones_like(scales), scales).float()
            zeros = torch.round(8 - shift.float() / safe).to(torch.uint8)
        codes = _unpack_int4pack(packed)[:out, :inn].contiguous()
        return PackedWeight(
            scheme, shape, numerics.pack_codes(codes, 4), scales.contiguous(), zeros, *permutation, **activation
        )

    def linear(self, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, scheme: Scheme, out: int) -> Tensor:
        packed, scales_and_shifts, *permutation = weight
        if permutation:
            x = x.index_select(-1, permutation[0])
        inn = packed.shape[1] * 2
        rows = _pad_columns(x, inn).reshape(-1, inn)
        result = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.contiguous(), packed, scheme.weight.group_size or 128, scales_and_shifts
        )
        result = result[:, :out].contiguous().view(*x.shape[:-1], out)
        return result if bias is None else result + bias


def _unpack_int4pack(packed: Tensor) -> Tensor:
    """Codes uint8 [out', in'] of what ``_convert_weight_to_int4pack_for_cpu`` packed, whatever this CPU's layout.

    The layout permutes the codes of 64 rows among themselves, in a way that depends on the vector width. The same
    permutation is read off by packing three numbers that together name each of the 64 rows x 64 columns of a block.
    """
    out, inn = packed.shape[0], packed.shape[1] * 2
    nibbles = torch.stack([packed & 15, packed >> 4], -1).view(out // _ROWS, _ROWS * inn)
    index = torch.arange(_ROWS * inn, dtype=torch.int32).view(_ROWS, inn)
    source = torch.zeros(_ROWS * inn, dtype=torch.int64)
    for shift in range(0, max(1, (_ROWS * inn - 1).bit_length()), 4):
        probe = torch.ops.aten._convert_weight_to_int4pack_for_cpu((index >> shift) & 15, 1)
        source |= torch.stack([probe & 15, probe >> 4], -1).view(-1).long() << shift
    codes = torch.empty_like(nibbles)
    codes[:, source] = nibbles
    return codes.view(out, inn)


class Int8Pack(Kernel):
    """Weight-only int8 per output channel: ``aten::_weight_int8pack_mm``. Tensors: int8 [out, in'], scales [out].

    in' is padded with zero weights to a multiple of 32: the ATen kernel reads whole vectors and, for other sizes, past
    the end of each row (wrong results and crashes seen with 200 columns, torch 2.13).
    """

    name = "int8pack"
    scales_like_input = True
    kinds = ("linear",)

    def computes(self, scheme: Scheme) -> bool:
        return scheme.weight.number == "int" and scheme.weight.bits == 8 and not scheme.activation

    def refuses(self, site: Site, scheme: Scheme) -> str:
        weight = scheme.weight
        if not self.computes(scheme):
            return f"computes int8 weights with float activations, not {scheme}"
        if weight.group_size is not None or not weight.symmetric:
            return "computes symmetric weights with one scale per output channel only"
        return "" if site.dtype in _REDUCED else f"fast in bfloat16 and float16 only, not {site.dtype}"

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        return site.out_features * (_round_up(site.in_features, _VECTOR) + site.dtype.itemsize)

    def prepare(self, packed: PackedWeight) -> list[Tensor]:
        codes, inn = numerics.signed_codes(packed.codes), packed.shape[1]
        codes = F.pad(codes, (0, _round_up(inn, _VECTOR) - inn)).contiguous()
        tensors = [codes, packed.scales.flatten().contiguous()]
        return tensors if packed.permutation is None else [*tensors, packed.permutation]

    def restore(
        self,
        tensors: Sequence[Tensor],
        scheme: Scheme,
        shape: tuple[int, ...],
        activation: Mapping[str, Tensor] = NO_PARAMS,
    ) -> PackedWeight:
        codes, scales, *permutation = tensors
        codes = codes[:, : shape[1]].contiguous().view(torch.uint8) ^ 0x80
        return PackedWeight(scheme, shape, codes, scales[:, None], None, *permutation, **activation)

    def linear(self, x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, scheme: Scheme, out: int) -> Tensor:
        codes, scales, *permutation = weight
        if permutation:
            x = x.index_select(-1, permutation[0])
        rows = _pad_columns(x, codes.shape[1]).reshape(-1, codes.shape[1]).contiguous()
        result = torch.ops.aten._weight_int8pack_mm(rows, codes, scales).reshape(*x.shape[:-1], out)
        return result if bias is None else result + bias


class IntMM(Kernel):
    """Integer weights per output channel, and integer activations: ``aten::_int_mm``.

    Tensors: int8 [out, in], or of fewer bits the canonical codes, which every call unpacks; scales [out]; and the sums
    int32 [out] of each row where the activations have a zero point z: ``sum((x - z) * w) = sum(x * w) - z * sum(w)``.
    """

    name = "int_mm"
    kinds = ("linear",)

    def computes(self, scheme: Scheme) -> bool:
        return scheme.activation is not None and scheme.activation.number == "int"

    def refuses(self, site: Site, scheme: Scheme) -> str:
        weight = scheme.weight
        if not self.computes(scheme):
            return f"computes integer weights with integer activations, not {scheme}"
        if weight.group_size is not None or not weight.symmetric:
            return "computes symmetric weights with one scale per output channel only"
        if site.in_features > _LONGEST:
            return f"sums of {site.in_features} products can exceed 32 bits; it takes up to {_LONGEST}"
        return ""

    def nbytes(self, site: Site, scheme: Scheme) -> int:
        row = -(-site.in_features * scheme.weight.bits // 8) + site.dtype.itemsize
        return site.out_features * (row + (0 if scheme.activation and scheme.activation.symmetric else 4))

    def prepare(self, packed: PackedWeight) -> list[Tensor]:
        bits, activation, columns = packed.scheme.weight.bits, packed.scheme.activation, packed.shape[1]
        codes = numerics.signed_codes(packed.codes) if bits == 8 else packed.codes
        tensors = [codes, packed.scales.flatten().contiguous()]
        if activation is not None and not activation.symmetric:
            parts = codes.split(max(1, numerics.CHUNK // columns))
            tensors.append(torch.cat([_signed(part, bits, columns).sum(1, dtype=torch.int32) for part in parts]))
        return tensors if packed.permutation is None else [*tensors, packed.permutation]

    def restore(
        self,
        tensors: Sequence[Tensor],
        scheme: Scheme,
        shape: tuple[int, ...],
        activation: Mapping[str, Tensor] = NO_PARAMS,
    ) -> PackedWeight:
        codes, scales, _, permutation = _int_mm_tensors(tensors, scheme)
        codes = codes.view(torch.uint8) ^ 0x80 if scheme.weight.bits == 8 else codes
        return PackedWeight(scheme, shape, codes, scales[:, None], permutation=permutation, **activation)

    def scaled_linear(
        self,
        x: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Tensor | None,
        scheme: Scheme,
        out: int,
        dtype: torch.dtype,
    ) -> Tensor:
        codes, scale, *zero = x
        stored, channel_scale, sums, permutation = _int_mm_tensors(weight, scheme)
        if permutation is not None:
            codes = codes.index_select(-1, permutation)
        # _int_mm returns garbage for a single row with strides (0, 1), which Inductor gives to the view of one token
        # (torch 2.13). The clamp changes no number and gives the rows a buffer of their own.
        rows = codes.reshape(-1, codes.shape[-1]).clamp(min=-128)
        signed = _signed(stored, scheme.weight.bits, codes.shape[-1])
        total = torch._int_mm(rows, signed.t()).reshape(*codes.shape[:-1], out)
        if sums is not None:
            total = total - zero[0] * sums
        return finish_scaled(total, scale, channel_scale, bias, dtype)


def _signed(codes: Tensor, bits: int, columns: int) -> Tensor:
    """The numbers int8 [rows, columns] that an integer product multiplies."""
    return codes if bits == 8 else numerics.unpack_codes(codes, bits, columns).view(torch.int8) - 2 ** (bits - 1)


def _int_mm_tensors(tensors: Sequence[Tensor], scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(codes, scales, sums, permutation) from the list that ``IntMM.prepare`` gave."""
    codes, scales, *rest = tensors
    sums = None if scheme.activation is None or scheme.activation.symmetric else rest.pop(0)
    return codes, scales, sums, rest[0] if rest else None
