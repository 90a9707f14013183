"""One command for everything that waits for a GPU: correctness first, then every table, then plots of them.

    benchmarks/cuda_peers.sh peers                          # once: what it compares with
    python benchmarks/cuda_all.py --peers peers             # under ten minutes
    python benchmarks/cuda_all.py --tune 6000               # measures tiles before (cuda_tune.py), which takes longer
    python benchmarks/cuda_all.py --device cpu              # a dry run without a GPU, into a temporary folder

Every part is a process of its own with so many seconds, and what it has written by then is kept: none is lost because
another one crashed, hung or was wrong, which the exit code tells.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent
PARTS = {
    "cuda_check": 70, "cuda_chain": 40, "cuda_linear": 115, "cuda_scaled": 75, "cuda_experts": 80, "cuda_decode": 170,
}  # fmt: skip
"""Seconds of each part, 550 together."""
PLOTS = 45  # seconds
SPARE = 12  # of a part's seconds: Python's and CUDA's start, and the row that is measured when its time is over


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a dry run on small shapes")
    parser.add_argument("--out", type=Path, help="folder for JSON and plots (default: results/)")
    parser.add_argument("--peers", type=Path, help="folder with libraries of peers (cuda_peers.sh)")
    parser.add_argument("--tune", type=float, default=0, metavar="SECONDS", help="measure tiles first, for so long")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="parts to run")
    return parser.parse_args()


def run(command: list[str], seconds: float) -> str:
    """Run a part; kill it, and all that it started, when its time is over. What became of it, "" if all is well."""
    process = subprocess.Popen([sys.executable, *command], start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"killed after {seconds:.0f} s"
    return "" if code == 0 else f"exit code {code}"


def main() -> None:
    chosen = arguments()
    out = chosen.out or (Path(tempfile.mkdtemp(prefix="cuda_")) if chosen.device == "cpu" else FOLDER / "results")
    budgets = {"cuda_tune": chosen.tune} if chosen.tune else {}
    budgets |= {part: seconds for part, seconds in PARTS.items() if part in chosen.only}
    failed: dict[str, str] = {}
    for part, seconds in budgets.items():
        print(f"\n== {part}, {seconds:.0f} s", flush=True)
        started = time.monotonic()
        options = ["--device", chosen.device, "--seconds", str(max(1, seconds - SPARE))]
        if part != "cuda_tune" or chosen.device == "cpu":  # the package's table otherwise
            options += ["--out", str(out / f"{part}_{time.strftime('%Y-%m-%d')}.json")]
        options += ["--peers", str(chosen.peers)] if chosen.peers else []
        failed[part] = run([str(FOLDER / f"{part}.py"), *options], seconds)
        print(f"== {part}: {failed[part] or 'done'} in {time.monotonic() - started:.0f} s", flush=True)
    failed["cuda_plots"] = run([str(FOLDER / "cuda_plots.py"), "--folder", str(out)], PLOTS)
    print(f"\n== all is in {out}")
    for part, why in failed.items():
        print(f"{part}: {why or 'done'}")
    sys.exit(any(failed.values()))


if __name__ == "__main__":
    main()
