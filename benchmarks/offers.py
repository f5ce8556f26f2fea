"""What a version of the weights costs the controller beside its bytes: many trainer ranks, many generators.

    python benchmarks/offers.py [--hosts 8 64] [--versions 6]

Emulated hosts as in hosts.py; the process on each is a rank of the trainers, whose part of an 8B model it offers, and a
generator that takes what all of them offer up to where it would read it. No weights move. CPU time is that of the
controller's process with all its threads, and that of the generators is of one of them, in seconds; the first version,
at which everybody is told where the weights lie, and the median of the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any

from rows import PROJECT, row

sys.path.insert(0, str(PROJECT))

import torch
from hosts import controlled, cpu_s
from monarch.actor import Actor, current_rank, endpoint

from forge_hpc.actors.errors import collective
from forge_hpc.cluster.meshes import attach
from forge_hpc.controller.generators import WeightSync
from forge_hpc.controller.service import Service
from forge_hpc.controller.trainers import Trainers
from forge_hpc.weights import UNKNOWN, Brief, Known, Offer, Part, Place
from forge_hpc.weights.layout import Manifest, Shard
from forge_hpc.weights.memory import Handle
from forge_hpc.wire.messages import Address

TARGET_MS = 1.0
"""CPU time of the controller a generator and version."""
BUCKET_BYTES = 16 << 20


def shapes_8b() -> dict[str, tuple[int, ...]]:
    """Of Qwen3 8B."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (151936, 4096), "lm_head.weight": (151936, 4096), "model.norm.weight": (4096,)
    }  # fmt: skip
    attention: dict[str, tuple[int, ...]] = {"q_norm": (128,), "k_norm": (128,), "v_proj": (1024, 4096)}
    attention |= {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "o_proj": (4096, 4096)}
    mlp = {"gate_proj": (12288, 4096), "up_proj": (12288, 4096), "down_proj": (4096, 12288)}
    for layer in range(36):
        shapes |= {f"model.layers.{layer}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"model.layers.{layer}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {f"model.layers.{layer}.{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
    return shapes


def manifest(rank: int, num_ranks: int, shapes: dict[str, tuple[int, ...]]) -> Manifest:
    """What a rank holds of a model, cut along the first dimension as FSDP does: the last pieces may be shorter, or
    missing."""
    shards, buckets = [], [0]
    for name, shape in shapes.items():
        size = -(-shape[0] // num_ranks)
        own = (min(size, shape[0] - rank * size), *shape[1:])
        if own[0] <= 0:
            continue
        offsets = (rank * size, *[0] * (len(shape) - 1))
        shard = Shard(name, torch.bfloat16, shape, offsets, own, len(buckets) - 1, buckets[-1])
        if buckets[-1] + shard.num_bytes > BUCKET_BYTES:
            buckets.append(0)
        shards.append(shard)
        buckets[-1] += -(-shard.num_bytes // 64) * 64
    return Manifest(0, rank, tuple(shards), tuple(buckets))


class Process(Actor):
    """A rank and a generator."""

    def __init__(self, num: int) -> None:
        rank = current_rank().rank
        laid = manifest(rank, num, shapes_8b())
        handle = Handle(f"host-{rank}", "cuda", sum(laid.bucket_bytes), tuple(range(12)), f"{rank:016x}")
        self.place_here = Place(handle, laid, Address("127.0.0.1", 20000 + rank, f"{rank:032x}"))
        self.known, self.waits, self.cpu = Known(), False, 0.0

    @endpoint
    @collective
    async def publish(self, store: Any, version: int, *options: Any) -> Brief:
        return Part(version, self.place_here, None).brief

    @endpoint
    @collective
    async def place(self, version: int) -> Place:
        return self.place_here

    @endpoint
    async def load(self, store: Any, version: int, told: Offer | Brief, again: bool = False) -> str:
        if again and not self.waits:
            return ""
        start = time.process_time()
        offer = self.known.offer(told)
        self.waits = offer is None
        if offer is not None:
            assert len(offer.shapes) == len(shapes_8b()) and offer.has_streams
        self.cpu += time.process_time() - start
        return UNKNOWN if offer is None else "TLS streams"

    @endpoint
    async def take_cpu(self) -> float:
        seconds, self.cpu = self.cpu, 0.0
        return seconds


async def control(addresses: list[str], num_versions: int) -> dict[str, float]:
    hosts = await attach(addresses, "127.0.0.1", 600)
    procs = hosts.spawn_procs(per_host={"procs": 1}, name="process")
    mesh = procs.spawn("process", Process, len(addresses))
    trainers = Trainers(mesh, 600, asyncio.get_running_loop().create_future())
    generators = Service("generator", len(addresses), 600, lambda index, reason: None)
    actors = [mesh.slice(hosts=number) for number in range(len(addresses))]
    for index, actor in enumerate(actors):
        await generators.admit(index, actor)
    store: Any = SimpleNamespace(spec=None)
    weights = WeightSync(trainers, store, generators, None, lambda line: None)
    figures: dict[str, list[float]] = {"cpu": [], "generator": [], "s": []}
    for version in range(num_versions):
        start = cpu_s(), time.perf_counter()
        weights.is_changed = True
        await weights.publish(version)
        await weights.delivered()
        figures["cpu"].append(cpu_s() - start[0])
        figures["s"].append(time.perf_counter() - start[1])
        figures["generator"].append(await actors[-1].take_cpu.call_one())
    await hosts.shutdown()
    first = {f"first_{name}": each[0] for name, each in figures.items()}
    return first | {name: statistics.median(each[1:]) for name, each in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="*", default=[8, 64])
    parser.add_argument("--versions", type=int, default=6)
    parser.add_argument("--control", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.control:
        print(json.dumps(asyncio.run(control(args.control, args.versions))))
        return
    for num in args.hosts:
        found = controlled(num, __file__, "--versions", str(args.versions))
        print(json.dumps({"hosts": num} | {name: round(value, 4) for name, value in found.items()}), flush=True)
        row(f"controller, {num} ranks and generators: a version, CPU time a generator", 1000 * found["cpu"] / num,
            target=TARGET_MS, better="less", unit="ms", note=f"{1000 * found['s']:.0f} ms in all")  # fmt: skip


if __name__ == "__main__":
    main()
