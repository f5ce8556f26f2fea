"""Packing: documents of any length become full rows, because padding is paid for by everything after it.

A document of L tokens takes L - 1 slots: slot t holds token t as input and token t + 1 as label, and everything that
is said of a token (mask, log-probabilities, advantage) stands in the slot that predicts it. Positions restart at 0
with each document, which is how the attention keeps them apart; what is left of a row is a segment of its own.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from forge_hpc.data.types import Document


@dataclass(slots=True)
class PackedBatch:
    """Rows of packed documents. All arrays are [R, T]: R rows of T slots."""

    input_ids: np.ndarray
    """int64."""
    labels: np.ndarray
    """int64: the token after ``input_ids``; 0 in padding."""
    positions: np.ndarray
    """int64: place in the document, from 0; padding counts from 0 too."""
    segment_ids: np.ndarray
    """int32: 1, 2, … for the documents of a row, 0 for padding."""
    mask: np.ndarray
    """bool: labels that are trained."""
    advantages: np.ndarray
    """float32: the document's advantage at every slot of it."""
    generator_logprobs: np.ndarray | None
    """float32: the generator's log-probabilities of the labels; None where no document has any."""
    ref_logprobs: np.ndarray | None
    """float32: the reference model's log-probabilities of the labels; None where no document has any."""
    placements: list[tuple[int, int]]
    """(row, first slot) of each document, in the order of the documents."""
    num_slots_used: int
    """Slots that hold a token of a document."""

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_trained_tokens(self) -> int:
        """Labels that are trained: the step's global count, by which the loss is divided."""
        return int(np.count_nonzero(self.mask))

    @property
    def num_trained_sequences(self) -> int:
        """Documents with a label that is trained, by which losses that are means over sequences are divided."""
        numbers = np.arange(self.num_rows)[:, None] * (self.segment_ids.max() + 1) + self.segment_ids
        return len(np.unique(numbers[self.mask]))

    @property
    def fill(self) -> float:
        """Share of the slots that hold a token of a document."""
        return self.num_slots_used / self.input_ids.size

    def rows(self, start: int, stop: int) -> dict[str, np.ndarray | None]:
        """The arrays by name, cut to the rows [start, stop)."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("placements", "num_slots_used")}
        return {name: array if array is None else array[start:stop] for name, array in arrays.items()}


def pack(
    documents: Sequence[Document], seq_len: int, *, num_rows_multiple: int = 1, row_len_multiple: int = 8
) -> PackedBatch:
    """Pack documents into as few rows as hold them, evenly, and trim the rows to the longest.

    The number of rows is chosen first; then each document, longest first, goes to the emptiest row (LPT scheduling,
    Graham 1969). Rows of nearly equal load can all be cut to the longest, so small batches fill well too. The same
    documents always give the same rows.

    Args:
        seq_len: largest number of slots in a row.
        num_rows_multiple: the number of rows is a multiple of this: data-parallel ranks times rows of a microbatch.
            With few documents some rows may stay empty.
        row_len_multiple: the row length is a multiple of this; it may exceed ``seq_len`` by the rounding.

    Raises:
        ValueError: no documents; one that is longer than ``seq_len + 1`` or shorter than 2 tokens; arrays of other
            lengths than the tokens; log-probabilities or an advantage that are not finite; log-probabilities that only
            some documents have.
    """
    lengths = [_checked_length(index, document, seq_len) for index, document in enumerate(documents)]
    if not lengths:
        raise ValueError("no documents to pack")
    num_rows = num_rows_multiple * -(-sum(lengths) // (seq_len * num_rows_multiple))
    while True:
        placements, loads = _spread(lengths, num_rows)
        if max(loads) <= seq_len:
            break
        num_rows += num_rows_multiple
    row_len = -(-max(loads) // row_len_multiple) * row_len_multiple
    return _fill_rows(documents, placements, loads, row_len)


def unpack(values: np.ndarray, batch: PackedBatch, documents: Sequence[Document]) -> list[np.ndarray]:
    """Per-slot values [R, T] back to the documents: [L] each, at the token predicted; 0 at the first token."""
    unpacked = []
    for document, (row, start) in zip(documents, batch.placements, strict=True):
        num_slots = len(document.token_ids) - 1
        unpacked.append(np.concatenate([np.zeros(1, values.dtype), values[row, start : start + num_slots]]))
    return unpacked


def _checked_length(index: int, document: Document, seq_len: int) -> int:
    """Slots of a document."""
    num_tokens = len(document.token_ids)
    if num_tokens < 2:
        raise ValueError(f"document {index} has {num_tokens} token(s): nothing to predict")
    if num_tokens > seq_len + 1:
        raise ValueError(
            f"document {index} has {num_tokens} tokens, more than fit into a row: trainer.training.seq_len is {seq_len}"
        )
    for name in ("loss_mask", "generator_logprobs", "ref_logprobs"):
        array = getattr(document, name)
        if array is not None and len(array) != num_tokens:
            raise ValueError(f"document {index} has {num_tokens} tokens but {len(array)} entries in {name}")
        if array is not None and name != "loss_mask" and not np.isfinite(array).all():
            raise ValueError(f"document {index} has {name} that are not finite")
    if not math.isfinite(document.advantage):
        raise ValueError(f"document {index} has an advantage that is not finite")
    return num_tokens - 1


def _spread(lengths: list[int], num_rows: int) -> tuple[list[tuple[int, int]], list[int]]:
    """(row, first slot) of each document and the load of each row, longest document first to the emptiest row."""
    heap = [(0, row) for row in range(num_rows)]
    placements = [(0, 0)] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, row = heap[0]
        placements[index] = (row, load)
        heapq.heapreplace(heap, (load + lengths[index], row))
    loads = [0] * num_rows
    for load, row in heap:
        loads[row] = load
    return placements, loads


def _fill_rows(
    documents: Sequence[Document], placements: list[tuple[int, int]], loads: list[int], row_len: int
) -> PackedBatch:
    shape = (len(loads), row_len)
    optional: dict[str, np.ndarray | None] = {}
    for name in ("generator_logprobs", "ref_logprobs"):
        num_with = sum(getattr(document, name) is not None for document in documents)
        if num_with not in (0, len(documents)):
            raise ValueError(f"{num_with} of {len(documents)} documents have {name}: all or none must")
        optional[name] = np.zeros(shape, np.float32) if num_with else None
    batch = PackedBatch(
        input_ids=np.zeros(shape, np.int64),
        labels=np.zeros(shape, np.int64),
        positions=np.zeros(shape, np.int64),
        segment_ids=np.zeros(shape, np.int32),
        mask=np.zeros(shape, bool),
        advantages=np.zeros(shape, np.float32),
        generator_logprobs=optional["generator_logprobs"],
        ref_logprobs=optional["ref_logprobs"],
        placements=placements,
        num_slots_used=sum(loads),
    )
    num_segments = [0] * len(loads)
    for document, (row, start) in zip(documents, placements, strict=True):
        num_slots = len(document.token_ids) - 1
        slots = (row, slice(start, start + num_slots))
        num_segments[row] += 1
        batch.input_ids[slots] = document.token_ids[:-1]
        batch.labels[slots] = document.token_ids[1:]
        batch.positions[slots] = np.arange(num_slots)
        batch.segment_ids[slots] = num_segments[row]
        batch.mask[slots] = document.loss_mask[1:]
        batch.advantages[slots] = document.advantage
        for name, array in optional.items():
            if array is not None:
                array[slots] = getattr(document, name)[1:]
    for row, load in enumerate(loads):
        batch.positions[row, load:] = np.arange(row_len - load)
    return batch
