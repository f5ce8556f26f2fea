"""What changed between two versions of the same bytes, small where little did.

Bytes are taken as words of 16 bits, whatever they stand for: a bfloat16 is one of them, and a small learning rate moves
few, mostly by one place in the order of floating-point numbers. So a change is two bytes: how many words after the last
one, and by how much the word grows. The result is the new version to the last bit, by construction.

    number of changes ‖ of words given whole ‖ gaps, 1 to 255 ‖ growths, -127 to 127 ‖ places ‖ words

A gap beyond 255 is bridged by changes of 0, a word that grows by more is given whole.
"""

from __future__ import annotations

import struct

import numpy as np

_COUNTS = struct.Struct("<II")
_LARGEST_GAP, _LARGEST_GROWTH = 255, 127
WORTHWHILE = 0.5
"""Largest share of changed words that is looked at closer: finding them takes time too."""


def find(old: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Places where two arrays [N] of int16 differ, in order, and what stood and stands there; None where they are so
    many that sending all is as short."""
    differ = old != new
    if np.count_nonzero(differ) > len(old) * WORTHWHILE:
        return None
    places = np.flatnonzero(differ)
    return places, old[places], new[places]


def encode(places: np.ndarray, old: np.ndarray, new: np.ndarray) -> bytes:
    """Changes [K] as bytes.

    Args:
        places: ascending, below 2^32.
        old, new: int16.
    """
    growths = new.astype(np.int32) - old
    large = np.abs(growths) > _LARGEST_GROWTH
    whole_places, whole_words = places[large].astype("<u4"), new[large].astype("<i2")
    places, growths = places[~large], growths[~large]
    gaps = np.diff(places, prepend=-1)
    bridges = (gaps - 1) // _LARGEST_GAP
    ends = np.cumsum(bridges + 1) - 1
    all_gaps = np.full(int(ends[-1]) + 1 if len(ends) else 0, _LARGEST_GAP, np.uint8)
    all_growths = np.zeros(len(all_gaps), np.int8)
    all_gaps[ends] = gaps - bridges * _LARGEST_GAP
    all_growths[ends] = growths
    counts = _COUNTS.pack(len(all_gaps), len(whole_places))
    return b"".join([counts, *(part.tobytes() for part in (all_gaps, all_growths, whole_places, whole_words))])


def apply(words: np.ndarray, changes: bytes | bytearray | memoryview) -> None:
    """Make the new version out of the old, an array [N] of int16, in place."""
    num, num_whole = _COUNTS.unpack_from(changes)
    position = _COUNTS.size

    def take(dtype: str, count: int) -> np.ndarray:
        nonlocal position
        part = np.frombuffer(changes, dtype, count, position)
        position += part.nbytes
        return part

    gaps, growths = take("u1", num), take("i1", num)
    words[np.cumsum(gaps, dtype=np.int64) - 1] += growths
    whole_places = take("<u4", num_whole)
    words[whole_places] = take("<i2", num_whole)
