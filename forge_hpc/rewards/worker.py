"""A process that computes one reward: ``python -m forge_hpc.rewards.worker``, started by the pool.

Messages come on the standard input, each a length (8 bytes, little endian) and a pickle: first the reward to load, then
requests, or the ``id`` of one to ``cancel``. Answers go to what was the standard output, one JSON object a line with
the request's ``id``. What rewards print goes to the standard error. It ends with its input.

A sync reward runs in the main thread, one call at a time; an async one on one event loop, all calls at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import pickle
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from forge_hpc.config.errors import UserError
from forge_hpc.rewards.compute import Answer, compute, compute_async, failure
from forge_hpc.rewards.keeper import keep
from forge_hpc.rewards.registry import Reward, load_reward

_HEADER = struct.Struct("<Q")
Send = Callable[[dict[str, Any], Answer], None]


def main() -> None:
    keep()
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    me = os.getpid()

    def send(request: dict[str, Any], answer: Answer) -> None:
        if os.getpid() != me:
            os._exit(0)  # a reward forked, and its child came back from the call
        print(json.dumps({**answer, "id": request["id"]}), file=answers, flush=True)

    first = _read(requests)
    if first is None:
        return
    try:
        if first["memory_gib"] is not None:
            limit = int(first["memory_gib"] * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        reward = load_reward(first["name"], first["args"])
        if not reward.is_async:
            asyncio.run(_check(reward, first))
    except UserError as error:
        return send(first, {"error": error.message, "hint": error.hint})
    except Exception as error:  # a user's module may raise anything
        return send(first, failure(error))
    if reward.is_async:
        return asyncio.run(_serve_async(reward, first, requests, send))
    send(first, reward.traits)
    while (request := _read(requests)) is not None:
        send(request, compute(reward, request))


async def _serve_async(reward: Reward, first: dict[str, Any], requests: BinaryIO, send: Send) -> None:
    try:
        await _check(reward, first)
    except UserError as error:
        return send(first, {"error": error.message, "hint": error.hint})
    except Exception as error:
        return send(first, failure(error))
    send(first, reward.traits)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), requests)

    running: dict[int, asyncio.Task[Answer]] = {}

    def begin(request: dict[str, Any]) -> None:
        def end(task: asyncio.Task[Answer]) -> None:  # also of a call that was cancelled before its first step
            del running[request["id"]]
            send(request, {"error": "was cancelled", "kind": "raised"} if task.cancelled() else task.result())

        task = running[request["id"]] = tasks.create_task(compute_async(reward, request))
        task.add_done_callback(end)

    with contextlib.suppress(asyncio.IncompleteReadError):
        async with asyncio.TaskGroup() as tasks:
            while True:
                length = _HEADER.unpack(await reader.readexactly(_HEADER.size))[0]
                request = pickle.loads(await reader.readexactly(length))
                if "cancel" not in request:
                    begin(request)
                elif request["cancel"] in running:
                    running[request["cancel"]].cancel()


async def _check(reward: Reward, first: dict[str, Any]) -> None:
    """Call the reward's own ``check``, where it has one and the pool asks for it."""
    check = getattr(reward.function, "check", None) if first["check"] else None
    if check is not None and inspect.isawaitable(checked := check()):
        await checked


def _read(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message; None at the end of the input."""
    header = stream.read(_HEADER.size)
    return pickle.loads(stream.read(_HEADER.unpack(header)[0])) if len(header) == _HEADER.size else None


if __name__ == "__main__":
    main()
