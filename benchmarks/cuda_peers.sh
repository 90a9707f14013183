#!/usr/bin/env bash
# Installs what the benchmarks of CUDA kernels compare with, for torch 2.11 with CUDA 13 and Python 3.12: gemlite and
# Humming as packages; of vLLM only its two libraries of kernels, into the folder that --peers names.
#   benchmarks/cuda_peers.sh peers && python benchmarks/cuda_linear.py --peers peers
set -euo pipefail
folder=$(mkdir -p "${1:-peers}" && cd "${1:-peers}" && pwd)
python3 -m pip install --no-deps gemlite==0.6.0.post2 humming-kernels==0.1.19 tabulate==0.10.0 torchao==0.18.0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip download --no-deps --only-binary=:all: -d "$work" vllm==0.26.0
python3 - "$work" "$folder" <<'PYTHON'
import pathlib, sys, zipfile
work, folder = map(pathlib.Path, sys.argv[1:])
with zipfile.ZipFile(next(work.glob("vllm-*.whl"))) as wheel:
    for name in ("_C_stable_libtorch.abi3.so", "_moe_C_stable_libtorch.abi3.so"):
        (folder / name.replace("_stable_libtorch.abi3", "")).write_bytes(wheel.read(f"vllm/{name}"))
PYTHON
