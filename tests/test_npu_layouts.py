"""Ascend's bit layouts against worked examples and the goldens, and that converting holds no second weight."""

import npu_goldens
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_cases import packed_weight, size
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qcompile import numerics
from qcompile.backends.npu import BACKEND, layouts
from qcompile.types import Scheme

shapes = st.tuples(
    st.lists(st.integers(1, 3), max_size=1), st.integers(1, 5).map(lambda n: 8 * n), st.integers(1, 40)
).map(lambda s: (*s[0], *s[1:]))


def words(*values: int) -> list[int]:
    return [value - 2**32 if value >= 2**31 else value for value in values]


def test_words_of_worked_examples():
    assert numerics.pack_int4(torch.arange(-8, 0, dtype=torch.int8)).tolist() == words(0xFEDCBA98)
    assert numerics.pack_int4(torch.arange(8, dtype=torch.int8)).tolist() == words(0x76543210)


def test_two_int4_in_a_byte_are_the_words_of_npu_convert_weight_to_int4pack():
    """Even columns in the low half: -3 and 5 are 0x5D, and four such bytes are one word."""
    assert numerics.pack_int4(torch.tensor([-3, 5] * 4, dtype=torch.int8)).view(torch.uint8).tolist() == [0x5D] * 4


@given(shapes, st.integers(2, 4))
def test_weights_become_the_words_that_the_device_would_pack(shape, bits):
    *experts, out, inn = shape
    codes = torch.randint(0, 2**bits, (*experts, out, inn), dtype=torch.uint8)
    packed = numerics.pack_codes(codes, bits)
    stored = layouts.to_int4(packed, bits, inn).view(torch.int32)
    signed = codes.to(torch.int32) - 2 ** (bits - 1)
    assert torch.equal(stored, npu_goldens.pack_int4(signed.transpose(-1, -2)))
    assert torch.equal(layouts.from_int4(stored, bits), packed)


@given(shapes, st.integers(2, 8))
def test_int8_layout_is_transposed_and_signed(shape, bits):
    *experts, out, inn = shape
    codes = torch.randint(0, 2**bits, (*experts, out, inn), dtype=torch.uint8)
    packed = numerics.pack_codes(codes, bits)
    stored = layouts.to_int8(packed, bits, inn)
    assert torch.equal(stored.to(torch.int32), codes.transpose(-1, -2).to(torch.int32) - 2 ** (bits - 1))
    assert stored.is_contiguous()
    assert torch.equal(layouts.from_int8(stored, bits), packed)


def test_pieces_of_any_size_give_the_same(monkeypatch):
    codes = numerics.pack_codes(torch.randint(0, 16, (2, 72, 24), dtype=torch.uint8), 4)
    scales = torch.rand(2, 72, 3)
    whole = [
        layouts.to_int4(codes, 4, 24),
        layouts.to_int8(codes, 4, 24),
        layouts.compensation(codes, 4, 24, scales, 8),
    ]
    monkeypatch.setattr(numerics, "CHUNK", 24 * 16)
    parts = [
        layouts.to_int4(codes, 4, 24),
        layouts.to_int8(codes, 4, 24),
        layouts.compensation(codes, 4, 24, scales, 8),
    ]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert torch.equal(layouts.from_int4(parts[0].view(torch.int32), 4), codes)
    assert torch.equal(layouts.from_int8(parts[1], 4), codes)


@pytest.mark.parametrize(("scale", "bits"), [(1.0, 0x3F800000), (2.0**-7, 0x3C000000), (0.1, 0x3DCCCCCD)])
def test_scale_containers_hold_the_bits_of_float32(scale, bits):
    assert layouts.to_container(torch.tensor([scale])).tolist() == [bits]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_scale_containers_are_exact_for_either_sign(values):
    scales = torch.tensor(values)
    containers = layouts.to_container(scales)
    assert containers.dtype == torch.int64
    assert (containers >= 0).all()
    assert torch.equal(layouts.from_container(containers), scales)


def test_quant_parameters_are_rounded_to_nearest_and_marked():
    assert layouts.to_quant_parameter(torch.tensor([0.1])).tolist() == [0x00004000_3DCCC000]
    scales = torch.rand(1000) + 1e-3
    read = layouts.from_quant_parameter(layouts.to_quant_parameter(scales))
    assert ((read - scales).abs() <= scales * 2**-11).all()
    signed = torch.stack([read - scales > 0, read - scales < 0]).float().mean(1)
    assert (signed > 0.3).all()  # truncating would make all of them too small
    assert torch.equal(layouts.to_quant_parameter(scales), npu_goldens.npu_trans_quant_param(scales, None, 1))


@given(st.integers(1, 70), st.integers(1, 3))
def test_compensation_makes_the_split_into_two_int4_exact(columns, experts):
    """x = 16 hi + lo + 8: the products of hi and lo lack 8 * sum(w * s), which is the compensation."""
    x = torch.randint(-128, 128, (5, columns), dtype=torch.int8)
    codes = torch.randint(0, 16, (experts, 8, columns), dtype=torch.uint8)
    scales = torch.rand(experts, 8, 1)
    bias = layouts.compensation(numerics.pack_codes(codes, 4), 4, columns, scales, columns)
    weight = (codes.double() - 8) * scales.double()
    high, low = x.to(torch.int32) >> 4, (x.to(torch.int32) & 15) - 8
    assert int(high.min()) >= -8
    assert int(low.min()) >= -8
    split = (16 * high.double() + low.double()) @ weight.transpose(1, 2) + bias.double()[:, None]
    torch.testing.assert_close(split, x.double() @ weight.transpose(1, 2), rtol=1e-5, atol=1e-4)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations under it have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for storage in [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]:
            if storage._cdata not in given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return result


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w8a16", "w8a8", "w4a8", "w4a4"])
def test_converting_experts_holds_no_second_copy_of_them(scheme, monkeypatch):
    """The fault of loaders that transpose all experts of a layer before they free what they transposed."""
    monkeypatch.setattr(numerics, "CHUNK", 1 << 12)
    parsed, shape = Scheme.parse(scheme), (48, 64, 256)
    packed = packed_weight(shape, parsed)
    kernel = next(k for k in BACKEND.kernels if k.computes(parsed) and (k.nz or parsed.activation is None))
    with LiveBytes() as live:
        prepared = kernel.prepare(packed)
    temporaries = 16 * numerics.CHUNK + 4 * size([packed.scales])
    assert live.peak <= size(prepared[:1]) + temporaries
    with LiveBytes() as live:
        kernel.restore(prepared, parsed, shape, packed.activation_tensors())
    assert live.peak <= size([packed.codes]) + temporaries
