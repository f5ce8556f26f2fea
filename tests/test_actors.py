"""The parts of the loop that live in the controller: the buffer between rollouts and training, and services."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from forge_hpc.actors.buffer import EpisodeBuffer
from forge_hpc.actors.service import Service
from forge_hpc.data.types import Completion, Episode, Group, Prompt


def group(position: int, policy_version: int, num_episodes: int = 2) -> Group:
    prompt = Prompt(position, "1+1=", [1, 2], "2")
    versions = (policy_version, policy_version)
    completions = [Completion(i, "2", [3], [-0.1], "stop", versions) for i in range(num_episodes)]
    return Group(prompt, [Episode(prompt, completion, 1.0) for completion in completions])


async def passes(waiter: Any) -> bool:
    """Whether a wait is over at once."""
    task = asyncio.ensure_future(waiter)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    done = task.done()
    task.cancel()
    return done


def test_generation_runs_ahead_of_training_by_the_staleness_bound_and_no_further() -> None:
    async def scenario(max_staleness: int) -> list[int]:
        buffer = EpisodeBuffer(1, max_staleness, policy_version=0)
        before = [step for step in range(1, 6) if await passes(buffer.room(step))]
        await buffer.weights_loaded(1)
        after = [step for step in range(1, 6) if await passes(buffer.room(step))]
        return before + after

    assert asyncio.run(scenario(0)) == [1, 1, 2]
    assert asyncio.run(scenario(2)) == [1, 2, 3, 1, 2, 3, 4]


def test_a_step_takes_its_own_prompts_in_order_whoever_finishes_first() -> None:
    async def scenario() -> list[list[int]]:
        buffer = EpisodeBuffer(2, 1, policy_version=0)
        await buffer.put(2, group(3, 0))
        await buffer.put(1, group(1, 0))
        assert not await passes(buffer.take(1))  # half a step
        await buffer.put(1, group(0, 0))
        first = await buffer.take(1)
        assert len(buffer) == 1
        await buffer.put(2, group(2, 0))
        return [[g.prompt.position for g in groups] for groups in (first, await buffer.take(2))]

    assert asyncio.run(scenario()) == [[0, 1], [2, 3]]


def test_an_episode_older_than_the_bound_is_left_out_and_counted() -> None:
    async def scenario() -> tuple[list[int], int]:
        buffer = EpisodeBuffer(2, 1, policy_version=0)
        await buffer.put(5, group(0, policy_version=2))  # the policy before step 5 is version 4
        await buffer.put(5, group(1, policy_version=3))
        return [len(g.episodes) for g in await buffer.take(5)], buffer.num_stale

    assert asyncio.run(scenario()) == ([0, 2], 2)


class FakeReplica:
    """Answers when it is told to. Real replicas are tested end to end; their timing cannot be chosen."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gate = asyncio.Event()

    @property
    def generate(self) -> FakeReplica:
        return self

    async def call_one(self, *args: Any) -> tuple[str, Any]:
        await self.gate.wait()
        return self.name, args


def test_calls_go_to_the_least_loaded_replica_or_to_that_of_their_key() -> None:
    async def scenario() -> None:
        replicas = [FakeReplica(name) for name in "abc"]
        service = Service("generator", replicas, timeout_s=10)
        calls = [asyncio.ensure_future(service.generate.route(i)) for i in range(4)]
        await asyncio.sleep(0)
        assert service.in_flight == [2, 1, 1]
        replicas[1].gate.set()
        assert await calls[1] == ("b", (1,))
        assert service.in_flight == [2, 0, 1]
        for replica in replicas:
            replica.gate.set()
        assert (await service.generate.route(9))[0] == "b"  # b had nothing to do when it was asked
        await asyncio.gather(*calls)
        assert [(await service.generate.route(0, key=key))[0] for key in range(6)] == list("abcabc")
        assert [name for name, _ in await service.generate.fanout()] == list("abc")

    asyncio.run(scenario())


def test_a_replica_that_does_not_answer_is_named() -> None:
    async def scenario() -> None:
        service = Service("generator", [FakeReplica("a")], timeout_s=0.05)
        with pytest.raises(TimeoutError, match=r"generator replica 0 did not answer generate\(\) within"):
            await service.generate.route()
        assert service.in_flight == [0]

    asyncio.run(scenario())
