"""Speed of a prompt on the CPU: quantized models against the same model in bfloat16, all compiled.

    python benchmarks/cpu_prefill.py                          # Qwen3-0.6B shape, random weights, 128 tokens
    python benchmarks/cpu_prefill.py --prompt 512 --json

``cpu_common.py`` says how it is measured, and against what.
"""

from __future__ import annotations

from cpu_common import run

if __name__ == "__main__":
    run(__doc__.splitlines()[0], ["w4a16_g128", "w8a16", "w8a8"], "prefill")
