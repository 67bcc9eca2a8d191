"""Derived seeds, and seeding of random generators."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mix_seed(*parts: int | str) -> int:
    """Return 63 bits that depend on every part; unlike with sums, (seed 0, epoch 1) and (seed 1, epoch 0) are unrelated."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


@contextmanager
def drawing(seed: int | None) -> Iterator[None]:
    """Seed torch's global generator within the context and restore it afterwards; None leaves it alone."""
    if seed is None:
        yield
        return
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds every GPU as well
    try:
        yield
    finally:
        torch.set_rng_state(state)


def seed_everything(seed: int, stage: str, epoch: int, rank: int, step: int = 0) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    mixed = mix_seed(seed, stage, epoch, rank, step)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)
