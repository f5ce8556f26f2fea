"""Weights that generators read where the trainers put them: no message, no copy of a copy.

    trainer rank                          controller                         generator of the same host
    part = snapshots.take(7, …)  ──────►  Offer(7, all of them)  ──────────►  with opened(offer) as weights: read them
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
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from forge_hpc.weights import memory
from forge_hpc.weights.checksum import Checksum, checksum, compare
from forge_hpc.weights.layout import Manifest, Shard, distinct, plan
from forge_hpc.weights.offers import Offer, Part, Place
from forge_hpc.wire.messages import Address

logger = logging.getLogger(__name__)
_MAX_BLOCKS = 2


@dataclass
class _Block:
    data: torch.Tensor
    place: Place
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
        self.address: Address | None = None
        """Where other hosts get the bytes, to be set before the first version is taken; None: nowhere."""
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
        block = self._free_block(manifest, in_use)
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
        return Part(version, block.place, total)

    def find(self, version: int) -> tuple[Manifest, torch.Tensor] | None:
        """A version that is still there: what lies where, and the buckets one after the other (uint8)."""
        for block in self._blocks:
            if block.version == version:
                return replace(block.place.manifest, version=version), block.data
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
            self._manifest = manifest
            self._blocks.clear()
        own = {place for place in places if place}
        are_views = all(source.untyped_storage().data_ptr() in own for source in sources.values())
        self._places, self._sources = (places, sources) if are_views else ((), {})
        return manifest, sources

    def _free_block(self, manifest: Manifest, in_use: Collection[int]) -> _Block | None:
        free = [block for block in self._blocks if block.version not in in_use]
        if self._keeps_previous and len(self._blocks) < _MAX_BLOCKS:
            if (block := self._new_block(manifest)) is not None:
                return block
            self._keeps_previous = False
        if self._keeps_previous:  # the older goes
            free.sort(key=lambda block: -1 if block.version is None else block.version)
        if free:
            return free[0]
        return self._new_block(manifest) if len(self._blocks) < _MAX_BLOCKS else None

    def _new_block(self, manifest: Manifest) -> _Block | None:
        num_bytes = sum(manifest.bucket_bytes)
        data, reason = memory.allocate(max(num_bytes, 64), self.device), "no memory for it"
        if data is not None:
            try:
                handle = memory.share(data)
            except memory.Unreachable as error:
                handle, reason = memory.out_of_reach(data), f"it cannot be shared, {error}"
                if self.address is not None:
                    logger.warning("no process of this host reads the weights in place, TLS streams serve: %s", error)
            if handle.host or self.address is not None:
                self._blocks.append(_Block(data, Place(handle, manifest, self.address)))
                return self._blocks[-1]
        logger.warning("no copy of the weights of %.1f GiB to be read in place: %s", num_bytes / 2**30, reason)
        self.is_possible = bool(self._blocks)
        return None


class Opened:
    """The weights of an offer, opened in a process that reads them."""

    def __init__(self, offer: Offer, data: Sequence[torch.Tensor]) -> None:
        self._offer, self._index = offer, offer.places.index
        self.data = data
        """Of each of the places: its block of memory, uint8."""
        self._starts = offer.places.starts

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
        if None in self._offer.checksums:
            return None
        whole = Checksum()
        for rank, (manifest, sent) in enumerate(zip(self._offer.places.manifests, self._offer.checksums, strict=True)):
            taken = self._index.shards_of(rank)
            found = checksum(self._view(rank, shard) for shard in taken)
            if len(taken) == len(distinct(manifest.shards)):  # else another rank has the same shard too
                compare(found, sent, self._offer.version)
            whole += found
        return whole

    def _view(self, rank: int, shard: Shard) -> torch.Tensor:
        return shard.view(self.data[rank][self._starts[rank][shard.bucket] :])


@contextlib.contextmanager
def opened(offer: Offer) -> Iterator[Opened]:
    """The weights of an offer, without a copy. When the context ends nothing of them may be used any more.

    Raises:
        memory.Unreachable: they cannot be read from here.
        IncompleteVersionError: shards are missing.
    """
    data = [memory.open_memory(handle) for handle in offer.places.handles]
    weights = Opened(offer, data)
    try:
        yield weights
    finally:
        weights.data = ()
