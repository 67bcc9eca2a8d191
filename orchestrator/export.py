"""The command `export`: write the pruned network of a trial as one file that needs neither this project nor the network's class.

    python -m orchestrator.export runs/digits --trial trial_0004 --format onnx
    python -m orchestrator.export runs/digits --trial trial_0004 --format pt2 --out network.pt2

onnx is for ONNX Runtime and other readers of ONNX; pt2 is a torch.export program: torch.export.load("network.pt2").module().
Both take images (N, channels, height, width) of the search's size, any N, and return logits. The file is read back and
compared with the network before it gets its final name.
Exit codes: 0 success, the path is on stdout; 1 the network cannot be written in this format; 2 invalid command, or unknown trial.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli import run_command
from orchestrator.config.packages import ONNX_PACKAGES, missing_packages
from orchestrator.errors import UserError
from orchestrator.masking import MaskingParser
from orchestrator.storage.addresses import is_address
from orchestrator.storage.fetching import fetched
from orchestrator.storage.paths import RunPaths

if TYPE_CHECKING:
    from orchestrator.models.deployment import Format


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)

    def body() -> int:
        """Return the exit code of the export, its path printed."""
        if is_address(arguments.run_dir) and arguments.out is None:
            raise UserError(
                f"--out is missing: {arguments.run_dir} is an address, and the file is written to this machine's disk"
            )
        RunPaths(Path()).trial(arguments.trial)  # refuses ids that lead elsewhere
        with fetched(arguments.run_dir, f"trials/{arguments.trial}/*") as run_dir:
            print(export_trial(RunPaths(run_dir), arguments.trial, arguments.format, arguments.out))
        return 0

    return run_command("export", argv, body)


def export_trial(run: RunPaths, trial_id: str, form: "Format", out: Path | None = None) -> Path:
    """Write the network of a finished trial to `out`, or into the trial's folder, and return the path.

    Raises: UserError for packages that are not installed, an unfit `out`, or a trial without a network; OrchestratorError as
    deployment.write_network() does.
    """
    path = out or run.trial(trial_id).exported(form)
    if path.suffix != f".{form}":
        raise UserError(f"--out {path}: expected a name that ends in .{form}, as --format says")
    if path.is_dir():
        raise UserError(f"--out {path}: found a folder, expected the name of a file")
    missing = missing_packages(ONNX_PACKAGES) if form == "onnx" else []
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}; pip install {' '.join(missing)}, or use --format pt2"
        )

    # Late: torch takes seconds to import, and --help or a mistake in the command should not wait for it.
    import torch

    import gator
    from orchestrator.models.deployment import CHECKED_BATCHES, write_network
    from orchestrator.models.saved import load_trial

    network = load_trial(run.root, trial_id)
    (shape,) = gator.Architecture.load(run.trial(trial_id).architecture).input_shapes
    images = torch.randn(max(CHECKED_BATCHES), *shape[1:], generator=torch.Generator().manual_seed(0))
    write_network(network, images, path, form)
    return path


def _parser() -> argparse.ArgumentParser:
    parser = MaskingParser(
        prog="orchestrator export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="folder that a search wrote, such as runs/digits, or its address"
    )
    parser.add_argument("--trial", required=True, metavar="ID", help="a finished trial, such as trial_0004")
    parser.add_argument("--format", required=True, choices=("onnx", "pt2"), help="ONNX, or a torch.export program")
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="file to write (network.onnx or network.pt2 in the trial's folder)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
