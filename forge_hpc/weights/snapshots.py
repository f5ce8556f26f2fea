"""Weights that generators read where the trainers put them: no message, no copy of a copy.

    trainer rank                          controller                         generator of the same host
    part = snapshots.take(7, …)  ──part──►  Offer(7, all parts)  ──offer──►  with opened(offer) as weights: read them
                                            counts who reads 7
    snapshots.take(8, …, in_use={7})      until they have, or are lost

A rank copies its shards into one block of memory (``memory``) that it touches once and uses for every version, so that
nobody reads what the optimizer writes. Only where somebody still reads it, as a replacement does that came late, the
next version goes into a second block. The controller alone knows who reads: it gave out the offer, and learns of every
reader's end, also of a death. So a dead reader holds nothing up, and a dead trainer takes nothing that a generator has
loaded with it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from forge_hpc.weights import memory
from forge_hpc.weights.checksum import Checksum, checksum, compare
from forge_hpc.weights.layout import Index, Manifest, Shard, build_index, distinct, plan
from forge_hpc.wire.messages import Address

logger = logging.getLogger(__name__)
_MAX_BLOCKS = 2


@dataclass(frozen=True)
class Part:
    """Where the shards of one rank lie, and how."""

    version: int
    handle: memory.Handle
    layout: bytes
    """The pickled manifest; the same bytes for every version, so that a reader makes the index of them once."""
    checksum: Checksum | None
    address: Address | None = None
    """Where other hosts get the bytes behind the handle."""


@dataclass(frozen=True)
class Offer:
    """One version of the weights in the trainers' memory; valid until they are told that nobody reads it."""

    version: int
    parts: tuple[Part, ...]
    """By rank."""

    def is_within_reach(self, device_type: str) -> bool:
        """Whether a process that computes on ``device_type`` may be able to open all parts."""
        return all(memory.is_within_reach(part.handle, device_type) for part in self.parts)

    @property
    def has_streams(self) -> bool:
        """Whether other hosts can get all parts."""
        return all(part.address is not None for part in self.parts)

    @property
    def origin(self) -> Hashable:
        """Equal where two versions lie in the same processes."""
        return tuple((part.handle.host, part.address) for part in self.parts)

    @property
    def layouts(self) -> tuple[bytes, ...]:
        """Equal where the shards of two versions lie alike."""
        return tuple(part.layout for part in self.parts)

    @property
    def index(self) -> Index:
        """What lies where. Raises IncompleteVersionError where shards are missing."""
        return _index(self.layouts)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each full tensor by Hugging Face name."""
        return {name: parts[0][1].global_shape for name, parts in self.index.tensors.items()}


@dataclass
class _Block:
    data: torch.Tensor
    handle: memory.Handle
    version: int | None = None
    targets: list[torch.Tensor] | None = None
    """A view for each shard that is written, in the manifest's order."""


class Snapshots:
    """The copies of one trainer rank's weights.

    Args:
        dtype: floating-point tensors are stored in it.
        device: where they are, and the copies too.
        max_bucket_bytes: of what goes into the store, where a generator is out of reach.
        keeps_previous: where there is memory for a second block, the version before the newest stays to be compared.
    """

    def __init__(
        self,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        max_bucket_bytes: int,
        keeps_previous: bool = False,
    ) -> None:
        self._keeps_previous = keeps_previous
        self._rank, self._dtype, self._max_bucket_bytes = rank, dtype, max_bucket_bytes
        self.device = device
        self._blocks: list[_Block] = []
        self._places: tuple[int, ...] = ()
        self._sources: dict[Shard, torch.Tensor] = {}
        self._manifest: Manifest | None = None
        self._layout = b""
        self.is_possible = True
        """False once there was no memory for a first block."""

    def take(
        self,
        version: int,
        weights: Callable[[], Mapping[str, torch.Tensor]],
        parameters: Iterable[torch.Tensor],
        *,
        in_use: Collection[int] = (),
        with_checksum: bool = False,
    ) -> Part | None:
        """Copy the weights; they may change when this returns.

        Args:
            weights: what is published, by Hugging Face name, as ``layout.plan`` takes it.
            parameters: the model's own. Where all weights are views of them it is asked for the weights once.
            in_use: versions that somebody still reads.

        Returns:
            None where there is no memory for it.
        """
        if not self.is_possible:
            return None
        manifest, sources = self._plan(weights, parameters)
        block = self._free_block(sum(manifest.bucket_bytes), in_use)
        if block is None:
            return None
        block.version = None  # until it is whole
        if block.targets is None:
            starts = manifest.bucket_starts()
            block.targets = [shard.view(block.data[starts[shard.bucket] :]) for shard in sources]
        if block.targets:
            torch._foreach_copy_(block.targets, list(sources.values()))
        total = checksum(source.to(shard.dtype) for shard, source in sources.items()) if with_checksum else None
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # readers wait for no event of ours
        block.version = version
        return Part(version, block.handle, self._layout, total)

    def find(self, version: int) -> tuple[Manifest, torch.Tensor] | None:
        """A version that is still there: what lies where, and the buckets one after the other (uint8)."""
        for block in self._blocks:
            if block.version == version and self._manifest is not None:
                return replace(self._manifest, version=version), block.data
        return None

    def _plan(
        self, weights: Callable[[], Mapping[str, torch.Tensor]], parameters: Iterable[torch.Tensor]
    ) -> tuple[Manifest, dict[Shard, torch.Tensor]]:
        places = tuple(getattr(parameter, "_local_tensor", parameter).data_ptr() for parameter in parameters)
        if self._manifest is not None and self._sources and places == self._places:
            return self._manifest, self._sources
        manifest, sources = plan(
            weights(), version=0, rank=self._rank, dtype=self._dtype, max_bucket_bytes=self._max_bucket_bytes
        )
        if manifest != self._manifest:
            self._manifest, self._layout = manifest, pickle.dumps(manifest)
            self._blocks.clear()
        own = {place for place in places if place}
        are_views = all(source.untyped_storage().data_ptr() in own for source in sources.values())
        self._places, self._sources = (places, sources) if are_views else ((), {})
        return manifest, sources

    def _free_block(self, num_bytes: int, in_use: Collection[int]) -> _Block | None:
        free = [block for block in self._blocks if block.version not in in_use]
        if self._keeps_previous and len(self._blocks) < _MAX_BLOCKS:
            if (block := self._new_block(num_bytes)) is not None:
                return block
            self._keeps_previous = False
        if self._keeps_previous:  # the older goes
            free.sort(key=lambda block: -1 if block.version is None else block.version)
        if free:
            return free[0]
        return self._new_block(num_bytes) if len(self._blocks) < _MAX_BLOCKS else None

    def _new_block(self, num_bytes: int) -> _Block | None:
        data, reason = memory.allocate(max(num_bytes, 64), self.device), "no memory for it"
        if data is not None:
            try:
                self._blocks.append(_Block(data, memory.share(data)))
                return self._blocks[-1]
            except memory.Unreachable as error:
                reason = f"it cannot be shared, {error}"
        logger.warning("no copy of the weights of %.1f GiB to be read in place: %s", num_bytes / 2**30, reason)
        self.is_possible = bool(self._blocks)
        return None


class Opened:
    """The weights of an offer, opened in a process that reads them."""

    def __init__(self, offer: Offer, data: Sequence[torch.Tensor]) -> None:
        self._offer, self._index = offer, offer.index
        self.data = data
        """By rank: its block of memory, uint8."""
        self._starts = [_manifest(part.layout).bucket_starts() for part in offer.parts]

    def tensor(self, name: str) -> torch.Tensor:
        """A full tensor: a view of the trainers' memory, or where it is cut, put together in memory of its own."""
        parts = self._index.tensors[name]
        if len(parts) == 1:
            return self._view(*parts[0])
        first, device = parts[0][1], self.data[parts[0][0]].device
        try:
            whole = torch.empty(first.global_shape, dtype=first.dtype, device=device)
        except torch.OutOfMemoryError:  # slower, not wrong
            whole = torch.empty(first.global_shape, dtype=first.dtype)
        for rank, shard in parts:
            box = tuple(slice(o, o + s) for o, s in zip(shard.offsets, shard.shape, strict=True))
            whole[box].copy_(self._view(rank, shard))
        return whole

    def shards(self, name: str) -> Iterator[tuple[int, int, Shard]]:
        """The shards of a tensor: the rank, the first byte in its block, and the box."""
        for rank, shard in self._index.tensors[name]:
            yield rank, self._starts[rank][shard.bucket] + shard.start_bytes, shard

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of all tensors."""
        return {shard.dtype for parts in self._index.tensors.values() for _, shard in parts}

    def verify(self) -> Checksum | None:
        """The checksum of the whole; None where the trainers gave none.

        Raises:
            CorruptWeightsError: it is not what they gave.
        """
        if any(part.checksum is None for part in self._offer.parts):
            return None
        whole = Checksum()
        for rank, part in enumerate(self._offer.parts):
            taken = self._index.shards_of(rank)
            found = checksum(self._view(rank, shard) for shard in taken)
            if len(taken) == len(distinct(_manifest(part.layout).shards)):  # else another rank has the same shard too
                compare(found, part.checksum, part.version)
            whole += found
        return whole

    def _view(self, rank: int, shard: Shard) -> torch.Tensor:
        return shard.view(self.data[rank][self._starts[rank][shard.bucket] :])


@functools.lru_cache(maxsize=64)
def _manifest(layout: bytes) -> Manifest:
    return pickle.loads(layout)


@functools.lru_cache(maxsize=2)
def _index(layouts: tuple[bytes, ...]) -> Index:
    return build_index([_manifest(layout) for layout in layouts])


@contextlib.contextmanager
def opened(offer: Offer) -> Iterator[Opened]:
    """The weights of an offer, without a copy. When the context ends nothing of them may be used any more.

    Raises:
        memory.Unreachable: they cannot be read from here.
        IncompleteVersionError: shards are missing.
    """
    data = [memory.open_memory(part.handle) for part in offer.parts]
    weights = Opened(offer, data)
    try:
        yield weights
    finally:
        weights.data = ()
