"""How many images per second does a core decode, crop and hand over, beside the limit and other loaders?

    python -m benchmarks.bench_data --make 20000                      write the images, in three forms, below runs/bench_data
    python -m benchmarks.bench_data limit-1 ours-1 image_folder-1     one measurement each: SIDE-PROCESSES, "-cold" for a cold page cache
    python -m benchmarks.bench_data --all --seconds 280               a further turn of every measurement, in pieces
    python -m benchmarks.bench_data --anew limit-1 ours-1 limit-1 ours-1         two turns of each, in place of those that there are
    python -m benchmarks.bench_data --render                          write the table, benchmarks/results/data.md
    python -m benchmarks.bench_data --remove                          remove the images

Sides, each in a process of its own, in turns; 224 px, batches of 32, RandomResizedCrop, flip, normalised float32:

    limit           decode, crop, flip and normalise in a bare loop over bytes in memory; no batches, no loader processes
    ours            data set parquet through TrainLoader
    ours_store      the same from an S3 server on this machine, which answers every request 80 ms late; no cache
    ours_files      data set image_folder through TrainLoader
    image_folder    torchvision's ImageFolder and v2 transforms under torch's DataLoader, as its documentation has it
    webdataset      tar files through webdataset, decoded by its "pil", the same transforms
    ray_data        the shards of `ours` through Ray Data: read_parquet, map_batches with our decoding and cropping, iter_torch_batches

Counted are 120 batches after the first 20 of a pass, so that starting up is left out (Ray Data: a pass over five shards of
1,024 images, whose blocks come in bursts, starting its tasks included). "Per core" is per CPU second of the loader processes:
what a core gives that has nothing else to do. "All" are the CPU seconds of the process that takes the batches as well, and of
Ray's. All sides have glibc's thresholds of a search's workers; without them the process that takes the batches may ask the kernel
for the memory of each batch anew and need twice the time. Batches of more than 55 images exceed the threshold of 32 MiB: 0.27 ms
an image more, on every side.
"""

import argparse
import io
import itertools
import json
import os
import re
import shutil
import statistics
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.machine import machine
from benchmarks.row_file import PROJECT, RESULTS, RowFile, json_of_process
from orchestrator.cluster.processes import TIMING_ENV
from orchestrator.config.trial import DataConfig
from orchestrator.datasets import splits as datasets
from orchestrator.datasets.encoded import MEAN, STD, RandomCrop, header_size, normalised
from orchestrator.datasets.loading import TrainLoader
from orchestrator.datasets.parquet.packing import pack
from orchestrator.datasets.parquet.sources import ClassFolders

FOLDER = PROJECT / "runs" / "bench_data"
ROWS = RowFile(RESULTS / "data.jsonl")
TABLE = RESULTS / "data.md"
SIDES = ("limit", "ours", "ours_store", "ours_files", "image_folder", "webdataset", "ray_data")
NAMES = (*(f"{side}-{processes}" for processes in (1, 2) for side in SIDES), "ours-1-cold", "image_folder-1-cold")
BATCH_SIZE, IMAGE_SIZE = 32, 224
NUM_CLASSES, NUM_BASES = 10, 200
WARM_UP_BATCHES, COUNTED_BATCHES = 20, 120
NUM_RAY_SHARDS = 5
IMAGES_PER_TAR = 1000
SHAPES = ((375, 500), (375, 500), (375, 500), (333, 500), (500, 375))  # height and width; ImageNet's usual ones
TIMEOUT_S = 200
DELAY_S = 0.08


# --- the images -----------------------------------------------------------------------------------------------------------


def make(num_images: int) -> None:
    """Write the images as files, as shards and as tar files; the validation split is a link to the training split."""
    rng = np.random.default_rng(0)
    bases = [_picture(rng) for _ in range(NUM_BASES)]
    for number in range(num_images):
        path = FOLDER / "files" / "train" / f"class_{number % NUM_CLASSES}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = SHAPES[number % len(SHAPES)]
        top, left = rng.integers(0, 600 - height), rng.integers(0, 600 - width)
        crop = bases[number % NUM_BASES][top : top + height, left : left + width]
        Image.fromarray(crop).save(path, quality=int(rng.integers(90, 97)))
    (FOLDER / "files" / "val").symlink_to("train")
    pack(
        ClassFolders(str(FOLDER / "files" / "train")),
        str(FOLDER / "train"),
        on_error="refuse",
        images_per_shard=1024,
        rows_per_group=32,
        run=map,
    )
    (FOLDER / "val").symlink_to("train")
    _write_tars()
    sizes = [path.stat().st_size for path in (FOLDER / "files" / "train").glob("*/*")]
    print(f"{len(sizes)} images of {np.mean(sizes) / 1000:.0f} kB in the mean")


def _picture(rng: np.random.Generator) -> np.ndarray:
    """Return (600, 600, 3) uint8: noise of four scales, which JPEG packs about as well as a photograph."""
    picture = np.full((600, 600, 3), 128.0)
    for cells, amplitude in ((10, 90), (30, 60), (100, 30), (300, 16)):
        coarse = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        picture += (np.asarray(coarse.resize((600, 600), Image.Resampling.BICUBIC)) - 128.0) / 128 * amplitude
    return np.clip(picture + rng.normal(0, 9, picture.shape), 0, 255).astype(np.uint8)


def _by_number() -> list[Path]:
    """Return the image files as they were made: any part of them has all shapes, pictures and classes in equal shares."""
    return sorted((FOLDER / "files" / "train").glob("*/*.jpg"), key=lambda path: path.name)


def _write_tars() -> None:
    files = _by_number()
    (FOLDER / "tars").mkdir()
    for first in range(0, len(files), IMAGES_PER_TAR):
        with tarfile.open(FOLDER / "tars" / f"{first // IMAGES_PER_TAR:04d}.tar", "w") as tar:
            for path in files[first : first + IMAGES_PER_TAR]:
                tar.add(path, f"{path.stem}.jpg")
                label = path.parent.name.rpartition("_")[2].encode()
                info = tarfile.TarInfo(f"{path.stem}.cls")
                info.size = len(label)
                tar.addfile(info, io.BytesIO(label))


def _drop_page_cache(side: str) -> None:
    """Ask the kernel to forget what the side reads. The disk of a virtual machine may be cached below it."""
    os.sync()
    for path in _files(side):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _fill_page_cache(side: str) -> None:
    for path in _files(side):
        path.read_bytes()


def _files(side: str) -> list[Path]:
    folder = {"ours": "train", "ours_store": "train", "ray_data": "train", "webdataset": "tars"}.get(side, "files")
    return [path for path in (FOLDER / folder).rglob("*") if path.is_file()]


# --- the sides: each yields the number of images of a batch when it is there ------------------------------------------------


def _data(name: str, root: str | Path, processes: int) -> DataConfig:
    return DataConfig(
        name=name,
        train=f"{root}/train",
        test=f"{root}/val",
        image_size=IMAGE_SIZE,
        global_batch_size=BATCH_SIZE,
        validation_share=0.01,
        augment=True,
        num_loader_workers=processes,
    )


def _ours(name: str, root: str | Path, processes: int) -> Iterator[int]:
    train = datasets.load(_data(name, root, processes), seed=0).train
    loader = TrainLoader(train, global_batch_size=BATCH_SIZE, seed=0, num_loader_workers=processes)
    for images, _ in loader:
        yield len(images)


def limit(processes: int) -> Iterator[int]:
    """Run the bare loop; of several processes each has every image in memory."""
    for _ in range(processes - 1):
        if os.fork() == 0:
            for _ in _bare_loop():
                pass
            os._exit(0)
    for num in _bare_loop():
        yield num * processes


def _bare_loop() -> Iterator[int]:
    files = _by_number()[: (WARM_UP_BATCHES + COUNTED_BATCHES + 1) * BATCH_SIZE]
    encoded = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in files]
    sizes = [header_size(data) for data in encoded]
    crop = RandomCrop(IMAGE_SIZE, is_varied=False)
    for first in range(0, len(encoded) - BATCH_SIZE, BATCH_SIZE):
        for data, size in zip(encoded[first : first + BATCH_SIZE], sizes[first:], strict=False):
            normalised(crop(data, size))
        yield BATCH_SIZE


def image_folder(processes: int) -> Iterator[int]:
    """Run torchvision's own."""
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(FOLDER / "files" / "train"), _transforms())
    for images, _ in DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=processes):
        yield len(images)


def webdataset(processes: int) -> Iterator[int]:
    """Run webdataset's."""
    import webdataset as wds

    tars = sorted(map(str, (FOLDER / "tars").glob("*.tar")))
    dataset = wds.WebDataset(tars, shardshuffle=len(tars)).shuffle(1000).decode("pil").to_tuple("jpg", "cls")
    dataset = dataset.map_tuple(_transforms(), int).batched(BATCH_SIZE)
    for images, _ in DataLoader(dataset, batch_size=None, num_workers=processes):
        yield len(images)


def ray_data(processes: int) -> Iterator[int]:
    """Run Ray Data's."""
    import ray

    ray.init(num_cpus=processes, include_dashboard=False, log_to_driver=False, object_store_memory=2**30)
    ray.data.DataContext.get_current().enable_progress_bars = False
    shards = sorted((FOLDER / "train").glob("shard-*"))[:NUM_RAY_SHARDS]
    rows = ray.data.read_parquet([str(path) for path in shards], columns=["image", "label"])
    for batch in rows.map_batches(_crop_rows, batch_size=BATCH_SIZE).iter_torch_batches(batch_size=BATCH_SIZE):
        yield len(normalised(batch["image"]))
    ray.shutdown()


def _crop_rows(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    torch.set_num_threads(1)
    crop = RandomCrop(IMAGE_SIZE, is_varied=False)
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in rows["image"]]
    return {"image": np.stack([crop(data, header_size(data)).numpy() for data in encoded]), "label": rows["label"]}


def _transforms() -> Callable[[Image.Image], Tensor]:
    steps = [
        v2.RandomResizedCrop(IMAGE_SIZE),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
    ]
    transforms: Callable[[Image.Image], Tensor] = v2.Compose([*steps, v2.Normalize(MEAN, STD)])
    return transforms


RUN: dict[str, Callable[[int], Iterator[int]]] = {
    "limit": limit,
    "ours": lambda processes: _ours("parquet", FOLDER, processes),
    "ours_store": lambda processes: _ours("parquet", "s3://images", processes),
    "ours_files": lambda processes: _ours("image_folder", FOLDER / "files", processes),
    "image_folder": image_folder,
    "webdataset": webdataset,
    "ray_data": ray_data,
}


# --- measuring ----------------------------------------------------------------------------------------------------------------


class _Memory(threading.Thread):
    """Watches the largest resident memory of a child process: VmHWM, mapped files and shared batches included."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb = 0.0

    def run(self) -> None:
        while True:
            for child in psutil.Process().children(recursive=True):
                try:
                    status = Path(f"/proc/{child.pid}/status").read_text()
                except OSError:
                    continue
                for line in status.splitlines():
                    if line.startswith("VmHWM:"):
                        self.peak_mb = max(self.peak_mb, int(line.split()[1]) / 1000)
            time.sleep(0.5)


class _LateStore(BaseHTTPRequestHandler):
    """Answers as S3 does for the bucket `images`, which is FOLDER, DELAY_S late."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Send a file, or the range of it that the request names."""
        time.sleep(DELAY_S)
        path = FOLDER / self.path.removeprefix("/images/")
        size = path.stat().st_size if path.is_file() else 0
        first, last = 0, size - 1
        if named := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(named[1]), min(int(named[2]), last)
        self.send_response(206 if named else 200 if path.is_file() else 404)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if self.command == "GET" and path.is_file():
            with path.open("rb") as file:
                file.seek(first)
                self.wfile.write(file.read(last - first + 1))

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextmanager
def _late_store() -> Iterator[None]:
    """Run the server, to which the processes that are started meanwhile send their requests."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _LateStore) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
        yield
        server.shutdown()


def measure(name: str) -> dict[str, Any]:
    """Return images per second of wall time and per CPU second, and the largest loader process."""
    side, processes, *cold = name.split("-")
    torch.set_num_threads(1)
    (_drop_page_cache if cold else _fill_page_cache)(side)
    memory = _Memory()
    memory.start()
    skipped = 0 if side == "ray_data" else WARM_UP_BATCHES
    num_images, began, cpu_began = 0, time.perf_counter(), _cpu_s()
    loaders_s, all_s = 0.0, 0.0
    batches = RUN[side](int(processes))
    for step, num in enumerate(batches if side == "ray_data" else itertools.islice(batches, skipped + COUNTED_BATCHES)):
        if step < skipped:
            began, cpu_began = time.perf_counter(), _cpu_s()
            continue
        num_images += num
        wall_s = time.perf_counter() - began
        loaders_s, all_s = (now - before for now, before in zip(_cpu_s(), cpu_began, strict=True))
    return {
        "per_s": num_images / wall_s,
        "per_core": num_images / (all_s if side == "limit" else loaders_s),
        "per_cpu_s": num_images / all_s,
        "peak_mb": memory.peak_mb,
        "images": num_images,
    }


def _cpu_s() -> tuple[float, float]:
    """Return the CPU seconds of the children of this process, and of both, those that have ended included."""
    own = psutil.Process().cpu_times()
    loaders_s = own.children_user + own.children_system
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        loaders_s += times.user + times.system + times.children_user + times.children_system
    return loaders_s, loaders_s + own.user + own.system


def run(names: list[str], seconds: float, *, is_anew: bool = False) -> None:
    """Add a turn of each measurement, in processes of their own; start none after `seconds`.

    is_anew: the first turn of a measurement takes the place of all that it had.
    """
    os.environ |= TIMING_ENV
    began = time.monotonic()
    replaced = set(names) if is_anew else set()
    for name in names:
        if time.monotonic() - began > seconds:
            return
        found = json_of_process("benchmarks.bench_data", name, TIMEOUT_S)
        if isinstance(found, str):
            print(f"{name}: {found}", flush=True)
            continue
        row = ROWS.read().get(name, {"model": name, "turns": []})
        turns = [] if name in replaced else row["turns"]
        replaced.discard(name)
        ROWS.write(
            row | {"turns": [*turns, found], "machine": machine("torch", "torchvision", "pyarrow", "pillow", "ray")}
        )
        print(f"{name}: {found}", flush=True)


# --- the table ------------------------------------------------------------------------------------------------------------------


def table_text() -> str:
    """Return the results as a Markdown page."""
    rows = ROWS.read()
    lines = [_line(name, rows) for name in NAMES if name in rows]
    shares = {
        key: [_median(rows["ours-1"], key) / _median(rows[f"{side}-1"], key) for side in ("limit", "image_folder")]
        for key in ("per_core", "per_cpu_s", "per_s")
    }
    num_images = max(turn["images"] for row in rows.values() for turn in row["turns"])
    return "\n".join(
        [
            "# Images per second and core, beside the limit and other loaders",
            "",
            "Written by `python -m benchmarks.bench_data --render`; what is timed stands in [bench_data.py](../bench_data.py).",
            "",
            f"- A core of ours gives {shares['per_core'][0]:.0%} of the limit, {shares['per_core'][1]:.2f} times torchvision's",
            f"  ImageFolder. With the process that takes the batches: {shares['per_cpu_s'][0]:.0%} and {shares['per_cpu_s'][1]:.2f} times;",
            f"  by wall time {shares['per_s'][0]:.0%} and {shares['per_s'][1]:.2f} times.",
            *_late_line(rows),
            f"- Largest loader process of ours: {max(turn['peak_mb'] for turn in rows['ours_store-1']['turns']):.0f} MB, from the store.",
            "- The limit normalises where it decodes, ours in the process that takes the batches: per core ours may come out above it,",
            "  counted over all processes it does not. In a training on a GPU it is done there.",
            "- With two loader processes on two cores the process that takes the batches, the store's server and the requests have no",
            "  core of their own. With one, requests are handled beside the decoding, while shards on the disk are read in between.",
            "",
            f"Machine: {'; '.join(sorted({row['machine'] for row in rows.values()}))}.",
            f"20,000 images of about 102 kB and 500 x 375, crops of {NUM_BASES} generated pictures; a turn counts {num_images} at most;",
            "one thread a process.",
            "Medians of n turns (least-most), each in a process of its own, the sides one after another. Warm: every file was read",
            "before. Cold: the kernel was asked to forget the files (posix_fadvise); the disk below the virtual machine may remember",
            "them.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{' --- |' * len(COLUMNS)}",
            *lines,
            "",
        ]
    )


def _late_line(rows: dict[str, Any]) -> list[str]:
    shares = [
        f"{_median(rows[f'ours_store-{processes}'], 'per_s') / _median(rows[f'ours-{processes}'], 'per_s'):.0%}"
        for processes in (1, 2)
        if f"ours_store-{processes}" in rows
    ]
    what = f"{1000 * DELAY_S:.0f} ms added to each request"
    return [f"- From a store with {what}: {' and '.join(shares)} of the images/s from the disk."] if shares else []


COLUMNS = (
    *("side", "processes", "page cache", "images/s", "per core", "of the limit"),
    *("per CPU second, all", "of the limit", "largest process MB", "n"),
)


def _line(name: str, rows: dict[str, Any]) -> str:
    side, processes, *cold = name.split("-")
    row, bound = rows[name], rows.get(f"limit-{processes}")
    shares = [f"{_median(row, key) / _median(bound, key):.0%}" if bound else "-" for key in ("per_core", "per_cpu_s")]
    peak = f"{max(turn['peak_mb'] for turn in row['turns']):.0f}" if side != "limit" else "-"
    cells = (
        *(side, processes, "cold" if cold else "warm", _spread(row, "per_s"), _spread(row, "per_core"), shares[0]),
        *(_spread(row, "per_cpu_s"), shares[1], peak, len(row["turns"])),
    )
    return f"| {' | '.join(map(str, cells))} |"


def _median(row: dict[str, Any], key: str) -> float:
    return statistics.median(turn[key] for turn in row["turns"])


def _spread(row: dict[str, Any], key: str) -> str:
    values = [turn[key] for turn in row["turns"]]
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SIDE-PROCESSES[-cold]")
    parser.add_argument("--make", type=int, metavar="N", help="write so many images")
    parser.add_argument(
        "--all", action="store_true", help="a further turn of every measurement, those with the fewest first"
    )
    parser.add_argument("--anew", action="store_true", help="the named measurements' earlier turns are replaced")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no measurement after this time")
    parser.add_argument("--json", metavar="NAME", help="measure in this process; print it as JSON")
    parser.add_argument("--render", action="store_true", help="write the table from the results file")
    parser.add_argument("--remove", action="store_true", help="remove the images")
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make)
    if arguments.json:
        print(json.dumps(measure(arguments.json)))
    rows = ROWS.read()
    names = (
        sorted(NAMES, key=lambda name: len(rows.get(name, {"turns": []})["turns"]))
        if arguments.all
        else arguments.names
    )
    with _late_store():
        run(names, arguments.seconds, is_anew=arguments.anew)
    if arguments.render:
        TABLE.write_text(table_text())
    if arguments.remove:
        shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
