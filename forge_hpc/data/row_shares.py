"""Rows that several ranks hold together: which slots of a row each context-parallel rank computes.

A row of T slots is cut into 2C chunks of equal length, and each of C ranks takes two of them. A slot attends to what
stands before it in its document, so chunks cost differently: they are dealt so that all ranks have about the same. Of a
row with one document a rank gets an early and a late chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from forge_hpc.data.packing import balanced

CHUNKS = 2
"""Of a row, for each rank."""


class Pieces(NamedTuple):
    """What a rank attends with: P pieces of documents that stand together in its share, in the order of its slots."""

    num_queries: np.ndarray
    """[P]: slots of each piece."""
    num_keys: np.ndarray
    """[P]: slots of its document up to the piece's last one, those before the piece among them."""
    keys: np.ndarray
    """[M] int64: the slots of the microbatch, numbered through all rows, that are the pieces' keys, one after the
    other. No slot is there more than ``CHUNKS`` times."""


def row_shares(positions: np.ndarray, num_ranks: int) -> np.ndarray:
    """[C, R * T / C] int64: the slots of each rank, numbered through all rows, in ascending order; as many of each row.

    Args:
        positions: [R, T], restarting at 0 at each document; T is a multiple of 2C.
        num_ranks: C.
    """
    num_rows, row_len = positions.shape
    chunk_len = row_len // (CHUNKS * num_ranks)
    costs = (positions + 1).reshape(num_rows, -1, chunk_len).sum(-1)
    starts = np.stack([np.sort(balanced(row.tolist(), num_ranks)) for row in costs], axis=1) * chunk_len
    starts += np.arange(num_rows)[:, None] * row_len
    return (starts[..., None] + np.arange(chunk_len)).reshape(num_ranks, -1)


def pieces(positions: np.ndarray, share: np.ndarray) -> Pieces:
    """The pieces of a rank's share of rows.

    Args:
        positions: [R, T], as of ``row_shares``.
        share: [R * T / C], one of what it returns.
    """
    positions = positions.reshape(-1)[share]
    is_first = positions == 0
    is_first[0] = True
    is_first[1:] |= np.diff(share) != 1
    firsts = np.flatnonzero(is_first)
    num_queries = np.diff(np.append(firsts, len(share)))
    num_keys = positions[firsts] + num_queries
    starts = share[firsts] - positions[firsts]  # of the documents
    offsets = np.arange(num_keys.sum()) - np.repeat(np.cumsum(num_keys) - num_keys, num_keys)
    return Pieces(num_queries, num_keys, np.repeat(starts, num_keys) + offsets)
