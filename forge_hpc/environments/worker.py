"""A process that hosts environments: ``python -m forge_hpc.environments.worker``, started by the pool.

The first request loads the class; the others make an environment of it, step it and close it. A function in place of a
class is an agent: one request runs it, another ends what is left of it. Each environment has a
thread and an event loop of its own: one that blocks holds up no other. So it has the global generators of random
numbers. The process ends with its input.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import math
import os
import resource
import sys
import threading
from collections.abc import Callable
from typing import Any

from forge_hpc.cluster.stacks import stand_by
from forge_hpc.environments.agent import check_agent, is_agent, plain_result
from forge_hpc.environments.base import Environment, EnvironmentFull, Step
from forge_hpc.environments.isolation import Generators, isolate
from forge_hpc.environments.load import load_environment
from forge_hpc.workers.channel import Answer, Channel, failure, refusal
from forge_hpc.workers.keeper import keep

MAX_OBSERVATION_CHARS = 4_000_000
_CANCEL_TIMEOUT_S = 5.0


class _Host:
    """One environment, from its making to its end."""

    def __init__(self, make: Callable[..., Any], channel: Channel) -> None:
        self._make, self._channel = make, channel
        self._environment: Environment | None = None
        self._under_way: asyncio.Task[Any] | None = None
        self._generators = Generators()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, daemon=True).start()

    def post(self, request: dict[str, Any]) -> None:
        """Have a request done; its answer follows."""
        asyncio.run_coroutine_threadsafe(self._serve(request), self._loop)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _serve(self, request: dict[str, Any]) -> None:
        self._generators.use()
        try:
            self._channel.answer(request, {"value": await self._do(request)})
        except EnvironmentFull as error:
            self._channel.answer(request, {"error": str(error), "limit": error.limit})
        except (Exception, asyncio.CancelledError, SystemExit, KeyboardInterrupt) as error:
            # A user's environment may raise anything, and the pool counts it; nobody waits for one that we cancel.
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            self._channel.answer(request, failure(error))
        if request["do"] == "close":
            self._loop.stop()

    async def _do(self, request: dict[str, Any]) -> Any:
        if request["do"] == "close":
            await self._cancel()
            return None if self._environment is None else await self._environment.close()
        self._under_way = asyncio.current_task()
        if request["do"] == "run":
            result = self._make(**request["arguments"])
            return plain_result(await result if inspect.isawaitable(result) else result)
        if request["do"] == "reset":
            self._environment = self._make()
            return await self._environment.reset(request["prompt"])
        assert self._environment is not None, "reset comes first"
        return _plain(await self._environment.step(request["response"]))

    async def _cancel(self) -> None:
        """End a call that nobody waits for any more, so that it lets go of what it holds."""
        if self._under_way is not None and not self._under_way.done():
            self._under_way.cancel()
            await asyncio.wait([self._under_way], timeout=_CANCEL_TIMEOUT_S)


def _plain(step: Any) -> dict[str, Any]:
    """A Step as JSON has it. Raises TypeError or ValueError where it is none."""
    if not isinstance(step, Step):
        raise TypeError(f"step() must return a Step, not a {type(step).__name__}")
    if not isinstance(step.observation, str) or len(step.observation) > MAX_OBSERVATION_CHARS:
        raise TypeError(f"an observation is a text of at most {MAX_OBSERVATION_CHARS} characters")
    reward = None if step.reward is None else float(step.reward)
    if reward is not None and not math.isfinite(reward):
        raise ValueError(f"the reward is {reward}")
    return dataclasses.asdict(step) | {"reward": reward, "done": bool(step.done)}


def _load(request: dict[str, Any]) -> tuple[Callable[..., Any] | None, Answer]:
    """What makes an environment, tried once, and what to answer. Of an agent only whether it can be called."""
    os.environ.update(request["environ"])
    try:
        found = load_environment(request["name"])
        make = functools.partial(found, **request["args"])
        if is_agent(found):
            check_agent(found, request["name"], request["args"])
            if (check := getattr(found, "check", None)) is not None:
                check(**request["args"])
            return make, {"value": {"concurrency": None, "max_open_episodes": None, "agent": 1}}
        environment = make()
        if (check := getattr(environment, "check", None)) is not None:
            asyncio.run(check())
    except Exception as error:  # a user's module and class may raise anything
        return None, refusal(error)
    bounds = {name: getattr(environment, name, None) for name in ("concurrency", "max_open_episodes")}
    return make, {"value": {k: v if isinstance(v, int) and v > 0 else None for k, v in bounds.items()}}


def main() -> None:
    keep()
    stand_by("environment")
    channel = Channel()
    isolate()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # every event loop holds three files
    make: Callable[..., Any] | None = None
    hosts: dict[int, _Host] = {}
    while (request := channel.receive()) is not None:
        if request["do"] == "load":
            make, answer = _load(request)
            channel.answer(request, answer)
            continue
        number = request["environment"]
        if number not in hosts:
            assert make is not None, "load comes first"
            hosts[number] = _Host(make, channel)
        host = hosts.pop(number) if request["do"] == "close" else hosts[number]
        host.post(request)
    sys.stdout.flush()
    os._exit(0)  # whatever threads still do


if __name__ == "__main__":
    main()
