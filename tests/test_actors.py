"""The parts of the loop that live in the controller: the buffer between rollouts and training, and services."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from forge_hpc.controller.service import ActorLost, Service
from forge_hpc.data.types import Completion, Episode, Group, Prompt
from forge_hpc.rollouts.buffer import EpisodeBuffer


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


def buffer_of(
    size: int, max_staleness: int, steps_done: int = 0, position: int | None = None, **options: Any
) -> EpisodeBuffer:
    position = steps_done * size if position is None else position
    return EpisodeBuffer(size, max_staleness, steps_done, position, last_step=20, **options)


def prompts_at(*positions: int) -> list[Prompt]:
    return [Prompt(position, "1+1=", [1, 2], "2") for position in positions]


def positions_of(items: list[Any]) -> list[int]:
    return [(item.prompt if isinstance(item, Group) else item).position for item in items]


async def room_of(buffer: EpisodeBuffer) -> int:
    return await buffer.room() if await passes(buffer.room()) else 0


def test_generation_runs_ahead_of_training_by_the_staleness_bound_and_no_further() -> None:
    async def scenario(max_staleness: int) -> list[int]:
        buffer = buffer_of(2, max_staleness)
        rooms = [await room_of(buffer)]
        drawn = buffer.begin(prompts_at(*range(rooms[0])))
        rooms.append(await room_of(buffer))
        for prompt in drawn:
            await buffer.put(group(prompt.position, 0))
        rooms.append(await room_of(buffer))
        await buffer.take()
        await buffer.weights_loaded(1)
        return [*rooms, await room_of(buffer)]

    assert asyncio.run(scenario(0)) == [2, 0, 0, 2]
    assert asyncio.run(scenario(2)) == [6, 0, 0, 2]


def test_no_prompt_is_drawn_for_what_comes_after_the_last_step() -> None:
    async def scenario() -> list[int]:
        buffer = EpisodeBuffer(3, 4, policy_version=7, position=21, last_step=9)
        rooms = [await room_of(buffer)]
        buffer.begin(prompts_at(*range(21, 27)))
        return [*rooms, await room_of(buffer)]

    assert asyncio.run(scenario()) == [6, 0]


def test_a_step_takes_its_own_prompts_in_order_whoever_finishes_first() -> None:
    async def scenario() -> list[list[int]]:
        buffer = buffer_of(2, 1)
        buffer.begin(prompts_at(0, 1, 2, 3))
        await buffer.put(group(3, 0))
        await buffer.put(group(1, 0))
        assert not await passes(buffer.take())  # half a step
        await buffer.put(group(0, 0))
        first = await buffer.take()
        assert positions_of(buffer.finished()) == [3]
        await buffer.put(group(2, 0))
        return [positions_of(first), positions_of(await buffer.take())]

    assert asyncio.run(scenario()) == [[0, 1], [2, 3]]


def test_an_episode_older_than_the_bound_is_left_out_and_counted() -> None:
    async def scenario() -> tuple[list[int], float]:
        buffer = buffer_of(2, 1, steps_done=4)
        buffer.begin(prompts_at(8, 9))
        await buffer.put(group(8, policy_version=2))  # the policy before step 5 is version 4
        await buffer.put(group(9, policy_version=3))
        taken = [len(g.episodes) for g in await buffer.take()]
        resumed = buffer_of(2, 1, steps_done=5)
        resumed.restore([], buffer.state_dict())
        return taken, resumed.metrics()["episodes/stale"]

    assert asyncio.run(scenario()) == ([0, 2], 2)


def test_what_was_finished_ahead_is_kept_and_not_generated_again() -> None:
    async def scenario() -> None:
        buffer = buffer_of(2, 2, steps_done=3)
        buffer.begin(prompts_at(*range(6, 12)))
        for position in (9, 7, 6):
            await buffer.put(group(position, 3))
        saved = buffer.finished()
        assert positions_of(saved) == [6, 7, 9]
        resumed = buffer_of(2, 2, steps_done=3)
        resumed.restore(saved, {})
        assert await room_of(resumed) == 6
        assert positions_of(resumed.begin(prompts_at(*range(6, 12)))) == [8, 10, 11]
        assert await room_of(resumed) == 0
        assert positions_of(await resumed.take()) == [6, 7]

    asyncio.run(scenario())


def counts(g: Group) -> bool:
    """In these tests a group of one episode carries no signal."""
    return len(g.episodes) > 1


def test_more_prompts_are_drawn_in_place_of_groups_that_do_not_count() -> None:
    async def scenario(max_staleness: int) -> None:
        buffer = buffer_of(2, max_staleness, counts=counts)
        ahead = 2 * max_staleness
        buffer.begin(prompts_at(*range(2 + ahead)))
        await buffer.put(group(1, 0, num_episodes=1))
        assert await room_of(buffer) == (1 if ahead else 0)  # synchronous: once all that was begun is there
        await buffer.put(group(0, 0))
        assert await room_of(buffer) == 1
        assert not await passes(buffer.take())
        buffer.begin(prompts_at(2 + ahead))
        await buffer.put(group(2, 0))  # whichever comes next in the order fills the step
        assert positions_of(await buffer.take()) == [0, 1, 2]
        assert await room_of(buffer) == 0
        await buffer.weights_loaded(1)
        assert await room_of(buffer) == 2

    asyncio.run(scenario(0))
    asyncio.run(scenario(1))


def test_a_resumed_step_counts_what_was_saved_as_if_it_had_not_been_interrupted() -> None:
    async def scenario() -> None:
        buffer = buffer_of(2, 1, counts=counts)
        buffer.begin(prompts_at(0, 1, 2, 3))
        for position, num_episodes in ((0, 2), (1, 2), (2, 1), (3, 2)):
            await buffer.put(group(position, 0, num_episodes))
        assert positions_of(await buffer.take()) == [0, 1]
        buffer.begin(prompts_at(4))  # in place of 2; it was under way when the run was saved
        resumed = buffer_of(2, 1, steps_done=1, position=2, counts=counts)
        resumed.restore(buffer.finished(), {})
        assert await room_of(resumed) == 4
        assert positions_of(resumed.begin(prompts_at(2, 3, 4, 5))) == [4, 5]
        assert positions_of(resumed.begin(prompts_at(*range(6, 6 + await room_of(resumed))))) == [6]
        await resumed.put(group(4, 1))
        assert positions_of(await resumed.take()) == [2, 3, 4]

    asyncio.run(scenario())


def test_a_step_that_finds_no_signal_in_all_that_it_draws_is_given_up() -> None:
    async def scenario() -> None:
        buffer = buffer_of(2, 0, counts=counts, max_uncounted=6)
        buffer.begin(prompts_at(*range(7)))
        for position in range(6):
            await buffer.put(group(position, 0, num_episodes=1 if position else 2))
        assert not await passes(buffer.take())
        await buffer.put(group(6, 0, num_episodes=1))
        with pytest.raises(RuntimeError, match="for step 1 7 prompts were drawn, and in the groups of 6 all rewards"):
            await buffer.take()

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


class SendingReplica(FakeReplica):
    """Sends the pairs that it is told to, and returns or raises what it is told last."""

    def __init__(self, name: str = "a") -> None:
        super().__init__(name)
        self.told: asyncio.Queue[Any] = asyncio.Queue()
        self.was_cancelled = asyncio.Event()
        self.port: Any = None

    def tell(self, *words: Any) -> None:
        for word in words:
            self.told.put_nowait(word)

    async def call_one(self, *args: Any) -> int:
        self.num_calls += 1
        *_, self.port = args
        try:
            while isinstance(pair := await self.told.get(), tuple):
                self.port.send([pair])
        except asyncio.CancelledError:
            self.was_cancelled.set()
            raise
        if isinstance(pair, Exception):
            raise pair
        return pair


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


def test_a_stream_hands_over_each_result_before_the_call_ends() -> None:
    async def scenario() -> None:
        replica = SendingReplica()
        service, _ = await service_of([replica])
        stream = service.generate.stream("prompts", key=0)
        replica.tell((1, "one"))
        assert await anext(stream) == (1, "one")
        replica.tell((0, "zero"))
        assert await anext(stream) == (0, "zero")
        replica.tell((2, "two"), 3)
        assert [pair async for pair in stream] == [(2, "two")]
        assert replica.num_calls == 1

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_stream_waits_for_what_the_reply_has_overtaken_but_not_for_ever() -> None:
    async def scenario() -> None:
        replica = SendingReplica()
        service, _ = await service_of([replica])
        stream = service.generate.stream()
        replica.tell((0, "zero"), 2)
        assert await anext(stream) == (0, "zero")
        rest = asyncio.ensure_future(anext(stream))
        await until(lambda: service._replicas[0].in_flight == 0)  # the reply is there
        replica.port.send([(1, "one")])
        assert await rest == (1, "one")
        assert [pair async for pair in stream] == []
        service.timeout_s = 0.05
        replica.tell((0, "zero"), 2)
        with pytest.raises(ActorLost, match=r"generator, generate\(\): 1 results are missing"):
            [pair async for pair in service.generate.stream()]

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_stream_goes_on_at_another_replica_and_hands_over_nothing_twice() -> None:
    async def scenario() -> None:
        first, second = SendingReplica("a"), SendingReplica("b")
        service, losses = await service_of([first, second])
        stream = service.generate.stream(key=0)
        first.tell((2, "a"))
        second.tell((0, "b"), (1, "b"), (2, "b"), 3)
        received = [await anext(stream)]
        service.lose(0, "killed")
        received += [pair async for pair in stream]
        assert received == [(2, "a"), (0, "b"), (1, "b")]
        assert losses == [(0, "killed")] and second.num_calls == 1

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_what_the_call_of_a_stream_raises_is_raised() -> None:
    async def scenario() -> None:
        replica = SendingReplica()
        service, losses = await service_of([replica])
        stream = service.generate.stream()
        replica.tell((0, "zero"))
        assert await anext(stream) == (0, "zero")
        replica.tell(KeyError("no such thing"))
        with pytest.raises(KeyError, match="no such thing"):
            await anext(stream)
        assert not losses

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_stream_that_is_left_early_leaves_nothing() -> None:
    async def leave_by_closing(stream: Any) -> None:
        await stream.aclose()

    async def leave_by_cancelling(stream: Any) -> None:
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})

    async def scenario(leave: Any) -> None:
        replica = SendingReplica()
        service, losses = await service_of([replica])
        stream = service.generate.stream(key=0)
        replica.tell((0, "zero"))
        assert await anext(stream) == (0, "zero")
        await leave(stream)
        await until(replica.was_cancelled.is_set)
        replica.port.send([(1, "one")])  # nobody listens, and nothing comes of it
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        replica.tell(0)
        assert [pair async for pair in service.generate.stream(key=0)] == []  # the replica is free again
        assert not losses

    for leave in (leave_by_closing, leave_by_cancelling):
        asyncio.run(scenario(leave))
