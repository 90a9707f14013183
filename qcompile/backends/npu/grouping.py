"""Rows and experts: how an operation is told which rows belong to which expert, and where a row came from.

Both are types here and never bare tensors and integers, because Ascend has two conventions for each, the operations do
not check which one they are given, and the wrong one gives plausible numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from .layouts import TORCH_NUMBERS


@dataclass(frozen=True)
class Ends:
    """Where the rows of each expert end: int64 [experts], never decreasing (``group_list_type`` 0)."""

    values: Tensor
    list_type: ClassVar[int] = 0

    def ends(self) -> Ends:
        """Itself."""
        return self

    def counts(self) -> Counts:
        """The same as counts."""
        return Counts(torch.diff(self.values, prepend=torch.zeros_like(self.values[:1])))


@dataclass(frozen=True)
class Counts:
    """How many rows each expert has: int64 [experts] (``group_list_type`` 1)."""

    values: Tensor
    list_type: ClassVar[int] = 1

    def ends(self) -> Ends:
        """The same as ends."""
        return Ends(torch.cumsum(self.values, 0))

    def counts(self) -> Counts:
        """Itself."""
        return self


Groups = Ends | Counts


def owners(groups: Groups, rows: int) -> Tensor:
    """The expert of each row, int64 [rows]."""
    ends = groups.ends().values
    return torch.searchsorted(ends, torch.arange(rows, device=ends.device), right=True)


def grouped_matmul(x: Tensor, weight: Tensor, groups: Groups, dtype: torch.dtype, **lists: Tensor | None) -> Tensor:
    """npu_grouped_matmul of rows sorted by expert with one weight tensor [experts, in, out]: [rows, out] in ``dtype``.

    ``lists`` are its other operands, one tensor each; those that are None are left out. With one expert the list is
    passed as ends, which are the same number: counts must not have length 1.
    """
    list_type = groups.list_type if weight.shape[0] > 1 else Ends.list_type
    given = {name: [tensor] for name, tensor in lists.items() if tensor is not None}
    (result,) = torch.ops.npu.npu_grouped_matmul.default(
        [x], [weight], group_list=groups.values, split_item=2, group_type=0, group_list_type=list_type,
        output_dtype=TORCH_NUMBERS[dtype], **given,
    )  # fmt: skip
    return result


def swiglu_quantized(
    codes: Tensor,
    weight: Tensor,
    scales: Tensor,
    token_scale: Tensor,
    groups: Counts,
    assist: Tensor | None = None,
    dequant_mode: int = 0,
) -> list[Tensor]:
    """npu_grouped_matmul_swiglu_quant_v2: [int8 codes [rows, out / 2], scale [rows, 1]] of silu(gate) * up.

    dequant_mode: 0 for one scale per channel, 1 for groups.
    """
    codes, scale = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2.default(
        codes, [weight], [scales], token_scale.reshape(-1), groups.values, dequant_mode=dequant_mode,
        weight_assist_matrix=None if assist is None else [assist], group_list_type=groups.list_type,
    )  # fmt: skip
    return [codes, scale[:, None]]


@dataclass(frozen=True)
class Pairs:
    """``pair[r]`` is the token and slot ``i * k + j`` of sorted row r: int32 [tokens * k] (``row_idx_type`` 1)."""

    pair: Tensor
    index_type: ClassVar[int] = 1


@dataclass(frozen=True)
class RowMajor:
    """``place[i * k + j]`` is the sorted row of token i's j-th expert: int32 [tokens * k] (``row_idx_type`` 0).

    What npu_moe_init_routing_v2 makes and npu_moe_token_unpermute reads. (npu_moe_init_routing and
    npu_moe_finalize_routing in its default mode count ``j * tokens + i``; nothing here uses them.)
    """

    place: Tensor
    index_type: ClassVar[int] = 0

    def combine(self, rows: Tensor, routing: Tensor) -> Tensor:
        """The weighted sum of each token's rows: [tokens * k, hidden] -> [tokens, hidden]."""
        return torch.ops.npu.npu_moe_token_unpermute.default(rows, self.place, routing)


Index = TypeVar("Index", RowMajor, Pairs)


def send(x: Sequence[Tensor], ids: Tensor, experts: int, index: type[Index]) -> tuple[list[Tensor], Counts, Index]:
    """Copy each token to its experts, sorted by expert; says where each went, or where each came from.

    x: [float [tokens, hidden]], or [codes, scale [tokens, 1]] with codes int8 or int4 words; ids: [tokens, k].
    """
    values, *scale = x
    is_words = values.dtype == torch.int32
    rows, place, counts, scales = torch.ops.npu.npu_moe_init_routing_v2.default(
        values.view(torch.int8) if is_words else values, ids.to(torch.int32),
        scale=scale[0].reshape(-1) if scale else None, active_num=-1, expert_num=experts, expert_tokens_num_type=1,
        expert_tokens_num_flag=True, quant_mode=-1, active_expert_range=[0, experts],
        row_idx_type=index.index_type,
    )  # fmt: skip
    rows = rows.view(torch.int32) if is_words else rows
    return [rows, scales[:, None]] if scale else [rows], Counts(counts), index(place)
