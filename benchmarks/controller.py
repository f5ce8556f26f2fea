"""What a rollout costs the controller: CPU time from a generator's message to the documents that the trainers have.

    python benchmarks/controller.py [--rollouts 1024] [--tokens 128 4096] [--repeats 3] [--trainers 1] [--batch 1]

The generator is an actor in a process of its own that has its completions ready; everything else is the run's own:
service, rewards (`exact`), groups, buffer, advantages, documents, and the call of a trainer actor on each rank. Prints
microseconds of the controller's CPU (all its threads) for each rollout, part by part, and how long the whole takes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from monarch.actor import Actor, Port, endpoint, this_host
from monarch.actor.concurrent import concurrent_endpoint
from rows import row

from forge_hpc.actors.errors import collective
from forge_hpc.advantages import advantage_function
from forge_hpc.config import Config
from forge_hpc.config.schema import RewardConfig
from forge_hpc.controller.service import Service
from forge_hpc.controller.trainers import Trainers
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import PromptStream
from forge_hpc.data.types import Completion, Document, Prompt
from forge_hpc.rewards import RewardPool
from forge_hpc.rollouts.buffer import episode_buffer
from forge_hpc.rollouts.documents import set_advantages, to_documents
from forge_hpc.rollouts.figures import measure
from forge_hpc.rollouts.stream import RolloutStream

MOST_US = (500, 650)
"""What a rollout with a message of its own may take on a busy machine: a short one, and a long one."""


class Generator(Actor):
    """Its answers cost nothing; they come as those of ``actors.generator`` do."""

    @endpoint
    async def start(self, num_tokens: int, group_size: int, batch: int) -> None:
        self._batch = batch
        rng = np.random.default_rng(0)
        self._samples = [
            Completion(
                index,
                "an answer",
                rng.integers(0, 150_000, num_tokens).tolist(),
                (-rng.random(num_tokens)).astype(np.float32).astype(float).tolist(),
                "stop",
                (0, 0),
            )
            for index in range(group_size)
        ]

    @endpoint
    async def relabel(self, version: int) -> None:
        for sample in self._samples:
            sample.policy_versions = (version, version)

    @concurrent_endpoint
    async def generate(self, prompts: Sequence[Prompt], port: Port[Any]) -> int:
        port.return_undeliverable = False
        pairs = [
            ((place, index), sample) for place in range(len(prompts)) for index, sample in enumerate(self._samples)
        ]
        for start in range(0, len(pairs), self._batch):
            port.send(pairs[start : start + self._batch])
        return len(prompts) * len(self._samples)


class Trainer(Actor):
    @endpoint
    @collective
    async def train_step(
        self, documents: Sequence[Document], update: bool, max_mismatch: float, model: str
    ) -> dict[str, float]:
        return {"tokens/trained": float(sum(len(document.token_ids) for document in documents))}


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Clock:
    """CPU and wall seconds by part."""

    def __init__(self) -> None:
        self.parts: dict[str, list[tuple[float, float]]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        cpu, wall = cpu_s(), time.perf_counter()
        yield
        self.parts.setdefault(name, []).append((cpu_s() - cpu, time.perf_counter() - wall))


async def run(num_rollouts: int, num_tokens: int, repeats: int, num_trainers: int, batch: int) -> Clock:
    config = Config(reward=[RewardConfig(name="exact")])
    config.data.path, config.data.chat_template = "builtin:addition", False
    config.rollout.prompts_per_step = num_rollouts // config.rollout.group_size
    config.trainer.training.steps = repeats + 1
    meshes = [this_host().spawn_procs(per_host={"gpus": num}) for num in (1, num_trainers)]
    generator, trainer = meshes[0].spawn("generator", Generator), meshes[1].spawn("trainer", Trainer)
    await generator.start.call_one(num_tokens, config.rollout.group_size, batch)
    service = Service("generator", 1, 600, print)
    await service.admit(0, generator)
    trainers = Trainers(trainer, 600, asyncio.get_running_loop().create_future())
    prompts = PromptStream(open_sources(config), char_tokenizer(), config)
    buffer, clock = episode_buffer(config, 0, 0), Clock()
    async with RewardPool(config) as rewards:
        stream = RolloutStream(config, prompts, service.generate.stream, 1, rewards, buffer, lambda text: None)
        rolling = asyncio.create_task(stream.run())
        for step in range(1, repeats + 2):
            with clock.part("received, rewarded, grouped"):
                groups = await stream.take()
            with clock.part("measured and compared"):
                measure(groups, step)
                set_advantages(groups, advantage_function("group_mean_std"))
            with clock.part("made documents"):
                documents = to_documents(groups)
            with clock.part("sent to the trainers"):
                await trainers.train_step(documents)
            with clock.part("the state of the run"):
                stream.state_dict()
            await generator.relabel.call_one(step)
            await buffer.weights_loaded(step)
        rolling.cancel()
        await asyncio.wait({rolling})
    await asyncio.gather(*(mesh.stop() for mesh in meshes))
    return clock


async def compare(args: argparse.Namespace) -> None:
    for num_tokens in args.tokens:
        clock = await run(args.rollouts, num_tokens, args.repeats, args.trainers, args.batch)
        print(f"{args.rollouts} rollouts of {num_tokens} tokens, {args.trainers} trainers, median of {args.repeats}")
        total = [0.0, 0.0]
        for name, measured in clock.parts.items():
            cpu, wall = (statistics.median(values) for values in zip(*measured[1:], strict=True))
            total = [total[0] + cpu, total[1] + wall]
            print(f"  {name:30} {1e6 * cpu / args.rollouts:8.1f} us of CPU a rollout {wall:8.3f} s")
        print(f"  {'all':30} {1e6 * total[0] / args.rollouts:8.1f} us of CPU a rollout {total[1]:8.3f} s", flush=True)
        what = f"the controller's CPU time, a rollout of {num_tokens} tokens, {args.batch} to a message"
        each_us = 1e6 * total[0] / args.rollouts
        known = "a message alone costs 200 µs" if args.batch == 1 and each_us <= MOST_US[num_tokens >= 1024] else ""
        row(what, each_us, target=300, better="less", unit="µs", known=known)
        taken_in, *rest = (statistics.median(cpu for cpu, _ in measured[1:]) for measured in clock.parts.values())
        row(f"the controller's CPU time between the last of {args.rollouts} rollouts of {num_tokens} tokens and the "
            "training", sum(rest), target=0.1, better="less", unit="s",
            note=f"{taken_in:.2f} s while they come")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trainers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="completions that are done at the same time")
    asyncio.run(compare(parser.parse_args()))


if __name__ == "__main__":
    # The processes import this file by its name.
    folder = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, str(Path(folder).parent), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, folder)
    import controller

    controller.main()
