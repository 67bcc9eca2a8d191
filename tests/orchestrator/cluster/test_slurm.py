"""clusters/slurm/search.sbatch before a real Slurm controller: what it asks for is granted, by two nodes that exist on paper only."""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.orchestrator.servers import free_port

PROJECT = Path(__file__).resolve().parents[3]
SCRIPT = PROJECT / "clusters" / "slurm" / "search.sbatch"
PROGRAMS = ("munged", "slurmctld", "sbatch")
ENVIRONMENT = os.environ | {"PATH": f"{os.environ['PATH']}{os.pathsep}/usr/sbin"}
"""Debian puts the daemons where only root looks."""
# Nodes of state CLOUD count as free without a daemon on them; they are never powered on, for no job is submitted.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=3600
NodeName=n[1-2] NodeAddr=127.0.0.1 CPUs=8 RealMemory=32000 Gres=gpu:1 State=CLOUD
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """Yield the environment of a user of a cluster of two nodes, each of 8 CPUs and a GPU."""
    if not all(shutil.which(program, path=ENVIRONMENT["PATH"]) for program in PROGRAMS):
        pytest.skip("needs a Slurm controller (apt-get install slurmctld slurm-client munge)")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # short: a Unix socket lies in it
    (folder / "state").mkdir()
    key, configuration = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(os.urandom(64))
    key.chmod(0o400)
    configuration.write_text(
        CONFIG.format(host=socket.gethostname().split(".")[0], port=free_port(), folder=folder, user=getpass.getuser())
    )
    environment = ENVIRONMENT | {"SLURM_CONF": str(configuration)}
    files = {
        "key-file": key,
        "socket": "munge.socket",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "seed",
    }
    commands = [
        ["munged", "--foreground", "--force", *(f"--{name}={folder / path}" for name, path in files.items())],
        ["slurmctld", "-D", "-f", str(configuration)],
    ]
    daemons = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "w") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(1)  # munged makes its socket, which slurmctld wants to find
        while subprocess.run(["sinfo"], env=environment, capture_output=True, check=False).returncode:
            assert all(daemon.poll() is None for daemon in daemons), (folder / "slurmctld.out").read_text()
            time.sleep(0.2)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.kill()
            daemon.wait()
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ([], "using 16 processors on nodes n[1-2]"),
        (["--gpus-per-node=2"], "Requested node configuration is not available"),
    ],
    ids=["as it stands", "more GPUs than there are"],
)
def test_what_the_script_asks_for_is_judged(slurm: dict[str, str], options: list[str], answer: str) -> None:
    command = ["sbatch", "--test-only", *options, str(SCRIPT), "digits"]
    told = subprocess.run(command, cwd=PROJECT, env=slurm, capture_output=True, text=True, check=False)
    assert answer in told.stderr
    assert (told.returncode == 0) == (not options)
