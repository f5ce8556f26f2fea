"""Weights by policy version: trainers publish, the controller commits, generators pull.

    controller                     trainer ranks (SPMD)                 generators
    store = await start(procs)
                                   await publish(spec, 7, state_dict)
    await store.commit(7)
                                                                        await pull(spec, 7)

A version can be seen only after ``commit``, which the controller calls once ``publish`` has returned on every rank; it
verifies that the shards cover every tensor exactly once and then drops the versions beyond the newest ``keep``.

Memory. Volumes hold ``keep`` versions, and one more while it is being published: (keep + 1) times the published bytes,
spread over the volumes by rank. A publishing rank needs one bucket more (``MAX_BUCKET_BYTES``, or its largest shard). A
puller holds the full model once, and one bucket.

Example:
    procs = trainer_hosts.spawn_procs(per_host={"volumes": 1})   # of its own: a training step would block a volume
    store = await WeightStore.start(procs, num_ranks=8)
    # hand store.spec to the actors
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from monarch.actor import ProcMesh, current_rank

from forge_hpc.weights.checksum import Checksum, checksum, compare
from forge_hpc.weights.compat import (
    LocalClient,
    MonarchTransportBuffer,
    Pipe,
    Request,
    StoreController,
    StoreVolume,
    TorchStoreStrategy,
    TransportBuffer,
)
from forge_hpc.weights.layout import Assembly, Index, Manifest, build_index, plan
from forge_hpc.weights.shared_memory import SharedMemoryBuffer, host_identity
from forge_hpc.weights.shared_memory import allocate as allocate_shared

MAX_BUCKET_BYTES = 256 * 2**20
MESSAGE_BYTES = 16 * 2**20
"""Larger messages are slower: malloc takes memory beyond 32 MiB from the kernel anew for each of their copies."""
_MESSAGES_IN_FLIGHT = 2


class VersionNotFoundError(LookupError):
    """The version was never committed, or it has been dropped since."""


class VersionExistsError(RuntimeError):
    """The version is committed already: what generators may be reading is never overwritten."""


class _Volumes(TorchStoreStrategy):
    """One volume for each process of a mesh; ranks are spread over them in blocks, so that a rank writes to the volume
    on its own host where both meshes span the same hosts."""

    def __init__(self, num_ranks: int, share_memory: bool) -> None:
        super().__init__()
        self.num_ranks = num_ranks
        self.share_memory = share_memory

    @classmethod
    def get_volume_id(cls) -> str:
        return f"{current_rank().rank}@{host_identity()}"

    async def set_storage_volumes(self, storage_volumes: StoreVolume) -> None:
        await super().set_storage_volumes(storage_volumes)
        self.volume_ids = sorted(self.volume_id_to_coord, key=lambda volume_id: int(volume_id.split("@")[0]))

    def volume_of(self, rank: int) -> str:
        return self.volume_ids[rank * len(self.volume_ids) // self.num_ranks]

    def shares_memory_with(self, volume_id: str) -> bool:
        return self.share_memory and volume_id.split("@")[1] == host_identity()


@dataclass(frozen=True)
class StoreSpec:
    """What trainers and generators need to reach the store; picklable, handed to them by the controller."""

    controller: StoreController
    volumes: _Volumes
    num_ranks: int


class _RangeBuffer(MonarchTransportBuffer):
    """Fetches a range of a bucket in a message."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    async def write_from(self, tensor: torch.Tensor | None) -> None:
        assert tensor is not None
        self.tensor = tensor[self.start : self.stop].clone()  # pickling a view would send the whole bucket


class _Pipe(Pipe):
    def __init__(self, volumes: _Volumes, volume_id: str, buffer: TransportBuffer | None = None) -> None:
        super().__init__(volumes.get_storage_volume(volume_id))
        self._buffer = buffer
        self._share_memory = volumes.shares_memory_with(volume_id)

    def create_transport_buffer(self) -> TransportBuffer:
        if self._buffer is not None:
            return self._buffer
        return SharedMemoryBuffer() if self._share_memory else MonarchTransportBuffer()


class _Client(LocalClient):
    """TorchStore's client, with the volume chosen by the publishing rank."""

    def __init__(self, spec: StoreSpec) -> None:
        super().__init__(spec.controller, spec.volumes)

    def allocate(self, rank: int, num_bytes: int) -> torch.Tensor:
        """A bucket [num_bytes] of uint8 that ``put_as`` moves without a copy where it can."""
        if self.strategy.shares_memory_with(self.strategy.volume_of(rank)):
            return allocate_shared(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    async def put_as(self, rank: int, key: str, value: Any) -> None:
        volume_id = self.strategy.volume_of(rank)
        request = Request.from_any(value)
        await _Pipe(self.strategy, volume_id).put_to_storage_volume(key, request)
        await self._controller.notify_put.call_one(key, request.meta_only(), volume_id)

    async def get_from(self, rank: int, key: str) -> Any:
        pipe = _Pipe(self.strategy, self.strategy.volume_of(rank))
        return await pipe.get_from_storage_volume(key, Request.from_any(None))

    async def get_bucket(self, rank: int, key: str, num_bytes: int) -> torch.Tensor:
        """The first ``num_bytes`` of a bucket: mapped within a host, in messages of ``MESSAGE_BYTES`` across hosts."""
        volume_id = self.strategy.volume_of(rank)
        if self.strategy.shares_memory_with(volume_id):
            return await self.get_from(rank, key)
        data = torch.empty(num_bytes, dtype=torch.uint8)
        in_flight = asyncio.Semaphore(_MESSAGES_IN_FLIGHT)

        async def fetch(start: int) -> None:
            stop = min(start + MESSAGE_BYTES, num_bytes)
            async with in_flight:
                pipe = _Pipe(self.strategy, volume_id, _RangeBuffer(start, stop))
                data[start:stop] = await pipe.get_from_storage_volume(key, Request.from_any(None))

        await asyncio.gather(*(fetch(start) for start in range(0, num_bytes, MESSAGE_BYTES)))
        return data

    async def all_keys(self) -> list[str]:
        return await self._controller.keys.call_one()

    async def committed(self) -> list[int]:
        return sorted(int(key.split("/")[1]) for key in await self.all_keys() if key.endswith("/index"))


def _prefix(version: int) -> str:
    return f"policy/{version}/"


def _index_key(version: int) -> str:
    return f"{_prefix(version)}index"


def _manifest_key(version: int, rank: int) -> str:
    return f"{_prefix(version)}{rank}/manifest"


def _bucket_key(version: int, rank: int, bucket: int) -> str:
    return f"{_prefix(version)}{rank}/{bucket}"


async def publish(
    spec: StoreSpec,
    version: int,
    state_dict: Mapping[str, torch.Tensor],
    *,
    rank: int,
    dtype: torch.dtype | None = None,
    with_checksum: bool = False,
) -> int:
    """Put this rank's shards of a version; called on every trainer rank with the same names and placements.

    Args:
        version: policy version, not committed yet. A version of which a part was published before is overwritten.
        state_dict: Hugging Face names to DTensors of any placement but ``Partial``, or to plain tensors, which rank 0
            publishes; on any device.
        rank: this process's rank, 0 to ``spec.num_ranks - 1``.
        dtype: floating-point tensors are stored in this dtype; by default in their own.
        with_checksum: who pulls it verifies what it has got.

    Returns:
        Bytes that this rank has put.

    Raises:
        VersionExistsError: the version is committed.
        ValueError: a pending sum, or a rank out of range.
    """
    if not 0 <= rank < spec.num_ranks:
        raise ValueError(f"rank {rank} of a store for {spec.num_ranks} ranks")
    client = await _client_for(spec, version)
    manifest, sources = plan(
        state_dict, version=version, rank=rank, dtype=dtype, max_bucket_bytes=bucket_limit(spec, rank)
    )
    if with_checksum:
        total = checksum(source.to(shard.dtype) for shard, source in sources.items())
        manifest = replace(manifest, checksum=total)
    for bucket, num_bytes in enumerate(manifest.bucket_bytes):
        data = client.allocate(rank, num_bytes)
        for shard, source in sources.items():
            if shard.bucket == bucket:
                shard.view(data).copy_(source)
        await client.put_as(rank, _bucket_key(version, rank, bucket), data)
    await client.put_as(rank, _manifest_key(version, rank), manifest)
    return sum(manifest.bucket_bytes)


async def publish_buckets(spec: StoreSpec, manifest: Manifest, data: torch.Tensor) -> int:
    """As ``publish``, of what has been laid out already: the manifest's buckets one after the other (uint8)."""
    client = await _client_for(spec, manifest.version)
    start = 0
    for bucket, num_bytes in enumerate(manifest.bucket_bytes):
        target = client.allocate(manifest.rank, num_bytes)
        target.copy_(data[start : start + num_bytes])
        start += num_bytes
        await client.put_as(manifest.rank, _bucket_key(manifest.version, manifest.rank, bucket), target)
    await client.put_as(manifest.rank, _manifest_key(manifest.version, manifest.rank), manifest)
    return start


async def _client_for(spec: StoreSpec, version: int) -> _Client:
    client = _Client(spec)
    if version in await client.committed():
        raise VersionExistsError(f"policy version {version} is published already")
    return client


def bucket_limit(spec: StoreSpec, rank: int) -> int:
    """Largest bucket of several tensors that a rank puts, bytes."""
    shares_memory = spec.volumes.shares_memory_with(spec.volumes.volume_of(rank))
    return MAX_BUCKET_BYTES if shares_memory else MESSAGE_BYTES


def reads_shared_memory(spec: StoreSpec) -> bool:
    """Whether ``pull`` maps the store's memory from here, or gets all of it in messages."""
    return all(spec.volumes.shares_memory_with(volume) for volume in spec.volumes.volume_ids)


async def pull(spec: StoreSpec, version: int) -> dict[str, torch.Tensor]:
    """The full tensors of a committed version by name, on the CPU.

    Within a host they may be views of the store's memory (copy on write), which stays allocated as long as they live.

    Raises:
        VersionNotFoundError: the version is not committed, or was dropped (perhaps while it was being pulled).
        CorruptWeightsError: it has a checksum, and that is not the one of what was pulled.
    """
    client = _Client(spec)
    committed = await client.committed()
    if version not in committed:
        raise VersionNotFoundError(f"policy version {version} is not published; there are {committed or 'none'}")
    index: Index = await client.get_from(0, _index_key(version))
    assembly, sums = Assembly(index), dict[int, Checksum]()
    for (rank, bucket), num_bytes in index.buckets().items():
        data = await client.get_bucket(rank, _bucket_key(version, rank, bucket), num_bytes)
        assembly.add(rank, bucket, data)
        if rank in index.checksums:
            shards = (shard for shard in index.shards_of(rank) if shard.bucket == bucket)
            sums[rank] = sums.get(rank, Checksum()) + checksum(shard.view(data) for shard in shards)
    for rank, found in sums.items():
        compare(found, index.checksums[rank], version)
    return assembly.result()


class WeightStore:
    """The controller's side of the store; use :meth:`start`."""

    def __init__(self, spec: StoreSpec, keep: int) -> None:
        self.spec = spec
        self._keep = keep
        self._client = _Client(spec)

    @classmethod
    async def start(
        cls, proc_mesh: ProcMesh, num_ranks: int, *, keep: int = 2, share_memory: bool = True
    ) -> WeightStore:
        """Spawn a volume in each process of ``proc_mesh``, and the index of keys in its first.

        Args:
            proc_mesh: processes that do nothing else, on the trainers' hosts (a busy trainer would let pulls wait); at
                most one a trainer rank. Who spawned it stops it; the store ends with it.
            num_ranks: trainer ranks that publish every version.
            keep: newest versions to hold; 2, so that a slow generator can finish pulling the one before the newest.
            share_memory: between processes of one host weights are mapped, not sent; false sends them always.
        """
        if not 1 <= proc_mesh.size() <= num_ranks or keep < 1:
            raise ValueError(f"{proc_mesh.size()} volumes, {num_ranks} ranks, keep {keep}: want 1 <= volumes <= ranks")
        volumes = proc_mesh.spawn("weight_volumes", StoreVolume, id_func=_Volumes.get_volume_id)
        strategy = _Volumes(num_ranks, share_memory)
        await strategy.set_storage_volumes(volumes)
        first = proc_mesh.slice(**dict.fromkeys(proc_mesh.extent.labels, 0))
        controller = first.spawn("weight_index", StoreController)
        await controller.init.call_one(strategy=strategy, num_storage_volumes=proc_mesh.size(), storage_volumes=volumes)
        return cls(StoreSpec(controller, strategy, num_ranks), keep)

    async def commit(self, version: int) -> int:
        """Make a version visible after ``publish`` has returned on every rank, and drop the oldest beyond ``keep``.

        Returns:
            Bytes of the full tensors.

        Raises:
            IncompleteVersionError: shards are missing, or ranks disagree.
            VersionNotFoundError: a rank has not published the version.
        """
        ranks = range(self.spec.num_ranks)
        keys = set(await self._client.all_keys())
        missing = [rank for rank in ranks if _manifest_key(version, rank) not in keys]
        if missing:
            raise VersionNotFoundError(f"policy version {version} was not published by ranks {missing}")
        index = build_index([await self._client.get_from(rank, _manifest_key(version, rank)) for rank in ranks])
        await self._client.put_as(0, _index_key(version), index)
        for old in (await self.versions())[: -self._keep]:
            await self.drop(old)
        return index.num_bytes

    async def versions(self) -> list[int]:
        """Committed versions, oldest first."""
        return await self._client.committed()

    async def drop(self, version: int) -> None:
        """Delete a version, whether it is committed, half published or absent."""
        keys = [key for key in await self.keys() if key.startswith(_prefix(version))]
        # The index first: from here on nobody begins to pull this version.
        for key in sorted(keys, key=lambda key: key != _index_key(version)):
            await self._client.delete(key)

    async def keys(self) -> list[str]:
        """Every key in the store, of committed and of half-published versions."""
        return await self._client.all_keys()

    async def stop(self) -> None:
        """Delete everything and end the store's actors; the processes stay with their owner."""
        await self.spec.controller.teardown.call_one()
        await self.spec.controller.stop()
        await self.spec.volumes.storage_volumes.stop()
