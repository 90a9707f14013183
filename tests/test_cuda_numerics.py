"""What the Triton kernels compute, by Triton's interpreter: no GPU is needed, but an interpreter from the start."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_compute_their_definitions():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider"]
    command += ["cuda_interpreted.py", "cuda_interpreted_experts.py", "cuda_interpreted_overlap.py"]
    command += ["cuda_interpreted_tuning.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
