"""Scores completions: quick built-in rewards at once, all others in worker processes with a time limit.

A reward that hangs costs its worker, which is killed and replaced, and its episode, which the caller counts and leaves
out. It never stalls the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import pickle
import signal
import struct
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, RewardConfig
from forge_hpc.data.types import Completion, Prompt
from forge_hpc.rewards.compute import compute
from forge_hpc.rewards.registry import INLINE_REWARDS, PENALTIES

_START_TIMEOUT_S = 120.0


class RewardError(Exception):
    """A reward gave no finite number for an episode, which must be left out.

    ``kind`` is ``raised``, ``not_finite``, ``timeout`` or ``died`` (its process ended).
    """

    def __init__(self, message: str, kind: str = "raised") -> None:
        super().__init__(message)
        self.kind = kind


class RewardPool:
    """The rewards of a run, as one weighted sum. Worker processes start when they are first needed.

    Example:
        async with RewardPool(config) as pool:
            total, terms = await pool.score(prompt, completion)
    """

    def __init__(self, config: Config, num_workers: int | None = None) -> None:
        """``num_workers`` processes run what is not inline; by default as many as cores, 4 at most."""
        self._rewards = _by_label(config.reward)
        self._max_response_tokens = config.rollout.max_response_tokens
        self._in_workers = [reward.name for reward in config.reward if reward.name not in INLINE_REWARDS]
        num_workers = num_workers or min(4, os.cpu_count() or 1)
        self._workers = [_Worker() for _ in range(num_workers)] if self._in_workers else []
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        for worker in self._workers:
            self._idle.put_nowait(worker)
        self.num_failed: Counter[str] = Counter()
        """Episodes without a score so far, by ``RewardError.kind``."""

    async def start(self) -> Self:
        """Start the workers now and load every reward. Raises UserError where one cannot be loaded."""
        try:
            await asyncio.gather(*(worker.load(self._in_workers) for worker in self._workers))
        except BaseException:
            await self.close()
            raise
        return self

    async def score(self, prompt: Prompt, completion: Completion) -> tuple[float, dict[str, float]]:
        """The weighted sum of all rewards, and each one unweighted by its label.

        Raises RewardError where any of them raises, hangs, dies or gives NaN or infinity.
        """
        calls = (self._one(reward, prompt, completion) for reward in self._rewards.values())
        # All are waited for: a cancelled call would cost its worker.
        results = await asyncio.gather(*calls, return_exceptions=True)
        terms: dict[str, float] = {}
        for label, result in zip(self._rewards, results, strict=True):
            if isinstance(result, RewardError):
                self.num_failed[result.kind] += 1
            if isinstance(result, BaseException):
                raise result
            terms[label] = result
        return sum(reward.weight * terms[label] for label, reward in self._rewards.items()), terms

    def is_right(self, terms: Mapping[str, float]) -> bool:
        """Whether the unweighted terms of a completion are the best there are: 1 in the weighted mean. Penalties for
        how an answer was given do not count."""
        counted = {label: r.weight for label, r in self._rewards.items() if r.name not in PENALTIES}
        return sum(weight * terms[label] for label, weight in counted.items()) >= sum(counted.values()) - 1e-6

    async def close(self) -> None:
        """Kill the workers and wait for their end."""
        workers, self._workers = self._workers, []
        for worker in workers:
            await worker.kill()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _one(self, reward: RewardConfig, prompt: Prompt, completion: Completion) -> float:
        request = {
            "name": reward.name,
            "prompt": prompt.text,
            "response": completion.text,
            "target": prompt.target,
            "fields": {**prompt.fields, **reward.args},
            "lengths": {
                "num_response_tokens": len(completion.token_ids),
                "max_response_tokens": self._max_response_tokens,
            },
        }
        if reward.name in INLINE_REWARDS:
            answer = compute(INLINE_REWARDS[reward.name], request)
        else:
            answer = await self._in_worker(reward, request)
        if "error" in answer:
            raise RewardError(f"reward {reward.name}: {answer['error']}")
        if not math.isfinite(answer["value"]):
            raise RewardError(f"reward {reward.name} is {answer['value']}", "not_finite")
        return answer["value"]

    async def _in_worker(self, reward: RewardConfig, request: dict[str, Any]) -> dict[str, Any]:
        worker = await self._idle.get()
        try:
            await worker.load(self._in_workers)  # a new or a replaced one; that is not the reward's time
            async with asyncio.timeout(reward.timeout_s):
                return await worker.ask(request)
        except TimeoutError:
            await worker.kill()
            raise RewardError(f"reward {reward.name} took longer than {reward.timeout_s:g} s", "timeout") from None
        except (EOFError, ConnectionError):
            await worker.kill()
            raise RewardError(f"reward {reward.name} ended its process", "died") from None
        except BaseException:  # cancelled in the middle of a request: its answer would be taken for the next one's
            await worker.kill()
            raise
        finally:
            self._idle.put_nowait(worker)


def _by_label(rewards: Sequence[RewardConfig]) -> dict[str, RewardConfig]:
    """What a reward is called in metrics and rollouts: its function's name, or all of its name to tell two apart."""
    short = [reward.name.rpartition(":")[2] for reward in rewards]
    labels = [reward.name if short.count(name) > 1 else name for reward, name in zip(rewards, short, strict=True)]
    assert len(set(labels)) == len(labels), "validation refuses a reward given twice"
    return dict(zip(labels, rewards, strict=True))


class _Worker:
    """One process of ``forge_hpc.rewards.worker``; started when it is needed, and again after it was killed."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None

    async def load(self, names: Sequence[str]) -> None:
        """Start the process and load the rewards, where that has not been done. Raises UserError where it fails."""
        if self._process is not None:
            return
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "forge_hpc.rewards.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # killed with whatever the reward started
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )
        for name in names:
            try:
                async with asyncio.timeout(_START_TIMEOUT_S):
                    answer = await self.ask({"name": name})
            except TimeoutError:
                raise UserError(f"the reward {name} did not load within {_START_TIMEOUT_S:g} s") from None
            except (EOFError, ConnectionError):
                raise UserError(f"the reward {name} ended its process while it was loaded") from None
            if "error" in answer:
                raise UserError(f"the reward {name} cannot be loaded: {answer['error']}", answer.get("hint"))

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and read its answer. Raises EOFError or ConnectionError where the process has ended."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        payload = pickle.dumps(request)
        process.stdin.write(struct.pack("<Q", len(payload)) + payload)
        await process.stdin.drain()
        line = await process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)

    async def kill(self) -> None:
        """End the process at once."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
