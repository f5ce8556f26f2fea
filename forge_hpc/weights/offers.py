"""What trainers offer of a version: where its bytes lie, and what lies where in them. That is said once.

    trainer rank                 controller                           generator
    Brief(7, key)    ──brief──►  Offer(7, places of all ranks)
    its Place       ◄──asked──   where it has none of that key
                                 Brief(7, key of all)     ──brief──►  knows the key, or says UNKNOWN:
                                 the whole offer          ──offer──►  then it has it for the next versions

The places are the same for all versions in a block of memory, and they are large: of 8B a rank has 400 shards. Each
version as a whole would be 7 MB to every generator where 256 ranks train; as a brief it is 100 bytes.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from forge_hpc.weights import memory
from forge_hpc.weights.checksum import Checksum
from forge_hpc.weights.layout import Index, Manifest, Shard, build_index
from forge_hpc.wire.messages import Address

UNKNOWN = "unknown"
"""What a generator says of a brief whose places it does not know."""
KEPT = 2
"""Places that are remembered: a rank has two blocks of memory."""


@dataclass(frozen=True)
class Place:
    """Where the shards of one rank lie, and how: the same for every version in a block of its memory."""

    handle: memory.Handle
    manifest: Manifest
    address: Address | None = None
    """Where other hosts get the bytes behind the handle."""

    @functools.cached_property
    def key(self) -> str:
        """Another place has another one. It is made once and goes with the place: equal places made apart may differ in
        it, and are then told once more."""
        return _key(pickle.dumps((self.handle, self.manifest, self.address)))


@dataclass(frozen=True)
class Part:
    """What one rank offers of a version."""

    version: int
    place: Place
    checksum: Checksum | None

    @property
    def brief(self) -> Brief:
        """For who knows the place, or asks for it."""
        return Brief(self.version, self.place.key, (self.checksum,))


@dataclass(frozen=True)
class Places:
    """Where the shards of all ranks lie that have any; a rank that has the same as another publishes none."""

    ranks: tuple[int, ...]
    handles: tuple[memory.Handle, ...]
    addresses: tuple[Address | None, ...]
    layout: bytes
    """``encoded`` manifests, which count the ranks that have shards from 0. Equal where two lie alike."""

    @classmethod
    def of(cls, places: Sequence[Place]) -> Places:
        """Those of all ranks of the trainers, by rank."""
        ranks = tuple(rank for rank, place in enumerate(places) if place.manifest.shards)
        own = [places[rank] for rank in ranks]
        layout = encoded([replace(place.manifest, rank=number) for number, place in enumerate(own)])
        return cls(ranks, tuple(place.handle for place in own), tuple(place.address for place in own), layout)

    @functools.cached_property
    def key(self) -> str:
        """Others have another one."""
        return _key(pickle.dumps((self.ranks, self.handles, self.addresses)) + self.layout)

    @property
    def manifests(self) -> list[Manifest]:
        """What lies where, of each of the ranks."""
        return _decoded(self.layout)

    @property
    def index(self) -> Index:
        """What lies where, of each tensor. Raises IncompleteVersionError where shards are missing."""
        return _index(self.layout)

    @property
    def starts(self) -> list[list[int]]:
        """Of each of the ranks where its buckets begin, in bytes."""
        return _starts(self.layout)

    @property
    def origin(self) -> Hashable:
        """Equal where two lie in the same processes."""
        return tuple((handle.host, address) for handle, address in zip(self.handles, self.addresses, strict=True))


@dataclass(frozen=True)
class Brief:
    """A version, for who knows where it lies."""

    version: int
    key: str
    """Of its place, or of the places of all ranks."""
    checksums: tuple[Checksum | None, ...]


@dataclass(frozen=True)
class Offer:
    """One version of the weights in the trainers' memory; valid until they are told that nobody reads it."""

    version: int
    places: Places
    checksums: tuple[Checksum | None, ...]
    """Of each of the places; None where nothing is to be verified."""

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Offer:
        """What all ranks offer, by rank."""
        places = Places.of([part.place for part in parts])
        return cls(parts[0].version, places, tuple(parts[rank].checksum for rank in places.ranks))

    @property
    def brief(self) -> Brief:
        """For who may know the places."""
        return Brief(self.version, self.places.key, self.checksums)

    def is_within_reach(self, device_type: str) -> bool:
        """Whether a process that computes on ``device_type`` may be able to open all of it."""
        return all(memory.is_within_reach(handle, device_type) for handle in self.places.handles)

    @property
    def has_streams(self) -> bool:
        """Whether other hosts can get all of it."""
        return None not in self.places.addresses

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each full tensor by Hugging Face name."""
        return {name: parts[0][1].global_shape for name, parts in self.places.index.tensors.items()}


class Known:
    """The newest places, by their keys."""

    def __init__(self) -> None:
        self._places: dict[Hashable, Places] = {}

    def get(self, key: Hashable) -> Places | None:
        """None where they are not known, or no more."""
        return self._places.get(key)

    def put(self, key: Hashable, places: Places) -> Places:
        """The same places. The oldest are forgotten."""
        self._places[key] = places
        while len(self._places) > KEPT:
            del self._places[next(iter(self._places))]
        return places

    def offer(self, told: Offer | Brief) -> Offer | None:
        """The whole of what was told; None where its places are not known."""
        if isinstance(told, Offer):
            self.put(told.places.key, told.places)
            return told
        places = self.get(told.key)
        return None if places is None else Offer(told.version, places, told.checksums)


# ---- manifests in few bytes: those of many ranks differ by the rank's share


def encoded(manifests: Sequence[Manifest]) -> bytes:
    """Manifests for ``_decoded``: names and shapes of the tensors once, and a table of the shards, in which a rank is
    what differs from what differed before (of equal shares: nothing)."""
    names: dict[tuple[str, object, tuple[int, ...]], int] = {}
    num_dims = max((len(shard.shape) for manifest in manifests for shard in manifest.shards), default=0)
    tables = []
    for manifest in manifests:
        table = np.zeros((len(manifest.shards), 3 + 2 * num_dims), np.int64)
        for row, shard in zip(table, manifest.shards, strict=True):
            name = names.setdefault((shard.name, shard.dtype, shard.global_shape), len(names))
            row[:3] = name, shard.bucket, shard.start_bytes
            row[3 : 3 + len(shard.offsets)] = shard.offsets
            row[3 + num_dims : 3 + num_dims + len(shard.shape)] = shard.shape
        tables.append(table)
    _accumulate(tables, -1)
    _accumulate(tables, -1)
    others = [(manifest.version, manifest.rank, manifest.bucket_bytes) for manifest in manifests]
    rows = [len(table) for table in tables]
    shards = np.concatenate(tables) if tables else np.zeros((0, 3), np.int64)
    return zlib.compress(pickle.dumps((list(names), num_dims, others, rows, shards)), 1)


@functools.lru_cache(maxsize=KEPT)
def _decoded(layout: bytes) -> list[Manifest]:
    names, num_dims, others, rows, shards = pickle.loads(zlib.decompress(layout))
    tables = np.split(shards, np.cumsum(rows)[:-1]) if rows else []
    _accumulate(tables, 1)
    _accumulate(tables, 1)
    return [
        Manifest(version, rank, tuple(_shard(names, num_dims, row) for row in table.tolist()), bucket_bytes)
        for (version, rank, bucket_bytes), table in zip(others, tables, strict=True)
    ]


def _shard(names: Sequence[tuple[str, object, tuple[int, ...]]], num_dims: int, row: list[int]) -> Shard:
    number, bucket, start_bytes = row[:3]
    name, dtype, global_shape = names[number]
    dims = len(global_shape)
    offsets, shape = tuple(row[3 : 3 + dims]), tuple(row[3 + num_dims : 3 + num_dims + dims])
    return Shard(name, dtype, global_shape, offsets, shape, bucket, start_bytes)  # type: ignore[arg-type]


def _accumulate(tables: list[np.ndarray], sign: int) -> None:
    """Add (1) to each table the one before, where that has as many rows, or subtract it (-1)."""
    for number in range(1, len(tables)) if sign > 0 else range(len(tables) - 1, 0, -1):
        if len(tables[number]) == len(tables[number - 1]):
            tables[number] = tables[number] + sign * tables[number - 1]


@functools.lru_cache(maxsize=KEPT)
def _index(layout: bytes) -> Index:
    return build_index(_decoded(layout))


@functools.lru_cache(maxsize=KEPT)
def _starts(layout: bytes) -> list[list[int]]:
    return [manifest.bucket_starts() for manifest in _decoded(layout)]


def _key(said: bytes) -> str:
    return hashlib.sha256(said).hexdigest()[:32]
