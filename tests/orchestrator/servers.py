"""Real servers on loopback for tests: PostgreSQL and MLflow's. They are killed at the end, whatever happens."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest

SERVE = Path(__file__).resolve().parents[2] / "clusters" / "mlflow" / "serve.sh"
POSTGRES_FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
"""Where Debian puts initdb and pg_ctl, which are not on the PATH."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def skip_or_fail(reason: str) -> None:
    """Skip a test for want of a program; in CI, which installs them all, fail."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL with an empty data base; yields its URI for MLflow."""
    if not POSTGRES_FOLDERS or shutil.which("setpriv") is None:
        skip_or_fail("needs PostgreSQL (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp())  # not one of pytest's, which are closed to the user that PostgreSQL runs as
    port, data = free_port(), folder / "data"
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    _as_nobody(folder, "initdb", "-D", str(data), "-U", "mlflow", "-A", "trust")
    _as_nobody(folder, "pg_ctl", "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        _as_nobody(folder, "pg_ctl", "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def _as_nobody(folder: Path, program: str, *arguments: str) -> None:
    """Run one of PostgreSQL's programs, which refuse to be root."""
    command = [str(POSTGRES_FOLDERS[0] / program), *arguments]
    if os.geteuid() == 0:
        shutil.chown(folder, "nobody", "nogroup")
        command = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *command]
    # no pipe: the server that pg_ctl leaves running would hold it open
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=60)


@contextmanager
def mlflow_server(store_uri: str, artifacts: Path, port: int) -> Iterator[str]:
    """MLflow's tracking server as clusters/mlflow starts it, with one worker; yields its URI. Killed by SIGKILL at the end."""
    uri = f"http://127.0.0.1:{port}"
    settings = {"MLFLOW_BACKEND_STORE_URI": store_uri, "MLFLOW_ARTIFACTS_DESTINATION": str(artifacts)}
    settings |= {"MLFLOW_PORT": str(port), "MLFLOW_WORKERS": "1", "PYTHON": sys.executable}
    artifacts.mkdir(parents=True, exist_ok=True)
    with running([SERVE], settings, f"{uri}/health", cwd=artifacts):
        yield uri


CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def object_store(log: Path, port: int | None = None) -> Iterator[dict[str, str]]:
    """An S3 server with an empty bucket named "bucket", as long as the block runs; yields the environment of its users.

    log: where it writes a line per request.
    """
    url = f"http://127.0.0.1:{port or free_port()}"
    with open(log, "a") as lines:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]],
            stdout=lines,
            stderr=lines,
        )
    try:
        wait_for(url, server)
        # moto takes unsigned requests
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
        yield {**CREDENTIALS, "AWS_ENDPOINT_URL": url}
    finally:
        server.terminate()
        server.wait()


@contextmanager
def closed_store() -> Iterator[str]:
    """A server that answers every request as S3 does without valid credentials; yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Closed) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Closed(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Refuse."""
        self.send_error(403)

    do_HEAD = do_PUT = do_POST = do_GET


@contextmanager
def google_store(log: Path) -> Iterator[str]:
    """A Google Cloud Storage with an empty bucket, as long as the block runs; yields the bucket's address.

    log: where it writes a line per request.
    """
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", "bucket"]
    with open(log, "a") as lines:
        server = subprocess.Popen(
            [sys.executable, "-m", "gcp_storage_emulator", "start", *options], stdout=lines, stderr=lines
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/storage/v1/b/bucket", server)
        yield f"gs://anonymous@bucket?endpoint_override=127.0.0.1:{port}&scheme=http"
    finally:
        server.kill()
        server.wait()


@contextmanager
def running(
    command: Sequence[str | Path], settings: Mapping[str, str], health: str, cwd: Path | None = None
) -> Iterator[None]:
    """Run a server, with these settings in its environment, until the block ends; it is up when `health` answers."""
    process = subprocess.Popen(
        command, env=os.environ | settings, cwd=cwd, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(health, process)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end(process: "subprocess.Popen[bytes]", word: signal.Signals) -> list[psutil.Process]:
    """Tell a process to end and wait for it and its children; kill and return those that outlive it."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(word)
    process.wait(60)
    _, alive = psutil.wait_procs(children, timeout=30)
    for child in alive:
        child.kill()
    return alive


def wait_for(url: str, process: "subprocess.Popen[bytes]", timeout_s: float = 120.0) -> None:
    """Wait until the process answers there."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            assert process.poll() is None, f"{process.args} ended"
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.2)
