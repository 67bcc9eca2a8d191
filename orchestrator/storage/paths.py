"""The path of every file of a run, in one place.

<storage>/                      StoragePaths
    mlflow.db  mlartifacts/     the embedded MLflow, one for all searches
    base/<hash>/                base networks, shared by all trials and searches that agree on their config
    <name>/                     RunPaths, one search
        trials/<trial_id>/      TrialPaths, one trial
    <name>-train/               TrainPaths, one training without a search
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from orchestrator.errors import RunDirError
from orchestrator.storage.addresses import is_address, joined

CACHE = Path("~/.cache/gator")
_TRIAL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def make_trial_id(number: int) -> str:
    """Return the id of the trial with this number, from 0.

    >>> make_trial_id(7)
    'trial_0007'
    """
    return f"trial_{number:04d}"


def trial_number(trial_id: str) -> int:
    """Return the number in a trial's id."""
    return int(trial_id.removeprefix("trial_"))


@dataclass(frozen=True)
class Folder:
    """A folder in which this project alone writes."""

    root: Path

    def refuse_links(self) -> None:
        """Raise RunDirError if something in it is a link: reading or writing it would leave the folder."""
        links = sorted(path.name for path in self.root.iterdir() if path.is_symlink()) if self.root.is_dir() else []
        if links:
            raise RunDirError(f"{self.root}: {', '.join(links)} is a link, expected a file; replace it with its target")


@dataclass(frozen=True)
class TrialPaths(Folder):
    """The files of one trial."""

    @property
    def config(self) -> Path:
        """The full TrialConfig; this file alone repeats the trial."""
        return self.root / "config.json"

    @property
    def architecture(self) -> Path:
        """Which channels are kept."""
        return self.root / "architecture.json"

    @property
    def widths(self) -> Path:
        """The widths of every channel group before and after, as a table."""
        return self.root / "widths.csv"

    @property
    def weights(self) -> Path:
        """The pruned and fine-tuned network."""
        return self.root / "weights.safetensors"

    @property
    def gates(self) -> Path:
        """The gates' logits at the end of the gating stage, for a stage that starts from this trial."""
        return self.root / "gates.safetensors"

    @property
    def cut(self) -> "TrialPaths":
        """The network as pruned, before it was fine-tuned, and its gates; only written if later trials may start from them."""
        return TrialPaths(self.root / "cut")

    @property
    def metrics(self) -> Path:
        """One row per epoch."""
        return self.root / "metrics.parquet"

    @property
    def log(self) -> Path:
        """What rank 0 logged."""
        return self.root / "log.txt"

    @property
    def stop(self) -> Path:
        """A file that asks the workers to save the trial and end."""
        return self.root / ".stop"

    def exported(self, form: str) -> Path:
        """The pruned network without its class, written by `orchestrator export`; form: onnx or pt2."""
        return self.root / f"network.{form}"


CHECKPOINTS = "checkpoint_*"
"""Pattern of the folders that Ray Train makes in the folder of a run, one per checkpoint."""
TRAIN_RECORD = "checkpoint_manager_snapshot.json"
"""Ray Train's record of these checkpoints, in the same folder. Its schema depends on Ray's version."""
BEFORE_THE_FIRST_EPOCH = frozenset(
    ["config.json", "search.json", "log.txt", "ray", "trials", "study.log", "search_id", "latency_curve.json"]
)
"""What a run writes before it has results; until then `ray` holds no checkpoint and `trials` no epoch."""


@dataclass(frozen=True)
class RunDirPaths(Folder):
    """What the run directories of a search and of a training have in common."""

    NOUN: ClassVar[str]
    """What a message calls its content."""
    CONFIG: ClassVar[str]
    """Name of the file that identifies a run directory."""

    @property
    def config(self) -> Path:
        """The full config, saved before anything starts."""
        return self.root / self.CONFIG

    @property
    def ray(self) -> Path:
        """Ray's own state: Train's checkpoints, and Tune's files if it is a search."""
        return self.root / "ray"

    @property
    def train(self) -> Path:
        """A folder per Ray Train run of a search, named after the trial."""
        return self.ray / "train"

    @property
    def tune(self) -> Path:
        """What Ray Tune writes; never read."""
        return self.ray / "tune"

    @property
    def recorded(self) -> Path:
        """How to open a finished search in MLflow; written once MLflow has all of it."""
        return self.root / "recorded.txt"

    @property
    def lock(self) -> Path:
        """Held by the process that works in this run directory."""
        return self.root / ".lock"

    @property
    def requests(self) -> Path:
        """What a person asks that process for; a line of JSON each."""
        return self.root / ".requests.jsonl"


@dataclass(frozen=True)
class TrainPaths(RunDirPaths, TrialPaths):
    """The files of one training without a search: those of a trial, in a run directory."""

    NOUN: ClassVar[str] = "training"
    CONFIG: ClassVar[str] = "config.json"
    SUFFIX: ClassVar[str] = "-train"
    """Appended to the space's name, which alone is the run directory of its search."""

    @property
    def result(self) -> Path:
        """The final metrics; written when the network is trained and measured."""
        return self.root / "result.json"


@dataclass(frozen=True)
class RunPaths(RunDirPaths):
    """The files of one search."""

    NOUN: ClassVar[str] = "search"
    CONFIG: ClassVar[str] = "search.json"

    @property
    def study(self) -> Path:
        """Optuna's journal."""
        return self.root / "study.log"

    @property
    def reports(self) -> Path:
        """The reports that the scheduler received, one line of JSON each."""
        return self.root / "reports.jsonl"

    @property
    def results(self) -> Path:
        """One row per trial."""
        return self.root / "results.parquet"

    @property
    def pareto(self) -> Path:
        """The front as JSON."""
        return self.root / "pareto.json"

    @property
    def report(self) -> Path:
        """The report for people, as a page."""
        return self.root / "report.html"

    @property
    def front_png(self) -> Path:
        """The front as a picture."""
        return self.root / "front.png"

    @property
    def latency_curve(self) -> Path:
        """The curve from which trials on CPUs estimate latency, measured before the first of them."""
        return self.root / "latency_curve.json"

    @property
    def search_id(self) -> Path:
        """The id that connects this directory with its runs in MLflow."""
        return self.root / "search_id"

    @property
    def trials(self) -> Path:
        """One folder per trial."""
        return self.root / "trials"

    def trial(self, trial_id: str) -> TrialPaths:
        """Return the paths of one trial; nothing is created.

        Raises: RunDirError for an id that leads out of the run directory, or a folder that is a link: ids are also read from
        results.parquet, which somebody else may have written.
        """
        if not _TRIAL_ID.fullmatch(trial_id):
            raise RunDirError(
                f"{trial_id[:60]!r} is not a trial id (in {self.root}), expected letters, digits, dashes and underscores"
            )
        paths = TrialPaths(self.trials / trial_id)
        for folder in (self.trials, paths.root):
            if folder.is_symlink():
                raise RunDirError(f"{folder} is a link, expected a folder; replace it with its target")
        return paths

    def trial_ids(self) -> list[str]:
        """Return the ids of the trials that have a folder, sorted."""
        if not self.trials.is_dir():
            return []
        return sorted(folder.name for folder in self.trials.iterdir() if folder.is_dir() and not folder.is_symlink())


@dataclass(frozen=True)
class BasePaths(Folder):
    """The files of one base network: trained once, shared by the trials that start from it."""

    @property
    def weights(self) -> Path:
        """The state dict of the unpruned network."""
        return self.root / "weights.safetensors"

    @property
    def record(self) -> Path:
        """What it was trained from, and its metrics; for people."""
        return self.root / "base.json"

    @property
    def ray(self) -> Path:
        """The checkpoints of its training."""
        return self.root / "ray"

    @property
    def stop(self) -> Path:
        """The stop file, as of a trial; only the process that holds the lock writes it, since others wait for the same network."""
        return TrialPaths(self.root).stop


@dataclass(frozen=True)
class StoragePaths:
    """The folders and files in the storage: run directories, base networks and MLflow's store."""

    root: Path
    address: str | None = None
    """Of the object store, if the storage is one; `root` is then a folder on the head's disk."""

    @classmethod
    def at(cls, place: str, local: str | None = None) -> "StoragePaths":
        """Return the storage at a path, or at an address of an object store.

        local: the folder on the head's disk that is used with an address; one in the home folder by default.
        """
        if not is_address(place):
            return cls(Path(place))
        address, mark, options = place.partition("?")
        address = address.rstrip("/")
        return cls(Path(local or CACHE / address.replace("://", "/")).expanduser(), f"{address}{mark}{options}")

    def name_of(self, path: Path) -> str:
        """Return the name of a file or folder below the root, which is its name in the object store."""
        return path.resolve().relative_to(self.root.resolve()).as_posix()

    @property
    def shared(self) -> Path | None:
        """The folder that every node has to mount; None if the storage is an object store."""
        return self.root if self.address is None else None

    def holds(self, path: Path) -> bool:
        """Return whether the path is below the root."""
        return path.resolve().is_relative_to(self.root.resolve())

    def place(self, path: Path) -> str:
        """Return where every node finds a file or folder of the storage: its address if the storage is an object store, else its path."""
        return str(path.resolve()) if self.address is None else joined(self.address, self.name_of(path))

    @property
    def mlflow_db(self) -> Path:
        """The SQLite store of the embedded MLflow."""
        return self.root / "mlflow.db"

    @property
    def mlartifacts(self) -> Path:
        """The artifact folder of the embedded MLflow."""
        return self.root / "mlartifacts"

    def base(self, base_hash: str) -> BasePaths:
        """Return the paths of the base network with this TrialConfig.base_hash()."""
        return BasePaths(self.root / "base" / base_hash)

    def run(self, name: str) -> RunPaths:
        """Return the paths of the search with this name."""
        return RunPaths(self.root / name)
