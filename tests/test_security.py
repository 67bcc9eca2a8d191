"""What must not get in and what must not get out: calls that run code out of a file, paths that lead elsewhere, secrets."""

import ast
import logging
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from orchestrator import search
from orchestrator.__main__ import main as run_a_verb
from orchestrator.config.cluster import ClusterConfig
from orchestrator.config.messages import shown
from orchestrator.config.trial import DataConfig
from orchestrator.config.yaml_files import _StrictLoader
from orchestrator.errors import DataError, OrchestratorError, RunDirError, TrackingError
from orchestrator.masking import MaskingFormatter, masked
from orchestrator.models.saved import load_trial
from orchestrator.reporting.outcome import Outcome, load_architectures
from orchestrator.storage.paths import RunPaths
from orchestrator.storage.run_dir import claim
from orchestrator.tracking.store import flatten
from tests import licences
from tests.orchestrator import planted as records
from tests.unsafe_uses import findings

PROJECT = Path(__file__).resolve().parent.parent
FOLDERS = ("gator", "orchestrator", "benchmarks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (PROJECT / folder).rglob("*.py"))

EXCEPTIONS = {
    ("tests/orchestrator/tuning/test_searchers.py", "pickle"): "shows that what Tune pickles of the searcher is empty",
    ("benchmarks/bench_latency_model.py", "os.execve"): "starts itself again, with settings of the allocator",
    (
        "gator/pruning/modules.py",
        "torch.package.importer.sys_importer",
    ): "names the modules that a generated forward imports, as torch.fx.GraphModule does; nothing is read with it",
    (
        "tests/gator/tracing/test_own_forwards.py",
        "torch.load",
    ): "shows that a user's torch.save of a pruned network works",
    ("tests/gator/generator.py", "exec"): "runs the networks that the generator has written",
    ("tests/gator/generator.py", "compile"): "names the network in their tracebacks",
    ("tests/test_commands.py", "exec"): "runs the Python lines that the documents show",
    ("tests/test_commands.py", "compile"): "names the document in their tracebacks",
    ("tests/test_commands.py", "shell=True"): "runs the blocks of shell lines that the documents show",
    (
        "orchestrator/config/yaml_files.py",
        "yaml.load",
    ): "with _StrictLoader, a SafeLoader, see the test at the end of this part",
}
"""(file, what it uses) -> why it may."""


def test_nothing_runs_code_out_of_what_it_reads() -> None:
    found = {
        (path.relative_to(PROJECT).as_posix(), name)
        for path in SOURCES
        for name in findings(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    }
    assert found == set(EXCEPTIONS), "what is new is refused; an exception that is no longer needed goes"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", {"pickle"}),
        ("import _pickle as p\np.loads(b'')", {"_pickle"}),
        ("from ray import cloudpickle", {"cloudpickle"}),
        ("import ray.cloudpickle as p", {"cloudpickle"}),
        ("import ray\nray.cloudpickle.loads(b'')", {"cloudpickle"}),
        ("def f():\n    from shelve import open", {"shelve"}),
        ("from importlib import import_module\nimport_module('pickle')", {"pickle"}),
        ("import runpy\nrunpy.run_path('x.py')", {"runpy"}),
        ("eval('1')", {"eval"}),
        ("import builtins as b\nb.eval('1')", {"eval"}),
        ("e = eval\ne('1')", {"eval"}),
        ("map(exec, texts)", {"exec"}),
        ("getattr(builtins, 'exec')(text)", {"exec"}),
        ("network.eval()", set()),
        ("re.compile('a')", set()),
        ("from re import compile\ncompile('a')", set()),
        ("import os\nos.system('ls')", {"os.system"}),
        ("from os import system as s\ns('ls')", {"os.system"}),
        ("from os import *", {"os.*"}),
        ("import os\ngetattr(os, 'system')('ls')", {"os.system"}),
        ("import os\nos.execvp('ls', [])", {"os.execvp"}),
        ("import os.path\nos.popen('ls')", {"os.popen"}),
        ("import subprocess as s\ns.getoutput('ls')", {"subprocess.getoutput"}),
        ("import torch\ntorch.load('w.pt')", {"torch.load"}),
        ("import torch as t\nt.load('w.pt')", {"torch.load"}),
        ("from torch import load\nload('w.pt')", {"torch.load"}),
        ("from torch import load\nload('w.pt', weights_only=True)", set()),
        ("torch.load('w.pt', weights_only=False)", {"torch.load"}),
        ("torch.load('w.pt', map_location='cpu', weights_only=True)", set()),
        ("read = torch.load", {"torch.load"}),
        ("torch.jit.load('w.pt')", {"torch.jit.load"}),
        ("from torch import hub\nhub.load('a/b', 'c')", {"torch.hub.load"}),
        ("import mlflow.pyfunc\nmlflow.pyfunc.load_model(uri)", {"mlflow.pyfunc.load_model"}),
        ("from mlflow import pytorch\npytorch.load_model(uri)", {"mlflow.pytorch.load_model"}),
        ("import pandas as pd\npd.read_pickle('x')", {"pandas.read_pickle"}),
        ("yaml.load(text, yaml.FullLoader)", {"yaml.load"}),
        ("yaml.load(text, Loader=yaml.SafeLoader)", set()),
        ("from yaml import load, SafeLoader\nload(text, SafeLoader)", set()),
        ("from yaml import load\nload(text, Loader=L)", {"yaml.load"}),
        ("from yaml import unsafe_load\nunsafe_load(text)", {"yaml.unsafe_load"}),
        ("yaml.load_all(text, L)", {"yaml.load_all"}),
        ("yaml.safe_load(text)", set()),
        ("subprocess.run('ls', shell=True)", {"shell=True"}),
        ("subprocess.run('ls', **{'shell': True})", {"shell=True"}),
        ("subprocess.run(['ls'])", set()),
        ("numpy.load(path, allow_pickle=flag)", {"allow_pickle=flag"}),
        ("tarfile.open(path).extractall()", {".extractall"}),
        ("import shutil\nshutil.unpack_archive(path)", {"shutil.unpack_archive"}),
    ],
)
def test_every_unsafe_use_is_seen(source: str, found: set[str]) -> None:
    assert findings(ast.parse(source)) == found


def test_the_strict_loader_is_a_safe_one() -> None:
    assert issubclass(_StrictLoader, yaml.SafeLoader)
    assert not set(_StrictLoader.yaml_constructors) - set(yaml.SafeLoader.yaml_constructors)


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial_id", ["../../secret", "/etc", "..", ".", "", "a/b", ".hidden", "a\0b"])
def test_a_trial_lies_in_its_run_directory(tmp_path: Path, trial_id: str) -> None:
    with pytest.raises(RunDirError, match="is not a trial id"):
        RunPaths(tmp_path).trial(trial_id)


def test_a_trial_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "trial_0000").symlink_to("/etc")
    run = RunPaths(tmp_path)
    with pytest.raises(RunDirError, match="is a link"):
        run.trial("trial_0000")
    assert run.trial_ids() == []


def test_a_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "trials" / "trial_0000"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").symlink_to("/etc/passwd")
    with pytest.raises(RunDirError, match=r"weights\.safetensors is a link"):
        load_trial(tmp_path, "trial_0000")


@pytest.mark.parametrize("name", ["search.json", "results.parquet", "trials/trial_0000/architecture.json"])
def test_a_report_follows_no_link(tmp_path: Path, name: str) -> None:
    run, row = RunPaths(tmp_path / "run"), records.finished(0, 97.0, 2.0)
    config = records.search_config()
    records.plant(run, config, [row])
    (run.root / name).rename(tmp_path / "elsewhere")
    (run.root / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirError, match=f"{Path(name).name} is a link"):
        load_architectures(Outcome.load(run), run)


def test_a_search_does_not_make_what_its_lock_leads_to(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run")
    run.root.mkdir()
    run.lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirError, match=r"\.lock is a link"), claim(run, records.search_config()):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_run_directory_without_the_trial_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no weights"):
        load_trial(tmp_path, "trial_0000")


# --- secrets ----------------------------------------------------------------------------------------------------------

PLANTED = "s3cr3t-0123456789"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a secret into the environment and return it."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", PLANTED)
    return PLANTED


def test_secrets_of_the_environment_are_masked(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/token")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{planted}-and-more")
    text = f"denied for {planted} and {planted}-and-more, see /home/me/token"
    assert masked(text) == "denied for ... and ..., see /home/me/token"


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_KEY",
        "PRIVATE_KEY",
        "ENCRYPTION_KEY",
        "AZURE_STORAGE_KEY",
        "DB_PASS",
        "DB_PWD",
        "PASSPHRASE",
        "REDIS_AUTH",
    ],
)
def test_a_variable_whose_name_says_so_holds_a_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, PLANTED)
    assert masked(f"denied for {PLANTED}") == "denied for ..."


@pytest.mark.parametrize(
    ("name", "value"),
    [("PWD", "/home/me/project"), ("SSH_AUTH_SOCK", "/tmp/agent.sock"), ("USE_KEY", "true"), ("N_PASS", "1"),
     ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/passwd"), ("RAY_AUTH_MODE", "disabled"), ("MONKEY", "bananabread")],
)  # fmt: skip
def test_an_ordinary_value_is_no_secret(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert masked(f"found {value}") == f"found {value}"


def test_a_secret_is_known_as_uris_and_json_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASS", 'pass/wo"rd+1 2')
    forms = ["pass/wo%22rd%2B1%202", "pass%2Fwo%22rd%2B1%202", "pass%2Fwo%22rd%2B1+2", 'pass/wo\\"rd+1 2']
    assert [masked(form) for form in forms] == ["..."] * 4


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:se/cr@db/x", "postgresql://db/x"),
        ("mysql://me:p@ss@db/x", "mysql://db/x"),
        ("https://token@host/x", "https://host/x"),
        ("https://host/x?token=abc&size=8", "https://host/x?token=...&size=8"),
        ("https://b/?X-Amz-Signature=ab&X-Amz-Security-Token=cd", "https://b/?X-Amz-Signature=...&X-Amz-Security-Token=..."),
        ("https://b/?sv=1&sig=ab%2F", "https://b/?sv=1&sig=..."),
        ("s3://bucket/x?secret_key=ab&region=eu", "s3://bucket/x?secret_key=...&region=eu"),
        ("secret_key=abc, password=def", "secret_key=... password=..."),
        ("--set base.model.kwargs.token=abc", "--set base.model.kwargs.token=..."),
    ],
)  # fmt: skip
def test_what_a_uri_or_a_setting_says_is_secret_is_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/a@2/train", "s3://host:9000/bucket/a@b", "models:/digits@best", "git+https://github.com/x/y@v1",
     "expected KEY=VALUE, such as width=8", "class_token=8 num_tokens=4", "see https://x.org/a:b, or mail a@b"],
)  # fmt: skip
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert masked(text) == text


def test_errors_are_masked_whoever_shows_them(planted: str) -> None:
    assert (
        str(OrchestratorError(f"401 for {planted} at https://me:{planted}@host/x")) == "401 for ... at https://host/x"
    )


def test_logs_are_masked_tracebacks_included(planted: str, caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError(f"bad token {planted}")
    except ValueError:
        logging.getLogger("orchestrator").exception("went wrong with %s", planted)
    (record,) = caplog.records
    assert planted in logging.Formatter().format(record)
    assert planted not in MaskingFormatter().format(record)


def test_mlflow_parameters_are_masked(planted: str) -> None:
    kwargs = {"token": planted, "urls": [f"https://me:{planted}@host/w"]}
    assert flatten({"kwargs": kwargs}) == {"kwargs.token": "...", "kwargs.urls": '["https://host/w"]'}


def test_a_value_is_masked_before_it_is_cut(planted: str) -> None:
    cut_inside_the_secret = "x" * (57 - len(planted)) + planted + "y" * 20
    assert planted[:6] not in shown(cut_inside_the_secret)
    assert planted[:6] not in shown("x" * 40 + f"s3://me:{planted}@bucket/data")


def test_a_config_holds_no_credentials() -> None:
    with pytest.raises(ValueError, match="expected no user, password or token"):
        DataConfig(name="image_folder", train="s3://me:secret@bucket/train", image_size=8, global_batch_size=8)


def test_a_cluster_is_shown_without_passwords() -> None:
    cluster = ClusterConfig(mlflow_uri="postgresql://me:secret@db/mlflow", env_vars={"MY_KEY": "secret"})
    assert "secret" not in str(cluster.shown())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--run-dir", f"s3://me:{PLANTED}@bucket/runs"],
        ["--set", f"base.data.train=s3://me:{PLANTED}@bucket/train"],
        ["--set", f"base.model.weights={PLANTED}.pt"],
    ],
    ids=["storage", "data", "value of the environment"],
)
def test_the_command_line_shows_no_secret(
    planted: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert search.main(["digits", "--dry-run", *arguments]) == 2
    told = capsys.readouterr()
    assert told.err
    assert planted not in told.out + told.err


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["search", "digits", "--dry-run", "--set", f"name={PLANTED}"], 0),
        (["train", "digits", "--dry-run", "--set", f"name={PLANTED}"], 0),
        (["measure", "--model", "resnet20_cifar", "--batch", PLANTED], 2),
        (["data", PLANTED], 2),
        ([PLANTED], 2),
    ],
    ids=["a plan", "a training's plan", "an argument", "a command of data", "a command"],
)
def test_no_verb_shows_a_secret(
    planted: str, arguments: list[str], exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = run_a_verb(arguments)
    except SystemExit as end:  # of argparse
        found = end.code
    told = capsys.readouterr()
    assert found == exit_code, told.err
    assert "..." in told.out + told.err
    assert planted not in told.out + told.err


def test_a_store_that_does_not_answer_is_told_without_its_password(
    planted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"{{storage: {tmp_path}, mlflow_uri: 'postgresql+nodriver://me:{planted}@localhost:1/x'}}")
    assert search.main(["--from-run", "0123", "--cluster", str(cluster)]) == TrackingError.exit_code
    told = capsys.readouterr().err
    assert "postgresql+nodriver://localhost:1/x" in told
    assert planted not in told


# --- servers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "is_warned"), [(None, False), ("127.0.0.2", False), ("0.0.0.0", True)])
def test_the_mlflow_server_is_for_this_machine_unless_told_otherwise(host: str | None, is_warned: bool) -> None:
    settings = {"PATH": os.environ["PATH"], "PYTHON": "echo", "MLFLOW_BACKEND_STORE_URI": "sqlite:///x",
                "MLFLOW_ARTIFACTS_DESTINATION": "files"} | ({} if host is None else {"MLFLOW_HOST": host})  # fmt: skip
    script = PROJECT / "clusters/mlflow/serve.sh"
    done = subprocess.run([script], env=settings, capture_output=True, text=True, check=True, timeout=20)
    assert f"--host {host or '127.0.0.1'} " in done.stdout
    assert ("whoever reaches it reads and writes every record" in done.stderr) == is_warned


# --- what comes with it -----------------------------------------------------------------------------------------------


def test_every_dependency_is_listed_with_its_licence() -> None:
    page = (PROJECT / "docs/licences.md").read_text()
    listed = {line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")}
    assert listed - {"package"} == {name for name, _ in licences.requirements()}


def test_nothing_that_is_needed_to_run_is_under_a_licence_that_binds_its_users() -> None:
    needed = [name for name, group in licences.requirements() if group in ("gator", "search")]
    copyleft = {name: text for name in needed if re.search(r"GPL|AGPL|SSPL", text := licences.licence(name))}
    assert not copyleft
