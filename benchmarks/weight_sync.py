"""Weights from a trainer process to a generator process of one host: TorchStore as it is against our two ways.

    python benchmarks/weight_sync.py [--megabytes 200] [--tensors 300] [--repeats 3]

Prints a table: seconds to publish and to pull (and read every value), MB/s (10^6 bytes a second), and the ratio to
TorchStore as it is in that run. The last lines pull while the trainer computes, from volumes in processes of their own
and from volumes in the trainer's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from monarch.actor import Actor, endpoint, this_host
from rows import row

from forge_hpc.weights import StoreSpec, WeightStore, publish, pull
from forge_hpc.weights.store import _Client

STOCK = "TorchStore 0.1.2, a message a tensor"


class StockClient(_Client):
    """TorchStore's own put and get; only the volume is given."""

    async def put(self, key: str, value: Any) -> None:
        await self.put_as(0, key, value)


class Trainer(Actor):
    @endpoint
    async def build(self, num_bytes: int, num_tensors: int) -> None:
        self.state_dict = {f"w{i}": torch.randn(num_bytes // num_tensors // 4) for i in range(num_tensors)}

    @endpoint
    async def publish(self, spec: StoreSpec, version: int, stock: bool) -> float:
        start = time.perf_counter()
        if stock:
            from torchstore.state_dict_utils import put_state_dict

            await put_state_dict(StockClient(spec), self.state_dict, f"stock/{version}")
        else:
            await publish(spec, version, self.state_dict, rank=0)
        return time.perf_counter() - start

    @endpoint
    async def compute(self, seconds: float) -> None:
        matrix = torch.randn(512, 512)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            matrix = torch.nn.functional.normalize(matrix @ matrix)


class Generator(Actor):
    @endpoint
    async def pull(self, spec: StoreSpec, version: int, stock: bool) -> float:
        start = time.perf_counter()
        if stock:
            from torchstore.state_dict_utils import get_state_dict

            tensors = await get_state_dict(StockClient(spec), f"stock/{version}")
        else:
            tensors = await pull(spec, version)
        assert sum(float(tensor.sum()) for tensor in tensors.values()) != 0  # read all of it, as an engine does
        return time.perf_counter() - start


async def measure(args: argparse.Namespace) -> None:
    meshes = [this_host().spawn_procs(per_host={"gpus": 1}) for _ in range(3)]
    trainer = meshes[0].spawn("trainer", Trainer)
    generator = meshes[1].spawn("generator", Generator)
    num_bytes = args.megabytes * 10**6
    await trainer.build.call_one(num_bytes, args.tensors)

    ways = ((STOCK, False), ("buckets, messages (across hosts)", False), ("buckets, shared memory (one host)", True))
    baseline: tuple[float, float] | None = None
    print(f"{args.megabytes} MB in {args.tensors} tensors, median of {args.repeats}")
    print(f"{'':38}{'publish s':>10}{'MB/s':>8}{'ratio':>7}{'pull s':>10}{'MB/s':>8}{'ratio':>7}")
    for name, share_memory in ways:
        store = await WeightStore.start(meshes[2], 1, share_memory=share_memory)
        put_s, get_s = [], []
        for version in range(args.repeats + 1):
            stock = name == STOCK
            put_s.append(await trainer.publish.call_one(store.spec, version, stock))
            if not stock:
                await store.commit(version)
            get_s.append(await generator.pull.call_one(store.spec, version, stock))
        put, get = statistics.median(put_s[1:]), statistics.median(get_s[1:])
        baseline = baseline or (put, get)
        print(
            f"{name:38}{put:10.3f}{num_bytes / put / 1e6:8.0f}{baseline[0] / put:7.1f}"
            f"{get:10.3f}{num_bytes / get / 1e6:8.0f}{baseline[1] / get:7.1f}"
        )
        if name != STOCK:
            row(f"weights, publish and pull: {name}", num_bytes / (put + get) / 1e6, num_bytes / sum(baseline) / 1e6,
                unit="MB/s", peer="TorchStore as it is")  # fmt: skip
        await store.stop()

    compute_s = 3.0
    for name, mesh in (("volumes of their own", meshes[2]), ("volumes in the trainer", meshes[0])):
        store = await WeightStore.start(mesh, 1)
        await trainer.publish.call_one(store.spec, 1, False)
        await store.commit(1)
        computing = trainer.compute.call_one(compute_s)
        pull_s = await generator.pull.call_one(store.spec, 1, False)
        await computing
        print(f"pull while the trainer computes for {compute_s:.0f} s, {name + ':':24}{pull_s:8.3f} s")
        await store.stop()
    await asyncio.gather(*(mesh.stop() for mesh in meshes))


def main() -> None:
    parser = argparse.ArgumentParser(description="Weights from a trainer to a generator on one host.")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    # The processes import this file by its name.
    folders = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    sys.path[:0] = folders
    import weight_sync

    weight_sync.main()
