"""The documented constraints of Ascend's operations, each a predicate on (site, scheme) that says why not.

Sources: op-plugin's pages of npu_weight_quant_batchmatmul, npu_quant_matmul, npu_grouped_matmul and npu_dynamic_quant,
and the checks of aclnnGroupedMatmul. A constraint that fires at the first forward is what users of other systems
complain about most; here it is an answer of the plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ...types import Scheme, Site
from .chips import current

LONGEST = 65535  # of K and N of npu_weight_quant_batchmatmul, and of the last dimensions of the others
MOST_EXPERTS = 1024  # groups of npu_grouped_matmul with one weight tensor
LONGEST_INT8_INT4 = 18432  # K of npu_grouped_matmul with int8 activations and int4 weights
INT8_INT4_GROUP = 256  # its only group size


class Rule(Protocol):
    """A constraint: why it is violated, "" when it holds."""

    def __call__(self, site: Site, scheme: Scheme) -> str: ...


def violations(rules: Iterable[Rule], site: Site, scheme: Scheme) -> str:
    """Every reason, joined."""
    return "; ".join(reason for rule in rules if (reason := rule(site, scheme)))


def group_of(site: Site, scheme: Scheme) -> int:
    """The group size as the operations count it: 0 for one scale per channel, however that is written.

    A group as long as a row (or a stored ``group_size`` of -1) is no group: the operations want 0 for it.
    """
    size = scheme.weight.group_size
    return 0 if size is None or size >= site.in_features else size


def chip_has(*operations: str) -> Rule:
    """The chip that is planned for has these operations."""

    def rule(site: Site, scheme: Scheme) -> str:
        missing = [name for name in operations if name not in current().soc.operations]
        return f"{' and '.join(missing)} is not documented for {current().soc.name}" if missing else ""

    return rule


def half_precision(site: Site, scheme: Scheme) -> str:
    """Activations have a 16-bit type of the chip."""
    allowed = current().soc.dtypes
    if site.dtype in allowed:
        return ""
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    return f"{current().soc.name} computes it in {names}, not {str(site.dtype).removeprefix('torch.')}"


def within_limits(site: Site, scheme: Scheme) -> str:
    """No dimension of the weight is too long."""
    longest = max(site.in_features, site.out_features)
    if longest > LONGEST:
        return f"{longest} features are more than {LONGEST}"
    if site.experts > MOST_EXPERTS:
        return f"{site.experts} experts are more than {MOST_EXPERTS}"
    return ""


def groups_of_32(site: Site, scheme: Scheme) -> str:
    """Weight-only groups: multiples of 32; those of experts have no short last one."""
    group = group_of(site, scheme)
    if group % 32:
        return f"group size {group} is not a multiple of 32"
    if site.experts and group and site.in_features % group:
        return f"{site.in_features} input features are not whole groups of {group}, as npu_grouped_matmul wants them"
    return ""


def channels_for_experts(site: Site, scheme: Scheme) -> str:
    """npu_grouped_matmul takes int8 weights with one scale per channel only."""
    if site.experts and group_of(site, scheme):
        return f"npu_grouped_matmul has no int8 weights in groups (of {group_of(site, scheme)})"
    return ""


def one_scale_per_channel(site: Site, scheme: Scheme) -> str:
    """Integer products are scaled when they are complete."""
    group = group_of(site, scheme)
    return f"it has one scale per output channel, not groups of {group}" if group else ""


def whole_int4_outputs(site: Site, scheme: Scheme) -> str:
    """Eight int4 columns are one int32 word."""
    return f"{site.out_features} output features are not a multiple of 8" if site.out_features % 8 else ""


def more_than_one_word(site: Site, scheme: Scheme) -> str:
    """torch_npu takes a weight of one int32 word for a transposed one, and its result for one of one column."""
    return "a weight of one int32 word" if site.in_features == 1 and site.out_features == 8 else ""


def whole_int4_inputs(site: Site, scheme: Scheme) -> str:
    """Eight int4 activations are one int32 word."""
    return f"{site.in_features} input features are not a multiple of 8" if site.in_features % 8 else ""


def int8_int4_groups(site: Site, scheme: Scheme) -> str:
    """int8 times int4: per channel, or groups of 256 that end with the row."""
    group = group_of(site, scheme)
    if group and (group != INT8_INT4_GROUP or site.in_features % group):
        return f"it has one scale per output channel or whole groups of {INT8_INT4_GROUP}, not groups of {group}"
    return ""


def int8_int4_inputs(site: Site, scheme: Scheme) -> str:
    """int8 times int4: K."""
    if site.in_features > LONGEST_INT8_INT4:
        return f"{site.in_features} input features are more than {LONGEST_INT8_INT4}"
    return ""


def integer_weight(site: Site, scheme: Scheme) -> str:
    """Weights are integers, whose zero points and scales any chip can apply."""
    number = scheme.weight.number
    return "" if number == "int" else f"computes integer weights; {number} ones need the operations of Ascend950"


def symmetric_weight(site: Site, scheme: Scheme) -> str:
    """Integer products have no zero points of the weight."""
    return "" if scheme.weight.symmetric else "it has no zero points of the weight"


def no_token_zeros(site: Site, scheme: Scheme) -> str:
    """Nor one per token."""
    activation = scheme.activation
    asymmetric = activation is not None and activation.dynamic and not activation.symmetric
    return "it has no zero point per token" if asymmetric else ""


MOST_FUSED_OUTPUTS = 10240  # N of npu_grouped_matmul_swiglu_quant_v2
FUSED_INPUTS = {8: 65535, 4: 19999}  # its longest K, by bits of the weight
FEWEST_SUMMED_OUTPUTS, MOST_SUMMED_EXPERTS, MOST_SUMMED_ROWS = (
    256,
    256,
    131072,
)  # of npu_grouped_matmul_finalize_routing


def swiglu_fits(inputs: int, outputs: int, bits: int) -> bool:
    """Whether npu_grouped_matmul_swiglu_quant_v2 takes a weight of these sizes."""
    return outputs <= MOST_FUSED_OUTPUTS and inputs <= FUSED_INPUTS[bits]


def sum_fits(experts: int, outputs: int, rows: int) -> bool:
    """Whether npu_grouped_matmul_finalize_routing takes a weight and a number of rows of these sizes."""
    return experts <= MOST_SUMMED_EXPERTS and outputs >= FEWEST_SUMMED_OUTPUTS and 0 < rows <= MOST_SUMMED_ROWS


def nz_is_wanted(site: Site, scheme: Scheme) -> str:
    """FRACTAL_NZ is not switched off."""
    return "" if current().nz else "FRACTAL_NZ is switched off"


def nz_aligned(columns: int) -> Rule:
    """FRACTAL_NZ has whole fractals: 16 input features, and 32 bytes of output features."""

    def rule(site: Site, scheme: Scheme) -> str:
        for size, multiple, what in ((site.in_features, 16, "input"), (site.out_features, columns, "output")):
            if size % multiple:
                return f"{size} {what} features are not a multiple of {multiple}, as FRACTAL_NZ has them"
        return ""

    return rule
