"""Packing: documents of any length become full rows, because padding is paid for by everything after it.

A document of L tokens takes L - 1 slots: slot t holds token t as input and token t + 1 as label, and everything that
is said of a token (mask, log-probabilities, advantage) stands in the slot that predicts it. Positions restart at 0
with each document, which is how the attention keeps them apart; what is left of a row is a segment of its own.
Documents of a group stand one after the other, in one row.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from forge_hpc.config.errors import UserError
from forge_hpc.data.types import Document

FIELDS = ("generator_logprobs", "ref_logprobs", "old_logprobs")
"""Of a document, beside ``advantage``: columns that have a field of their own."""
_EVEN = 0.002
"""What costs so little more than the mean is even enough."""
_ROWS = ("input_ids", "labels", "positions", "segment_ids", "group_ids", "mask")
RESERVED = frozenset((*_ROWS, *FIELDS, "routes", "logprobs", "entropy", "normalizer"))
"""What a column may not be called."""


@dataclass(slots=True)
class PackedBatch:
    """Which documents stand where in rows of equally many slots; ``rows`` makes the arrays of some of them.

    A rank places the documents of all, by their lengths, and fills its own rows alone, a microbatch at a time while its
    device computes the one before.
    """

    num_rows: int
    row_len: int
    """Slots of a row."""
    placements: list[tuple[int, int]]
    """(row, first slot) of each document, in the order of the documents."""
    columns: tuple[str, ...]
    """Names of what is said of the tokens: ``advantages``, ``generator_logprobs``, ``ref_logprobs`` and the documents'
    own columns. Only those that the documents have."""
    routes: tuple[int, ...] | None
    """Layers and experts a token of the documents' ``routes``; None: they say none."""
    num_trained_tokens: int
    """Labels that are trained: the step's global count, by which the loss is divided."""
    num_trained_sequences: int
    """Documents with a label that is trained, by which losses that are means over sequences are divided."""
    num_trained_groups: int
    """Groups with a label that is trained, by which losses that are means over pairs are divided."""
    _documents: Sequence[Document]
    _columns: Sequence[Mapping[str, np.ndarray]]
    _in_rows: list[list[tuple[int, int]]]
    """Of each row its documents, in their order, with the numbers of their groups."""
    _loads: list[int]
    """Of each row: slots that hold a token of a document."""

    @property
    def num_slots_used(self) -> int:
        """Slots that hold a token of a document."""
        return sum(self._loads)

    @property
    def fill(self) -> float:
        """Share of the slots that hold a token of a document."""
        return self.num_slots_used / (self.num_rows * self.row_len)

    def rows(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Arrays [R, T] of the rows [start, stop), T slots each, by name:

        - ``input_ids`` and ``labels``, the token after: int64, 0 in padding
        - ``positions``: int64, the place in the document, from 0; padding counts from 0 too
        - ``segment_ids``: int32, 1, 2, … for the documents of a row, 0 for padding
        - ``group_ids``: int32, the same for the groups of a row, a document without one being its own
        - ``mask``: bool, labels that are trained
        - each of ``columns``: float32, at the label that it is of; what is said of a whole document at every slot of it
        - ``routes`` [R, T, layers, k], where there are any: int16, -1 in padding
        """
        shape = (stop - start, self.row_len)
        arrays = {name: np.zeros(shape, np.int64) for name in ("input_ids", "labels", "positions")}
        arrays |= {name: np.zeros(shape, np.int32) for name in ("segment_ids", "group_ids")}
        arrays["mask"] = np.zeros(shape, bool)
        columns = {name: np.zeros(shape, np.float32) for name in self.columns}
        if self.routes is not None:
            arrays["routes"] = np.full((*shape, *self.routes), -1, np.int16)
        for row in range(start, stop):
            numbers: dict[int, int] = {}  # of groups
            for segment, (index, group) in enumerate(self._in_rows[row], 1):
                document, first = self._documents[index], self.placements[index][1]
                num_slots = len(document.token_ids) - 1
                slots = (row - start, slice(first, first + num_slots))
                arrays["input_ids"][slots] = document.token_ids[:-1]
                arrays["labels"][slots] = document.token_ids[1:]
                arrays["positions"][slots] = np.arange(num_slots)
                arrays["segment_ids"][slots] = segment
                arrays["group_ids"][slots] = numbers.setdefault(group, len(numbers) + 1)
                arrays["mask"][slots] = document.loss_mask[1:]
                if document.routes is not None:
                    arrays["routes"][slots] = document.routes
                for name, array in columns.items():
                    values = self._columns[index][name]
                    array[slots] = values[1:] if values.ndim else values
            load = self._loads[row]
            arrays["positions"][row - start, load:] = np.arange(self.row_len - load)
        return arrays | columns


def pack(
    documents: Sequence[Document],
    seq_len: int,
    *,
    num_rows_multiple: int = 1,
    row_len_multiple: int = 8,
    num_ranks: int = 1,
) -> PackedBatch:
    """Pack documents into as few rows as hold them, evenly, and trim the rows to the longest.

    The number of rows is chosen first; then each document, longest first, goes to the emptiest row (LPT scheduling,
    Graham 1969). Rows of nearly equal load can all be cut to the longest, so small batches fill well too. The same
    documents always give the same rows. A group goes the way of a document as long as all of it.

    Args:
        seq_len: largest number of slots in a row.
        num_rows_multiple: the number of rows is a multiple of this: data-parallel ranks times rows of a microbatch.
            With few documents some rows may stay empty.
        num_ranks: data-parallel ranks, which take ``num_rows_multiple / num_ranks`` rows each in turn: rows are dealt
            so that attention, whose cost grows with the square of a document, takes all about as long.
        row_len_multiple: the row length is a multiple of this; it may exceed ``seq_len`` by the rounding.

    Raises:
        ValueError: no documents; one that is longer than ``seq_len + 1`` or shorter than 2 tokens; arrays of other
            lengths than the tokens; a column that is not finite, or that only some documents have.
        UserError: a group that is longer than a row.
    """
    columns = [columns_of(index, document) for index, document in enumerate(documents)]
    lengths = [_checked_length(index, document, seq_len) for index, document in enumerate(documents)]
    if not lengths:
        raise ValueError("no documents to pack")
    units = _units(documents, lengths, seq_len)
    unit_lengths = [sum(lengths[index] for index in unit) for unit in units]
    num_rows = num_rows_multiple * -(-sum(lengths) // (seq_len * num_rows_multiple))
    while True:
        unit_places, loads = _spread(unit_lengths, num_rows)
        if max(loads) <= seq_len:
            break
        num_rows += num_rows_multiple
    if num_ranks > 1:
        unit_places, loads = _dealt(units, unit_places, lengths, loads, num_ranks, num_rows_multiple // num_ranks)
    row_len = -(-max(loads) // row_len_multiple) * row_len_multiple
    placements = [(0, 0)] * len(documents)
    for unit, (row, start) in zip(units, unit_places, strict=True):
        for index in unit:
            placements[index] = (row, start)
            start += lengths[index]
    group_of = {index: number for number, unit in enumerate(units) for index in unit}
    in_rows: list[list[tuple[int, int]]] = [[] for _ in loads]
    for index, (row, _) in enumerate(placements):
        in_rows[row].append((index, group_of[index]))
    num_trained = [int(np.count_nonzero(document.loss_mask[1:])) for document in documents]
    return PackedBatch(
        num_rows=len(loads),
        row_len=row_len,
        placements=placements,
        columns=_names(columns),
        routes=_shape_of_routes(documents),
        num_trained_tokens=sum(num_trained),
        num_trained_sequences=sum(number > 0 for number in num_trained),
        num_trained_groups=sum(any(num_trained[index] for index in unit) for unit in units),
        _documents=documents,
        _columns=columns,
        _in_rows=in_rows,
        _loads=loads,
    )


def unpack(values: np.ndarray, batch: PackedBatch, documents: Sequence[Document]) -> list[np.ndarray]:
    """Per-slot values [R, T] back to the documents: [L] each, at the token predicted; 0 at the first token."""
    unpacked = []
    for document, (row, start) in zip(documents, batch.placements, strict=True):
        num_slots = len(document.token_ids) - 1
        unpacked.append(np.concatenate([np.zeros(1, values.dtype), values[row, start : start + num_slots]]))
    return unpacked


def columns_of(index: int, document: Document) -> dict[str, np.ndarray]:
    """What a document says of its tokens, by the name that a loss gets it by: [L], or [] for all of them.

    Raises:
        ValueError: as ``pack``.
    """
    if taken := RESERVED & document.columns.keys():
        name = min(taken)
        instead = f"set Document.{name}" if name in FIELDS else "give it another name"
        raise ValueError(f"document {index} has a column {name!r}, which is no name for one: {instead}")
    given: dict[str, np.ndarray | float] = {"advantages": document.advantage}
    given |= {name: array for name in FIELDS if (array := getattr(document, name)) is not None}
    columns = {name: np.asarray(values) for name, values in (given | document.columns).items()}
    num_tokens = len(document.token_ids)
    for name, array in columns.items():
        if array.ndim and array.shape != (num_tokens,):
            raise ValueError(f"document {index} has {num_tokens} tokens but {array.size} entries in {name}")
        if array.dtype.kind not in "fiub":
            raise ValueError(f"document {index} has {name} that are no numbers")
        if array.dtype.kind in "iu" and (array.astype(np.float32) != array).any():
            raise ValueError(f"document {index} has {name} too large to be exact: columns are float32")
        if not np.isfinite(array).all():
            what = "an advantage that is" if name == "advantages" and not array.ndim else f"{name} that are"
            raise ValueError(f"document {index} has {what} not finite")
    return columns


def _checked_length(index: int, document: Document, seq_len: int) -> int:
    """Slots of a document."""
    num_tokens = len(document.token_ids)
    if num_tokens < 2:
        raise ValueError(f"document {index} has {num_tokens} token(s): nothing to predict")
    if num_tokens > seq_len + 1:
        raise ValueError(
            f"document {index} has {num_tokens} tokens, more than fit into a row: trainer.training.seq_len is {seq_len}"
        )
    if len(document.loss_mask) != num_tokens:
        raise ValueError(f"document {index} has {num_tokens} tokens but {len(document.loss_mask)} entries in loss_mask")
    return num_tokens - 1


def _units(documents: Sequence[Document], lengths: list[int], seq_len: int) -> list[list[int]]:
    """What is placed as one: the documents of a group, and each of the others, in the order of their first."""
    units: list[list[int]] = []
    of_group: dict[int, list[int]] = {}
    for index, document in enumerate(documents):
        if document.group is None or document.group not in of_group:
            units.append([index])
            if document.group is not None:
                of_group[document.group] = units[-1]
        else:
            of_group[document.group].append(index)
    for group, unit in of_group.items():
        if (num_slots := sum(lengths[index] for index in unit)) > seq_len:
            raise UserError(
                f"the {len(unit)} documents of group {group} take {num_slots} slots, and must stand in one row of "
                f"trainer.training.seq_len={seq_len}",
                f"set trainer.training.seq_len to at least {num_slots}, or make prompts and responses shorter",
            )
    return units


def _spread(lengths: list[int], num_rows: int) -> tuple[list[tuple[int, int]], list[int]]:
    """(row, first slot) of each length and the load of each row, the longest first to the emptiest row."""
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


def _dealt(
    units: list[list[int]],
    places: list[tuple[int, int]],
    lengths: list[int],
    loads: list[int],
    num_ranks: int,
    num_together: int,
) -> tuple[list[tuple[int, int]], list[int]]:
    """The same rows in another order: the ranks', which take ``num_together`` each in turn, cost about the same, and
    what they compute at the same time too."""
    costs = [0] * len(loads)
    for unit, (row, _) in zip(units, places, strict=True):
        costs[row] += sum(lengths[index] ** 2 for index in unit)
    num_turns = len(loads) // (num_ranks * num_together)
    order = [0] * len(loads)
    for rank, rows in enumerate(balanced(costs, num_ranks)):
        rows.sort(key=lambda row: (-costs[row], row))
        for turn in range(num_turns):
            first = (turn * num_ranks + rank) * num_together
            order[first : first + num_together] = rows[turn * num_together : (turn + 1) * num_together]
    place_of = {row: place for place, row in enumerate(order)}
    return [(place_of[row], start) for row, start in places], [loads[row] for row in order]


def balanced(costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Indices of ``costs`` in parts of equal number, whose sums are nearly equal: the costliest first to the cheapest
    part that has room, then exchanges between the costliest part and others for as long as they help and are needed."""
    size, total = len(costs) // num_parts, sum(costs)
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    sums = [0] * num_parts
    with_room = [(0, part) for part in range(num_parts)]  # the cheapest first
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        _, part = with_room[0]
        parts[part].append(index)
        sums[part] += costs[index]
        if len(parts[part]) < size:
            heapq.heapreplace(with_room, (sums[part], part))
        else:
            heapq.heappop(with_room)
    for _ in range(len(costs)):
        high = max(range(num_parts), key=lambda part: sums[part])
        if sums[high] * num_parts <= (1 + _EVEN) * total:
            break
        best = (0, 0, 0, 0)
        for low in range(num_parts):
            gap = sums[high] - sums[low]
            for i, one in enumerate(parts[high]):
                for j, other in enumerate(parts[low]):
                    moved = costs[one] - costs[other]
                    gain = min(moved, gap - moved)  # of the costliest of the two
                    if gain > best[0]:
                        best = (gain, low, i, j)
        gain, low, i, j = best
        if not gain:
            break
        moved = costs[parts[high][i]] - costs[parts[low][j]]
        parts[high][i], parts[low][j] = parts[low][j], parts[high][i]
        sums[high] -= moved
        sums[low] += moved
    return parts


def _shape_of_routes(documents: Sequence[Document]) -> tuple[int, ...] | None:
    """Layers and experts a token. Raises ValueError: routes of some documents, or of another number of tokens, layers
    or experts."""
    given = [document.routes for document in documents if document.routes is not None]
    if not given:
        return None
    if len(given) != len(documents):
        raise ValueError(f"{len(given)} of {len(documents)} documents have routes: all or none must")
    for index, (document, routes) in enumerate(zip(documents, given, strict=True)):
        if routes.shape != (len(document.token_ids) - 1, *given[0].shape[1:]):
            raise ValueError(
                f"document {index} has {len(document.token_ids)} tokens and routes of shape {list(routes.shape)}: "
                "there must be those of all tokens but the last, of as many layers and experts in all documents"
            )
    return tuple(given[0].shape[1:])


def _names(columns: Sequence[Mapping[str, np.ndarray]]) -> tuple[str, ...]:
    """Of all columns; ValueError where one is not in all documents."""
    names = dict.fromkeys(name for own in columns for name in own)
    for name in names:
        if (num_with := sum(name in own for own in columns)) != len(columns):
            raise ValueError(f"{num_with} of {len(columns)} documents have {name}: all or none must")
    return tuple(names)
