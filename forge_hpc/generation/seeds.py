"""The seed of each sample, from what identifies it in a run."""

from __future__ import annotations

import hashlib

_SEED_BITS = 63  # vLLM takes a signed 64-bit seed and reads -1 as "none"


def sample_seed(run_seed: int, position: int, sample_index: int, turn: int = 0) -> int:
    """Seed of response ``turn`` in sample ``sample_index`` of the prompt at ``position``, in [0, 2**63).

    A hash, because vLLM gives sample j of a request with ``n`` samples the seed ``seed + j``: two groups with
    neighbouring seeds would repeat each other's samples.
    """
    key = (f"{run_seed}/{position}/{sample_index}" + (f"/{turn}" if turn else "")).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") & ((1 << _SEED_BITS) - 1)
