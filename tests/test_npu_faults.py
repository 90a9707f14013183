"""One test for each fault that was found in other systems' NPU paths, named after it.

Checkpoint tensors are packed here by their descriptions, read by qcompile's formats, and computed with by Ascend's
operations; what must come out is the product with the weight that the checkpoint means.
"""

import dataclasses

import pytest
import torch
from npu_cases import COUNT, Layer, assert_as_defined, experts_site, linear_site, packed_weight, quantized, routed
from npu_library import define
from stored import described

from qcompile import numerics, plugins
from qcompile.backends.npu import BACKEND, layouts
from qcompile.kernels import choose
from qcompile.types import PackedWeight, Scheme

define()

OUT, INN, GROUP = 64, 256, 64
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # in which nibble of a word AWQ stores column i


def words(values: torch.Tensor, order=range(8)) -> torch.Tensor:
    """Unsigned 4-bit numbers [..., 8 n] as int32 words: number i of each eight in nibble ``order[i]``."""
    eights = values.to(torch.int64).unflatten(-1, (-1, 8))
    packed = sum(eights[..., i] << (4 * nibble) for i, nibble in enumerate(order))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def random_linear(groups=INN // GROUP):
    """Codes [in, out], zero points and scales [groups, out], and the weight [in, out] that they mean."""
    codes, zeros = torch.randint(0, 16, (INN, OUT)), torch.randint(1, 16, (groups, OUT))
    scales = (torch.rand(groups, OUT) * 0.1 + 0.01).half()
    spread = INN // groups
    return (
        codes,
        zeros,
        scales,
        (codes - zeros.repeat_interleave(spread, 0)) * scales.double().repeat_interleave(spread, 0),
    )


def read(format: str, tensors: dict[str, torch.Tensor], **section) -> PackedWeight:
    reader = plugins.find("formats", format)
    named = {f"m.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    (site,) = described(reader, named, (OUT, INN), {"bits": 4, **section})
    return reader.read(site, named.__getitem__)


def read_gptq(codes, zeros, scales, version=1, group=GROUP, g_idx=None, **section):
    tensors = {
        "qweight": words(codes.t()).t(), "qzeros": words((zeros - int(version == 1)) & 15), "scales": scales,
        "g_idx": torch.arange(INN, dtype=torch.int32) // (INN if group == -1 else group) if g_idx is None else g_idx,
    }  # fmt: skip
    return read(
        "gptq" if version == 1 else "gptq_v2", tensors, quant_method="gptq", group_size=group,
        checkpoint_format="gptq" if version == 1 else "gptq_v2", **{"sym": False, "desc_act": False, **section},
    )  # fmt: skip


def read_awq(codes, zeros, scales):
    tensors = {"qweight": words(codes, AWQ_ORDER), "qzeros": words(zeros, AWQ_ORDER), "scales": scales}
    return read("awq", tensors, quant_method="awq", group_size=GROUP, zero_point=True, version="gemm")


def computed(packed: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    """x @ W.T by the kernel that is chosen for a Linear of float16."""
    kernel, why = choose(BACKEND, linear_site(*packed.shape, torch.float16), packed.scheme)
    assert kernel is BACKEND.kernel("weight_int4"), why
    return kernel.linear(x, kernel.prepare(packed), None, packed.scheme, OUT)


def close(actual, expected) -> bool:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item() < 2e-3


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_asymmetric_zero_points_have_the_wrong_sign(version):
    """SGLang passes z - 8 as the offset, which the operation adds: only symmetric checkpoints are right."""
    codes, zeros, scales, weight = random_linear()
    packed, x = read_gptq(codes, zeros, scales, version), torch.randn(4, INN).half()
    assert close(computed(packed, x), x.double() @ weight)
    _, stored_scales, offsets = BACKEND.kernel("weight_int4").prepare(packed)
    assert torch.equal(offsets.long(), 8 - zeros)
    assert torch.equal(stored_scales, scales)


def test_gptq_versions_differ_by_one_in_what_they_store():
    """z = 8, 5 and 1 are stored as 7, 4 and 0 by version 1: the offsets are 0, 3 and 7 either way."""
    codes, _, scales, _ = random_linear()
    zeros = torch.tensor([8, 5, 1, 9]).repeat(OUT // 4).expand(INN // GROUP, OUT).contiguous()
    offsets = [
        BACKEND.kernel("weight_int4").prepare(read_gptq(codes, zeros, scales, version))[2][0, :4].tolist()
        for version in (1, 2)
    ]
    assert offsets == [[0, 3, 7, -1]] * 2


def test_group_size_minus_one_is_passed_through(monkeypatch):
    """It means one group per column, which the operation knows as 0; so does a group as long as a row."""
    codes, zeros, scales, weight = random_linear(groups=1)
    x, seen = torch.randn(4, INN).half(), []
    operation = torch.ops.npu.npu_weight_quant_batchmatmul.default
    monkeypatch.setattr(
        torch.ops.npu.npu_weight_quant_batchmatmul, "default",
        lambda *arguments: seen.append(arguments[7]) or operation(*arguments),
    )  # fmt: skip
    assert close(computed(read_gptq(codes, zeros, scales, group=-1), x), x.double() @ weight)
    packed = packed_weight((OUT, INN), Scheme.parse(f"w4a16_g{INN}"), torch.float16)
    assert close(computed(packed, x), x.double() @ numerics.dequantize_packed(packed, torch.float64).t())
    assert seen == [0, 0]


def test_act_order_is_refused():
    """Rows in the order of their groups, and the same order for the activations at run time."""
    codes, zeros, scales, _ = random_linear()
    order = torch.randperm(INN)
    g_idx = torch.empty(INN, dtype=torch.int32)
    g_idx[order] = torch.arange(INN, dtype=torch.int32) // GROUP
    weight = (codes - zeros[g_idx.long()]) * scales.double()[g_idx.long()]
    packed = read_gptq(codes, zeros, scales, g_idx=g_idx, desc_act=True)
    assert packed.permutation is not None
    x = torch.randn(4, INN).half()
    assert close(computed(packed, x), x.double() @ weight)


def test_awq_comments_call_the_checkpoint_signed():
    """It is unsigned, in an interleaved order; the words of the device are signed, in the natural one."""
    codes = torch.arange(8).repeat(INN, OUT // 8)
    _, zeros, scales, _ = random_linear()
    stored = BACKEND.kernel("weight_int4").prepare(read_awq(codes, zeros, scales))[0]
    assert words(codes, AWQ_ORDER)[0, 0].item() == 0x75316420
    assert stored.unique().tolist() == [0xFEDCBA98 - 2**32]


def test_awq_experts_have_their_columns_permuted_and_8_subtracted_twice():
    """Both happened when a kernel for another packing was reused: here every kernel sees canonical weights only."""
    experts = [random_linear() for _ in range(3)]
    read_experts = [read_awq(*expert[:3]) for expert in experts]
    packed = PackedWeight(
        read_experts[0].scheme, (3, OUT, INN),
        **{name: torch.stack([e.tensors()[name] for e in read_experts]) for name in ("codes", "scales", "zeros")},
    )  # fmt: skip
    kernel, _ = choose(BACKEND, experts_site(3, OUT, INN, torch.float16), packed.scheme)
    x, ends = torch.randn(6, INN).half(), torch.tensor([2, 3, 6], dtype=torch.int32)
    result = kernel.grouped_linear([x], ends, kernel.prepare(packed), packed.scheme, OUT, torch.float16)
    for e, (rows, expert) in enumerate(zip((slice(0, 2), slice(2, 3), slice(3, 6)), experts, strict=True)):
        assert close(result[rows], x[rows].double() @ expert[3]), e


def test_negative_scales_of_experts_lose_a_step():
    """Negating codes turns -8 into 8, which is clamped to 7; inverting their bits and an offset of 1 are exact."""
    packed = packed_weight((2, OUT, INN), Scheme.parse("w4a16_g64"), torch.float16)
    assert (packed.scales < 0).any()
    assert (packed.scales > 0).any()
    kernel = BACKEND.kernel("weight_int4")
    stored, scales, offsets = kernel.prepare(packed)
    assert (scales >= 0).all()
    values = numerics.unpack_int4(stored).double() + offsets.double().repeat_interleave(64, 1)
    exact = numerics.dequantize_packed(dataclasses.replace(packed, scales=packed.scales.double()))
    assert torch.equal(values * scales.double().repeat_interleave(64, 1), exact.transpose(1, 2))


@pytest.mark.parametrize("shards", [2, 4])
def test_scale_bias_is_counted_once_for_every_shard(shards):
    """Compensation made for all inputs, added on every rank of a row-parallel layer, is too large as many times."""
    scheme = Scheme.parse("w4a8")
    whole = packed_weight((OUT, INN), scheme)
    kernel, x = BACKEND.kernel("int8_int4_nz"), torch.randn(5, INN).bfloat16()
    codes, scale = quantized(x, whole)
    total, biases = torch.zeros(5, OUT), torch.zeros(1, OUT)
    for part in torch.arange(INN).chunk(shards):
        unpacked = numerics.unpack_codes(whole.codes, 4, INN)[:, part]
        shard = dataclasses.replace(whole, shape=(OUT, len(part)), codes=numerics.pack_codes(unpacked, 4))
        tensors = kernel.prepare(shard)
        biases += tensors[3]
        total += kernel.scaled_linear([codes[:, part], scale], tensors, None, scheme, OUT, torch.bfloat16).float()
    full = kernel.prepare(whole)
    torch.testing.assert_close(biases, full[3])
    expected = kernel.scaled_linear([codes, scale], full, None, scheme, OUT, torch.bfloat16)
    assert ((total - expected.float()).norm() / expected.float().norm()).item() < 1e-2


def test_scale_bias_was_made_from_other_scales_than_the_kernel_reads():
    """Scales of groups are rounded to float16 in the container; the compensation is of the rounded ones."""
    packed = packed_weight((OUT, 512), Scheme.parse("w4a8_g256"), torch.bfloat16)
    packed = dataclasses.replace(packed, scales=packed.scales.float() * 1.001)
    _, _, containers, bias = BACKEND.kernel("int8_int4_nz").prepare(packed)
    read_scales = layouts.from_container(containers)[0].t()
    assert torch.equal(read_scales, packed.scales.half().float())
    codes = numerics.unpack_codes(packed.codes, 4, 512).double() - 8
    expected = (8 * codes.unflatten(1, (2, 256)).sum(-1) * read_scales.double()).sum(-1)
    torch.testing.assert_close(bias[0].double(), expected, rtol=1e-6, atol=1e-5)


def test_a_zero_point_of_static_activations_is_corrected_with_a_rounded_scale():
    """quant_bias = -zero * sum(w), an exact integer of the operation, whatever the scale's dtype."""
    packed = packed_weight((OUT, INN), Scheme.parse("w8a8_static"))
    correction = BACKEND.kernel("int8_static_nz").prepare(packed)[4]
    signed = numerics.signed_codes(packed.codes).long()
    assert torch.equal(correction.long(), -packed.input_zero.long() * signed.sum(1))


def test_static_scales_are_rounded_twice_on_their_way_to_the_quantization():
    """A float32 scale that is divided by, not its reciprocal in the activations' dtype."""
    scale = torch.tensor([0.0123456789])
    x = torch.randn(64, INN).bfloat16()
    (codes,) = BACKEND.operations["quantize"].compute(x, [scale], "8_static_sym")
    assert torch.equal(codes, torch.round(x.float() / scale).clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu:alpha=1.702:limit=7.0:shift=1.0"])
def test_other_activations_are_silently_swiglu(activation):
    """The fused operation is taken where its formula is the model's; everything else is computed as it is written."""
    ids, routing = routed()
    layer = Layer("w8a8", activation=activation)
    assert_as_defined(layer, ids, routing)
    swiglu = Layer("w8a8", activation="silu")
    x = torch.randn(ids.shape[0], 256).bfloat16()
    assert (layer.run(x, ids, routing) - swiglu.run(x, ids, routing)).norm() > 0.01 * swiglu.run(x, ids, routing).norm()


def test_w2_alpha_is_never_read():
    """Each row is clamped to the share of its own expert before it is quantized for the second product."""
    layer = Layer("w4a8_clip")
    ids, routing = routed()
    assert_as_defined(layer, ids, routing)
    x = torch.randn(ids.shape[0], 256).bfloat16()
    before = layer.run(x, ids, routing)
    layer.packed[1] = dataclasses.replace(layer.packed[1], alpha=torch.full((COUNT,), 0.2))
    assert_as_defined(layer, ids, routing)
    assert (layer.run(x, ids, routing) - before).norm() > 0.05 * before.norm()
