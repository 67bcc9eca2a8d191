"""Who may import whom (docs/design.md, "Rooms"), read from the source. What may never be called: test_security.py."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("gator", "orchestrator")
MOST_FILES, MOST_LINES = 15, 500

ROOMS: dict[str, set[str]] = {
    "gator.graph": set(),
    "gator.costs": {"graph"},
    "gator.tracing": {"graph", "costs"},
    "gator.latency": {"graph", "costs"},
    "gator.pruning": {"graph", "costs", "tracing"},
    "gator.gating": {"graph", "costs", "tracing", "pruning"},
    "gator.checking": {"graph", "costs", "tracing", "pruning", "gating"},
    "orchestrator.config": set(),
    "orchestrator.storage": {"config"},
    "orchestrator.pareto": {"config"},
    "orchestrator.models": {"config", "storage", "gator"},
    "orchestrator.datasets": {"config", "storage"},
    "orchestrator.cluster": {"config", "storage"},
    "orchestrator.latency": {"config", "storage", "models", "cluster", "gator"},
    "orchestrator.training": {"config", "storage", "datasets", "gator"},
    "orchestrator.trial": {"config", "storage", "models", "datasets", "cluster", "latency", "training", "gator"},
    "orchestrator.planning": {"config", "storage", "models", "datasets"},
    "orchestrator.reporting": {"config", "storage", "pareto", "gator"},
    "orchestrator.tracking": {"config", "storage", "reporting", "models", "gator"},
    "orchestrator.tuning": {
        "config",
        "storage",
        "pareto",
        "cluster",
        "trial",
        "planning",
        "reporting",
        "tracking",
    },
}
"""Room -> rooms of its package that it may import; "gator" is the whole other package. Any room may import errors.py,
masking.py (orchestrator) and files.py (gator). The commands and cli.py may import every room."""

GROUND = {"gator": {"errors", "files"}, "orchestrator": {"errors", "masking"}}

LIBRARIES: dict[str, set[str]] = {
    "ray.tune": {"tuning"},
    "ray.train": {"trial"},
    "ray": {"cluster", "latency", "trial", "tuning", "tracking"},
    "optuna": {"tuning", "config", "reporting"},
    "mlflow": {"tracking"},
    "pyarrow": {"storage", "datasets", "latency"},
    "torch": {"datasets", "models", "latency", "training", "trial", "tracking", "export"},
    "torchvision": {"datasets"},
    "safetensors": {"models"},
    "onnxruntime": {"models"},
    "PIL": {"datasets"},
    "sqlalchemy": {"tracking"},
    "yaml": {"config", "planning", "tracking", "train"},
    "matplotlib": {"reporting"},
    "plotly": {"reporting"},
}
"""Library -> rooms and commands of orchestrator that may import it."""

COMMANDS = ("search", "steer", "train", "measure", "report", "export", "describe", "data")
LIGHT = ("config", "storage", "pareto", "planning", "reporting", "cli", *COMMANDS)
"""Loaded by every command before it knows what it is asked: no torch, no Ray, no MLflow, no Optuna at load time."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (PROJECT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sources(*PACKAGES)}


def modules_in(tree: ast.AST) -> Iterator[str]:
    """Yield every module that the source imports or reaches by attribute, as a dotted name; late and type-only imports too.

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
    return set(modules_in(ast.parse(path.read_text(encoding="utf-8"), str(path))))


def files_imported(path: Path) -> Iterator[str]:
    """Yield the project's files that one imports: of `from room import file` the file, of `from room import name` the room's face."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            found = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else str(node.module) for name in found if str(node.module) in MODULES)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room_of(module: str) -> str | None:
    """Return "orchestrator.config" for orchestrator.config.trial; None for a file at the top of a package."""
    return next((room for room in ROOMS if is_within(module, room)), None)


def refused(module: str, imported: str) -> bool:
    """Return whether the rules forbid a module of a room to import this other module of the project."""
    room = room_of(module)
    package = imported.split(".")[0]
    if package not in PACKAGES or room is None or is_within(imported, room):
        return False
    own, allowed = room.split(".")[0], ROOMS[room]
    if package != own:
        return package not in allowed
    name = imported.split(".")[1] if "." in imported else ""
    return name not in allowed | GROUND[own] and imported != own


def test_rooms_import_what_their_rule_names() -> None:
    assert not [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        for imported in sorted(imports(path))
        if refused(module, imported)
    ]


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("orchestrator.config.trial", "orchestrator.storage.paths"),
        ("orchestrator.pareto.front", "gator"),
        ("orchestrator.storage.files", "orchestrator.cli"),
        ("gator.graph.graph", "gator.costs.summary"),
        ("gator.costs.base", "orchestrator.errors"),
    ],
)
def test_an_import_against_the_rules_is_seen(module: str, imported: str) -> None:
    assert refused(module, imported)


def test_the_ground_imports_nothing_else() -> None:
    for package, names in GROUND.items():
        for name in names:
            own = {module for module in imports(PROJECT / package / f"{name}.py") if is_within(module, package)}
            assert {module.split(".")[1] for module in own if "." in module} <= names


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_in_its_rooms_only(library: str) -> None:
    allowed = {f"orchestrator.{name}" for name in LIBRARIES[library]}
    assert not [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        if is_within(module, "orchestrator") and (room_of(module) or module) not in allowed
        for imported in sorted(imports(path))
        if is_within(imported, library)
    ]


def test_gator_needs_torch_safetensors_and_the_standard_library_only() -> None:
    allowed = {"gator", "torch", "safetensors", *sys.stdlib_module_names}
    roots = {(path.name, module.partition(".")[0]) for path in sources("gator") for module in imports(path)}
    assert roots
    roots -= {("gpu_state.py", "pynvml")}  # NVIDIA's binding of its driver, where it is installed
    assert not [f"gator/{name} imports {root}" for name, root in sorted(roots) if root not in allowed]


def test_no_files_import_one_another_in_a_circle() -> None:
    graph = {module: {name for name in files_imported(path) if name != module} for module, path in MODULES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the files of a circle
    assert set(order) == set(MODULES)


def test_rooms_form_no_circle() -> None:
    for package in PACKAGES:
        rules = {room.split(".")[1]: rule for room, rule in ROOMS.items() if is_within(room, package)}
        assert set(graphlib.TopologicalSorter(rules).static_order()) >= rules.keys()


def test_every_folder_is_a_room_of_a_size_that_can_be_read() -> None:
    folders = {path.parent for path in MODULES.values()}
    names = {".".join(folder.relative_to(PROJECT).parts) for folder in folders} - set(PACKAGES)
    assert names == {
        *ROOMS,
        "gator.tracing.calls",
        "gator.tracing.rules",
        "orchestrator.datasets.parquet",
        "orchestrator.datasets.stored",
    }
    for folder in folders:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST_FILES, f"{folder}: {len(files)} files"
        rule = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert rule, f"{folder}/__init__.py: expected the room's rule as its docstring"
    assert not [str(path) for path in MODULES.values() if len(path.read_text().splitlines()) > MOST_LINES]
    for package, most in (("gator", 10), ("orchestrator", 26)):
        entries = [path for path in (PROJECT / package).iterdir() if not path.name.startswith("__pycache__")]
        assert len(entries) <= most, f"{package}/ has {len(entries)} entries"


def test_each_room_says_what_it_may_import() -> None:
    for room, allowed in ROOMS.items():
        rule = ast.get_docstring(ast.parse((PROJECT / room.replace(".", "/") / "__init__.py").read_text())) or ""
        named = set(re.findall(r"\w+", rule.partition("Imports:")[2].partition(".")[0].partition(";")[0]))
        assert named & {name.split(".")[1] for name in ROOMS} | (named & {"gator"}) == allowed, room


def test_no_module_shadows_the_standard_library() -> None:
    names = {path.relative_to(PROJECT): path.stem for path in sources("benchmarks")}
    names |= {path.relative_to(PROJECT): path.stem for path in MODULES.values() if path.parent.name in PACKAGES}
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
    assert module in set(modules_in(ast.parse(source)))


def test_what_every_command_loads_is_light() -> None:
    """`--help` and a typo are answered without torch, Ray, MLflow or Optuna."""
    light = [name for name in MODULES if any(is_within(name, f"orchestrator.{room}") for room in LIGHT)]
    code = (
        f"import importlib, sys\nfor name in {light!r}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'optuna'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, env=os.environ)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_processes_that_wait_for_a_trials_workers_do_without_torch() -> None:
    """Of each trial, the one that Tune starts and Ray Train's controller, which unpickles the configuration of the process group."""
    code = (
        "import pickle, sys, orchestrator.tuning.trainable\n"
        "from ray.train.v2._internal.execution.controller import TrainController\n"
        "from orchestrator.trial.process_group import ProcessGroupConfig\n"
        "pickle.loads(pickle.dumps(ProcessGroupConfig('gloo'))).backend_cls()\n"
        "print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, env=os.environ)
    assert found.stdout.strip() == "False", found.stdout + found.stderr
