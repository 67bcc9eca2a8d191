"""Everything that only a GPU can show: the tests marked gpu, then the benchmarks' GPU rows. `make gpu` runs it.

Each piece ends after PIECE_S and is repeated by the next run, where the benchmarks continue with what is missing; a piece that has
passed on this commit is not run again. What came out, good or bad, is one file to commit: benchmarks/results/gpu.json.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.row_file import PROJECT, RESULTS

RESULT = RESULTS / "gpu.json"
PIECE_S = 470.0
PIECES: dict[str, list[str]] = {
    "tests": ["pytest", "-q", "-m", "gpu", "tests"],
    "gates, resnet50": ["benchmarks.bench_gates", "resnet50", "--device", "cuda", "--render"],
    "gates, resnet56": ["benchmarks.bench_gates", "resnet56", "--device", "cuda", "--render"],
    "latency model": [
        *("benchmarks.bench_latency_model", "--device", "cuda", "--runtime", "cuda_graph", "--seconds", "300"),
    ],
    "main job": [
        *("benchmarks.bench_main_job", "--set", "cluster.resources_per_worker={CPU: 1, GPU: 1}"),
        *("--set", "cluster.workers_per_trial=1", "--out", str(RESULTS / "main_job_gpu.md")),
    ],
}
"""Name -> arguments of `python -m`."""


def why_no_gpu() -> str | None:
    """Return why nothing can run on a GPU here, in one sentence; None where it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of it."
    if torch.cuda.is_available():
        return None
    return (
        f"torch {torch.__version__} sees no GPU: expected a CUDA device and a driver for CUDA {torch.version.cuda}; "
        "`nvidia-smi` shows both."
    )


def commit() -> str:
    """Return the commit that runs."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False).stdout.strip()


def run(arguments: list[str], seconds: float) -> dict[str, Any]:
    """Run a piece and return how it ended."""
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        outcome, text = "passed" if done.returncode == 0 else "failed", done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        outcome, text = "not finished", str(error)
    return {"outcome": outcome, "seconds": round(time.monotonic() - began), "last_lines": text.splitlines()[-12:]}


def main() -> None:
    """Run the pieces that have not passed on this commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200.0, help="start no piece after so many")
    seconds, began = parser.parse_args().seconds, time.monotonic()
    if (reason := why_no_gpu()) is not None:
        print(f"no GPU: {reason}")
        return
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if found.get("commit") != commit():
        found = {"commit": commit(), "pieces": {}}
    found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "machine": machine("torch")}
    for name, arguments in PIECES.items():
        if found["pieces"].get(name, {}).get("outcome") == "passed":
            print(f"{name}: skipped, it has passed on this commit")
        elif time.monotonic() - began > seconds:
            print(f"{name}: left for the next run")
        else:
            found["pieces"][name] = row = run(arguments, PIECE_S)
            RESULT.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}: {row['outcome']} after {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
