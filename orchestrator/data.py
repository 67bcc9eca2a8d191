"""The command `data`: pack images into Parquet shards, and verify shards.

    python -m orchestrator.data pack /data/imagenet/train s3://bucket/imagenet/train --on-error skip
    python -m orchestrator.data check s3://bucket/imagenet/train

pack decodes every image once, on all CPUs of the cluster, and copies the files' bytes unchanged. Rerun the command to resume
after an interruption. check reads every file again and compares it with the manifest.
Exit codes: 0 success; 1 packing failed; 2 invalid command, or damaged images or shards; 130 after Ctrl-C, 143 after SIGTERM.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from orchestrator.cli import configure_logging, located, positive, run_command
from orchestrator.errors import DataError
from orchestrator.masking import MaskingParser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parser().parse_args(argv)
    configure_logging(Console(stderr=True))

    def body() -> int:
        print(arguments.run(arguments))
        return 0

    return run_command("data", argv, body)


def _pack(arguments: argparse.Namespace) -> str:
    # Late: torch and Ray take seconds to import, and --help should not wait for them.
    from orchestrator.cluster.connection import session
    from orchestrator.cluster.processes import spread
    from orchestrator.config.cluster import load_cluster
    from orchestrator.datasets.parquet.packing import pack
    from orchestrator.datasets.parquet.sources import open_source
    from orchestrator.datasets.stored.folder import StoredFolder

    is_remote = "://" in arguments.source
    address = arguments.source if is_remote else str(Path(arguments.source).expanduser().absolute())
    source = open_source(arguments.format, address, arguments.image_column, arguments.label_column)
    target = arguments.target if "://" in arguments.target else str(located(Path(arguments.target).expanduser()))
    store, cluster = StoredFolder(target), load_cluster(arguments.cluster)

    def run(function: Callable, tasks: Sequence) -> Iterator:  # packing.RunTasks
        """Yield the results of the tasks, run on a cluster of which all nodes see the target."""
        with (
            session(cluster, store.folder, "name a folder that all nodes mount, s3://... or gs://..."),
            _progress() as bar,
        ):
            named = {task.name: task for task in tasks}
            yield from bar.track(spread(function, named), total=len(tasks), description="shards")

    manifest = pack(
        source,
        target,
        on_error=arguments.on_error,
        images_per_shard=arguments.images_per_shard,
        rows_per_group=arguments.rows_per_group,
        run=run,
    )
    skipped = f", {len(manifest.skipped)} unreadable images left out" if manifest.skipped else ""
    return f"{store.place()}: {manifest.num_images} images of {manifest.num_classes} classes in {len(manifest.shards)} shards{skipped}"


def _check(arguments: argparse.Namespace) -> str:
    from orchestrator.datasets.parquet.format import read_manifest, verify
    from orchestrator.datasets.stored.folder import StoredFolder

    store = StoredFolder(arguments.target)
    manifest = read_manifest(store)
    names = [*manifest.files, *(shard.name for shard in manifest.shards)]
    wrong = []
    for name in _shown(names):
        try:
            verify(store, manifest, name)
        except DataError as error:
            wrong.append(str(error))
    if wrong:
        raise DataError(f"{len(wrong)} of {len(names)} files are damaged:\n" + "\n".join(wrong))
    return f"{store.place()}: {manifest.num_images} images in {len(manifest.shards)} shards, all match the manifest"


def _shown(names: Sequence[str]) -> Iterable[str]:
    with _progress() as progress:
        yield from progress.track(names, description="files")


def _progress() -> Progress:
    """Return a progress bar on stderr; only its final state is shown if stderr is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _parser() -> argparse.ArgumentParser:
    parser = MaskingParser(prog="orchestrator data", description="Pack images into Parquet shards.")
    commands = parser.add_subparsers(required=True, metavar="pack|check")
    pack = commands.add_parser(
        "pack",
        help="images -> Parquet shards",
        description="Write images as Parquet shards, on all CPUs of the cluster. The same command again resumes.",
    )
    pack.set_defaults(run=_pack)
    pack.add_argument(
        "source", metavar="SRC", help="the images: a path on every node, s3://... or gs://...; with * for some files"
    )
    pack.add_argument("target", metavar="DST", help="folder of the shards: a path on every node, s3://... or gs://...")
    pack.add_argument(
        "--format",
        choices=("image_folder", "hf_parquet", "webdataset"),
        default="image_folder",
        help="how SRC holds them: a folder per class (the default), Hugging Face's Parquet files, or webdataset's tar files",
    )
    pack.add_argument(
        "--image-column", metavar="NAME", help="hf_parquet: the column of the images, if it is not the only one"
    )
    pack.add_argument("--label-column", metavar="NAME", help="hf_parquet: the column of the labels, likewise")
    pack.add_argument(
        "--on-error",
        choices=("refuse", "skip"),
        default="refuse",
        help="unreadable images: refuse (the default) fails their shards, and the command; skip leaves the images out",
    )
    pack.add_argument(
        "--images-per-shard",
        type=positive,
        default=2048,
        metavar="N",
        help="images in a file (default: %(default)s, 225 MB of ImageNet)",
    )
    pack.add_argument(
        "--rows-per-group",
        type=positive,
        default=32,
        metavar="N",
        help="images that are read together (default: %(default)s, 3.5 MB of ImageNet); fewer shuffle better, more read faster",
    )
    pack.add_argument(
        "--cluster", default="local", metavar="NAME", help="clusters/ name or YAML file (default: local, this machine)"
    )
    check = commands.add_parser(
        "check",
        help="verify every file against the manifest",
        description="Read every shard and compare its size and digest with the manifest that pack wrote.",
    )
    check.set_defaults(run=_check)
    check.add_argument("target", metavar="DST", help="folder of the shards")
    return parser


if __name__ == "__main__":
    sys.exit(main())
