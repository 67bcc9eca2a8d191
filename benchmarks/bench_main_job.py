"""What the default search spends its time and memory on, beside what Ray alone would need.

    python -m benchmarks.bench_main_job [SPACE] [--set key=value ...] [--out FILE.md]

Two runs on this machine, one after the other. The search, as `make search` runs it, in a fresh storage folder. Then the
baseline: as many Train runs as the search had trials, just as many at once, with as many workers, under the same Tune
settings, whose workers return at once: Ray's own start-up, which no search on Ray can do without.

Wall time is split over slots (trials at once): what a trial spends counts 1 / slots of itself, what happens before the
first and after the last trial counts whole.

    training, evaluation, measurement    as the workers clock them, in metrics.parquet and the base network's log
    start-up                             until the first trial starts, without the base network's epochs; and of each
                                         trial, from its start to its first epoch
    recording                            the driver's time in records, MLflow and the report, as far as no trial runs
                                         beside it; and of each trial, its checkpoints and reports between epochs
    waiting                              what is left: a slot whose trial has ended and whose next has not started
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import machine

PROJECT = Path(__file__).resolve().parents[1]
MARK = "GATOR_BENCH"
"""Environment variable by which all processes of a run are found, Ray's daemons included."""
CPU_EVERY_S, PSS_EVERY_S = 0.5, 3.0
MEMORY_LIMIT_GB = 7.0


# --- the two runs, each in a process of its own -------------------------------------------------------------------------


def run_search(space: str, storage: Path, overrides: list[str], events_file: Path) -> None:
    """Run the command in this process and note when trials start and end, and how long the driver records."""
    from orchestrator import search
    from orchestrator.reporting.progress import Progress
    from orchestrator.tracking.search_run import SearchRun
    from orchestrator.tracking.tracker import Tracker
    from orchestrator.tuning import driver, recorder

    events: list[dict[str, Any]] = []

    def note(owner: Any, name: str, kind: str) -> None:
        function = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            began = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                trial_id = _trial_id(args[1]) if kind.startswith("trial ") else None
                events.append({"kind": kind, "began": began, "ended": time.time(), "trial_id": trial_id})

        setattr(owner, name, noted)

    for name in ("trial_started", "epoch", "trial_ended", "remeasured", "show", "search_ended"):
        note(Tracker, name, "recording")
    note(driver, "write_report", "recording")
    note(recorder, "append_result", "recording")
    note(SearchRun, "__init__", "recording")
    for name in ("measure_fixed", "remeasure"):
        note(driver, name, "measurement")
    note(Progress, "started", "trial starts")
    note(Progress, "ended", "trial ends")
    arguments = [part for override in overrides for part in ("--set", override)]
    code = search.main([space, "--run-dir", str(storage), *arguments])
    events_file.write_text(json.dumps(events))
    sys.exit(code)


def _trial_id(told: str | dict[str, Any]) -> str:
    """Return the id in what Progress is told: the id itself, or the trial's row."""
    return told if isinstance(told, str) else str(told["trial_id"])


def run_empty(space: str, storage: Path, overrides: list[str]) -> None:
    """Run as many empty Train runs as the search has trials."""
    from ray import tune

    from orchestrator.cluster.capacity import capacity
    from orchestrator.cluster.connection import session
    from orchestrator.config.cluster import load_cluster
    from orchestrator.config.rungs import num_concurrent
    from orchestrator.planning.space import load_space
    from orchestrator.tuning.tuner import TUNE_ENVIRONMENT, driver_resources

    config, cluster = load_space(space, overrides), load_cluster("local")
    os.environ.update(TUNE_ENVIRONMENT)
    with redirect_stdout(sys.stderr), session(cluster):
        tuner = tune.Tuner(
            tune.with_resources(empty_trial, driver_resources()),
            param_space={
                "number": tune.grid_search(list(range(config.search.num_trials))),
                "storage": str(storage),
                "num_workers": cluster.workers_per_trial,
                "resources": dict(cluster.resources_per_worker),
            },
            tune_config=tune.TuneConfig(max_concurrent_trials=num_concurrent(config, capacity(cluster))),
            run_config=tune.RunConfig(name="empty", storage_path=str(storage), verbose=0),
        )
        results = tuner.fit()
    assert results.num_errors == 0, results.errors


def empty_trial(config: dict[str, Any]) -> None:
    """A trial whose workers meet and return."""
    from ray import tune
    from ray.train import LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        lambda: None,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=config["num_workers"], resources_per_worker=config["resources"]),
        run_config=RunConfig(
            name=f"empty_{config['number']}",
            storage_path=config["storage"],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    ).fit()
    tune.report({"done": True})


# --- watching a run -------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """What a run has cost."""

    began: float = 0.0
    wall_s: float = 0.0
    cpu_s: dict[int, float] = field(default_factory=dict)
    titles: dict[int, str] = field(default_factory=dict)
    peak_pss_gb: float = 0.0

    def cpu_by_title(self) -> dict[str, float]:
        """Return CPU seconds by what the processes call themselves, largest first."""
        totals: defaultdict[str, float] = defaultdict(float)
        for pid, seconds in self.cpu_s.items():
            totals[self.titles[pid]] += seconds
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


def watch(command: list[str], log: Path) -> Watched:
    """Run the command to its end and sample all processes that carry its mark."""
    token = uuid.uuid4().hex
    environment = {**os.environ, MARK: token, "PYTHONPATH": str(PROJECT)}
    watched = Watched(began=time.time())
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=output, stderr=output)
        ended = threading.Event()
        sampler = threading.Thread(target=_sample, args=(token, watched, ended))
        sampler.start()
        code = process.wait()
        watched.wall_s = time.time() - watched.began
        ended.set()
        sampler.join()
    if code != 0:
        sys.exit(f"{command} ended with {code}; its output is in {log}")
    return watched


def _sample(token: str, watched: Watched, ended: threading.Event) -> None:
    known: dict[int, psutil.Process] = {}
    strangers: set[tuple[int, float]] = set()
    next_pss = 0.0
    while not ended.wait(CPU_EVERY_S):
        for process in psutil.process_iter(["create_time"]):
            identity = (process.pid, process.info["create_time"])
            if process.pid not in known and identity not in strangers:
                if _has_mark(process, token):
                    known[process.pid] = process
                else:
                    strangers.add(identity)
        pss = 0
        for pid, process in list(known.items()):
            try:
                times = process.cpu_times()
                watched.cpu_s[pid] = times.user + times.system
                watched.titles[pid] = _title(process) or watched.titles.get(pid, "other")
                if time.time() >= next_pss:
                    pss += process.memory_full_info().pss
            except psutil.Error:
                del known[pid]
        if pss:
            next_pss = time.time() + PSS_EVERY_S
            watched.peak_pss_gb = max(watched.peak_pss_gb, pss / 1e9)


def _has_mark(process: psutil.Process, token: str) -> bool:
    try:
        return f"{MARK}={token}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return False


def _title(process: psutil.Process) -> str | None:
    """Return "ray::RayTrainWorker" and the like, one name for all processes of a kind."""
    line = " ".join(process.cmdline())
    if found := re.match(r"ray::[A-Za-z_]+", line):
        return found[0]
    for part, title in (
        ("bench_main_job", "the driver"), ("gcs_server", "Ray's daemons"), ("raylet", "Ray's daemons"),
        ("dashboard", "Ray's daemons"), ("log_monitor", "Ray's daemons"), ("monitor.py", "Ray's daemons"),
        ("default_worker", "ray::IDLE"), ("runtime_env", "Ray's daemons"),
    ):  # fmt: skip
        if part in line:
            return title
    return "other" if line else None  # a process that ends has no command line any more


# --- from events to the split -----------------------------------------------------------------------------------------


def split_wall(run_dir: Path, events: list[dict[str, Any]], watched: Watched, num_slots: int) -> dict[str, float]:
    """Return wall seconds by what they were spent on; they add up to watched.wall_s."""
    began, ended = _times(events, "trial starts"), _times(events, "trial ends")
    trials_begin, trials_end = min(began.values()), max(ended.values())
    parts: defaultdict[str, float] = defaultdict(float)
    for trial_id, start in began.items():
        for part, seconds in _split_trial(run_dir / "trials" / trial_id / "metrics.parquet", start).items():
            parts[part] += seconds / num_slots
    before = {"start-up": trials_begin - watched.began, **_base_seconds(run_dir.parent)}
    for event in events:
        seconds = event["ended"] - event["began"]
        if event["kind"] in ("recording", "measurement") and event["ended"] <= trials_begin:
            before[event["kind"]] = before.get(event["kind"], 0.0) + seconds
        elif event["kind"] in ("recording", "measurement") and event["began"] >= trials_end:
            parts[event["kind"]] += seconds
    before["start-up"] -= sum(seconds for part, seconds in before.items() if part != "start-up")
    for part, seconds in before.items():
        parts[part] += seconds
    return {**parts, "waiting": watched.wall_s - sum(parts.values())}


def _split_trial(metrics_file: Path, start: float) -> dict[str, float]:
    from orchestrator.storage.records import read_metrics

    rows = read_metrics(metrics_file)
    columns = {"training": "train_s", "evaluation": "eval_s", "measurement": "measure_s"}
    clocked = {part: sum(row[column] or 0.0 for row in rows) for part, column in columns.items()}
    first_epoch_begins = rows[0]["timestamp_ms"] / 1e3 - sum(rows[0][column] or 0.0 for column in columns.values())
    rest = rows[-1]["timestamp_ms"] / 1e3 - first_epoch_begins - sum(clocked.values())
    return {**clocked, "start-up": first_epoch_begins - start, "recording": rest}


def _base_seconds(storage: Path) -> dict[str, float]:
    """Return what the base network's epochs took, as its log tells."""
    log = next((storage / "base").glob("*/log.txt")).read_text()
    names = {"training": "train_s", "evaluation": "eval_s"}
    return {part: sum(map(float, re.findall(rf"{name} ([\d.e+-]+)", log))) for part, name in names.items()}


def _times(events: list[dict[str, Any]], kind: str) -> dict[str, float]:
    timed = [event for event in events if event["kind"] == kind]
    return {event["trial_id"]: event["ended"] for event in timed if event["trial_id"].startswith("trial_")}


# --- the table --------------------------------------------------------------------------------------------------------


def table(parts: dict[str, float], search: Watched, empty: Watched, num_trials: int, num_slots: int) -> str:
    """Return the result as Markdown."""
    names = ["start-up", "training", "evaluation", "measurement", "recording", "waiting"]
    orchestration = sum(parts[name] for name in ("start-up", "recording", "waiting"))
    allowed = empty.wall_s + 0.1 * search.wall_s
    lines = [
        f"{machine('torch', 'ray')}; {num_trials} trials, {num_slots} at once; one run of each side (n = 1, no spread).",
        "",
        "| wall time | s | share |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {parts[name]:.1f} | {parts[name] / search.wall_s:.1%} |" for name in names),
        f"| together | {search.wall_s:.1f} | |",
        "",
        "| orchestration: start-up, recording, waiting | s |",
        "| --- | ---: |",
        f"| the search | {orchestration:.1f} |",
        f"| baseline: {num_trials} empty Train runs, Ray's start included | {empty.wall_s:.1f} |",
        f"| allowed: the baseline and 10 % of the wall time | {allowed:.1f} |",
        f"| ratio of the search to what is allowed | {orchestration / allowed:.2f} |",
        "",
        f"Peak memory of all processes (PSS): {search.peak_pss_gb:.2f} GB, allowed {MEMORY_LIMIT_GB:g} GB; "
        f"baseline {empty.peak_pss_gb:.2f} GB.",
        "",
        "| CPU seconds | search | baseline |",
        "| --- | ---: | ---: |",
    ]
    ours, rays = search.cpu_by_title(), empty.cpu_by_title()
    lines += [f"| {title} | {seconds:.0f} | {rays.get(title, 0.0):.0f} |" for title, seconds in ours.items()]
    lines += [f"| together | {sum(ours.values()):.0f} | {sum(rays.values()):.0f} |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run both sides and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", nargs="?", default="digits")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=PROJECT / "benchmarks" / "results" / "main_job.md")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side, folder = arguments.child[0], Path(arguments.child[1])
        if side == "search":
            run_search(arguments.space, folder, arguments.set, folder / "events.json")
        return run_empty(arguments.space, folder, arguments.set)

    from orchestrator.config.cluster import load_cluster
    from orchestrator.config.rungs import num_concurrent
    from orchestrator.planning.space import load_space

    folder = Path(tempfile.mkdtemp(prefix="bench_main_job_"))
    sides = {}
    for side in ("search", "empty"):
        (folder / side).mkdir()
        command = [
            sys.executable,
            "-m",
            "benchmarks.bench_main_job",
            *sys.argv[1:],
            "--child",
            side,
            str(folder / side),
        ]
        print(f"{side}: {folder / side}.log", file=sys.stderr)
        sides[side] = watch(command, folder / f"{side}.log")
    config, cluster = load_space(arguments.space, arguments.set), load_cluster("local")
    per_trial = cluster.workers_per_trial * cluster.resources_per_worker["CPU"]
    num_slots = num_concurrent(config, int(os.cpu_count() // per_trial))
    events = json.loads((folder / "search" / "events.json").read_text())
    parts = split_wall(folder / "search" / config.name, events, sides["search"], num_slots)
    text = table(parts, sides["search"], sides["empty"], config.search.num_trials, num_slots)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    print(text)
    return None


if __name__ == "__main__":
    main()
