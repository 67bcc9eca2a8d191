"""Who may import what (docs/design.md, "Rooms"), read from the source. What may never be called: test_security.py."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("gator", "orchestrator")

RAY_FILES = {
    "ray.train": {"trial.py", "worker.py", "train.py"},
    "ray.tune": {"driver.py", "recorder.py", "schedulers.py", "searchers.py", "trial.py"},
    "ray": {
        "base.py",
        "cluster.py",
        "data.py",
        "driver.py",
        "measure.py",
        "measurers.py",
        "recorder.py",
        "remeasure.py",
        "schedulers.py",
        "searchers.py",
        "system_metrics.py",
        "timing.py",
        "train.py",
        "trial.py",
        "worker.py",
    },
}
MLFLOW_FILES = {
    "tracking.py",
    "mlflow_store.py",
    "mlflow_parent.py",
    "mlflow_models.py",
    "mlflow_replay.py",
    "system_metrics.py",
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (PROJECT / folder).rglob("*.py"))


def modules_of(tree: ast.AST) -> Iterator[str]:
    """Yield every module that the source imports or reaches by attribute, as a dotted name.

    `from ray import tune` yields ray and ray.tune; so does `ray.tune.Tuner` after a bare `import ray`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ray":
            yield f"ray.{node.attr}"


def imports(path: Path) -> set[str]:
    return set(modules_of(ast.parse(path.read_text(encoding="utf-8"), str(path))))


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def misplaced(files: list[Path], package: str, allowed: set[str]) -> list[str]:
    """Return "file imports module" for each import of the package outside the allowed file names."""
    return [
        f"{path.relative_to(PROJECT)} imports {module}"
        for path in files
        if path.name not in allowed
        for module in sorted(imports(path))
        if is_within(module, package)
    ]


def test_gator_needs_torch_safetensors_and_the_standard_library_only() -> None:
    allowed = {"gator", "torch", "safetensors", *sys.stdlib_module_names}
    roots = {(path.name, module.partition(".")[0]) for path in sources("gator") for module in imports(path)}
    assert roots
    roots -= {("gpu_state.py", "pynvml")}  # NVIDIA's binding of its driver, where it is installed
    assert not [f"gator/{name} imports {root}" for name, root in sorted(roots) if root not in allowed]


@pytest.mark.parametrize(("package", "allowed"), RAY_FILES.items(), ids=RAY_FILES)
def test_ray_is_met_in_its_files_only(package: str, allowed: set[str]) -> None:
    assert not misplaced(sources("orchestrator"), package, allowed)


def test_mlflow_is_met_in_its_files_only() -> None:
    assert not misplaced(sources("orchestrator"), "mlflow", MLFLOW_FILES)


def test_no_module_shadows_the_standard_library() -> None:
    names = {path.relative_to(PROJECT): path.stem for path in sources(*PACKAGES, "benchmarks")}
    assert not [str(path) for path, name in names.items() if name in sys.stdlib_module_names and name != "__main__"]


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import ray.tune", "ray.tune"),
        ("from ray import tune", "ray.tune"),
        ("from ray.tune.search import Searcher", "ray.tune.search"),
        ("def late():\n    import ray\n    ray.tune.Tuner()", "ray.tune"),
    ],
)
def test_every_way_to_import_is_seen(source: str, module: str) -> None:
    assert module in set(modules_of(ast.parse(source)))
