"""Images in class folders, packed into shards, and searched over: the commands of docs/data.md, one after another."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.orchestrator.commands.test_search import PROJECT, SPACE
from tests.orchestrator.packed import CLASSES, make_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def command(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-m", f"orchestrator.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_search_over_packed_images(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    for split, per_class in (("train", 60), ("val", 20)):
        tree = make_tree(tmp_path / "images" / split, per_class=per_class)
        told = command("data", "pack", tree, shards / split, "--images-per-shard", "32", "--rows-per-group", "4")
        assert f"{3 * per_class} images of 3 classes" in told
    space = yaml.safe_load(SPACE)
    space["base"]["model"]["num_classes"] = len(CLASSES)
    space["base"]["data"] = {
        "name": "parquet", "train": str(shards / "train"), "test": str(shards / "val"), "image_size": 16,
        "global_batch_size": 16, "validation_share": 0.2, "augment": True, "num_loader_workers": 1,
    }  # fmt: skip
    (tmp_path / "packed.yaml").write_text(yaml.safe_dump(space))
    command("search", tmp_path / "packed.yaml", "--run-dir", tmp_path / "runs", "--set", "search.num_trials=1")
    rows = {row["kind"]: row for row in pq.read_table(tmp_path / "runs" / "tiny" / "results.parquet").to_pylist()}
    assert rows["trial"]["status"] == "finished"
    assert rows["trial"]["macs_ratio"] < 0.75
    assert rows["trial"]["top1"] > 60  # the classes differ in brightness; chance is a third
    assert "all match the manifest" in command("data", "check", shards / "train")
