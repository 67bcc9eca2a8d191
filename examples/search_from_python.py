"""A search from Python: start it, read its table, load the best network. A notebook's cells can hold the same lines.

    python examples/search_from_python.py

Two short trials on scikit-learn's digits. The same call resumes a search that was stopped, and returns at once when it is done.
"""

import json
from pathlib import Path

import pyarrow.parquet as pq
import torch

from orchestrator import models, search

SETTINGS = {
    "base.data.num_train": 500,
    "base.pretraining.epochs": 2,
    "base.gating.epochs": 2,
    "base.finetuning.epochs": 1,
    "search.num_trials": 2,
    "constraints": "[]",
}
"""Key of the space -> value; docs/reference/config.md has all keys. Without them it is the search of `make search`."""


def main() -> None:
    """Search, print the results, and run the best network."""
    settings = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    exit_code = search.main(["digits", "--run-dir", "runs/from_python", *settings])
    if exit_code != 0:  # what went wrong is on stderr
        raise SystemExit(exit_code)

    folder = Path("runs/from_python/digits")
    for row in pq.read_table(folder / "results.parquet").to_pylist():  # docs/reference/metrics.md has the columns
        if row["status"] == "finished":  # a trial that was stopped early has no test accuracy
            print(row["trial_id"], f"top1 {row['top1']:.1f} latency_ms {row['latency_ms']:.3f}")

    best = json.loads((folder / "pareto.json").read_text())["front"][0]["trial_id"]
    network = models.load_trial(folder, best)  # a plain nn.Module
    print(f"{best} is the most accurate: logits {tuple(network(torch.zeros(1, 3, 32, 32)).shape)}")


if __name__ == "__main__":
    main()
