"""A search recorded by a team's MLflow: a tracking server over PostgreSQL that goes away in the middle."""

import json
import os
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.config.cluster import ClusterConfig
from orchestrator.errors import TrackingError
from orchestrator.reporting.outcome import Outcome
from orchestrator.reporting.page import write_report
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths, StoragePaths
from orchestrator.storage.records import append_result
from orchestrator.tracking import delivery
from orchestrator.tracking.tracker import Tracker
from tests.orchestrator import planted
from tests.orchestrator.servers import SERVE, free_port, mlflow_server, postgres

CONFIG = planted.search_config()
NUM_TRIALS = 8
NUM_EPOCHS = 6


@pytest.fixture(scope="module")
def store_uri() -> Iterator[str]:
    with postgres() as uri:
        yield uri


@pytest.fixture
def storage(tmp_path: Path) -> StoragePaths:
    return StoragePaths(tmp_path)


@pytest.fixture
def run(storage: StoragePaths) -> RunPaths:
    run = storage.run(CONFIG.name)
    write_atomic(run.config, CONFIG.model_dump_json())
    return run


def rows() -> list[dict[str, Any]]:
    return [planted.finished(number, top1=90.0 + number, latency_ms=1.0 + number) for number in range(NUM_TRIALS)]


def report_epochs(tracker: Tracker, first: int, last: int) -> None:
    """Report epochs of all trials as they come in while they run side by side."""
    for epoch in planted.epochs(NUM_EPOCHS)[first - 1 : last]:
        for row in rows():
            tracker.epoch(row["trial_id"], epoch)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nothing_is_lost_or_doubled_when_the_server_dies_and_comes_back(
    store_uri: str, storage: StoragePaths, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "PAUSE_S", 0.0)  # the search waits for a minute; the test does not
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port, artifacts = free_port(), storage.mlartifacts
    with mlflow_server(store_uri, artifacts, port) as uri:
        tracker = Tracker.open(CONFIG, run, storage, ClusterConfig(mlflow_uri=uri))
        run_ids = {row["trial_id"]: tracker.trial_started(row["trial_id"], {}, CONFIG.base) for row in rows()}
        report_epochs(tracker, 1, 2)
    assert all(run_ids.values())
    report_epochs(tracker, 3, 4)
    assert tracker.delivery.num_failed == 2 * NUM_TRIALS
    with mlflow_server(store_uri, artifacts, port) as uri:
        report_epochs(tracker, 5, NUM_EPOCHS)
        for row in rows():
            planted.plant_trial(run, CONFIG, row)
            append_result(run.results, row)
            tracker.trial_ended(row["trial_id"], row, "finished")
        outcome = write_report(run)
        tracker.search_ended(lambda: outcome)
        client = MlflowClient(uri)
        children = client.search_runs([tracker.search.experiment_id], "tags.`gator.kind` = 'trial'")
        histories = [
            [(point.step, point.value) for point in client.get_metric_history(child.info.run_id, "train/loss")]
            for child in children
        ]
        best = client.search_runs(
            [tracker.search.experiment_id], "metrics.latency_ms <= 4.5", order_by=["metrics.top1 DESC"], max_results=1
        )
    assert {child.data.tags["gator.trial_id"]: child.info.run_id for child in children} == run_ids
    assert {child.info.status for child in children} == {"FINISHED"}
    expected = [(epoch, 1.0 / epoch) for epoch in range(1, NUM_EPOCHS + 1)]
    assert histories == [expected] * NUM_TRIALS  # in order, none missing, none twice
    assert best[0].data.tags["gator.trial_id"] == "trial_0003"


class Databricks(BaseHTTPRequestHandler):
    """Passes requests on to an MLflow server, and refuses names as Databricks and Unity Catalog do."""

    server_uri = ""

    def handle_request(self) -> None:
        """Answer any request."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        values = json.loads(body) if body and self.path.endswith("/create") else {}
        if self.path.endswith("experiments/create") and not values["name"].startswith("/"):
            self._answer(400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "expected an absolute path"}')
        elif self.path.endswith("registered-models/create") and values["name"].count(".") != 2:
            self._answer(400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "expected three levels"}')
        else:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            request = urllib.request.Request(self.server_uri + self.path, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    self._answer(response.status, response.read())
            except urllib.error.HTTPError as error:
                self._answer(error.code, error.read())

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def databricks(server_uri: str) -> Iterator[str]:
    """Yield the address of a Databricks in front of an MLflow server."""
    handler = type("Handler", (Databricks,), {"server_uri": server_uri})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.timeout(300)
def test_front_is_registered_through_a_server_that_expects_names_of_its_own(
    store_uri: str, storage: StoragePaths, run: RunPaths
) -> None:
    row = planted.finished(0, 97.0, 2.0)

    def package(trial_ids: list[str], folder: str) -> dict[str, str]:
        """Stand in for the export, which test_registry.py runs: the server only sees files."""
        for trial_id, name in chain.from_iterable(((one, "MLmodel"), (one, "model.pt2")) for one in trial_ids):
            write_atomic(Path(folder, trial_id, name), "flavors: {}\n")
        return {}

    with mlflow_server(store_uri, storage.mlartifacts, free_port()) as server, databricks(server) as uri:
        with pytest.raises(TrackingError, match="expected an absolute path"):
            Tracker.open(CONFIG, run, storage, ClusterConfig(mlflow_uri=uri, mlflow_experiment="other"))
        names = {"mlflow_experiment": "/Shared/gator/{name}", "mlflow_model": "main.vision.{name}"}
        tracker = Tracker.open(CONFIG, run, storage, ClusterConfig(mlflow_uri=uri, **names))
        planted.plant_trial(run, CONFIG, row)
        run_id = tracker.trial_started(row["trial_id"], {}, CONFIG.base)
        append_result(run.results, row)
        tracker.trial_ended(row["trial_id"], row, "finished")
        tracker.register_front(Outcome.load(run), package)
        client = MlflowClient(uri)
        version = client.get_model_version_by_alias("main.vision.planted", "best")
        assert client.get_experiment(tracker.search.experiment_id).name == "/Shared/gator/planted"
    assert version.run_id == run_id
    assert version.source.startswith("mlflow-artifacts:/")
    assert sorted(path.name for path in storage.mlartifacts.rglob("model.pt2")) == ["model.pt2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({}, "MLFLOW_BACKEND_STORE_URI: set it to the data base", id="no store"),
        pytest.param(
            {"MLFLOW_BACKEND_STORE_URI": "postgresql://db/mlflow"}, "expected postgresql+psycopg2", id="driver"
        ),
    ],
)
def test_server_script_says_what_it_lacks(settings: dict[str, str], message: str) -> None:
    given = {"PATH": os.environ["PATH"], "MLFLOW_ARTIFACTS_DESTINATION": "files", **settings}
    result = subprocess.run([SERVE], env=given, capture_output=True, text=True, check=False, timeout=20)
    assert result.returncode != 0
    assert message in result.stderr
