"""The command `export`: write the pruned network of a trial as one file that needs neither this project nor the network's class.

    python -m orchestrator.export runs/digits --trial trial_0004 --format onnx
    python -m orchestrator.export runs/digits --trial trial_0004 --format onnx --int8 static
    python -m orchestrator.export runs/digits --trial trial_0004 --format pt2 --out network.pt2

onnx is for ONNX Runtime and other readers of ONNX; pt2 is a torch.export program: torch.export.load("network.pt2").module().
Both take images (N, channels, height, width) of the search's size, any N, and return logits. The file is read back and
compared with the network before it gets its final name. An ONNX file that a search has timed is kept, byte for byte.
--int8 also writes network_int8.onnx next to the ONNX file, quantised by ONNX Runtime, and network_int8.json with the accuracy of both
files on the test split. static calibrates on training images; dynamic quantises the weights of linear layers alone.
Exit codes: 0 success, the paths are on stdout; 1 the network cannot be written in this format; 2 invalid command, or unknown trial.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli import run_command
from orchestrator.config.metrics import TEST
from orchestrator.config.packages import ONNX_PACKAGES, missing_packages
from orchestrator.errors import UserError
from orchestrator.masking import MaskingParser
from orchestrator.storage.addresses import is_address
from orchestrator.storage.fetching import fetched
from orchestrator.storage.files import write_atomic
from orchestrator.storage.paths import RunPaths

if TYPE_CHECKING:
    from orchestrator.models.deployment import Format
    from orchestrator.models.quantization import Int8


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)

    def body() -> int:
        """Return the exit code of the export, its path printed."""
        if arguments.int8 is not None and arguments.format != "onnx":
            raise UserError(f"--int8 with --format {arguments.format}: expected --format onnx")
        if is_address(arguments.run_dir) and arguments.out is None:
            raise UserError(
                f"--out is missing: {arguments.run_dir} is an address, and the file is written to this machine's disk"
            )
        RunPaths(Path()).trial(arguments.trial)  # refuses ids that lead elsewhere
        with fetched(arguments.run_dir, f"trials/{arguments.trial}/*") as run_dir:
            run = RunPaths(run_dir)
            path = export_trial(run, arguments.trial, arguments.format, arguments.out)
            print(path)
            if arguments.int8 is not None:
                print("\n".join(export_int8(run, arguments.trial, path, arguments.int8)))
        return 0

    return run_command("export", argv, body)


def export_trial(run: RunPaths, trial_id: str, form: "Format", out: Path | None = None) -> Path:
    """Write the network of a finished trial to `out`, or into the trial's folder, and return the path.

    Raises: UserError for packages that are not installed, an unfit `out`, or a trial without a network; OrchestratorError as
    deployment.write_network() does.
    """
    in_folder = run.trial(trial_id).exported(form)
    path = out or in_folder
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
    from orchestrator.models.deployment import CHECKED_BATCHES, keep_or_write
    from orchestrator.models.saved import load_trial

    network = load_trial(run.root, trial_id)
    (shape,) = gator.Architecture.load(run.trial(trial_id).architecture).input_shapes
    images = torch.randn(max(CHECKED_BATCHES), *shape[1:], generator=torch.Generator().manual_seed(0))
    keep_or_write(network, images, path, form, in_folder)
    return path


def export_int8(run: RunPaths, trial_id: str, file: Path, kind: "Int8") -> tuple[str, str]:
    """Write FILE_int8.onnx and FILE_int8.json next to a trial's ONNX file; return the path of the first, and both accuracies in a line.

    Raises: DataError if the images cannot be read, OrchestratorError if ONNX Runtime cannot quantise the file.
    """
    import hashlib

    import torch

    from orchestrator.datasets import splits as datasets
    from orchestrator.models.quantization import RunsFile, write_int8
    from orchestrator.storage.run_dir import read_trial_config
    from orchestrator.training.evaluation import calibration_batches, evaluate
    from orchestrator.training.loaders import num_samples
    from orchestrator.training.ranks import Ranks
    from orchestrator.trial.plain_choices import data_of

    config = read_trial_config(run.trial(trial_id))
    images = datasets.load(data_of(config), config.seed)
    path = file.with_name(f"{file.stem}_int8.onnx")
    write_int8(file, path, kind, calibration_batches(images.train, config, torch.device("cpu")))
    manifest: dict[str, Any] = {"int8": kind, "accuracy_split": TEST, "num_images": num_samples(images.test)}
    for name, one in (("float32", file), ("int8", path)):
        network, content = RunsFile(one), one.read_bytes()
        facts = {"file": one.name, "sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
        manifest[f"{name}_file"] = facts | evaluate(network, images.test, config, Ranks())
        manifest["versions"] = network.versions
    write_atomic(path.with_suffix(".json"), json.dumps(manifest, indent=2) + "\n")
    texts = [
        f"{name} top1 {facts['top1']:.2f}, {facts['num_bytes']:,} bytes"
        for name, facts in ((name, manifest[f"{name}_file"]) for name in ("float32", "int8"))
    ]
    return str(path), f"on {manifest['num_images']} images of the {TEST} split: {'; '.join(texts)}"


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
        "--out",
        type=Path,
        metavar="PATH",
        help="file to write (default: network.onnx or network.pt2 in the trial's folder)",
    )
    parser.add_argument(
        "--int8",
        choices=("dynamic", "static"),
        help="with --format onnx: also write the file in int8, and the accuracy of both",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
