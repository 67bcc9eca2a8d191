"""Who may import what (docs/design.md, "Rooms"), read from the source, and what must never be read with pickle."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from orchestrator.yaml_files import _StrictLoader

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("gator", "orchestrator")

RAY_FILES = {
    "ray.train": {"trial.py", "worker.py", "train.py"},
    "ray.tune": {"driver.py", "recorder.py", "schedulers.py", "searchers.py", "trial.py"},
    "ray": {
        "base.py",
        "cluster.py",
        "driver.py",
        "latency_build.py",
        "measure.py",
        "recorder.py",
        "remeasure.py",
        "schedulers.py",
        "searchers.py",
        "system_metrics.py",
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
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "ray.cloudpickle"}


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


def unsafe_calls(tree: ast.AST) -> list[str]:
    """Return the calls that can run code out of a file: torch.load without weights_only=True, yaml.load.

    Allowed is yaml_files._StrictLoader, of which test_the_strict_loader_is_a_safe_one says what it is.
    """
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        weights_only = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
        is_strict = any(word.arg == "Loader" and ast.unparse(word.value) == "_StrictLoader" for word in node.keywords)
        if (
            (name == "yaml.load" and not is_strict)
            or name == "yaml.unsafe_load"
            or (name == "torch.load" and not weights_only)
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_gator_needs_torch_safetensors_and_the_standard_library_only() -> None:
    allowed = {"gator", "torch", "safetensors", *sys.stdlib_module_names}
    roots = {(path.name, module.partition(".")[0]) for path in sources("gator") for module in imports(path)}
    assert roots
    assert not [f"gator/{name} imports {root}" for name, root in sorted(roots) if root not in allowed]


@pytest.mark.parametrize(("package", "allowed"), RAY_FILES.items(), ids=RAY_FILES)
def test_ray_is_met_in_its_files_only(package: str, allowed: set[str]) -> None:
    assert not misplaced(sources("orchestrator"), package, allowed)


def test_mlflow_is_met_in_its_files_only() -> None:
    assert not misplaced(sources("orchestrator"), "mlflow", MLFLOW_FILES)


def test_no_module_shadows_the_standard_library() -> None:
    names = {path.relative_to(PROJECT): path.stem for path in sources(*PACKAGES, "benchmarks")}
    assert not [str(path) for path, name in names.items() if name in sys.stdlib_module_names and name != "__main__"]


def test_nothing_is_pickled() -> None:
    files = sources(*PACKAGES, "benchmarks")
    assert not [line for package in sorted(PICKLES) for line in misplaced(files, package, allowed=set())]


def test_no_file_is_loaded_as_code() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources(*PACKAGES, "benchmarks", "tests")}
    assert not [f"{path.relative_to(PROJECT)} {call}" for path, tree in trees.items() for call in unsafe_calls(tree)]


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


@pytest.mark.parametrize(
    ("source", "num_unsafe"),
    [
        ("torch.load('w.pt')", 1),
        ("torch.load('w.pt', weights_only=False)", 1),
        ("torch.load('w.pt', map_location='cpu', weights_only=True)", 0),
        ("yaml.load(text, yaml.FullLoader)", 1),
        ("yaml.safe_load(text)", 0),
    ],
)
def test_every_unsafe_load_is_seen(source: str, num_unsafe: int) -> None:
    assert len(unsafe_calls(ast.parse(source))) == num_unsafe


def test_the_strict_loader_is_a_safe_one() -> None:
    assert issubclass(_StrictLoader, yaml.SafeLoader)
    assert not set(_StrictLoader.yaml_constructors) - set(yaml.SafeLoader.yaml_constructors)
