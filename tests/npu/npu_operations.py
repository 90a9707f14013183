"""torch_npu's own operations behind their aclnn calls: the goldens, which also refuse what is outside of the contract.

torch_npu chooses which aclnn operation an ``npu::`` one becomes. Arguments that qcompile never passes must be missing.
"""

from __future__ import annotations

import npu_goldens as goldens
import torch
from pretend import FRACTAL_NZ, NUMBERS, TYPES, Operand, aclnn, to_nz

SCHEMA_NUMBERS = {dtype: number for number, dtype in goldens.DTYPES.items()}  # how npu:: schemas write a dtype


def schema_number(dtype: torch.dtype) -> int:
    return SCHEMA_NUMBERS[dtype]


def absent(*arguments: object) -> None:
    goldens.need(all(argument is None or argument == [] for argument in arguments), "an argument that is not used here")


# --------------------------------------------------------------------------------------------------------- formats


@aclnn("TransData", "x:operand to:operand")
@aclnn("Identity", "x:operand to:operand")
def format_cast(x: Operand, to: Operand) -> None:
    """What npu_format_cast, and copies to the host, become."""
    if to.format == FRACTAL_NZ:
        to_nz(x.values, to.stored)
    else:
        to.values.copy_(x.values)


# ---------------------------------------------------------------------------------------------------- quantization


@aclnn("DynamicQuantV2", "x smooth? group_index? dtype:int > y scale offset?")
def dynamic_quant(x, smooth, group_index, dtype):
    number = {NUMBERS[torch.int8]: 1, 3: 16, 29: 16}[dtype]  # 29 is int4, eight of which are an int32
    return goldens.npu_dynamic_quant(x, smooth_scales=smooth, group_index=group_index, dst_type=number)


@aclnn("Quantize", "x scales zero_points? dtype:int axis:int > y")
def quantize(x, scales, zero_points, dtype, axis):
    goldens.need(TYPES[dtype] is torch.int8, f"dtype {dtype}")
    return goldens.npu_quantize(x, scales, zero_points, schema_number(torch.qint8), axis)


@aclnn("DequantSwigluQuantV2", "x weight_scale? activation_scale? bias? quant_scale? quant_offset? group_index? "
       "left:bool mode:text dtype:int round:text dim:int swiglu_mode:int limit:double alpha:double shift:double "
       "> y scale")  # fmt: skip
def dequant_swiglu_quant(
    x, weight_scale, activation_scale, bias, quant_scale, quant_offset, group_index, left, mode, dtype, rounding, dim,
    swiglu_mode, limit, alpha, shift,
):  # fmt: skip
    goldens.need((mode, rounding, dim, TYPES[dtype]) == ("dynamic", "rint", -1, torch.int8), f"{mode} {rounding} {dim}")
    return goldens.npu_dequant_swiglu_quant(
        x, weight_scale=weight_scale, activation_scale=activation_scale, bias=bias, quant_scale=quant_scale,
        quant_offset=quant_offset, group_index=group_index, activate_left=left, quant_mode=1, swiglu_mode=swiglu_mode,
        clamp_limit=limit, glu_alpha=alpha, glu_bias=shift,
    )  # fmt: skip


@aclnn("SwiGlu", "x dim:int > y")
def swiglu(x, dim):
    return goldens.npu_swiglu(x, dim)


# -------------------------------------------------------------------------------------------------------- products


@aclnn("WeightQuantBatchMatmulV2",
       "x weight scale offset? quant_scale? quant_offset? bias? group_size:int > y")  # fmt: skip
def weight_quant_batchmatmul(x, weight, scale, offset, quant_scale, quant_offset, bias, group_size):
    return goldens.npu_weight_quant_batchmatmul(
        x, weight, scale, offset, quant_scale, quant_offset, bias, antiquant_group_size=group_size
    )


def quant_matmul(
    x1, x2, token_scale, scale, y_scale, x1_offset, x2_offset, y_offset, bias, transpose1, transpose2, group_size, y
):
    absent(y_scale, *(None if t is None or not t.numel() else t for t in (x1_offset, x2_offset, y_offset)))
    goldens.need(not transpose1 and not transpose2 and group_size == 0, "not used here")
    return goldens.npu_quant_matmul(
        x1, x2, scale, pertoken_scale=token_scale, bias=bias, output_dtype=schema_number(y.dtype)
    )


QUANT_MATMUL = (
    "x1 x2 token_scale? scale y_scale? x1_offset? x2_offset? y_offset? bias? transpose1:bool transpose2:bool "
    "group_size:int y:out"
)
aclnn("QuantMatmulV5", QUANT_MATMUL)(quant_matmul)
aclnn("QuantMatmulWeightNz", QUANT_MATMUL)(quant_matmul)


def grouped_matmul(
    x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token_scale, group_list, activation_input,
    activation_scale, activation_offset, split_item, group_type, group_list_type, act_type, tuning, y,
):  # fmt: skip
    absent(offset, activation_input, activation_scale, activation_offset, tuning)
    goldens.need(act_type == 0, f"activation {act_type}")
    return goldens.npu_grouped_matmul(
        x, weight, bias=bias, scale=scale, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset,
        per_token_scale=per_token_scale, group_list=group_list, split_item=split_item, group_type=group_type,
        group_list_type=group_list_type, output_dtype=schema_number(y[0].dtype),
    )[0]  # fmt: skip


GROUPED = (
    "x:list weight:list bias:list scale:list offset:list antiquant_scale:list antiquant_offset:list "
    "per_token_scale:list group_list activation_input:list activation_scale:list activation_offset:list "
    "split_item:int group_type:int group_list_type:int act_type:int tuning:ints"
)


@aclnn("GroupedMatmulV5", f"{GROUPED} y:outs")
def grouped_matmul_nd(*arguments):
    return grouped_matmul(*arguments)


@aclnn("GroupedMatmulWeightNz", f"{GROUPED} group_size:int y:outs")
def grouped_matmul_nz(*arguments):
    """torch_npu passes 256 for a group size that only asymmetric weights need."""
    *before, _, y = arguments
    return grouped_matmul(*before, y)


@aclnn("GroupedMatmulSwigluQuantWeightNzV2",
       "x weight:list scale:list assist:list bias? x_scale smooth? group_list dequant_mode:int dequant_dtype:int "
       "quant_mode:int group_list_type:int tuning:ints > y y_scale")  # fmt: skip
def grouped_matmul_swiglu_quant(
    x, weight, scale, assist, bias, x_scale, smooth, group_list, dequant_mode, dequant_dtype, quant_mode,
    group_list_type, tuning,
):  # fmt: skip
    absent(bias, smooth, tuning)
    return goldens.npu_grouped_matmul_swiglu_quant_v2(
        x, weight, scale, x_scale, group_list, weight_assist_matrix=assist, dequant_mode=dequant_mode,
        dequant_dtype=schema_number(TYPES[dequant_dtype]), quant_mode=quant_mode, group_list_type=group_list_type,
    )  # fmt: skip


@aclnn("GroupedMatmulFinalizeRoutingWeightNzV2",
       "x w scale bias? offset? antiquant_scale? antiquant_offset? token_scale group_list shared_input? logit "
       "row_index dtype:int shared_weight:float shared_offset:int transpose_x:bool transpose_w:bool "
       "group_list_type:int tuning:ints y:out")  # fmt: skip
def grouped_matmul_finalize_routing(
    x, w, scale, bias, offset, antiquant_scale, antiquant_offset, token_scale, group_list, shared_input, logit,
    row_index, dtype, shared_weight, shared_offset, transpose_x, transpose_w, group_list_type, tuning, y,
):  # fmt: skip
    absent(bias, offset, antiquant_scale, antiquant_offset, shared_input, tuning)
    goldens.need(not transpose_x and not transpose_w and dtype == 0, "not used here")
    return goldens.npu_grouped_matmul_finalize_routing(
        x, w, group_list, scale=scale, pertoken_scale=token_scale, logit=logit, row_index=row_index,
        output_bs=y.shape[0], group_list_type=group_list_type,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- routing


@aclnn("MoeInitRoutingV3",
       "x expert_idx scale? offset? active_num:int capacity:int expert_num:int drop_pad:int counts_type:int "
       "counts_flag:bool quant_mode:int expert_range:ints index_type:int > rows index counts row_scale")  # fmt: skip
def moe_init_routing(
    x, expert_idx, scale, offset, active_num, capacity, expert_num, drop_pad, counts_type, counts_flag, quant_mode,
    expert_range, index_type,
):  # fmt: skip
    rows, index, counts, row_scale = goldens.npu_moe_init_routing_v2(
        x, expert_idx, scale=scale, offset=offset, active_num=active_num, expert_capacity=capacity,
        expert_num=expert_num, drop_pad_mode=drop_pad, expert_tokens_num_type=counts_type,
        expert_tokens_num_flag=counts_flag, quant_mode=quant_mode, active_expert_range=expert_range,
        row_idx_type=index_type,
    )  # fmt: skip
    return rows, index, counts, row_scale


@aclnn("MoeTokenUnpermute", "rows index probs? padded:bool restore_shape:ints > y")
def moe_token_unpermute(rows, index, probs, padded, restore_shape):
    goldens.need(restore_shape in (None, [1]), "not used here")
    return goldens.npu_moe_token_unpermute(rows, index, probs, padded)


# ----------------------------------------------------------------------------------------------------------- norms


@aclnn("RmsNorm", "x gamma epsilon:double > y root")
def rms_norm(x, gamma, epsilon):
    return goldens.npu_rms_norm(x, gamma, epsilon)


@aclnn("AddRmsNorm", "x1 x2 gamma epsilon:double > y root total")
def add_rms_norm(x1, x2, gamma, epsilon):
    return goldens.npu_add_rms_norm(x1, x2, gamma, epsilon)


@aclnn("AddRmsNormDynamicQuantV2",
       "x1 x2 gamma smooth1? smooth2? beta? epsilon:double mask:bools > y1 y2 total scale1 scale2")  # fmt: skip
def add_rms_norm_dynamic_quant(x1, x2, gamma, smooth1, smooth2, beta, epsilon, mask):
    absent(smooth1, smooth2, beta)
    y, _, total, scale, _ = goldens.npu_add_rms_norm_dynamic_quant(x1, x2, gamma, epsilon=epsilon, output_mask=mask)
    return y, None, total, scale, None


@aclnn("AddRmsNormQuantV2",
       "x1 x2 gamma scale1 scale2? zero1? zero2? beta? axis:int epsilon:double divides:bool > y1 y2 total")  # fmt: skip
def add_rms_norm_quant(x1, x2, gamma, scale1, scale2, zero1, zero2, beta, axis, epsilon, divides):
    y, _, total = goldens.npu_add_rms_norm_quant(
        x1, x2, gamma, scale1, zero1, beta, scale2, zero2, axis=axis, epsilon=epsilon, div_mode=divides
    )
    return y, None, total
