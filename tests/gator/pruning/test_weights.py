"""Tensors on disk: what was written is read, and nothing else."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gator
from gator.pruning.weights import load_weights, save_weights

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "num_batches_tracked": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}


def are_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def test_weights_are_read_with_their_owner_and_by_plain_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "new" / "w.safetensors"
    save_weights(path, TENSORS, owner="somebody")
    found, owner = load_weights(path)
    assert owner == "somebody"
    assert are_equal(found, TENSORS)
    assert are_equal(load_file(path), TENSORS)


def test_what_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gator.ArtifactError, match=r"'_extra_state' is not a tensor"):
        save_weights(tmp_path / "w", {**TENSORS, "_extra_state": {"scale": 1.0}})  # type: ignore[dict-item]
    assert not (tmp_path / "w").exists()


def test_the_same_tensors_make_the_same_file(tmp_path: Path) -> None:
    save_weights(tmp_path / "a", TENSORS, owner="x")
    save_weights(tmp_path / "b", dict(reversed(TENSORS.items())), owner="x")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_flipped_bit_anywhere_is_known(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, TENSORS)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found, _ = load_weights(path)
        except gator.ArtifactError:
            continue
        assert are_equal(found, TENSORS), f"byte {place}"  # a space in the header, say


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "absent or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "absent or damaged"),
        (lambda path: path.unlink(), "absent or damaged"),
        (lambda path: save_file(TENSORS, path), "have version none, this program reads version 2"),
        (lambda path: save_file(TENSORS, path, {"gator": "[]"}), "absent or damaged"),
    ],
    ids=["empty", "cut", "gone", "another program's", "another label"],
)
def test_what_is_no_weights_file_is_one_clear_error(damage, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, TENSORS)
    damage(path)
    with pytest.raises(gator.ArtifactError, match=message):
        load_weights(path)
