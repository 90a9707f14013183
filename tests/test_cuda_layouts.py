"""Weights as tensor cores read them: who owns which bytes, and that nothing is lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.backends.cuda import layouts

ORDERS = [(4, "wgmma"), (4, "mma"), (8, "wgmma"), (8, "mma")]


@pytest.mark.parametrize(("bits", "order"), ORDERS)
@given(tiles=st.integers(1, 3), columns=st.integers(1, 4), data=st.data())
def test_nothing_is_lost(bits, order, tiles, columns, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    codes = torch.randint(0, 2**bits, (16 * tiles, 64 * columns), dtype=torch.uint8, generator=generator)
    stored = layouts.to_fragments(codes, bits, order)
    assert stored.shape == (tiles, 16 * 64 * columns * bits // 8)
    assert torch.equal(layouts.from_fragments(stored, bits, order), codes)


@pytest.mark.parametrize(("bits", "order"), ORDERS)
def test_a_lane_owns_the_16_bytes_that_its_tensor_core_wants(bits, order):
    """PTX ISA: lane 4 g + c of a warp holds rows g and g + 8 of the left operand, and the columns that follow."""
    width = 16 * 8 // bits // 2  # codes of one row in 16 bytes
    run = 32 // bits
    columns = {
        "wgmma": lambda c: [16 * s + 8 * b + 2 * c + e for s in range(width // 4) for b in (0, 1) for e in (0, 1)],
        "mma": lambda c: [4 * run * s + run * c + j for s in range(2) for j in range(run)],
    }[order]
    rows, k = torch.meshgrid(torch.arange(16), torch.arange(64), indexing="ij")
    per_byte = 8 // bits

    def owners(value: torch.Tensor) -> torch.Tensor:
        """[lanes, codes] of one number that is written in place of each code, in as many bits as a code has."""
        stored = layouts.to_fragments(value.to(torch.uint8), bits, order).view(-1, 32, 16)
        parts = [stored & 15, stored >> 4] if per_byte == 2 else [stored]
        return torch.stack(parts, -1).flatten(2)[0]

    row, low, high = owners(rows), owners(k % 16), owners(k // 16)
    for lane in range(32):
        g, c = divmod(lane, 4)
        assert set(row[lane].tolist()) == {g, g + 8}
        found = sorted((16 * high[lane] + low[lane])[row[lane] == g].tolist())
        assert found == sorted(columns(c)), (lane, found)


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.bfloat16), (4, torch.float16), (8, torch.bfloat16)])
def test_scales_and_zero_points_are_kept_exactly(bits, dtype):
    scales = torch.randn(64, 5).to(dtype)
    scales[3, 2] = 0
    zeros = torch.randint(0, 2**bits, (64, 5), dtype=torch.uint8)
    offset = layouts.offset_of(bits, dtype)
    pairs = layouts.scale_pairs(scales, zeros, offset)
    assert pairs.shape == (5, 64, 2)
    back, zeros_back = layouts.from_scale_pairs(pairs, offset)
    assert torch.equal(back, scales)
    assert torch.equal(zeros_back, zeros)
