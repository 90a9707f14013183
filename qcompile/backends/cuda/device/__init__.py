"""Triton code. Only ``launch`` imports it, when a kernel runs: planning and packing need no Triton."""
