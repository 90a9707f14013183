"""What Ascend's operations compute, in plain torch on the CPU, and what they are documented to refuse.

Formulas and tables are those of op-plugin's pages and of the goldens in its tests; integer parts are exact. Every
function has the signature of its operator's schema (npu_schemas.txt) and raises Refused for a call outside of its
contract, as CANN answers with error 161002. The signatures name no type of qcompile: the same functions stand behind
the real schemas of torch_npu.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {
    1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 12: torch.qint8, 15: torch.bfloat16,
    16: torch.quint4x2,
}  # fmt: skip
HALF = (torch.float16, torch.bfloat16)
LONGEST = 65535


class Refused(RuntimeError):
    """A call that the operation's documentation rules out."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise Refused(message)


def unpack_int4(words: Tensor) -> Tensor:
    """int32 [..., n] as int8 [..., 8 n]: nibble i of a word is number i, in two's complement."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (words[..., None] >> shifts) & 15
    return torch.where(nibbles > 7, nibbles - 16, nibbles).flatten(-2).to(torch.int8)


def pack_int4(values: Tensor) -> Tensor:
    """Inverse of ``unpack_int4``, as npu_convert_weight_to_int4pack has it: values are masked, not checked."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int64)
    words = ((values.to(torch.int64).unflatten(-1, (-1, 8)) & 15) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def read_container(scale: Tensor, mask: int = 0xFFFFFFFF) -> Tensor:
    """The float32 in the low half of int64."""
    return (scale & mask).to(torch.int32).view(torch.float32)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Exact product of integers, as float64."""
    return x.double() @ weight.double()


# ------------------------------------------------------------------------------------------------------ quantization


def npu_dynamic_quant(
    input, *, smooth_scales=None, group_index=None, dst_type=None, quant_mode="pertoken", dst_type_max=0.0
):
    need(input.dtype in HALF and input.dim() > 1, f"input is {input.dtype} with {input.dim()} dimensions")
    need(smooth_scales is None and group_index is None and quant_mode == "pertoken", "not used here")
    need(dst_type in (None, 1, 16), f"dst_type {dst_type}")
    top = 7 if dst_type == 16 else 127
    need(top == 127 or input.shape[-1] % 8 == 0, f"{input.shape[-1]} columns as int4")
    largest = input.float().abs().amax(-1)
    inverse = torch.where(largest == 0, torch.zeros_like(largest), top / largest)
    codes = torch.round(input.float() * inverse[..., None]).to(torch.int8)
    return (pack_int4(codes) if top == 7 else codes), largest / top


def npu_quantize(input, scales, zero_points, dtype, axis=1, div_mode=True):
    need(div_mode, "only the dividing form is used here")
    need(input.dtype in (*HALF, torch.float32), f"input is {input.dtype}")
    need(scales.dtype in (torch.float32, torch.bfloat16), f"scales are {scales.dtype}")
    need(scales.dim() == 1 and scales.numel() in (1, input.shape[axis]), f"scales {list(scales.shape)}")
    need(DTYPES[dtype] is torch.qint8, f"dtype {dtype}")
    if zero_points is not None:
        need(zero_points.dtype in (torch.int8, torch.uint8, torch.int32, torch.bfloat16), f"{zero_points.dtype}")
        need(zero_points.shape == scales.shape, "zero_points have another shape than scales")
    zero = 0 if zero_points is None else zero_points.float()
    return torch.round(input.float() / scales.float() + zero).clamp(-128, 127).to(torch.int8)


def npu_dequant_swiglu_quant(
    x, *, weight_scale=None, activation_scale=None, bias=None, quant_scale=None, quant_offset=None, group_index=None,
    activate_left=False, quant_mode=0, dst_type=None, round_mode=None, activate_dim=None, swiglu_mode=0,
    clamp_limit=7.0, glu_alpha=1.702, glu_bias=1.0,
):  # fmt: skip
    need(x.dtype in HALF and x.dim() == 2 and x.shape[1] % 2 == 0, f"x is {x.dtype} {list(x.shape)}")
    others = (weight_scale, activation_scale, bias, quant_scale, quant_offset, group_index)
    need(all(other is None for other in others) and quant_mode == 1, "not used here")
    need(activate_left and swiglu_mode in (0, 2), "not used here")
    gate, up = x.float().chunk(2, -1)
    if swiglu_mode == 2:
        gate, up = gate.clamp(max=clamp_limit), up.clamp(-clamp_limit, clamp_limit)
        result = gate * torch.sigmoid(glu_alpha * gate) * (up + glu_bias)
    else:
        result = torch.nn.functional.silu(gate) * up
    scale = result.abs().amax(-1) * (1 / 127)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(result / safe[:, None]).clamp(-128, 127).to(torch.int8), scale


def npu_swiglu(self, dim=-1):
    need(self.dtype in (*HALF, torch.float32) and self.shape[dim] % 2 == 0, f"{self.dtype} {list(self.shape)}")
    gate, up = self.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(self.dtype)


# ---------------------------------------------------------------------------------------------------------- products


def npu_weight_quant_batchmatmul(
    x, weight, antiquant_scale, antiquant_offset=None, quant_scale=None, quant_offset=None, bias=None,
    antiquant_group_size=0, inner_precise=0, weight_dtype=None,
):  # fmt: skip
    need(x.dtype in HALF and x.dim() == 2 and x.numel() > 0, f"x is {x.dtype} {list(x.shape)}")
    need(weight.dtype in (torch.int8, torch.int32) and weight.is_contiguous(), f"weight is {weight.dtype}")
    values = unpack_int4(weight) if weight.dtype == torch.int32 else weight
    (rows, columns), size = values.shape, antiquant_group_size
    need(x.shape[1] == rows, f"K is {x.shape[1]} and {rows}")
    need(0 < rows <= LONGEST and 0 < columns <= LONGEST, f"weight {rows} x {columns}")
    need(size == 0 or (32 <= size <= rows - 1 and size % 32 == 0), f"group size {size} with K {rows}")
    need(antiquant_scale.dtype == x.dtype, f"scale is {antiquant_scale.dtype}, x {x.dtype}")
    shapes = [(-(-rows // size), columns)] if size else [(1,), (columns,), (1, columns)]
    need(tuple(antiquant_scale.shape) in shapes, f"scale {list(antiquant_scale.shape)}, not one of {shapes}")
    if antiquant_offset is not None:
        need(antiquant_offset.shape == antiquant_scale.shape, "offset and scale have other shapes")
        need(antiquant_offset.dtype == antiquant_scale.dtype, "offset and scale have other types")
    need(quant_scale is None and quant_offset is None and inner_precise == 0, "not used here")
    need_bias(bias, x.dtype, columns)
    result = x.float() @ dequantized(values, antiquant_scale, antiquant_offset, size).float()
    return (result if bias is None else result + bias.float()).to(x.dtype)


def need_bias(bias: Tensor | None, dtype: torch.dtype, columns: int) -> None:
    wanted = torch.float32 if dtype == torch.bfloat16 else dtype
    if bias is not None:
        need(bias.dtype == wanted, f"bias is {bias.dtype}, not {wanted}")
        need(tuple(bias.shape) in ((columns,), (1, columns)), f"bias {list(bias.shape)}")


def dequantized(values: Tensor, scale: Tensor, offset: Tensor | None, size: int) -> Tensor:
    """``(w + offset) * scale`` in the dtype of the scale: [rows, columns]."""

    def spread(table: Tensor) -> Tensor:
        return table.repeat_interleave(size, 0)[: values.shape[0]] if size else table

    numbers = values.to(scale.dtype)
    return (numbers if offset is None else numbers + spread(offset)) * spread(scale)


INT8_TABLE = {  # (output, has a scale per token): scale dtypes, bias dtypes
    (torch.float16, False): ({torch.int64, torch.float32}, {torch.int32}),
    (torch.int8, False): ({torch.int64, torch.float32}, {torch.int32}),
    (torch.bfloat16, False): (
        {torch.float32, torch.bfloat16},
        {torch.int32, torch.bfloat16, torch.float32},
    ),
    (torch.bfloat16, True): ({torch.float32, torch.bfloat16}, {torch.int32, torch.bfloat16, torch.float32}),
    (torch.float16, True): ({torch.float32}, {torch.int32, torch.bfloat16, torch.float32}),
}


def npu_quant_matmul(
    x1, x2, scale, *, offset=None, pertoken_scale=None, bias=None, output_dtype=None, x1_dtype=None, x2_dtype=None,
    pertoken_scale_dtype=None, scale_dtype=None, group_sizes=None, y_scale=None,
):  # fmt: skip
    others = (offset, x1_dtype, x2_dtype, pertoken_scale_dtype, scale_dtype, group_sizes, y_scale)
    need(all(other is None for other in others), "not used here")
    need(x1.dim() == 2 and x2.dim() == 2 and x1.numel() > 0, f"x1 {list(x1.shape)}, x2 {list(x2.shape)}")
    need(x1.dtype == x2.dtype and x1.dtype in (torch.int8, torch.int32), f"x1 {x1.dtype}, x2 {x2.dtype}")
    need(max(x1.shape[1], x2.shape[1]) <= LONGEST, f"x1 {list(x1.shape)}, x2 {list(x2.shape)}")
    output = torch.int8 if output_dtype is None else DTYPES[output_dtype]
    if x1.dtype == torch.int32:
        need(x1.is_contiguous() and x2.is_contiguous(), "int4 operands must be contiguous")
        need(pertoken_scale is not None and output in HALF, "the form without a scale per token is not used here")
        need(scale.dtype == torch.float32 and bias is None, f"scale is {scale.dtype}, bias {bias is not None}")
        x1, x2 = unpack_int4(x1), unpack_int4(x2)
    else:
        need((output, pertoken_scale is not None) in INT8_TABLE, f"output {output}")
        scales, biases = INT8_TABLE[output, pertoken_scale is not None]
        need(scale.dtype in scales, f"scale is {scale.dtype}, not one of {scales} for {output}")
        need(bias is None or bias.dtype in biases, f"bias is {bias is not None and bias.dtype}, not one of {biases}")
    need(x1.shape[1] == x2.shape[0], f"K is {x1.shape[1]} and {x2.shape[0]}")
    columns = x2.shape[1]
    need(tuple(scale.shape) in ((1,), (columns,)), f"scale {list(scale.shape)}")
    need(bias is None or tuple(bias.shape) == (columns,), f"bias {bias is not None and list(bias.shape)}")
    total = product(x1, x2)
    if bias is not None and bias.dtype == torch.int32:
        total = total + bias
    steps = read_container(scale, 0xFFFFE000) if scale.dtype == torch.int64 else scale.float()
    result = total.float() * steps
    if pertoken_scale is not None:
        need(pertoken_scale.dtype == torch.float32, f"pertoken_scale is {pertoken_scale.dtype}")
        need(tuple(pertoken_scale.shape) == (x1.shape[0],), f"pertoken_scale {list(pertoken_scale.shape)}")
        result = result * pertoken_scale[:, None]
    if bias is not None and bias.dtype != torch.int32:
        result = result + bias.float()
    return result.to(output)


def npu_trans_quant_param(scale, offset=None, round_mode=0):
    need(scale.dtype == torch.float32 and offset is None, f"scale is {scale.dtype}")
    bits = scale.view(torch.int32).to(torch.int64)
    if round_mode == 1:
        bits = bits + 0xFFF + ((bits >> 13) & 1)
    return (bits & 0xFFFFE000) | 1 << 46


# ----------------------------------------------------------------------------------------------------------- experts


def npu_grouped_matmul(
    x, weight, *, bias=None, scale=None, offset=None, antiquant_scale=None, antiquant_offset=None, per_token_scale=None,
    group_list=None, activation_input=None, activation_quant_scale=None, activation_quant_offset=None, split_item=0,
    group_type=None, group_list_type=0, act_type=0, tuning_config=None, output_dtype=None, x_dtype=None,
    weight_dtype=None, scale_dtype=None, per_token_scale_dtype=None,
):  # fmt: skip
    lists = (x, weight, bias, scale, antiquant_scale, antiquant_offset, per_token_scale)
    need(all(given is None or len(given) == 1 for given in lists), "one tensor in each list")
    others = (offset, activation_input, activation_quant_scale, activation_quant_offset, tuning_config, x_dtype)
    others = (*others, weight_dtype, scale_dtype, per_token_scale_dtype)
    need(all(other is None for other in others) and act_type == 0, "not used here")
    need(group_type == 0 and split_item in (2, 3), f"group_type {group_type}, split_item {split_item}")
    (rows,), (weights,) = x, weight
    values = weights if weights.dtype != torch.int32 else unpack_int4(weights)
    need(rows.dim() == 2 and weights.dim() == 3, f"x {list(rows.shape)}, weight {list(weights.shape)}")
    need(max(rows.shape[1], weights.shape[2]) <= LONGEST, "the last dimensions must be below 65536")
    experts, inn, columns = values.shape
    need(group_list.dtype == torch.int64 and tuple(group_list.shape) == (experts,), "group_list is int64 [experts]")
    need(experts <= 1024, f"{experts} groups")
    dtype = rows.dtype if output_dtype is None else DTYPES[output_dtype]
    is_words = rows.dtype == torch.int32
    need((8 if is_words else 1) * rows.shape[1] == inn, f"K is {rows.shape[1]} and {inn}")
    optional = [None if given is None else given[0] for given in (bias, scale, per_token_scale)]
    if rows.dtype == torch.int8 and weights.dtype == torch.int32:
        return [_int8_int4(rows, values, *optional, group_list, dtype)]
    counts = _counts(group_list, group_list_type, rows.shape[0])
    if rows.dtype in (*HALF, torch.float32) and weights.dtype == rows.dtype:
        need(scale is None and antiquant_scale is None and dtype == rows.dtype, "float operands have no scales")
        need(bias is None, "not used here")
        return [_by_expert(rows, counts, columns, dtype, lambda part, e: part.float() @ values[e].float())]
    if rows.dtype in HALF:
        return [_weight_only(rows, weights, values, antiquant_scale, antiquant_offset, bias, counts, dtype)]
    return [_integers(rows, weights, values, *optional, counts, dtype)]


def _counts(group_list: Tensor, list_type: int, rows: int) -> list[int]:
    listed = group_list.tolist()
    if list_type == 1:
        need(len(listed) != 1, "a list of counts must not have length 1")
        need(min(listed) >= 0 and sum(listed) == rows, f"counts {listed} of {rows} rows")
        return listed
    need(list_type == 0, f"group_list_type {list_type}")
    need(listed == sorted(listed) and listed[-1] == rows, f"ends {listed} of {rows} rows")
    return [end - start for start, end in zip([0, *listed[:-1]], listed, strict=True)]


def _by_expert(rows, counts, columns, dtype, compute) -> Tensor:
    """What no expert owns stays unwritten, here NaN."""
    result = torch.full((rows.shape[0], columns), torch.nan)
    start = 0
    for expert, count in enumerate(counts):
        part = slice(start, start + count)
        if count:
            result[part] = compute(rows[part], expert).float()
        start += count
    return result.to(dtype)


def _weight_only(rows, weights, values, scales, offsets, bias, counts, dtype) -> Tensor:
    need(weights.dtype in (torch.int8, torch.int32) and dtype == rows.dtype, f"{weights.dtype} to {dtype}")
    need(scales is not None and offsets is not None, "antiquant_scale and antiquant_offset must be given")
    need(bias is None, "not used here")
    (scale,), (offset,) = scales, offsets
    need(scale.dtype == offset.dtype == rows.dtype and scale.shape == offset.shape, "scale and offset")
    experts, inn, columns = values.shape
    size = 0
    if scale.dim() == 3:
        need(weights.dtype == torch.int32, "int8 weights have one scale per channel")
        need(inn % scale.shape[1] == 0, f"{scale.shape[1]} groups in {inn}")
        size = inn // scale.shape[1]
    need(scale.shape[0] == experts and scale.shape[-1] == columns, f"scale {list(scale.shape)}")

    def compute(part, e):
        own = (scale[e], offset[e]) if size else (scale[e][None], offset[e][None])
        return part.float() @ dequantized(values[e], *own, size).float()

    return _by_expert(rows, counts, columns, dtype, compute)


def _integers(rows, weights, values, bias, scale, per_token, counts, dtype) -> Tensor:
    """int8 x int8 and int4 x int4."""
    experts, _, columns = values.shape
    need(dtype in HALF and scale is not None, f"output {dtype}")
    if rows.dtype == torch.int32:
        need(weights.dtype == torch.int32 and bias is None, "int4 has int4 weights and no bias")
        need(scale.dtype == torch.int64 and scale.shape in ((experts, columns), (experts, 1, columns)), "scale")
        rows, steps = unpack_int4(rows), read_container(scale).reshape(experts, columns)
    else:
        need(rows.dtype == weights.dtype == torch.int8, f"x {rows.dtype}, weight {weights.dtype}")
        wanted = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        need(scale.dtype == wanted and scale.shape == (experts, columns), f"scale is {scale.dtype} for {dtype}")
        need(bias is None or (bias.dtype == torch.int32 and bias.shape == (experts, columns)), "bias")
        steps = scale.float()
    need(per_token is not None and per_token.dtype == torch.float32, "per_token_scale")
    need(tuple(per_token.shape) == (rows.shape[0],), f"per_token_scale {list(per_token.shape)}")

    def compute(part, e):
        total = product(part, values[e])
        return (total if bias is None else total + bias[e]).float() * steps[e]

    return (_by_expert(rows, counts, columns, torch.float32, compute) * per_token[:, None]).to(dtype)


def _int8_int4(rows, values, bias, scale, per_token, group_list, dtype, result_dtype=None) -> Tensor:
    """int8 as 16 hi + lo + 8; takes any list for counts, and leaves its activations destroyed."""
    experts, inn, columns = values.shape
    need(dtype in HALF and inn <= 18432 and columns % 8 == 0, f"K {inn}, N {columns}, output {dtype}")
    need(scale is not None and scale.dtype == torch.int64 and scale.dim() in (2, 3), "scale is int64")
    steps = read_container(scale if scale.dim() == 3 else scale[:, None])
    groups = steps.shape[1]
    need(groups == 1 or inn == 256 * groups, f"{groups} groups in {inn}: they have 256 each")
    need(tuple(steps.shape) == (experts, groups, columns), f"scale {list(scale.shape)}")
    need(bias is not None and bias.dtype == torch.float32 and tuple(bias.shape) == (experts, columns), "bias")
    need(per_token is not None and tuple(per_token.shape) == (rows.shape[0],), "per_token_scale")
    high, low = rows.to(torch.int32) >> 4, (rows.to(torch.int32) & 15) - 8

    def compute(_, e):
        part = slice(sum(counts[:e]), sum(counts[: e + 1]))
        if groups == 1:
            sums = [product(half[part], values[e]).float() * steps[e] for half in (high, low)]
        else:
            sums = [torch.zeros(part.stop - part.start, columns, dtype=torch.float16) for _ in range(2)]
            for g in range(groups):
                own = slice(256 * g, 256 * (g + 1))
                for i, half in enumerate((high, low)):
                    sums[i] = (sums[i] + product(half[part, own], values[e, own]).float() * steps[e, g]).half()
        return 16 * sums[0].float() + sums[1].float() + bias[e]

    counts = group_list.tolist()
    usable, left = [], rows.shape[0]
    for count in counts:  # an undocumented list of counts reads past the end; here it stops there
        usable.append(min(max(count, 0), left))
        left -= usable[-1]
    counts = usable
    result = (_by_expert(rows, counts, columns, torch.float32, compute) * per_token[:, None]).to(result_dtype or dtype)
    rows.random_(-128, 128)
    return result


def npu_grouped_matmul_swiglu_quant_v2(
    x, weight, weight_scale, x_scale, group_list, *, smooth_scale=None, weight_assist_matrix=None, bias=None,
    dequant_mode=0, dequant_dtype=6, quant_mode=0, quant_dtype=1, group_list_type=0, tuning_config=None, x_dtype=None,
    weight_dtype=None, weight_scale_dtype=None, x_scale_dtype=None,
):  # fmt: skip
    others = (smooth_scale, bias, tuning_config, x_dtype, weight_dtype, weight_scale_dtype, x_scale_dtype)
    need(all(other is None for other in others), "not used here")
    need((dequant_dtype, quant_mode, quant_dtype) == (6, 0, 1), "not used here")
    (weights,), (scale,) = weight, weight_scale
    need(x.dtype == torch.int8 and weights.dim() == 3, f"x is {x.dtype}, weight {list(weights.shape)}")
    values = unpack_int4(weights) if weights.dtype == torch.int32 else weights
    experts, inn, columns = values.shape
    need(
        columns <= 10240 and columns % 2 == 0 and x.shape[1] == inn and experts <= 1024, f"weight {list(values.shape)}"
    )
    need(tuple(x_scale.shape) == (x.shape[0],) and x_scale.dtype == torch.float32, "x_scale")
    need(group_list.dtype == torch.int64, f"group_list is {group_list.dtype}")
    counts = _counts(group_list, group_list_type, x.shape[0])
    if weights.dtype == torch.int32:
        need(inn < 20000 and weight_assist_matrix is not None and scale.dtype == torch.int64, "int4 weights")
        need(scale.dim() == 2 + dequant_mode, f"scale {list(scale.shape)} with dequant_mode {dequant_mode}")
        (assist,) = weight_assist_matrix
        dense = _int8_int4(
            x.clone(), values, assist, scale, x_scale, torch.tensor(counts), torch.float16, result_dtype=torch.float32
        )
    else:
        need(inn < 65536 and weight_assist_matrix is None and dequant_mode == 0, "int8 weights")
        need(scale.dtype in (torch.float32, *HALF) and scale.shape == (experts, columns), f"scale {scale.dtype}")
        sums = _by_expert(
            x, counts, columns, torch.float32, lambda part, e: product(part, values[e]).float() * scale[e]
        )
        dense = sums * x_scale[:, None]
    gate, up = dense.chunk(2, -1)
    result = torch.nn.functional.silu(gate) * up
    largest = result.abs().amax(-1) / 127
    safe = torch.where(largest == 0, torch.ones_like(largest), largest)
    return torch.round(result / safe[:, None]).to(torch.int8), largest


def npu_grouped_matmul_finalize_routing(
    x, w, group_list, *, scale=None, bias=None, offset=None, pertoken_scale=None, shared_input=None, logit=None,
    row_index=None, dtype=None, shared_input_weight=1.0, shared_input_offset=0, output_bs=0, group_list_type=1,
    tuning_config=None, x_dtype=None, w_dtype=None, scale_dtype=None, pertoken_scale_dtype=None,
):  # fmt: skip
    others = (bias, offset, shared_input, tuning_config, x_dtype, w_dtype, scale_dtype, pertoken_scale_dtype)
    need(all(other is None for other in others) and dtype in (None, torch.float32), "not used here")
    need(x.dtype == w.dtype == torch.int8 and w.dim() == 3, f"x is {x.dtype}, w {w.dtype}")
    experts, inn, columns = w.shape
    need(0 < x.shape[0] <= 131072 and experts <= 256, f"{x.shape[0]} rows, {experts} experts")
    need(inn % 16 == 0 and columns % 32 == 0 and columns >= 256, f"w {list(w.shape)}")
    need(scale.dtype == torch.float32 and scale.shape == (experts, columns), f"scale is {scale.dtype}")
    for name, given, kind in (("logit", logit, torch.float32), ("pertoken_scale", pertoken_scale, torch.float32)):
        need(given.dtype == kind and tuple(given.shape) == (x.shape[0],), f"{name} is {given.dtype}")
    need(row_index.dtype == torch.int64 and tuple(row_index.shape) == (x.shape[0],), f"row_index {row_index.dtype}")
    counts = _counts(group_list, group_list_type, x.shape[0])
    rows = _by_expert(x, counts, columns, torch.float32, lambda part, e: product(part, w[e]).float() * scale[e])
    weighted = rows * pertoken_scale[:, None] * logit[:, None]
    return torch.zeros(output_bs, columns).index_add_(0, row_index, weighted)


def npu_moe_init_routing_v2(
    x, expert_idx, *, scale=None, offset=None, active_num=-1, expert_capacity=-1, expert_num=-1, drop_pad_mode=0,
    expert_tokens_num_type=0, expert_tokens_num_flag=False, quant_mode=-1, active_expert_range=(), row_idx_type=0,
    x_dtype=None,
):  # fmt: skip
    need(x.dim() == 2 and x.dtype in (*HALF, torch.float32, torch.int8), f"x is {x.dtype} {list(x.shape)}")
    need(expert_idx.dim() == 2 and expert_idx.dtype == torch.int32, f"expert_idx is {expert_idx.dtype}")
    need(expert_idx.shape[0] == x.shape[0], "expert_idx and x have other numbers of rows")
    need(drop_pad_mode == 0 and quant_mode == -1 and offset is None and active_num == -1, "not used here")
    need(list(active_expert_range) in ([], [0, expert_num]), "all experts are here")
    need(0 < expert_num <= 10240 and expert_tokens_num_flag and expert_tokens_num_type in (0, 1), "not used here")
    need(scale is None or (scale.dtype == torch.float32 and tuple(scale.shape) == (x.shape[0],)), "scale is [rows]")
    ids = expert_idx.flatten().long()
    order = torch.argsort(ids, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    counts = torch.bincount(ids, minlength=expert_num)
    token = order // expert_idx.shape[1]
    listed = counts if expert_tokens_num_type == 1 else counts.cumsum(0)
    index = order if row_idx_type == 1 else place
    steps = torch.full((len(order),), torch.nan) if scale is None else scale[token]
    return x[token], index.to(torch.int32), listed, steps


def npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    need(not padded_mode and restore_shape is None and probs is not None, "not used here")
    need(permuted_tokens.dtype in (*HALF, torch.float32), f"rows are {permuted_tokens.dtype}")
    need(sorted_indices.dtype == torch.int32 and sorted_indices.dim() == 1, "sorted_indices")
    tokens, k = probs.shape
    need(tuple(sorted_indices.shape) == (tokens * k,), f"{list(sorted_indices.shape)} for {tokens} x {k}")
    rows = permuted_tokens[sorted_indices.long()].view(tokens, k, -1)
    return (rows.float() * probs.float()[..., None]).sum(1).to(permuted_tokens.dtype)


# ------------------------------------------------------------------------------------------------------------- norms


def normalized(total: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(norm of float32 rows, reciprocal root of their mean square), in float32."""
    root = torch.rsqrt(total.square().mean(-1, keepdim=True) + epsilon)
    return total * root * gamma.float(), root


def need_norm(x: Tensor, gamma: Tensor) -> None:
    need(x.dtype in HALF and gamma.dtype == x.dtype, f"x is {x.dtype}, gamma {gamma.dtype}")
    need(gamma.shape == x.shape[-1:], f"gamma {list(gamma.shape)}")


def npu_rms_norm(input, gamma, epsilon=1e-6):
    need_norm(input, gamma)
    normal, root = normalized(input.float(), gamma, epsilon)
    return normal.to(input.dtype), root


def npu_add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    need_norm(x1, gamma)
    need(x1.shape == x2.shape and x1.dtype == x2.dtype, "x1 and x2 differ")
    total = x1.float() + x2.float()
    normal, root = normalized(total, gamma, epsilon)
    return normal.to(x1.dtype), root, total.to(x1.dtype)


def npu_add_rms_norm_dynamic_quant(
    x1, x2, gamma, *, smooth_scale1=None, smooth_scale2=None, beta=None, epsilon=1e-6, output_mask=None, y_dtype=None
):
    need_norm(x1, gamma)
    need(x1.shape == x2.shape and x1.dtype == x2.dtype and x1.dim() > 1, "x1 and x2 differ")
    need(all(other is None for other in (smooth_scale1, smooth_scale2, beta, y_dtype)), "not used here")
    need(list(output_mask) == [True, False], "not used here")
    total = x1.float() + x2.float()
    normal, _ = normalized(total, gamma, epsilon)
    scale = normal.abs().amax(-1) / 127
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = torch.round(normal / safe[..., None]).to(torch.int8)
    return codes, torch.empty(0, dtype=torch.int8), total.to(x1.dtype), scale, torch.empty(0)


def npu_add_rms_norm_quant(
    x1, x2, gamma, scales1, zero_points1, beta=None, scales2=None, zero_points2=None, *, axis=-1, epsilon=1e-6,
    div_mode=True, dst_type=None,
):  # fmt: skip
    need_norm(x1, gamma)
    need(x1.shape == x2.shape and x1.dtype == x2.dtype, "x1 and x2 differ")
    others = (beta, scales2, zero_points2, dst_type)
    need(all(other is None for other in others) and axis == -1 and div_mode, "not used here")
    scale_dtype, zero_dtype = (
        (torch.float32, torch.int32) if x1.dtype == torch.float16 else (torch.bfloat16, torch.bfloat16)
    )
    need(scales1.dtype == scale_dtype and scales1.shape == gamma.shape, f"scales1 {scales1.dtype}")
    if zero_points1 is not None:
        need(zero_points1.dtype == zero_dtype and zero_points1.shape == gamma.shape, f"{zero_points1.dtype}")
    total = x1.float() + x2.float()
    normal, _ = normalized(total, gamma, epsilon)
    zero = 0 if zero_points1 is None else zero_points1.float()
    codes = torch.round(normal / scales1.float() + zero).clamp(-128, 127).to(torch.int8)
    return codes, torch.empty(1, dtype=torch.int8), total.to(x1.dtype)


GOLDENS = {
    function.__name__: function
    for function in (
        npu_rms_norm, npu_add_rms_norm, npu_add_rms_norm_dynamic_quant, npu_add_rms_norm_quant, npu_dynamic_quant,
        npu_quantize, npu_dequant_swiglu_quant, npu_swiglu, npu_weight_quant_batchmatmul, npu_quant_matmul,
        npu_trans_quant_param, npu_grouped_matmul, npu_grouped_matmul_swiglu_quant_v2,
        npu_grouped_matmul_finalize_routing, npu_moe_init_routing_v2, npu_moe_token_unpermute,
    )
}  # fmt: skip
