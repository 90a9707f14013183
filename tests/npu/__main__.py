"""``python tests/npu``: the tests of the NPU backend against the real torch_npu, on an Ascend chip or on a pretend one.

Where CANN's environment is set up (ASCEND_HOME_PATH) the chip computes, and a table says what differs from the
reference numerics. Elsewhere, or with --pretend, torch_npu's host code runs over stubs of CANN (stubs.py) and the
reference numerics stand behind its calls (pretend.py). Everything else on the command line goes to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import stubs

HERE = Path(__file__).resolve().parent
AGAIN = ("kernels", "experts", "layouts")  # of tests/test_npu_*.py: once more, under torch_npu's schemas and shapes


def main(arguments: list[str]) -> int:
    pretend = "--pretend" in arguments or "ASCEND_HOME_PATH" not in os.environ
    arguments = [argument for argument in arguments if argument != "--pretend"]
    environment = {
        **os.environ,
        "QCOMPILE_NPU": "pretend" if pretend else "chip",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # tests/conftest.py imports torch_npu, when torch is there
        # torch_npu's unpermute hands its input on, for a backward; where CI is set, torch makes an error of its warning
        "TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING": "0",
    }
    files = [HERE, *(HERE.parent / f"test_npu_{name}.py" for name in (AGAIN if pretend else ()))]
    if not any(Path(argument.partition("::")[0]).exists() for argument in arguments):
        arguments += map(str, files)
    if not pretend:
        arguments = ["-n", "0", *arguments]  # one process has the chip, and one table is printed at the end
    with tempfile.TemporaryDirectory() as folder:
        if pretend:
            stubs.build(Path(folder))
            paths = [folder, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
            # calls reach the device in the thread that makes them
            environment |= {"LD_LIBRARY_PATH": os.pathsep.join(paths), "TASK_QUEUE_ENABLE": "0"}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, env=environment, cwd=HERE.parents[1]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
