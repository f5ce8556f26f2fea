"""Weights travel from sharded trainers to generators by policy version, through a real TorchStore on real processes."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from monarch.actor import Actor, ActorError, current_rank, endpoint, this_host
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from forge_hpc.weights import (
    IncompleteVersionError,
    Offer,
    Part,
    Snapshots,
    StoreSpec,
    VersionExistsError,
    VersionNotFoundError,
    WeightStore,
    opened,
    publish,
    pull,
)
from forge_hpc.weights.layout import Assembly, Manifest, build_index
from forge_hpc.weights.layout import Shard as StoredShard

NUM_RANKS = 2
LARGE_VERSION = 9  # holds a tensor of more than one message


def full_values(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    large = {"large": torch.randn(5_000_000, generator=generator)} if version == LARGE_VERSION else {}
    return large | {
        "embed": torch.randn(10, 6, generator=generator),
        "uneven": torch.randn(5, 3, generator=generator),
        "one_row": torch.randn(1, 7, generator=generator),
        "columns": torch.randn(4, 9, generator=generator),
        "bias": torch.randn(11, generator=generator).bfloat16(),
        "replicated": torch.randn(3, 3, generator=generator),
        "scalar": torch.tensor(float(version)),
        "plain": torch.arange(6) + version,
    }


SHARD_DIMS = {"embed": 0, "uneven": 0, "one_row": 0, "columns": 1, "bias": 0, "replicated": None, "scalar": None}


class FakeTrainer(Actor):
    """Holds DTensors as FSDP does, over gloo."""

    def __init__(self, file_store: str) -> None:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(file_store, NUM_RANKS),
            rank=current_rank().rank,
            world_size=NUM_RANKS,
        )
        self.mesh = init_device_mesh("cpu", (NUM_RANKS,))

    @endpoint
    async def publish(
        self, spec: StoreSpec, version: int, leave_out: str | None = None, dtype: torch.dtype | None = None
    ) -> int:
        return await publish(spec, version, self.state_dict(version, leave_out), rank=current_rank().rank, dtype=dtype)

    def state_dict(self, version: int, leave_out: str | None = None) -> dict[str, torch.Tensor]:
        state_dict = {}
        for name, value in full_values(version).items():
            if name == leave_out and current_rank().rank == 1:
                continue
            if name in SHARD_DIMS:
                dim = SHARD_DIMS[name]
                placement = Replicate() if dim is None else Shard(dim)
                state_dict[name] = distribute_tensor(value, self.mesh, [placement], src_data_rank=None)
            else:
                state_dict[name] = value
        return state_dict

    @endpoint
    async def offer(self, version: int, in_use: tuple[int, ...]) -> Part | None:
        if not hasattr(self, "snapshots"):
            self.snapshots = Snapshots(current_rank().rank, torch.float32, torch.device("cpu"), 1 << 20)
        weights = {name: tensor for name, tensor in self.state_dict(version).items() if name != "bias"}
        return self.snapshots.take(version, lambda: weights, [], in_use=in_use, with_checksum=True)

    @endpoint
    async def leave(self) -> None:
        torch.distributed.destroy_process_group()


class FakeGenerator(Actor):
    @endpoint
    async def pull(self, spec: StoreSpec, version: int) -> dict[str, torch.Tensor]:
        return await pull(spec, version)

    @endpoint
    async def differing(self, spec: StoreSpec, version: int) -> list[str]:
        pulled = await pull(spec, version)
        return [name for name, value in full_values(version).items() if not torch.equal(pulled[name], value)]

    @endpoint
    async def differing_of_offer(self, offer: Offer) -> list[str]:
        expected = full_values(offer.version)
        with opened(offer) as weights:
            weights.verify()
            found = {name: weights.tensor(name) for name in offer.shapes}
            return [f"{name}: {value}" for name, value in found.items() if not torch.equal(value, expected[name])]

    @endpoint
    async def pull_error(self, spec: StoreSpec, version: int) -> str:
        try:
            await pull(spec, version)
        except VersionNotFoundError as error:
            return str(error)
        return ""


class MemfdCounter(Actor):
    """Counts the weights' memory that this process holds open."""

    @endpoint
    async def count(self) -> int:
        gc.collect()
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum("forge_hpc_weights" in str(link.readlink()) for link in links)


@dataclass
class Meshes:
    trainers: Any
    generators: Any
    volumes: Any
    run: Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Meshes]:
    """Two trainer processes, one generator, two of volumes; they end with the module."""
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setenv("PYTHONPATH", path)  # the processes import this module
        procs = [this_host().spawn_procs(per_host={"gpus": num}) for num in (NUM_RANKS, 1, 2)]
        trainers = procs[0].spawn("trainer", FakeTrainer, str(tmp_path_factory.mktemp("weights") / "gloo"))
        generators = procs[1].spawn("generator", FakeGenerator)

        def run(body: Coroutine[Any, Any, None]) -> None:
            runner.run(asyncio.wait_for(body, 300))

        async def stop() -> None:
            await trainers.leave.call()
            await asyncio.gather(*(mesh.stop() for mesh in procs))

        yield Meshes(trainers, generators, procs[2], run)
        run(stop())


@asynccontextmanager
async def a_store(volumes: Any, *, share_memory: bool = True) -> AsyncIterator[WeightStore]:
    store = await WeightStore.start(volumes, NUM_RANKS, share_memory=share_memory)
    yield store
    await store.stop()


@pytest.mark.parametrize(("num_volumes", "share_memory"), [(1, True), (2, True), (2, False)])
def test_pulled_tensors_equal_the_full_values_for_several_versions(
    meshes: Meshes, num_volumes: int, share_memory: bool
) -> None:
    async def body() -> None:
        volumes = meshes.volumes.slice(gpus=slice(0, num_volumes))
        async with a_store(volumes, share_memory=share_memory) as store:
            for version in (1, 2, 3):
                await meshes.trainers.publish.call(store.spec, version)
                assert "is not published" in await meshes.generators.pull_error.call_one(store.spec, version)
                await store.commit(version)
                pulled = await meshes.generators.pull.call_one(store.spec, version)
                expected = full_values(version)
                assert pulled.keys() == expected.keys()
                for name, value in expected.items():
                    assert pulled[name].dtype == value.dtype and torch.equal(pulled[name], value), name
            assert await store.versions() == [2, 3]
            assert "there are [2, 3]" in await meshes.generators.pull_error.call_one(store.spec, 1)
            older = await meshes.generators.pull.call_one(store.spec, 2)
            assert torch.equal(older["plain"], full_values(2)["plain"])

    meshes.run(body())


def test_a_version_is_refused_while_a_rank_or_a_shard_is_missing_and_once_it_is_there(meshes: Meshes) -> None:
    async def body() -> None:
        async with a_store(meshes.volumes) as store:
            await meshes.trainers.slice(gpus=0).publish.call(store.spec, 1)
            with pytest.raises(VersionNotFoundError, match=r"not published by ranks \[1\]"):
                await store.commit(1)
            assert "there are none" in await meshes.generators.pull_error.call_one(store.spec, 1)

            await meshes.trainers.publish.call(store.spec, 1, leave_out="uneven")
            with pytest.raises(IncompleteVersionError, match="uneven"):
                await store.commit(1)
            await store.drop(1)
            assert await store.keys() == []

            await meshes.trainers.publish.call(store.spec, 1)
            await store.commit(1)
            with pytest.raises(Exception, match=VersionExistsError.__name__):
                await meshes.trainers.publish.call(store.spec, 1)
            pulled = await meshes.generators.pull.call_one(store.spec, 1)
            assert torch.equal(pulled["embed"], full_values(1)["embed"])

    meshes.run(body())


@pytest.mark.parametrize("share_memory", [True, False])
def test_a_tensor_larger_than_a_message_arrives_whole(meshes: Meshes, share_memory: bool) -> None:
    async def body() -> None:
        async with a_store(meshes.volumes, share_memory=share_memory) as store:
            await meshes.trainers.publish.call(store.spec, LARGE_VERSION)
            await store.commit(LARGE_VERSION)
            assert await meshes.generators.differing.call_one(store.spec, LARGE_VERSION) == []

    meshes.run(body())


def test_floating_point_tensors_are_published_in_the_dtype_asked_for(meshes: Meshes) -> None:
    async def body() -> None:
        async with a_store(meshes.volumes) as store:
            await meshes.trainers.publish.call(store.spec, 1, dtype=torch.bfloat16)
            await store.commit(1)
            pulled = await meshes.generators.pull.call_one(store.spec, 1)
            assert torch.equal(pulled["embed"], full_values(1)["embed"].bfloat16())
            assert pulled["plain"].dtype == torch.int64

    meshes.run(body())


def test_dropped_versions_and_a_stopped_store_give_their_memory_back(meshes: Meshes) -> None:
    async def body() -> None:
        counter = meshes.volumes.spawn("counter", MemfdCounter)

        async def num_memfds() -> int:
            return sum(count for _, count in await counter.count.call())

        counts = []
        async with a_store(meshes.volumes) as store:
            for version in range(1, 6):
                await meshes.trainers.publish.call(store.spec, version)
                await store.commit(version)
                counts.append(await num_memfds())
        assert counts[1] == 2 * counts[0] == counts[2] == counts[4] > 0
        assert await num_memfds() == 0

    meshes.run(body())


def test_shards_of_several_ranks_are_read_where_they_lie_as_long_as_the_trainers_say(meshes: Meshes) -> None:
    async def offer(version: int, *in_use: int) -> Offer:
        parts = [part for _, part in await meshes.trainers.offer.call(version, in_use)]
        return Offer.of(parts)

    async def body() -> None:
        first = await offer(1)
        second = await offer(2, 1)  # somebody still reads the first
        assert len(first.shapes) == len(full_values(1)) - 1
        for whole in (first, second):
            assert await meshes.generators.differing_of_offer.call_one(whole) == []
        third = await offer(3, 2)  # nobody reads the first any more
        for whole in (second, third):
            assert await meshes.generators.differing_of_offer.call_one(whole) == []
        with pytest.raises(ActorError, match="CorruptWeightsError"):
            await meshes.generators.differing_of_offer.call_one(first)

    meshes.run(body())


def manifests_of(mesh_shape: tuple[int, ...], placements: list[Any], shape: tuple[int, ...]) -> list[Manifest]:
    """What each rank of a mesh would publish of one tensor, without processes."""
    manifests = []
    for rank, coordinate in enumerate(itertools.product(*(range(size) for size in mesh_shape))):
        local_shape, offsets = _compute_local_shape_and_global_offset(shape, mesh_shape, list(coordinate), placements)
        shard = StoredShard("w", torch.float32, shape, offsets, local_shape, 0, 0)
        manifests.append(Manifest(1, rank, (shard,) if shard.num_bytes else (), (shard.num_bytes,)))
    return manifests


@pytest.mark.parametrize("rows", [1, 3, 5, 7, 8, 10])
def test_shards_of_fsdp_with_tensor_parallel_cover_every_shape_or_are_refused(rows: int) -> None:
    full = torch.arange(rows * 3, dtype=torch.float32).view(rows, 3)
    index = build_index(manifests_of((2, 2), [_StridedShard(0, split_factor=2), Shard(0)], (rows, 3)))
    assembly = Assembly(index)
    for rank, bucket in index.buckets():
        (shard,) = (part for owner, part in index.tensors["w"] if owner == rank)
        box = tuple(slice(o, o + s) for o, s in zip(shard.offsets, shard.shape, strict=True))
        assembly.add(rank, bucket, full[box].contiguous().view(torch.uint8).flatten())
    assert torch.equal(assembly.result()["w"], full)


def test_overlapping_shards_are_refused() -> None:
    manifests = manifests_of((2,), [Shard(0)], (4, 3))
    moved = dataclasses.replace(manifests[1].shards[0], offsets=(1, 0))
    manifests[1] = dataclasses.replace(manifests[1], shards=(moved,))
    with pytest.raises(IncompleteVersionError, match="do not cover"):
        build_index(manifests)
