"""Shared by the commands: exit codes and logging of all; arguments, run directory and lock of `search` and `train`."""

import argparse
import errno
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.logging import RichHandler

from orchestrator.cluster.interrupts import Interrupted
from orchestrator.config.cluster import ClusterConfig, load_cluster
from orchestrator.config.messages import validate
from orchestrator.config.search import SearchConfig
from orchestrator.config.trial import ModelConfig, TrialConfig
from orchestrator.config.yaml_files import load_yaml
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.masking import MaskingFormatter, masked, printable
from orchestrator.storage.addresses import is_address
from orchestrator.storage.mirror import Mirror
from orchestrator.storage.paths import RunDirPaths, RunPaths, StoragePaths
from orchestrator.storage.run_dir import check_run_dir, claim

DEFAULT_SPACE = "digits"
IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""An environment variable that is set in the processes of a Ray job."""
STORAGE_FAILURES = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT,
    errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP,
}  # fmt: skip
"""Errors of a disk that is full, broken, unreachable or read-only, or has another kind of file at a path. They are not bugs of
this program, so they need no traceback."""


class RunPlan(Protocol):
    """The plan of a command that works in a run directory."""

    @property
    def config(self) -> SearchConfig | TrialConfig:
        """The config that is saved in the run directory, and to which the directory belongs."""

    @property
    def run(self) -> RunDirPaths:
        """The run directory."""

    @property
    def mirror(self) -> Mirror | None:
        """Keeps the copy of the run directory in an object store, if the storage is one."""


P = TypeVar("P", bound=RunPlan)


def run_plan(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    make_plan: Callable[[argparse.Namespace], P],
    text: Callable[[P], str],
    work: Callable[[P, Console], int],
) -> int:
    """Run a command that has a run directory, and return its exit code: print its plan for --dry-run, else work under the lock.

    parser: with add_arguments; its prog ends with the command's name.
    text: returns the plan as text.    work: returns the exit code; gets the console of stderr.
    """
    arguments = parser.parse_args(argv)

    def body() -> int:
        """Print the plan or work, and return the exit code."""
        console = Console(stderr=True)
        configure_logging(console)
        plan = make_plan(arguments)
        if arguments.dry_run:
            check_run_dir(plan.run, plan.config, must_exist=arguments.resume and plan.mirror is None)
            print(masked(text(plan)))
            return 0
        with claim(plan.run, plan.config, plan.mirror, must_exist=arguments.resume):
            return work(plan, console)

    return run_command(parser.prog.split()[-1], argv, body)


def run_command(command: str, argv: Sequence[str] | None, body: Callable[[], int]) -> int:
    """Run the body of a command and return its exit code; errors that are raised on purpose become one message on stderr."""
    try:
        return body()
    except OrchestratorError as error:
        fail(command, str(error))
        return error.exit_code
    except OSError as error:
        if error.errno not in STORAGE_FAILURES:
            raise
        fail(command, f"{masked(str(error))}; fix this, then rerun the same command to resume")
        return 1
    except (Interrupted, KeyboardInterrupt) as interrupt:
        line = shlex.join(["python", "-m", f"orchestrator.{command}", *(sys.argv[1:] if argv is None else argv)])
        fail(command, f"stopped; finished work is saved. Rerun the same command to resume: {masked(line)}")
        return interrupt.exit_code if isinstance(interrupt, Interrupted) else 130


def fail(command: str, reason: str) -> None:
    """Print on stderr why the command fails; stdout is flushed first, so that this is the last line of a log of both."""
    sys.stdout.flush()
    print(printable(f"{command}: {reason}"), file=sys.stderr)


def add_arguments(parser: argparse.ArgumentParser, *, noun: str, folder: str) -> None:
    """Add SPACE and the options. noun: what the command runs.    folder: its run directory, relative to the storage."""
    parser.add_argument("space", nargs="?", metavar="SPACE", help="search_spaces/ name or YAML file (default: digits)")
    parser.add_argument(
        "--cluster", default="local", metavar="NAME", help="clusters/ name or YAML file (default: local, this machine)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the space, such as base.gating.epochs=4; may be repeated",
    )
    parser.add_argument("--resume", action="store_true", help=f"resume a {noun}, and fail if there is none")
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help=f"storage to use instead of the cluster's: the {noun} writes DIR/{folder}/, with NAME from its space. DIR may be an "
        "address, such as s3://bucket/runs. It may also "
        f"be the run directory itself, if it holds a {noun} or ends in {folder}",
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help=f"resume a {noun} in an object store whose machine is gone without waiting",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan; start and write nothing")


class KeepLines(argparse.RawDescriptionHelpFormatter):
    """Prints the module's docstring as it is."""


def chosen_cluster(arguments: argparse.Namespace) -> ClusterConfig:
    """Return the cluster that --cluster names, with the storage that --run-dir gives. Raises: ConfigError, ClusterError."""
    cluster = load_cluster(arguments.cluster)
    if arguments.run_dir is not None:
        cluster = validate(ClusterConfig, {**cluster.model_dump(), "storage": arguments.run_dir}, "--run-dir")
    if IN_RAY_JOB in os.environ and not is_address(cluster.storage):
        cluster = cluster.model_copy(update={"storage": str(located(cluster.storage))})
    return cluster


def located(folder: str | Path) -> Path:
    """Return the folder as an absolute one: inside a Ray job relative to the home folder, else to the working directory.

    A job's working directory is a copy that is thrown away. On one node, or with homes that all nodes mount, the same command
    finds its folder in the home folder again; session() refuses it elsewhere.
    """
    return (Path.home() if IN_RAY_JOB in os.environ else Path.cwd()) / folder


def run_folder(
    cluster: ClusterConfig, arguments: argparse.Namespace, name: str, config: str
) -> tuple[StoragePaths, Path]:
    """Return the storage and the run directory: <storage>/<name>, or what --run-dir names if that is the directory itself.

    config: the file that distinguishes a run directory from a storage.
    """
    if is_address(cluster.storage):
        address, mark, options = cluster.storage.partition("?")
        address = address.rstrip("/").removesuffix(f"/{name}" if arguments.run_dir is not None else "")
        storage = StoragePaths.at(f"{address}{mark}{options}", cluster.local)
        return storage, storage.root / name
    folder = Path(cluster.storage)
    if arguments.run_dir is not None and (folder.name == name or (folder / config).is_file()):
        return StoragePaths(folder.parent), folder
    return StoragePaths(folder), folder / name


def mirror_of(storage: StoragePaths, run: RunDirPaths, arguments: argparse.Namespace) -> Mirror | None:
    """Return what keeps the copy of the run directory in an object store, if the storage is one."""
    return None if storage.address is None else Mirror(storage, run, is_taken=arguments.take_over)


def find_run(folder_or_name: Path) -> RunPaths:
    """Return the run directory: the folder itself, or what a search of this name wrote on this machine."""
    here = Path(ClusterConfig().storage, folder_or_name)
    return RunPaths(here if not folder_or_name.exists() and here.exists() else folder_or_name)


def configure_logging(console: Console) -> None:
    """Send the log to stderr: warnings of all libraries, and the messages of this package."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False)  # prints above the live table instead of into it
        handler.setFormatter(MaskingFormatter("%(name)s: %(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(MaskingFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)  # they would be printed into the live table
    logging.getLogger("orchestrator").setLevel(logging.INFO)


MODEL_HELP = "a torchvision classifier, resnet<6n+2>_cifar, or package.module:function"


def positive(text: str) -> int:
    """Return the whole number of an argument. Raises: argparse.ArgumentTypeError unless it is one of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number of at least 1")
    return number


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a network, except its name."""
    parser.add_argument(
        "--image-size", type=positive, metavar="PIXELS", help="height and width (default: 224; CIFAR ResNets: 32)"
    )
    parser.add_argument(
        "--num-classes", type=positive, metavar="N", help="outputs of the classifier (default: 1000; CIFAR ResNets: 10)"
    )
    parser.add_argument(
        "--kwargs",
        type=_keyword,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="further argument of the network's function, such as width=8; may be repeated",
    )


def chosen_model(arguments: argparse.Namespace) -> tuple[ModelConfig, int]:
    """Return the network of --model and its options, and the image size; defaults are those of ImageNet, or CIFAR for its ResNets.

    Raises: ConfigError for a value that does not fit.
    """
    # Late: torch takes seconds to import, and --help should not wait for it.
    from orchestrator.models.registry import CIFAR_NAME

    is_cifar = CIFAR_NAME.fullmatch(arguments.model) is not None
    fields = {
        "name": arguments.model,
        "num_classes": arguments.num_classes or (10 if is_cifar else 1000),
        "kwargs": dict(arguments.kwargs),
    }
    return validate(ModelConfig, fields, "command line"), arguments.image_size or (32 if is_cifar else 224)


def _keyword(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    try:
        if equals and key:
            return key, load_yaml(value, f"the value of {key} is not valid YAML")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    raise argparse.ArgumentTypeError(f"found {text!r}, expected KEY=VALUE, such as width=8")
