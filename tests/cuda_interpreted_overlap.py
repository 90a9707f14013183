"""What products prefetch before they wait for earlier kernels, in Triton's interpreter, as ``cuda_interpreted.py``."""

import ptx
import pytest
import torch
from cuda_cases import error, exact, kernel_for, packed_weight, run

from qcompile.backends.cuda import BACKEND
from qcompile.backends.cuda.device import launch, overlap
from qcompile.types import Scheme

ptx.install()

WAIT, NEXT = "wait", "next"


@pytest.fixture
def events(monkeypatch) -> list:
    """Prefetches, waits, and what lets the next kernel start, in the order in which programs do them."""
    done: list = []
    monkeypatch.setattr(ptx, "PREFETCHED", done)
    monkeypatch.setattr(overlap, "gdc_wait", lambda: done.append(WAIT))
    monkeypatch.setattr(overlap, "gdc_launch_dependents", lambda: done.append(NEXT))
    monkeypatch.setattr(launch, "overlap", lambda device: {"PDL": True})
    return done


def lines(addresses) -> set[int]:
    return {address // 128 for address in addresses}


def lines_of(tensor: torch.Tensor) -> set[int]:
    begin = tensor.data_ptr()
    return lines(range(begin, begin + tensor.nbytes, 16)) | lines([begin + tensor.nbytes - 1])


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins with a line, as all memory of a GPU does."""
    room = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    first = -room.data_ptr() % 128
    return room[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    "scheme",
    ["w4a16_g128", "w4a16_g32_asym", "w4a16", "w8a16_g64", "w8a8", "w8a8_g32", "w4a8_g64", "w4a8", "wfp8afp8",
     "wfp8afp8_tensor", "wfp8afp8_b128x128"],
)  # fmt: skip
@pytest.mark.parametrize(("out", "inn", "rows"), [(72, 200, 1), (256, 512, 40)])
def test_short_weights_are_prefetched_whole_and_nothing_else_is(scheme, out, inn, rows, events, monkeypatch):
    parsed = Scheme.parse(scheme)
    packed, kernel = packed_weight(parsed, (out, inn), torch.float16), kernel_for(parsed, "sm_90", torch.float16)
    tensors = [aligned(tensor) for tensor in kernel.prepare(packed)]
    monkeypatch.setattr(kernel, "prepare", lambda _: tensors)
    x = torch.randn(rows, inn).half()
    with BACKEND.target("sm_90"):
        assert error(run(kernel, packed, x), exact(packed, x)) < 5e-4
    assert events.count(WAIT) == events.count(NEXT) > 0
    programs = ptx_programs(events)
    assert all(len(prefetched) == 2 for prefetched in programs)  # codes, scales
    for tensor, place in zip(tensors[:2], (0, 1), strict=True):
        found = set().union(*(lines(prefetched[place]) for prefetched in programs))
        assert found == lines_of(tensor)


def ptx_programs(events: list) -> list[list]:
    """What each program prefetched before it waited; each lets the next kernel start right after."""
    found: list[list] = [[]]
    for before, event in zip([None, *events], events, strict=False):
        if isinstance(event, str):
            assert (event == NEXT) == (isinstance(before, str) and before == WAIT)
            found += [[]] if event == NEXT else []
        else:
            found[-1].append(event)
    assert found[-1] == []
    return found[:-1]


def test_long_weights_are_prefetched_where_each_program_begins(events):
    parsed = Scheme.parse("w4a16_g128")
    packed, kernel = packed_weight(parsed, (64, 4096), torch.float16), kernel_for(parsed, "sm_90", torch.float16)
    codes, pairs = map(aligned, kernel.prepare(packed))
    launch.float_linear(torch.randn(1, 4096).half(), codes, pairs, None, None, 4, True, 128, True, 64, 2)
    first, second = ptx_programs(events)
    begin = codes.data_ptr()
    for program, columns in ((first, 0), (second, 2048)):
        rows = [begin + strip * codes.shape[1] + columns * 8 for strip in range(4)]
        assert lines(program[0]) == set().union(*(lines(range(row, row + 4 * 128 * 8, 128)) for row in rows))


def test_experts_wait_at_once(events):
    parsed = Scheme.parse("w8a8")
    packed = packed_weight(parsed, (3, 64, 128), torch.float16)
    kernel = kernel_for(parsed, "sm_90", torch.float16, experts=3)
    codes, scales = kernel.prepare(packed)
    x, x_scale = torch.zeros(2, 128, dtype=torch.int8), torch.ones(2, 1)
    ends = torch.tensor([0, 2, 2], dtype=torch.int32)  # experts without rows have programs too, which wait as others
    launch.scaled_linear(x, x_scale, codes, scales, None, ends, "int8", 0, 1, False, 64, 0, torch.float16)
    assert set(map(tuple, ptx_programs(events))) == {()}
