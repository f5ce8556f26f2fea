"""The groups of each step, generated beside the training.

    prompts ──► generators (and environments) ──► rewards ──► groups ──► buffer ──► take()
                    ▲                                                     │
                    └───────────────────── room ◄─────────────────────────┘

New weights in the generators make room in the buffer, and with dynamic sampling every group that carries no signal, in
whose place a further prompt is drawn. With ``rollout.max_staleness`` 0 generation and training take turns; above it
generation runs ahead. Then a prompt is begun when a generator has places for its samples, or soon will: on the newest
weights that there are, so that it may take the longer, and by a generator that comes meanwhile, where one does.
Episodes of an environment, which leave their places while it is its turn, are begun so only where late groups may be
overtaken (``rollout.window``).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from forge_hpc.config import Config
from forge_hpc.config.sources import run_sources
from forge_hpc.data.prompts import PromptStream
from forge_hpc.data.types import Group, Prompt
from forge_hpc.rewards import RewardPool, RewardPools
from forge_hpc.rollouts.buffer import EpisodeBuffer
from forge_hpc.rollouts.checks import EpisodeWatch
from forge_hpc.rollouts.figures import RolloutClock
from forge_hpc.rollouts.groups import make_groups

T = TypeVar("T")


def num_waiting(config: Config) -> int:
    """Samples that may wait at a generator whose places are taken: a quarter as many, or two groups. Without any, some
    places are empty while calls wait at another (``benchmarks/flow.py``), or until the controller has heard of it."""
    return max(config.generator.engine.max_num_seqs // 4, 2 * config.rollout.group_size)


class RolloutStream:
    """What ``session.rollouts()`` gives to a recipe.

    Args:
        prompts: those of the steps to come.
        sample: the generators', or the environments', stream of samples: (prompts, key=...).
        num_generators: replicas that share the prompts of a synchronous step.
        check: raises where the groups of a step that is to be taken will never come.
        num_serving: replicas that serve now, where that changes.
        admission: returns when another one serves.
        reward_more: adds to the rewards of a step's episodes what is computed of them together.
        warn: shows the user a line.
    """

    def __init__(
        self,
        config: Config,
        prompts: PromptStream,
        sample: Callable[..., AsyncIterator[Any]],
        num_generators: int,
        rewards: RewardPool | RewardPools,
        buffer: EpisodeBuffer,
        warn: Callable[[str], None],
        check: Callable[[int], None] = lambda step: None,
        num_serving: Callable[[], int] | None = None,
        admission: Callable[[], Awaitable[None]] | None = None,
        reward_more: Callable[[list[Group]], Awaitable[None]] | None = None,
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._sample = sample
        self._num_generators = num_generators
        self._rewards = rewards
        self._buffer = buffer
        self._reward_more = reward_more
        self._clock = RolloutClock()
        self._watch = EpisodeWatch(warn)
        self._step = buffer.step
        self._check = check
        self._num_serving = num_serving or (lambda: num_generators)
        self._admission = admission
        is_ahead, is_strict = config.rollout.max_staleness > 0, config.rollout.window == 1
        plays = any(run.config.environment.name is not None for run in run_sources(config))
        self._waits_for_places = is_ahead and not (is_strict and plays)
        self._places = config.generator.engine.max_num_seqs + num_waiting(config)
        self._num_open = 0  # samples that are being generated
        self._has_places = asyncio.Event()

    async def take(self) -> list[Group]:
        """The groups of the next step, in the order of their prompts, none older than ``rollout.max_staleness``."""
        self._step = self._buffer.step
        self._check(self._step)
        groups = await self._buffer.take()
        if self._reward_more is not None:
            await self._reward_more(groups)
        self._prompts.report(groups)
        self._watch.check(self._step, groups)
        return groups

    def metrics(self) -> dict[str, float]:
        """The figures of the step that was taken last: what was waited for, and what was left out."""
        return self._prompts.metrics() | self._buffer.metrics() | self._clock.metrics()

    def state_dict(self) -> dict[str, Any]:
        """What a run that trained on the step that was taken last needs to go on after it; JSON."""
        buffer = self._buffer
        return {"prompts": self._prompts.state_after(buffer.position - 1, buffer.ahead)} | buffer.state_dict()

    async def run(self) -> None:
        """Generate, for as long as this is not cancelled."""
        synchronous, num = self._config.rollout.max_staleness == 0, self._num_generators
        async with asyncio.TaskGroup() as tasks:
            if self._admission is not None:
                tasks.create_task(self._see_admissions(self._admission))
            while True:
                batch = self._buffer.begin(self._prompts.draw(await self._room()))
                # Synchronous: a generator admits all its prompts at once, so that the run repeats exactly; each has its
                # part of every source.
                batch.sort(key=lambda prompt: prompt.source)
                shares = [batch[i::num] for i in range(num) if batch[i::num]] if synchronous else [[p] for p in batch]
                self._num_open += len(batch) * self._config.rollout.group_size
                started = self._clock.begin(len(shares))
                for key, share in enumerate(shares):
                    tasks.create_task(self._roll_out(share, key if synchronous else None, started))

    async def _room(self) -> int:
        """Wait until prompts may be drawn, and return how many."""
        room = await self._buffer.room()
        if not self._waits_for_places:
            return room
        if (num_again := self._buffer.num_to_draw_again) > 0:  # they had places before
            return min(room, num_again)
        while (num_free := self._num_serving() * self._places - self._num_open) <= 0:
            self._has_places.clear()
            await self._has_places.wait()
        return min(room, math.ceil(num_free / self._config.rollout.group_size))

    async def _counted(self, samples: AsyncIterator[T]) -> AsyncIterator[T]:
        async for sample in samples:
            self._num_open -= 1
            self._has_places.set()
            yield sample

    async def _see_admissions(self, admission: Callable[[], Awaitable[None]]) -> None:
        while True:
            await admission()
            self._has_places.set()

    async def _roll_out(self, share: list[Prompt], key: int | None, started: float) -> None:
        samples = self._counted(self._sample(share, key=key))
        async with aclosing(make_groups(share, samples, self._rewards, self._config)) as groups:
            async for group in groups:
                await self._buffer.put(group)
        self._clock.end(started)
