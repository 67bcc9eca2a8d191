"""Searches that are killed again and again, and end like one that nobody disturbed.

    python -m tests.faults.harness LOG --kind full --kills 60 --seed 0

A round is one search: faults drawn from (seed, round) hit it one after the other, the same command goes on after each, and at
the end its records are compared with those of an undisturbed search. LOG gets a line of JSON per fault and per round; the same
command goes on behind the last complete round, so that many kills can be collected in pieces.

full: real trials on two cores, a minute each.    instant: real Ray, Tune, records and MLflow, trials that only report.
store: real trials in an object store; each fault ends all processes of the head and empties its disk, and another head takes over.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
from mlflow import MlflowClient

from orchestrator.storage.addresses import AddressedFolder, joined
from orchestrator.storage.files import write_atomic
from orchestrator.storage.mirror import SAVED_EVERY_S
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.records import read_metrics, read_results
from orchestrator.tuning.report_log import ReportLog
from tests.orchestrator.servers import object_store

PROJECT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

Kind = Literal["full", "instant", "store"]
SEARCH, HEAD = "search", "head"
PROCESSES = {
    "train worker": "ray::RayTrainWorker",
    "train controller": "ray::TrainController",
    "trial driver": "ray::ImplicitFunc",
    "measuring process": "ray::_measure_fixed",
    "raylet": "raylet/raylet",
}
"""What is killed -> how its command line begins, or what it holds."""
SIGNALS = {"SIGINT": signal.SIGINT, "SIGINT twice": signal.SIGINT, "SIGTERM": signal.SIGTERM}
FAULTS: dict[Kind, dict[str, int]] = {
    "full": {SEARCH: 4, "train worker": 8, "train controller": 2, "trial driver": 6, "measuring process": 1, "raylet": 2,
             "SIGINT": 2, "SIGINT twice": 1, "SIGTERM": 2},
    "store": {HEAD: 1},
    "instant": {SEARCH: 3, "trial driver": 30, "raylet": 1, "SIGINT": 1, "SIGINT twice": 1, "SIGTERM": 1},
}  # fmt: skip
"""What may happen, with how often relative to each other."""
SPENDS = {"train worker": "worker failures", "train controller": "driver failures", "trial driver": "driver failures"}
"""What a fault spends of what a trial may spend in one process of the search before it is given up: each once at most."""
EXIT_CODES = {"SIGINT": {130}, "SIGINT twice": {130, -signal.SIGINT}, "SIGTERM": {143}}
"""Of a search that is under way; before Ray is up, a signal ends it as it ends any program."""
OF_THE_PROCESS = {"mlflow_run_id", "train_s", "eval_s", "measure_s"}
"""Columns that no two searches share."""
WHEN_UNDER_WAY = 0.8
"""Share of the faults that wait for the first trial, or the base network, to begin; the others may hit the start."""
END_TIMEOUT_S, DRIVER_TIMEOUT_S = 90.0, 600.0
PROMISED_S = SAVED_EVERY_S + 2.0
"""What was written so long before a head is lost is in the store; a copy takes its time."""


class FaultError(AssertionError):
    """A promise of docs/reliability.md that did not hold."""


@dataclass
class Search:
    """One run directory, the process that works in it now, and all sessions of processes it has had."""

    kind: Kind
    storage: Path
    seconds_per_epoch: float = 1.0
    num_trials: int = 12
    """This and the line above: of searches with instant trials."""
    process: "subprocess.Popen[bytes] | None" = None
    sessions: list[int] = field(default_factory=list)
    mlflow_uri: str | None = None
    """A server; None is SQLite in the storage. Searches with instant trials only."""
    space: str = "faulty"
    """A YAML file beside this one. Searches with real trials only."""
    address: str | None = None
    """Of the storage in an object store; the folder `storage` is then the home folder of the head."""
    log: Path = field(init=False)
    """What the search says. Beside its storage, which may be full."""
    said_before: int = 0
    """Length of the log when the process started."""

    def __post_init__(self) -> None:
        self.log = self.storage.with_name(f"{self.storage.name}.stderr.txt")

    @property
    def run(self) -> RunPaths:
        """The run directory."""
        return RunPaths(self.root / ("instant" if self.kind == "instant" else self.space))

    @property
    def root(self) -> Path:
        """The storage on the disk of the machine."""
        return (
            self.storage if self.address is None else self.storage / ".cache/gator" / self.address.replace("://", "/")
        )

    def start(self) -> None:
        """Start the command, in a session of its own."""
        self.storage.mkdir(parents=True, exist_ok=True)
        # Ray's sockets lie in it; their paths end at 107 characters.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if self.address is not None:
            environment["HOME"] = str(self.storage)
        with open(self.log, "ab") as log:
            self.said_before = log.tell()
            self.process = subprocess.Popen(
                self._command(), cwd=PROJECT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self.sessions.append(self.process.pid)

    def _command(self) -> list[str]:
        python = [sys.executable, "-m"]
        if self.kind == "instant":
            command = [
                *python,
                "tests.orchestrator.instant_search",
                str(self.storage),
                str(self.seconds_per_epoch),
                str(self.num_trials),
            ]
            return command if self.mlflow_uri is None else [*command, self.mlflow_uri]
        space, cluster = HERE / f"{self.space}.yaml", HERE / "one_worker.yaml"
        command = [*python, "orchestrator.search", str(space), "--cluster", str(cluster), "--run-dir"]
        if self.address is None:
            return [*command, str(self.storage)]
        renamed = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"head-{len(self.sessions)}"]
        return [*renamed, *command, self.address, "--take-over"]

    def members(self) -> list[psutil.Process]:
        """Return the processes that this search has started and that still run."""
        return [
            process for process in psutil.process_iter() if _session(process) in self.sessions and _is_alive(process)
        ]

    def wait_for_the_end_of_all(self) -> None:
        """Raise FaultError if something of the search outlives the process that ran it."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while left := self.members():
            if time.monotonic() > deadline:
                names = [" ".join(process.cmdline())[:60] for process in left]
                for process in left:
                    process.kill()
                raise FaultError(f"{len(left)} processes outlive the search: {names}")
            time.sleep(0.2)

    def wait_until_under_way(self) -> None:
        """Wait until the process of the search has started a trial, trains the base network, or has ended."""
        assert self.process is not None
        while self.process.poll() is None and not self.is_under_way():
            time.sleep(0.2)

    def is_under_way(self) -> bool:
        """Return whether the process of the search has come to the base network or a trial."""
        said = self.log.read_bytes()[self.said_before :]
        return b" starts\n" in said or b"Preparing the base network" in said

    def hurry(self) -> None:
        """Let instant trials report as fast as they can from the next one on: what was to be seen of them has been."""
        self.seconds_per_epoch = 0.0
        (self.storage / "seconds_per_epoch").write_text("0.0")

    def finish(self) -> None:
        """Run the command to its end. Raises: FaultError unless it exits with 0."""
        if self.process is None:
            self.start()
        assert self.process is not None
        code = self.process.wait(timeout=DRIVER_TIMEOUT_S)
        if code != 0:
            raise FaultError(f"the search ended with {code}: {self.last_words()}")
        self.wait_for_the_end_of_all()

    def last_words(self) -> str:
        """Return the end of what the search has said."""
        return self.log.read_text(errors="replace")[-2000:]


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(is_so: Callable[[], bool], timeout_s: float = 300.0) -> None:
    """Return once it is so. Raises: AssertionError if it is not in time."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"it is not so {timeout_s:g} s later"
        time.sleep(0.5)


# --- one fault --------------------------------------------------------------------------------------------------------


def inject(search: Search, fault: str, chance: random.Random) -> str | None:
    """Let one fault happen now; return what was hit, None if there is nothing to hit.

    What ends the search is waited for, with everything that the search started. Raises: FaultError.
    """
    assert search.process is not None
    if fault in SIGNALS:
        return _signal(search, fault, chance)
    if fault == SEARCH:
        search.process.kill()
        _wait_for_death(search)
        return f"pid {search.process.pid}"
    if fault == HEAD:
        return _lose_head(search)
    victims = [process for process in search.members() if _is_named(process, PROCESSES[fault])]
    if not victims:
        return None
    victim = chance.choice(sorted(victims, key=lambda process: process.pid))
    name = _title(victim)
    try:
        victim.kill()
    except psutil.NoSuchProcess:
        return None
    if fault == "raylet":
        _wait_for_death(search)
    return name


def _signal(search: Search, fault: str, chance: random.Random) -> str:
    assert search.process is not None
    is_under_way = search.is_under_way()
    search.process.send_signal(SIGNALS[fault])
    if fault == "SIGINT twice":
        time.sleep(chance.uniform(0.05, 1.0))
        search.process.send_signal(signal.SIGINT)
    _wait_for_death(search)
    if search.process.returncode not in EXIT_CODES[fault] | (set() if is_under_way else {-SIGNALS[fault]}):
        raise FaultError(f"{fault}: exit code {search.process.returncode}: {search.last_words()}")
    return f"exit {search.process.returncode}"


def _lose_head(search: Search) -> str | None:
    """End all processes of the head and empty its disk. Raises: FaultError unless the store has what it had to have."""
    assert search.process is not None
    assert search.address is not None
    promised = _written(search.run)
    time.sleep(PROMISED_S)
    if search.process.poll() is not None:
        return None
    written = _written(search.run)
    for process in search.members():
        process.kill()
    _wait_for_death(search)
    shutil.rmtree(search.storage)
    copy = AddressedFolder(joined(search.address, search.run.root.name))
    for name in copy.names():
        if name in (search.run.results.name, search.run.reports.name):
            write_atomic(search.run.root / name, copy.read(name))
    kept = _written(search.run)
    shutil.rmtree(search.storage, ignore_errors=True)
    if lost := promised - kept:
        raise FaultError(f"the store lacks what was written {PROMISED_S:g} s before the head was lost: {lost}")
    return f"{len(written)} rows and reports written, {len(written - kept)} of them in the last seconds and lost"


def _written(run: RunPaths) -> set[str]:
    """Return the rows and the reports of a run."""
    rows = read_results(run.results) if run.results.exists() else []
    reports = run.reports.read_text().splitlines(keepends=True) if run.reports.exists() else []
    return {f"{row['trial_id']} {row['status']}" for row in rows} | {line for line in reports if line.endswith("\n")}


def _wait_for_death(search: Search) -> None:
    assert search.process is not None
    try:
        search.process.wait(timeout=END_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise FaultError(f"the search has not ended {END_TIMEOUT_S:g} s later: {search.last_words()}") from error
    search.wait_for_the_end_of_all()


def _is_named(process: psutil.Process, name: str) -> bool:
    title = _title(process)
    return title.startswith(name) or (name.startswith("raylet") and name in title.split(" ")[0])


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:80].strip()
    except psutil.Error:
        return ""


def running_trial(run: RunPaths) -> str:
    """Return the trial that is under way, by its folder; "" before the first."""
    ended = {row["trial_id"] for row in read_results(run.results)} if run.results.exists() else set()
    return max(set(run.trial_ids()) - ended, default="")


# --- one round --------------------------------------------------------------------------------------------------------


def draw(kind: Kind, num: int, chance: random.Random) -> list[str]:
    """Return faults at random, by their weights."""
    return chance.choices(list(FAULTS[kind]), list(FAULTS[kind].values()), k=num)


def disturbed(
    search: Search, faults: Sequence[str], chance: random.Random, longest_wait_s: float
) -> Iterator[dict[str, Any]]:
    """Hit a search with faults, starting it again where needed, and bring it to its end; yield a line for each that hit.

    A fault whose victim does not run at the moment drawn for it is tried again, until the search comes to its end.
    """
    left, spent = list(faults), set[tuple[str, str]]()
    search.start()
    began = time.monotonic()
    while left:
        fault, wait_s = left[0], chance.uniform(0.5, longest_wait_s)
        if chance.random() < WHEN_UNDER_WAY:
            search.wait_until_under_way()
        time.sleep(wait_s)
        assert search.process is not None
        trial = running_trial(search.run)
        while fault in SPENDS and (trial == "" or (SPENDS[fault], trial) in spent) and search.process.poll() is None:
            time.sleep(0.2)
            trial = running_trial(search.run)
        if search.process.poll() is not None:
            break  # it has come to its end
        state = _state(search.run)
        hit = inject(search, fault, chance)
        if hit is None:
            if fault == "measuring process" and state["rows"] > 0:
                left.pop(0)  # it measures the unpruned network, once
            continue
        left.pop(0)
        yield {"fault": fault, "hit": hit, "seconds_after_start": round(time.monotonic() - began, 1), **state}
        if fault in SPENDS:
            spent.add((SPENDS[fault], trial))
        if search.process.poll() is not None:
            spent.clear()
            search.start()
            began = time.monotonic()
    search.finish()


def _state(run: RunPaths) -> dict[str, Any]:
    """Return how far the search is."""
    trial = running_trial(run)
    metrics = run.trial(trial).metrics if trial else None
    epochs = len(read_metrics(metrics)) if metrics is not None and metrics.exists() else 0
    return {"rows": len(read_results(run.results)) if run.results.exists() else 0, "trial": trial, "epochs": epochs}


def fingerprint(run: RunPaths) -> dict[str, Any]:
    """Return what must not depend on whether the search was disturbed."""
    rows = sorted(read_results(run.results), key=lambda row: str(row["trial_id"]))
    return {
        "rows": [{name: value for name, value in row.items() if name not in OF_THE_PROCESS} for row in rows],
        "rungs": [(report["trial_id"], report["epoch"], report["top1"]) for report in ReportLog(run.reports).read()],
        "front": _without_run_ids(json.loads(run.pareto.read_text())),
        "epochs": {
            name: [(epoch["epoch"], epoch["stage"], epoch["top1"]) for epoch in read_metrics(run.trial(name).metrics)]
            for name in run.trial_ids()
            if _status(rows, name) == "finished"
        },
        "networks": {
            name: (run.trial(name).architecture.read_text(), run.trial(name).weights.read_bytes())
            for name in run.trial_ids()
            if run.trial(name).weights.exists() and _status(rows, name) == "finished"
        },
    }


def _without_run_ids(front: dict[str, Any]) -> dict[str, Any]:
    members = [{name: value for name, value in row.items() if name not in OF_THE_PROCESS} for row in front["front"]]
    return {**front, "front": members}


def _status(rows: list[dict[str, Any]], trial_id: str) -> str:
    return next((row["status"] for row in rows if row["trial_id"] == trial_id), "none")


def check(search: Search, expected: dict[str, Any]) -> None:
    """Raise FaultError unless the search has ended as expected: the same results, nothing twice, nothing left behind."""
    found = fingerprint(search.run)
    for part, value in expected.items():
        if found[part] != value:
            raise FaultError(f"{part} differ: found {str(found[part])[:1500]}, undisturbed {str(value)[:1500]}")
    twice = [key for key, count in Counter((trial, epoch) for trial, epoch, _ in found["rungs"]).items() if count > 1]
    if twice:
        raise FaultError(f"judged twice: {twice}")
    _check_mlflow(search)
    if left := leftovers(search.root):
        raise FaultError(f"temporary files are left: {left}")
    if has_traceback(text := search.log.read_text(errors="replace")):
        raise FaultError(f"a traceback was shown: {text[-4000:]}")


def leftovers(storage: Path) -> list[str]:
    """Return the hidden files that a search has left in its storage, but for locks and what Ray keeps."""
    hidden = sorted(path.relative_to(storage) for path in storage.rglob(".*"))
    return [str(path) for path in hidden if path.name != ".lock" and "ray" not in path.parts]


def has_traceback(text: str) -> bool:
    """Return whether the search itself showed one; Ray puts the name of a worker before each line of its."""
    return any(line.startswith("Traceback") for line in text.splitlines())


def _check_mlflow(search: Search) -> None:
    client = MlflowClient(f"sqlite:///{search.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(search.run.root.name)
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    names = Counter(run.data.tags.get("gator.trial_id", "search") for run in runs)
    rows = {row["trial_id"]: row for row in read_results(search.run.results)}
    if names != Counter({**dict.fromkeys(rows, 1), "search": 1}):
        raise FaultError(f"MLflow has runs {dict(names)}, expected one for each of {sorted(rows)} and the search")
    unended = [run.info.run_name for run in runs if run.info.status != "FINISHED"]
    if unended:
        raise FaultError(f"MLflow has runs that are not FINISHED: {unended}")
    for run in runs:
        row = rows.get(run.data.tags.get("gator.trial_id", ""), {"macs": None})
        if row["macs"] is not None and run.data.metrics["macs"] != row["macs"]:
            raise FaultError(
                f"MLflow has {run.data.metrics['macs']} macs of {run.info.run_name}, expected {row['macs']}"
            )


def undisturbed(kind: Kind, storage: Path, num_trials: int = 12) -> dict[str, Any]:
    """Return the fingerprint of a search that runs to its end, or has already done so in this storage."""
    search = Search(kind, storage, seconds_per_epoch=0.0, num_trials=num_trials)
    search.finish()
    return fingerprint(search.run)


# --- many rounds ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run rounds until the log has as many faults as asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--kind", choices=("full", "instant", "store"), default="full")
    parser.add_argument("--kills", type=int, default=100, help="faults in all, those in the log included")
    parser.add_argument("--per-search", type=int, default=10)
    parser.add_argument("--longest-wait", type=float, default=40.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further round after this time")
    arguments = parser.parse_args()
    began = time.monotonic()
    reference = arguments.log.with_suffix(f".{arguments.kind}")
    expected = undisturbed("full" if arguments.kind == "store" else arguments.kind, reference)
    print(
        f"undisturbed: {len(expected['rows'])} rows, {Counter(row['status'] for row in expected['rows'])}", flush=True
    )
    while (done := _done(arguments.log)).kills < arguments.kills and time.monotonic() < began + 60 * arguments.minutes:
        with tempfile.TemporaryDirectory(prefix="faults") as folder, store_of(arguments.kind, Path(folder)):
            _round(arguments, done.rounds, Path(folder), expected)


@contextmanager
def store_of(kind: Kind, folder: Path) -> Iterator[None]:
    """Keep an empty object store for the searches that need one, and its credentials in the environment."""
    if kind != "store":
        yield
        return
    with object_store(folder / "store.txt") as environment:
        os.environ.update(environment)
        yield


@dataclass(frozen=True)
class _Done:
    rounds: int
    kills: int


def _done(log: Path) -> _Done:
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    ends = [line for line in lines if "outcome" in line]
    return _Done(len(ends), sum(line["kills"] for line in ends))


def _round(arguments: argparse.Namespace, number: int, folder: Path, expected: dict[str, Any]) -> None:
    seed = f"{arguments.kind} {arguments.seed} {number}"
    address = "s3://bucket/runs" if arguments.kind == "store" else None
    search, chance = Search(arguments.kind, folder / "storage", address=address), random.Random(seed)
    hits: list[dict[str, Any]] = []
    outcome = "same"
    began = time.monotonic()
    try:
        for hit in disturbed(search, draw(search.kind, arguments.per_search, chance), chance, arguments.longest_wait):
            hits.append(hit)
            _append(arguments.log, {"seed": seed, **hit})
        check(search, expected)
    except FaultError as error:
        outcome = str(error)
        shutil.copytree(folder, arguments.log.with_suffix(f".round{number}"), dirs_exist_ok=True, symlinks=True)
    finally:
        for process in search.members():
            process.kill()
    seconds = round(time.monotonic() - began)
    _append(arguments.log, {"seed": seed, "outcome": outcome, "kills": len(hits), "seconds": seconds})


def _append(log: Path, line: dict[str, Any]) -> None:
    text = json.dumps(line)
    print(text[:300], flush=True)
    with open(log, "a") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    main()
