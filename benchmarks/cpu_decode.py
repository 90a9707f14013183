"""Decode speed on the CPU: quantized models against the same model in bfloat16, all compiled.

    python benchmarks/cpu_decode.py                         # Qwen3-0.6B shape, random weights, lm_head quantized
    python benchmarks/cpu_decode.py --lm-head float --json  # the same with the lm_head left as it is
    python benchmarks/cpu_decode.py --both --schemes w4a16_g128 w8a16 w8a8  # and prompts, compiled once

``cpu_common.py`` says how it is measured, and against what.
"""

from __future__ import annotations

from cpu_common import run

if __name__ == "__main__":
    run(__doc__.splitlines()[0], ["w4a16_g128", "w8a16"], "decode")
