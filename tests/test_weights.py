"""Weights travel from sharded trainers to generators by policy version, through a real TorchStore on real processes."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

monarch_actor = pytest.importorskip("monarch.actor")

from monarch.actor import Actor, current_rank, endpoint, this_host  # noqa: E402

from forge_hpc.weights import (  # noqa: E402
    IncompleteVersionError,
    StoreSpec,
    VersionExistsError,
    VersionNotFoundError,
    WeightStore,
    publish,
    pull,
)

NUM_RANKS = 2


def full_values(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {
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
    async def publish(self, spec: StoreSpec, version: int, leave_out: str | None = None) -> int:
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
        return await publish(spec, version, state_dict, rank=current_rank().rank)

    @endpoint
    async def leave(self) -> None:
        torch.distributed.destroy_process_group()


class FakeGenerator(Actor):
    @endpoint
    async def pull(self, spec: StoreSpec, version: int) -> dict[str, torch.Tensor]:
        return await pull(spec, version)

    @endpoint
    async def pull_error(self, spec: StoreSpec, version: int) -> str:
        try:
            await pull(spec, version)
        except VersionNotFoundError as error:
            return str(error)
        return ""


@pytest.fixture(autouse=True)
def processes_find_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).resolve().parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]))


def run_on_meshes(body: Callable[[WeightStore, Any, Any], Awaitable[None]], num_volumes: int) -> None:
    async def main() -> None:
        host = this_host()
        meshes = [
            host.spawn_procs(name=name, per_host={"gpus": n})
            for name, n in (("trainers", NUM_RANKS), ("generators", 1), ("volumes", num_volumes))
        ]
        try:
            with tempfile.TemporaryDirectory() as folder:
                trainers = meshes[0].spawn("trainer", FakeTrainer, os.path.join(folder, "gloo"))
                generators = meshes[1].spawn("generator", FakeGenerator)
                store = await WeightStore.start(meshes[2], NUM_RANKS)
                await body(store, trainers, generators)
                await trainers.leave.call()
        finally:
            for mesh in meshes:
                await mesh.stop()

    asyncio.run(asyncio.wait_for(main(), 120))


@pytest.mark.parametrize("num_volumes", [1, 2])
def test_pulled_tensors_equal_the_full_values_for_several_versions(num_volumes: int) -> None:
    async def body(store: WeightStore, trainers: Any, generators: Any) -> None:
        for version in (1, 2, 3):
            await trainers.publish.call(store.spec, version)
            assert "is not published" in await generators.pull_error.call_one(store.spec, version)
            await store.commit(version)
            pulled = await generators.pull.call_one(store.spec, version)
            expected = full_values(version)
            assert pulled.keys() == expected.keys()
            for name, value in expected.items():
                assert pulled[name].dtype == value.dtype and torch.equal(pulled[name], value), name
        assert await store.versions() == [2, 3]
        assert "there are [2, 3]" in await generators.pull_error.call_one(store.spec, 1)
        assert torch.equal((await generators.pull.call_one(store.spec, 2))["plain"], full_values(2)["plain"])

    run_on_meshes(body, num_volumes)


def test_a_version_is_refused_while_a_rank_or_a_shard_is_missing_and_once_it_is_there() -> None:
    async def body(store: WeightStore, trainers: Any, generators: Any) -> None:
        await trainers.slice(gpus=0).publish.call(store.spec, 1)
        with pytest.raises(VersionNotFoundError, match=r"not published by ranks \[1\]"):
            await store.commit(1)
        assert "there are none" in await generators.pull_error.call_one(store.spec, 1)

        await trainers.publish.call(store.spec, 1, leave_out="uneven")
        with pytest.raises(IncompleteVersionError, match="uneven"):
            await store.commit(1)
        await store.drop(1)
        assert await store._client.all_keys() == []

        await trainers.publish.call(store.spec, 1)
        await store.commit(1)
        with pytest.raises(Exception, match=VersionExistsError.__name__):
            await trainers.publish.call(store.spec, 1)
        assert torch.equal((await generators.pull.call_one(store.spec, 1))["embed"], full_values(1)["embed"])

    run_on_meshes(body, 1)
