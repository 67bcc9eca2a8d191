"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: real images that are installed with the package."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orchestrator.config.trial import DataConfig
from orchestrator.datasets.in_memory import prepare, stratified
from orchestrator.errors import DataError

NUM_CLASSES = 10
NUM_TRAIN = 1438
VAL_SHARE = 0.2
MEAN, STD = 4.884 / 16, 6.017 / 16  # of the 1,797 images, whose pixels are 0 to 16


def load(data: DataConfig) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) for training, 1,438, and for testing, 359: always the same, stratified by digit.

    Raises: DataError if scikit-learn's file is missing.
    """
    table = torch.from_numpy(np.loadtxt(_file(), delimiter=",", dtype=np.float32))  # 64 pixels and the label
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    labels = table[:, 64].long()
    images = prepare(table[:, :64].reshape(-1, 1, 8, 8) / 16, data.image_size, MEAN, STD)
    is_val = stratified(labels, VAL_SHARE)
    return (images[~is_val], labels[~is_val]), (images[is_val], labels[is_val])


def _file() -> Path:
    """Return the file that sklearn.datasets.load_digits() reads.

    sklearn itself is not imported: with scipy it would cost every worker of every trial a second of CPU time and 60 MB.
    """
    package = importlib.util.find_spec("sklearn")
    folder = Path(str(package.origin)).parent if package else Path("sklearn")
    path = folder / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise DataError(f"the digits are missing: {path} comes with scikit-learn; install it: pip install scikit-learn")
    return path
