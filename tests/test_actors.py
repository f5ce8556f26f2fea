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


def test_what_was_finished_ahead_is_kept_and_not_generated_again() -> None:
    async def scenario() -> None:
        buffer = EpisodeBuffer(2, 2, policy_version=3)
        for step, position in ((5, 9), (4, 7), (4, 6)):
            await buffer.put(step, group(position, 3))
        saved = buffer.finished()
        assert [g.prompt.position for g in saved] == [6, 7, 9]
        resumed = EpisodeBuffer(2, 2, policy_version=3)
        resumed.restore(saved)
        prompts = {step: [Prompt(2 * step - 2 + i, "", [1], "") for i in range(2)] for step in (4, 5, 6)}
        missing = {step: [p.position for p in resumed.missing(step, prompts[step])] for step in prompts}
        assert missing == {4: [], 5: [8], 6: [10, 11]}
        assert [g.prompt.position for g in await resumed.take(4)] == [6, 7]

    asyncio.run(scenario())


class FakeReplica:
    """Answers when it is told to, or not at all. Real replicas are tested end to end; their timing cannot be chosen."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gate = asyncio.Event()
        self.num_calls = 0

    @property
    def generate(self) -> FakeReplica:
        return self

    async def call_one(self, *args: Any) -> tuple[str, Any]:
        self.num_calls += 1
        await self.gate.wait()
        return self.name, args


class Losses(list):
    """Collects what a service reports as lost."""

    def __call__(self, index: int, reason: str) -> None:
        self.append((index, reason))


async def service_of(replicas: list[FakeReplica], timeout_s: float = 10) -> tuple[Service, Losses]:
    losses = Losses()
    service = Service("generator", len(replicas), timeout_s, losses)
    for index, replica in enumerate(replicas):
        await service.admit(index, replica)
    return service, losses


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


def test_calls_go_to_the_least_loaded_replica_or_to_that_of_their_key() -> None:
    async def scenario() -> None:
        replicas = [FakeReplica(name) for name in "abc"]
        service, _ = await service_of(replicas)
        calls = [asyncio.ensure_future(service.generate.route(i)) for i in range(4)]
        await until(lambda: sum(replica.num_calls for replica in replicas) == 4)
        assert [replica.num_calls for replica in replicas] == [2, 1, 1]
        replicas[1].gate.set()
        assert await calls[1] == ("b", (1,))
        for replica in replicas:
            replica.gate.set()
        await asyncio.gather(*calls)
        assert [(await service.generate.route(0, key=key))[0] for key in range(6)] == list("abcabc")
        assert [name for name, _ in await service.generate.fanout()] == list("abc")

    asyncio.run(scenario())


def test_calls_of_a_lost_replica_go_to_others_and_a_key_has_its_replica_to_itself() -> None:
    async def scenario() -> None:
        replicas = [FakeReplica(name) for name in "ab"]
        service, losses = await service_of(replicas)
        calls = [asyncio.ensure_future(service.generate.route(key, key=key)) for key in range(2)]
        await until(lambda: [replica.num_calls for replica in replicas] == [1, 1])
        service.lose(0, "killed")
        for _ in range(20):
            await asyncio.sleep(0)
        assert replicas[1].num_calls == 1  # the second call waits for the first to be over
        replicas[1].gate.set()
        assert sorted(await asyncio.gather(*calls)) == [("b", (0,)), ("b", (1,))]
        assert losses == [(0, "killed")] and service.serving == [1]

    asyncio.run(scenario())


def test_a_replica_that_does_not_answer_is_lost_and_its_call_waits_for_the_next() -> None:
    async def scenario() -> None:
        service, losses = await service_of([FakeReplica("a")], timeout_s=0.05)
        call = asyncio.ensure_future(service.generate.route(7))
        await until(lambda: losses)
        assert "did not answer within 0.05 s" in losses[0][1]
        assert service.serving == [] and not call.done()
        healthy = FakeReplica("b")
        healthy.gate.set()
        await service.admit(0, healthy)
        assert await call == ("b", (7,))

    asyncio.run(scenario())


def test_who_waits_for_a_replica_that_never_comes_is_told_why() -> None:
    async def scenario() -> None:
        service, _ = await service_of([FakeReplica("a")])
        call = asyncio.ensure_future(service.generate.route())
        await until(lambda: service._replicas[0].in_flight == 1)
        service.lose(0, "killed")
        await service.fail(RuntimeError("no node is left"))
        with pytest.raises(RuntimeError, match="no node is left"):
            await call

    asyncio.run(scenario())
