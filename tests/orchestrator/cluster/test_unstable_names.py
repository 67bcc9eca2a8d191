"""Which names of Ray and Optuna orchestrator uses that may change without notice. A new Ray is tried against this list first."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import ray

PROJECT = Path(__file__).resolve().parents[3]
SOURCES = sorted((PROJECT / "orchestrator").rglob("*.py"))
LIBRARIES = ("ray", "optuna")

UNSTABLE = {
    "optuna.importance.get_param_importances": "experimental",
    "optuna.samplers.PartialFixedSampler": "experimental",
    "optuna.samplers.QMCSampler": "experimental",
    "optuna.samplers.TPESampler": "experimental",
    "ray.cluster_resources": "DeveloperAPI",
    "ray.exceptions.ActorDiedError": "DeveloperAPI",
    "ray.nodes": "DeveloperAPI",
    "ray.train.Checkpoint": "PublicAPI (beta)",
    "ray.train.ControllerError": "PublicAPI (alpha)",
    "ray.train.LoggingConfig": "PublicAPI (alpha)",
    "ray.train.TrainingFailedError": "PublicAPI (alpha)",
    "ray.train.WorkerGroupError": "PublicAPI (alpha)",
    "ray.train.backend.Backend": "DeveloperAPI",
    "ray.train.backend.BackendConfig": "DeveloperAPI",
    "ray.train.get_preemption_info": "PublicAPI (alpha)",
    "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer": "DeveloperAPI",
    "ray.tune.Callback": "PublicAPI (beta)",
    "ray.tune.PlacementGroupFactory": "PublicAPI (beta)",
    "ray.tune.TuneConfig": "PublicAPI (beta)",
    "ray.tune.Tuner": "PublicAPI (beta)",
    "ray.tune.experiment.Trial": "DeveloperAPI",
    "ray.tune.schedulers.TrialScheduler": "DeveloperAPI",
    "ray.tune.search.Searcher": "DeveloperAPI",
    "ray.tune.with_resources": "PublicAPI (beta)",
    "ray.util.metrics.Counter": "DeveloperAPI",
    "ray.util.metrics.Gauge": "DeveloperAPI",
    "ray.util.state.list_cluster_events": "DeveloperAPI",
}
"""Name -> how its library marks it, or an argument of it."""

PRIVATE = {
    "_find_sample_id",  # QMCSampler's: the place in the Sobol sequence, from the trial's number
    "_trial_id",  # FrozenTrial's: to open a recorded trial again
}
"""Attributes and methods with an underscore that belong to a library."""

TEXTS = {
    "CheckpointManagerInitializationError",
    "No available node types can fulfill",
    "accelerator_type:",
    "checkpoint_manager_snapshot.json",
    "node:__internal_head__",
    "ray._private.authentication",
    "RAY_ADDRESS",
    "RAY_AIR_NEW_OUTPUT",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_CHDIR_TO_TRIAL_DIR",
    "RAY_GCS_SERVER_PORT",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
    "RAY_TRAIN_METRICS_ENABLED",
    "RAY_USAGE_STATS_ENABLED",
    "RAY_USE_TLS",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS",
    "TUNE_DISABLE_SIGINT_HANDLER",
    "TUNE_GLOBAL_CHECKPOINT_S",
    "TUNE_PRINT_ALL_TRIAL_ERRORS",
}
"""Environment variables, file names and other texts whose meaning is in Ray's source only."""


def bound_names(tree: ast.AST) -> dict[str, str]:
    """Return local name -> dotted name of what a file imports from the libraries."""
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {alias.asname: alias.name for alias in node.names if alias.asname}
            bound |= {root: root for root in (alias.name.partition(".")[0] for alias in node.names if not alias.asname)}
        elif isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {local: name for local, name in bound.items() if name.partition(".")[0] in LIBRARIES}


def dotted(node: ast.AST, bound: dict[str, str]) -> str | None:
    """Return "ray.tune.report" for `tune.report` after `from ray import tune`; None for what is not a library's."""
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.Attribute) and (before := dotted(node.value, bound)) is not None:
        return f"{before}.{node.attr}"
    return None


def names_in(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names of the libraries that a file uses."""
    bound = bound_names(tree)
    yield from bound.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node, bound)) is not None:
            yield name


def resolve(name: str) -> object:
    """Return the object of a dotted name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name} does not exist")


def mark_of(thing: object) -> str:
    """Return how a library marks it: "PublicAPI (alpha)", "DeveloperAPI", "experimental"; empty for stable and unmarked things."""
    if inspect.ismodule(thing):
        return ""
    text = inspect.getdoc(thing) or ""
    if re.search(r"Added in v[\d.]+ as an experimental feature", text):
        return "experimental"
    if getattr(thing, "_annotated", None) != getattr(thing, "__name__", ""):
        return ""
    found = re.search(r"\*\*(PublicAPI \(\w+\)|DeveloperAPI)", text)
    return found[1] if found else ""


TREES = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
USED = sorted({name for tree in TREES for name in names_in(tree)})


def private_uses() -> Iterator[str]:
    """Yield attributes with an underscore that their file does not define, and private methods that override a library's."""
    for tree in TREES:
        bound, nodes = bound_names(tree), list(ast.walk(tree))
        own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
        own |= {
            node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        for node in nodes if bound else ():
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                yield node.attr
            elif isinstance(node, ast.ClassDef):
                bases = [resolve(name) for base in node.bases if (name := dotted(base, bound)) is not None]
                methods = [one.name for one in node.body if isinstance(one, ast.FunctionDef)]
                yield from (name for name in methods if is_private(name) and any(hasattr(one, name) for one in bases))


def is_private(name: str) -> bool:
    return re.match(r"_[^_]", name) is not None


def test_unstable_names_are_listed() -> None:
    assert {name: mark for name in USED if (mark := mark_of(resolve(name)))} == UNSTABLE


def test_private_names_are_listed() -> None:
    assert not [name for name in USED if any(map(is_private, name.split(".")))]
    assert set(private_uses()) == PRIVATE


def test_variables_of_ray_are_listed() -> None:
    written = {found for path in SOURCES for found in re.findall(r"\"((?:RAY|TUNE)_[A-Z_]+)\"", path.read_text())}
    assert written == {text for text in TEXTS if re.match("RAY_|TUNE_", text)}


def test_ray_still_has_each_text() -> None:
    missing, root = set(TEXTS), Path(ray.__file__).parent
    missing.remove("ray._private.authentication")  # a logger's name, which is that of a package
    assert (root / "_private" / "authentication").is_dir()
    for folder in ("_private", "_common", "train/v2", "train", "tune", "air", "dashboard", "util", "autoscaler/v2"):
        for path in (root / folder).rglob("*.py") if missing else ():
            content = path.read_text(encoding="utf-8", errors="replace")
            missing -= {text for text in missing if text in content}
    assert not missing
