"""torch_npu's operators without torch_npu: its schemas, shapes for tracing, and the goldens on the CPU.

``define()`` registers them once per process, or the goldens alone where torch_npu is imported. A call that does not fit
its schema (a name, an order, a keyword, a type) fails in the dispatcher, and one that does not fit its contract in
the golden.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from npu_goldens import DTYPES, GOLDENS
from torch import Tensor

SCHEMAS = Path(__file__).parent / "npu_schemas.txt"


def schemas() -> dict[str, str]:
    """Every schema of torch_npu 2.13.0 that is checked here, by the operator's name."""
    lines = SCHEMAS.read_text().splitlines()
    return {line.partition("(")[0].removeprefix("npu::"): line.removeprefix("npu::") for line in lines}


def _words(columns: int, dst_type: int | None) -> tuple[int, torch.dtype]:
    return (columns // 8, torch.int32) if dst_type == 16 else (columns, torch.int8)


def _dynamic_quant(input, *, dst_type=None, **_):
    columns, dtype = _words(input.shape[-1], dst_type)
    return (
        input.new_empty((*input.shape[:-1], columns), dtype=dtype),
        input.new_empty(input.shape[:-1], dtype=torch.float32),
    )


def _columns(weight: Tensor) -> int:
    return weight.shape[-1] * (8 if weight.dtype == torch.int32 else 1)


def _grouped_matmul(x, weight, *, output_dtype=None, **_):
    dtype = x[0].dtype if output_dtype is None else DTYPES[output_dtype]
    return [x[0].new_empty((x[0].shape[0], _columns(weight[0])), dtype=dtype)]


def _routing(x, expert_idx, *, expert_num=-1, **_):
    rows = expert_idx.shape[0] * expert_idx.shape[1]
    return (
        x.new_empty((rows, x.shape[1])), x.new_empty((rows,), dtype=torch.int32),
        x.new_empty((expert_num,), dtype=torch.int64), x.new_empty((rows,), dtype=torch.float32),
    )  # fmt: skip


def _root(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _norm_dynamic_quant(x1, x2, gamma, **_):
    codes, scale = torch.empty_like(x1, dtype=torch.int8), x1.new_empty(x1.shape[:-1], dtype=torch.float32)
    nothing = x1.new_empty((0,), dtype=torch.float32)
    return codes, nothing.to(torch.int8), torch.empty_like(x1), scale, nothing


def _swiglu_quant(x, weight, weight_scale, *_, **__):
    columns = weight_scale[0].shape[-1] // 2
    return x.new_empty((x.shape[0], columns)), x.new_empty((x.shape[0],), dtype=torch.float32)


FAKES = {
    "npu_grouped_matmul_swiglu_quant_v2": _swiglu_quant,
    "npu_grouped_matmul_finalize_routing": lambda x, w, *_, output_bs=0, **__: x.new_empty(
        (output_bs or x.shape[0], w.shape[-1]), dtype=torch.float32
    ),
    "npu_rms_norm": lambda x, *_: (torch.empty_like(x), _root(x)),
    "npu_add_rms_norm": lambda x, *_: (torch.empty_like(x), _root(x), torch.empty_like(x)),
    "npu_add_rms_norm_dynamic_quant": _norm_dynamic_quant,
    "npu_add_rms_norm_quant": lambda x, *_, **__: (
        torch.empty_like(x, dtype=torch.int8), x.new_empty((1,), dtype=torch.int8), torch.empty_like(x)
    ),
    "npu_dynamic_quant": _dynamic_quant,
    "npu_quantize": lambda input, *_: input.new_empty(input.shape, dtype=torch.int8),
    "npu_dequant_swiglu_quant": lambda x, **_: (
        x.new_empty((x.shape[0], x.shape[1] // 2), dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)
    ),
    "npu_swiglu": lambda x, dim=-1: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
    "npu_weight_quant_batchmatmul": lambda x, weight, *_, **__: x.new_empty((x.shape[0], _columns(weight))),
    "npu_quant_matmul": lambda x, weight, *_, output_dtype=None, **__: x.new_empty(
        (x.shape[0], _columns(weight)), dtype=DTYPES[output_dtype]
    ),
    "npu_trans_quant_param": lambda scale, *_, **__: scale.new_empty(scale.shape, dtype=torch.int64),
    "npu_grouped_matmul": _grouped_matmul,
    "npu_moe_init_routing_v2": _routing,
    "npu_moe_token_unpermute": lambda rows, indices, probs, *_, **__: rows.new_empty((probs.shape[0], rows.shape[1])),
}  # fmt: skip


@functools.cache
def define() -> torch.library.Library:
    """Register the goldens as the operators' CPU kernels, under torch_npu's schemas and shapes where it is imported."""
    if "torch_npu" in sys.modules:
        library = torch.library.Library("npu", "IMPL")
        for name, golden in GOLDENS.items():
            library.impl(name, golden, "CPU")
        return library
    library = torch.library.Library("npu", "DEF")
    for name, schema in schemas().items():
        if name in GOLDENS:
            library.define(schema)
            library.impl(name, GOLDENS[name], "CPU")
            torch.library.register_fake(f"npu::{name}", FAKES[name], lib=library)
    return library
