"""What `ray job submit --working-dir .` sends: Ray's own packager over the project, and over what people have beside it."""

import re
import shutil
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

PROJECT = Path(__file__).resolve().parents[3]


def uploaded(folder: Path, target: Path) -> set[str]:
    create_package(str(folder), target, include_gitignore=True)
    with zipfile.ZipFile(target) as package:
        return {name for name in package.namelist() if not name.endswith("/")}


def test_upload_of_the_project_is_small_and_complete(tmp_path: Path) -> None:
    names = uploaded(PROJECT, tmp_path / "package.zip")
    (megabytes,) = re.findall(
        r"upload of this project is less than (\d+) MB", (PROJECT / "docs/clusters.md").read_text()
    )
    assert (tmp_path / "package.zip").stat().st_size < int(megabytes) * 1e6
    assert {name.partition("/")[0] for name in names if "/" in name} >= {
        "gator",
        "orchestrator",
        "search_spaces",
        "clusters",
    }
    folders = ("gator", "orchestrator", "search_spaces", "clusters", "examples")
    needed = [path for folder in folders for path in (PROJECT / folder).rglob("*") if path.is_file()]
    assert names >= {path.relative_to(PROJECT).as_posix() for path in needed if "__pycache__" not in path.parts}


@pytest.mark.parametrize(
    "name",
    [
        ".venv/bin/python",
        "venv-2.58/pyvenv.cfg",
        "env/bin/python",
        "my_environment/lib/python3.11/site-packages/torch/__init__.py",
        "runs/digits/results.parquet",
        "mlruns/0/meta.yaml",
        "mlflow.db-wal",
        "resnet50.pth",
        "weights/last.ckpt",
        "images/cat.jpg",
        "images/n01440764/n01440764_18.JPEG",
        "imagenet.tar",
        "shards/train-0.parquet",
    ],
)
def test_what_lies_around_stays_behind(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("large")
    (folder / "my_space.yaml").write_text("name: mine\n")
    shutil.copy(PROJECT / ".rayignore", folder)
    assert uploaded(folder, tmp_path / "package.zip") == {".rayignore", "my_space.yaml"}
