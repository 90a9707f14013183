#!/usr/bin/env bash
# Collects what the benchmarks of CUDA kernels compare with into the folder that --peers names, which can be copied to
# another machine: torchao, gemlite and Humming; of vLLM its two libraries of kernels, for torch 2.11 with CUDA 13, and
# its Triton kernel for experts with int4 weights, cut out of a file that imports the rest of vLLM.
#   benchmarks/cuda_peers.sh peers && python benchmarks/cuda_linear.py --peers peers
set -euo pipefail
folder=$(mkdir -p "${1:-peers}" && cd "${1:-peers}" && pwd)
python3 -m pip install --no-deps --upgrade --target "$folder" \
  gemlite==0.6.0.post2 humming-kernels==0.1.19 tabulate==0.10.0 torchao==0.18.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip download --no-deps --only-binary=:all: -d "$work" vllm==0.26.0
python3 - "$work" "$folder" <<'PYTHON'
import ast, pathlib, sys, zipfile
work, folder = map(pathlib.Path, sys.argv[1:])
with zipfile.ZipFile(next(work.glob("vllm-*.whl"))) as wheel:
    for name in ("_C_stable_libtorch.abi3.so", "_moe_C_stable_libtorch.abi3.so"):
        (folder / name.replace("_stable_libtorch.abi3", "")).write_bytes(wheel.read(f"vllm/{name}"))
    source = wheel.read("vllm/model_executor/layers/fused_moe/fused_moe.py").decode()
parts = ["import triton\nimport triton.language as tl\n"]
for node in ast.parse(source).body:
    if getattr(node, "name", "") in ("write_zeros_to_output", "fused_moe_kernel_gptq_awq"):
        first = node.decorator_list[0].lineno
        parts.append("\n".join(source.splitlines()[first - 1 : node.end_lineno]) + "\n")
assert len(parts) == 3, "vLLM's fused_moe.py has other kernels now"
(folder / "vllm_wna16.py").write_text("\n\n".join(parts))
PYTHON
