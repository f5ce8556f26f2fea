"""A process that computes one reward: ``python -m forge_hpc.rewards.worker``, started by the pool.

The first request loads the reward; the others compute it, or name by its ``id`` one to ``cancel``. It ends with its
input. A sync reward runs in the main thread, one call at a time; an async one on one event loop, all calls at once.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import resource
from typing import Any

from forge_hpc.cluster.stacks import stand_by
from forge_hpc.rewards.compute import compute, compute_async
from forge_hpc.rewards.load import Reward, load_reward
from forge_hpc.workers.channel import Answer, Channel, refusal
from forge_hpc.workers.keeper import keep


def main() -> None:
    keep()
    stand_by("reward")
    channel = Channel()
    first = channel.receive()
    if first is None:
        return
    os.environ.update(first["environ"])
    try:
        if first["memory_gib"] is not None:
            limit = int(first["memory_gib"] * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        reward = load_reward(first["name"], first["args"])
        if not reward.is_async:
            asyncio.run(_check(reward, first))
    except Exception as error:  # a user's module may raise anything
        return channel.answer(first, refusal(error))
    if reward.is_async:
        return asyncio.run(_serve_async(reward, first, channel))
    channel.answer(first, reward.traits)
    while (request := channel.receive()) is not None:
        channel.answer(request, compute(reward, request))


async def _serve_async(reward: Reward, first: dict[str, Any], channel: Channel) -> None:
    try:
        await _check(reward, first)
    except Exception as error:
        return channel.answer(first, refusal(error))
    channel.answer(first, reward.traits)
    running: dict[int, asyncio.Task[Answer]] = {}

    def begin(request: dict[str, Any]) -> None:
        def end(task: asyncio.Task[Answer]) -> None:  # also of a call that was cancelled before its first step
            del running[request["id"]]
            answer = {"error": "was cancelled", "kind": "raised"} if task.cancelled() else task.result()
            channel.answer(request, answer)

        task = running[request["id"]] = tasks.create_task(compute_async(reward, request))
        task.add_done_callback(end)

    async with asyncio.TaskGroup() as tasks:
        async for request in channel.stream():
            if "cancel" not in request:
                begin(request)
            elif request["cancel"] in running:
                running[request["cancel"]].cancel()


async def _check(reward: Reward, first: dict[str, Any]) -> None:
    """Call the reward's own ``check``, where it has one and the pool asks for it."""
    check = getattr(reward.function, "check", None) if first["check"] else None
    if check is not None and inspect.isawaitable(checked := check()):
        await checked


if __name__ == "__main__":
    main()
