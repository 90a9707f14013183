"""Programmatic dependent launch (PDL, from Hopper on): a kernel starts while the one before it still computes.

What makes that right is the same for every kernel that calls ``wait``, and for nothing else than these rules:

- Every program waits, in straight-line code before anything that could end it. So a kernel that is complete means that
  all before it are, for whoever waits for this one next; and an allocator may reuse memory as it does without PDL.
- Before it waits, a program reads and writes nothing. It prefetches constants of the model into L2, where every write
  arrives: not even a weight that was prepared a moment ago can be seen as it was before.
- It lets the next kernel start only after it waited: that one may then take for granted everything but what this very
  kernel writes, as the kernels of Inductor do (``torch._inductor.config.triton.enable_pdl``).

Kernels that know nothing of this, before or after, are launched and complete as ever.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

AHEAD = tl.constexpr(4)  # steps of a product whose weights are prefetched: about what its pipeline loads at once


@triton.jit
def wait(PDL: tl.constexpr):
    """Until all that was launched before is complete. Does nothing without PDL."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(at):
    """Bring the lines that pointers lie in into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_codes(begun, length, STEP: tl.constexpr):
    """The first steps, of STEP bytes each, of ``length`` bytes that begin at each of the pointers [n] to bytes."""
    line = tl.minimum(tl.arange(0, AHEAD * STEP // 128) * 128, length - 1)
    prefetch(begun[:, None] + line[None, :])


@triton.jit
def prefetch_scales(
    scales, first, out, start, length, scale_row, scale_group,
    SCALE_ROWS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Scales (4 bytes each) of BN of ``out`` channels, for the first steps of ``length`` columns from ``start`` on."""
    channel = tl.minimum(first + tl.arange(0, BN // 32) * 32, out - 1)  # of each line
    at = scales + (channel // SCALE_ROWS) * scale_row
    if GROUP:
        count: tl.constexpr = max(1, AHEAD * BK // GROUP)
        group = tl.minimum(start // GROUP + tl.arange(0, count), (start + length - 1) // GROUP)
        prefetch(at[:, None] + group[None, :] * scale_group)
    else:
        prefetch(at)
