"""The images of a tree as others would have written them: Hugging Face's Parquet files, and the tars of webdataset."""

import io
import json
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.orchestrator.packed import CLASSES


def images_of(tree: Path) -> list[tuple[str, int, bytes]]:
    """Return key, label and bytes of each image, shuffled."""
    images = [
        (f"{name}/{path.name}", label, path.read_bytes())
        for label, name in enumerate(CLASSES)
        for path in sorted((tree / name).iterdir())
    ]
    random.Random(1).shuffle(images)
    return images


def write_hf(tree: Path, folder: Path, split: str, *, num_files: int = 2, with_names: bool = True) -> Path:
    """Write Parquet files in row groups of 4, as `datasets` does; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if with_names else None
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata)
    images = images_of(tree)
    for number in range(num_files):
        part = images[number::num_files]
        rows = {
            "image": [{"bytes": content, "path": key} for key, _, content in part],
            "label": [row[1] for row in part],
        }
        name = f"{split}-{number:05d}-of-{num_files:05d}.parquet"
        pq.write_table(pa.table(rows, schema), folder / name, row_group_size=4)
    return folder


def write_tars(tree: Path, folder: Path, split: str, *, num_files: int = 2, label_suffix: str = "cls") -> Path:
    """Write tar files; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    images = images_of(tree)
    for number in range(num_files):
        with tarfile.open(folder / f"{split}-{number:06d}.tar", "w") as tar:
            for key, label, content in images[number::num_files]:
                stem = key.removesuffix(".JPEG")
                text = str(label) if label_suffix == "cls" else json.dumps({"label": label})
                add(tar, f"{stem}.JPEG", content)
                add(tar, f"{stem}.{label_suffix}", text.encode())
    return folder


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
