"""Episodes of several turns: the policy and an environment talk, and every token stays as it was sampled.

    prompt ─► response ─► environment ─► observation ─► response ─► … ─► done, or a limit
              (loss)                     (no loss)      (loss)

Each response is generated from the token ids of all that went before, never from decoded text.

Synchronous runs play a generator's episodes in lockstep: the next responses of all episodes that still go on are asked
for in one call, in the order of prompts and samples, and nothing computed for an earlier turn is reused. A run repeats
exactly if its environments do: the same answers to the same responses, and none that exceeds its time limit in one run
and not in the other. Else every episode goes on by itself, and its generator reuses the KV cache of its earlier turns.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeAlias

from forge_hpc.actors.service import Service
from forge_hpc.config import Config
from forge_hpc.config.schema import SamplingConfig
from forge_hpc.data.types import Completion, Episode, Prompt, Turn
from forge_hpc.environments import EnvironmentFailed, EnvironmentPool
from forge_hpc.environments.rendering import ConversationRenderer
from forge_hpc.recipes.session import Session
from forge_hpc.recipes.streaming import stream

logger = logging.getLogger(__name__)
Respond = Callable[[Turn], Awaitable[Completion | ValueError]]
Played: TypeAlias = tuple[tuple[int, int], Episode | EnvironmentFailed]
"""The indices of a prompt and of a sample, and the episode, or why it failed."""

GenerateTurns = Callable[..., Awaitable[list[Completion | ValueError]]]
"""The generators' ``generate_turns``: (turns, sampling, seed, share, key=...)."""


async def start_environments(session: Session) -> EnvironmentPool | None:
    """The pool of ``environment``, None where there is none. Raises UserError where it cannot be loaded."""
    if session.config.environment.name is None:
        return None
    pool = await EnvironmentPool(session.config).start()
    session.on_close(pool.close)
    return pool


def episode_player(session: Session, generators: Service, environments: EnvironmentPool | None) -> EpisodePlayer | None:
    """What plays the episodes of prompts; None where there is no environment."""
    if environments is None:
        return None
    return EpisodePlayer(session.config, session.tokenizer, generators.generate_turns.route, environments)


class EpisodePlayer:
    """Plays episodes of prompts.

    Raises UserError where the tokenizer's chat template cannot render several turns.
    """

    def __init__(self, config: Config, tokenizer: Any, generate: GenerateTurns, environments: EnvironmentPool) -> None:
        self._config = config
        self._renderer = ConversationRenderer(tokenizer, config.data)
        self._generate = generate
        self._environments = environments
        self._cache = secrets.token_hex(8)
        self.num_failed: Counter[str] = Counter()
        """Episodes given up so far, by ``EnvironmentFailed.kind``."""

    def stream(
        self,
        prompts: Sequence[Prompt],
        num: int | None = None,
        sampling: SamplingConfig | None = None,
        seed: int | None = None,
        *,
        key: int | None = None,
    ) -> AsyncIterator[Played]:
        """``num`` episodes of each prompt, by default ``rollout.group_size``, each as soon as it has ended.
        ``sampling`` and ``seed`` are those of training unless they are given.

        With a key they are played in lockstep. Rewards are those of the environment, without ``config.reward``.
        """
        num = self._config.rollout.group_size if num is None else num

        async def play_all(hand_over: Callable[[Played], None]) -> None:
            def end(place: tuple[int, int], task: asyncio.Task[Episode | EnvironmentFailed]) -> None:
                if not task.cancelled() and task.exception() is None:
                    hand_over((place, task.result()))

            def start(prompt: Prompt, sample_index: int) -> Coroutine[Any, Any, Episode | EnvironmentFailed]:
                if lockstep is not None:
                    return lockstep.join(lambda respond: self._try(prompt, sample_index, respond))

                async def respond(turn: Turn) -> Completion | ValueError:
                    cache = f"{self._cache}-{prompt.position}"
                    [response] = await self._generate([turn], sampling, seed, cache, key=None)
                    return response

                return self._try(prompt, sample_index, respond)

            async with asyncio.TaskGroup() as tasks:
                if key is None:
                    lockstep = None
                else:
                    lockstep = Lockstep(lambda turns: self._generate(turns, sampling, seed, None, key=key), tasks)
                for index, prompt in enumerate(prompts):  # all have joined before the first one plays
                    for sample_index in range(num):
                        task = tasks.create_task(start(prompt, sample_index))
                        task.add_done_callback(partial(end, (index, sample_index)))

        return stream(play_all)

    async def _try(self, prompt: Prompt, sample_index: int, respond: Respond) -> Episode | EnvironmentFailed:
        try:
            return await self.play(prompt, sample_index, respond)
        except EnvironmentFailed as error:
            self.num_failed[error.kind] += 1
            if self.num_failed[error.kind] == 1:  # the rest is in metrics.jsonl
                logger.warning("an episode of prompt %d is left out: %s", prompt.position, error)
            return error

    async def play(self, prompt: Prompt, sample_index: int, respond: Respond) -> Episode:
        """One episode. Raises EnvironmentFailed."""
        limits, rollout = self._config.environment, self._config.rollout
        completion = Completion(sample_index, "", [], [], "turns", (0, 0), loss_mask=[])
        tokens, reward, transcript = completion.token_ids, 0.0, []
        async with self._environments.open() as environment:
            prompt = self._renderer.opening(prompt, await environment.reset(prompt))
            if len(prompt.token_ids) > rollout.max_prompt_tokens:
                raise EnvironmentFailed(
                    f"its opening has {len(prompt.token_ids)} tokens, more than rollout.max_prompt_tokens"
                )
            for turn in range(limits.max_turns):
                room = rollout.max_response_tokens - len(tokens)
                max_tokens = min(room, limits.max_turn_tokens or room)
                request = Turn(prompt.position, sample_index, turn, prompt.token_ids + tokens, max_tokens)
                response = await respond(request)
                if isinstance(response, ValueError):
                    raise EnvironmentFailed(f"the generator refused turn {turn}: {response}")
                _add_response(completion, response, is_first=turn == 0)
                step = await environment.step(response.text)
                reward += step.reward
                transcript += [
                    {"role": "assistant", "content": response.text},
                    {"role": step.role, "content": step.observation},
                ]
                if step.done:
                    completion.finish_reason = "stop"
                    break
                is_last = turn + 1 == limits.max_turns  # what nobody answers is not in the episode
                observation = [] if is_last else self._renderer.observation(step, response.token_ids[-1])
                if len(tokens) + len(observation) >= rollout.max_response_tokens:
                    completion.finish_reason = "length"
                    break
                _add_observation(completion, observation)
        completion.metadata = {"turns": turn + 1, "transcript": transcript, "info": step.info}
        return Episode(prompt, completion, reward, {"environment": reward})


def _add_response(completion: Completion, response: Completion, is_first: bool) -> None:
    if not response.token_ids:
        raise EnvironmentFailed("the generator gave an empty response")
    assert completion.loss_mask is not None
    completion.text = response.text
    completion.token_ids += response.token_ids
    completion.logprobs += response.logprobs
    completion.loss_mask += [True] * len(response.token_ids)
    first, last = response.policy_versions
    completion.policy_versions = (first if is_first else completion.policy_versions[0], last)


def _add_observation(completion: Completion, token_ids: list[int]) -> None:
    assert completion.loss_mask is not None
    completion.token_ids += token_ids
    completion.logprobs += [0.0] * len(token_ids)
    completion.loss_mask += [False] * len(token_ids)


class Lockstep:
    """Gathers one request of every episode that still goes on, then sends all at once, in the order of joining."""

    def __init__(
        self,
        generate: Callable[[list[Turn]], Awaitable[list[Completion | ValueError]]],
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._generate, self._tasks = generate, tasks
        self._num_joined = self._num_live = 0
        self._waiting: dict[int, tuple[Turn, asyncio.Future[Completion | ValueError]]] = {}

    def join(self, play: Callable[[Respond], Awaitable[Any]]) -> Any:
        """A coroutine that runs an episode, handing it what answers its turns. The episode counts from this call."""
        number = self._num_joined
        self._num_joined += 1
        self._num_live += 1

        async def respond(turn: Turn) -> Completion | ValueError:
            answer = asyncio.get_running_loop().create_future()
            self._waiting[number] = turn, answer
            self._send_when_complete()
            return await answer

        async def run() -> Any:
            try:
                return await play(respond)
            finally:
                self._num_live -= 1
                self._send_when_complete()

        return run()

    def _send_when_complete(self) -> None:
        if self._waiting and len(self._waiting) == self._num_live:
            requests = [request for _, request in sorted(self._waiting.items(), key=lambda item: item[0])]
            self._waiting = {}
            self._tasks.create_task(self._send(requests))

    async def _send(self, requests: list[tuple[Turn, asyncio.Future[Completion | ValueError]]]) -> None:
        responses = await self._generate([turn for turn, _ in requests])
        for (_, answer), response in zip(requests, responses, strict=True):
            if not answer.done():
                answer.set_result(response)
