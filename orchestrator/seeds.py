"""Seeds that are derived from others."""

import hashlib


def mix_seed(*parts: int | str) -> int:
    """Return 63 bits that depend on every part; unlike sums, (seed 0, epoch 1) and (seed 1, epoch 0) share nothing."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
