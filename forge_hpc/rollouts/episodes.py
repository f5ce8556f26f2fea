"""Episodes of several turns: the policy and an environment talk, and every token stays as it was sampled.

    prompt ─► response ─► environment ─► observation ─► response ─► … ─► done, or a limit
              (loss)                     (no loss)      (loss)

Each response is generated from the token ids of all that went before, never from decoded text.

Synchronous runs play a generator's episodes in lockstep: the next responses of all episodes that still go on are asked
for in one call, in the order of prompts and samples, and nothing computed for an earlier turn is reused. A run repeats
exactly if its environments do: the same answers to the same responses, and none that exceeds its time limit in one run
and not in the other. Else every episode goes on by itself, and its generator reuses the KV cache of its earlier turns.

Where no more than so many episodes may be open (``environment.max_open_episodes``, or what a server has room for) the
others wait in order, and take the place of one that has ended: also in the midst of a lockstep, which waits for none
that is not open.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeAlias

from forge_hpc.config import Config
from forge_hpc.config.schema import SamplingConfig
from forge_hpc.data.tool_calls import tool_format
from forge_hpc.data.types import Completion, Episode, Prompt, Turn, joined_routes
from forge_hpc.environments import EnvironmentFailed, EnvironmentPool, Response
from forge_hpc.environments.rendering import ConversationRenderer
from forge_hpc.rollouts.lockstep import Lockstep, Respond
from forge_hpc.rollouts.slots import Slot, Slots
from forge_hpc.rollouts.streaming import stream
from forge_hpc.workers.places import Place

logger = logging.getLogger(__name__)
_RETRY_S = 0.1, 5.0
"""An episode that there was no room for tries again after this long, then after twice as long, up to the second."""
Played: TypeAlias = tuple[tuple[int, int], Episode | EnvironmentFailed]
"""The indices of a prompt and of a sample, and the episode, or why it failed."""

GenerateTurns = Callable[..., Awaitable[list[Completion | ValueError]]]
"""The generators' ``generate_turns``: (turns, sampling, seed, share, key=...)."""


class Admission:
    """Lets episodes begin where there is room for them."""

    def __init__(self, config: Config, environments: EnvironmentPool) -> None:
        self._config = config
        self._environments = environments
        self._slots = Slots(lambda: environments.max_open_episodes)
        self._full_since: float | None = None
        self._warned: set[str] = set()

    async def admit(
        self, prompt: Prompt, slot: Slot, play: Callable[[Place | None], Awaitable[Episode]]
    ) -> Episode | EnvironmentFailed:
        """An episode, or why there is none. One that the environment has no room for waits and tries again; and so does
        one that was lost with its node, or, once, with its process where there are other nodes: ``play`` is told which
        node to avoid."""
        delay_s, longest_s = _RETRY_S
        avoided: Place | None = None
        has_died = False
        while True:
            await slot.acquire()
            try:
                return await play(avoided)
            except EnvironmentFailed as error:
                is_elsewhere = error.kind == "lost"
                if error.kind == "died" and not has_died and self._environments.is_on_several_nodes:
                    is_elsewhere = has_died = True
                    avoided = error.place
                if not is_elsewhere and (error.kind != "full" or self._is_hopeless()):
                    if error.kind not in self._warned:  # the rest is in metrics.jsonl
                        self._warned.add(error.kind)
                        logger.warning("an episode of prompt %d is left out: %s", prompt.position, error)
                    return error
            finally:
                slot.release()
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, longest_s)
            slot.request()

    def _is_hopeless(self) -> bool:
        """Whether there has been no room for ``environment.timeout_s``, though no episode of this run takes it."""
        now = time.monotonic()
        if self._environments.num_open or self._full_since is None:
            self._full_since = now
        return now - self._full_since > self._config.environment.timeout_s


class EpisodePlayer(Admission):
    """Plays episodes of prompts.

    Args:
        num_generators: those that play in lockstep share the open episodes evenly, so that none waits for another.

    Raises UserError where the tokenizer's chat template cannot render several turns.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        generate: GenerateTurns,
        environments: EnvironmentPool,
        num_generators: int = 1,
    ) -> None:
        super().__init__(config, environments)
        self._renderer = ConversationRenderer(tokenizer, config.data)
        self._tools = tool_format(tokenizer.chat_template) if config.data.chat_template else None
        self._generate = generate
        self._num_generators = num_generators
        self._shares: dict[int, Slots] = {}
        self._cache = secrets.token_hex(8)

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
                    return lockstep.join(slots, lambda slot, respond: self._try(prompt, sample_index, slot, respond))

                async def respond(turn: Turn) -> Completion | ValueError:
                    cache = f"{self._cache}-{prompt.position}"
                    [response] = await self._generate([turn], sampling, seed, cache, key=None)
                    return response

                return self._try(prompt, sample_index, Slot(slots), respond)

            async with asyncio.TaskGroup() as tasks:
                if key is None:
                    lockstep, slots = None, self._slots
                else:
                    lockstep = Lockstep(lambda turns: self._generate(turns, sampling, seed, None, key=key), tasks)
                    slots = self._shares.setdefault(key, Slots(self._share, self._slots))
                for index, prompt in enumerate(prompts):  # all have joined before the first one plays
                    for sample_index in range(num):
                        task = tasks.create_task(start(prompt, sample_index))
                        task.add_done_callback(partial(end, (index, sample_index)))

        return stream(play_all)

    def _share(self) -> int | None:
        most = self._environments.max_open_episodes
        return None if most is None else max(1, most // self._num_generators)

    async def _try(
        self, prompt: Prompt, sample_index: int, slot: Slot, respond: Respond
    ) -> Episode | EnvironmentFailed:
        return await self.admit(prompt, slot, partial(self.play, prompt, sample_index, respond))

    async def play(
        self, prompt: Prompt, sample_index: int, respond: Respond, away_from: Place | None = None
    ) -> Episode:
        """One episode. Raises EnvironmentFailed."""
        limits, rollout = self._config.environment, self._config.rollout
        completion = Completion(sample_index, "", [], [], "turns", (0, 0), loss_mask=[])
        tokens, transcript, num_truncated = completion.token_ids, [], 0
        rewards: list[float] = []
        responses: list[Completion] = []
        num_routed = 0
        async with self._environments.open(away_from) as environment:
            opening = await environment.reset(prompt)
            self._full_since = None
            prompt = self._renderer.opening(prompt, opening)
            if len(prompt.token_ids) > rollout.max_prompt_tokens:
                raise EnvironmentFailed(
                    f"its opening has {len(prompt.token_ids)} tokens, more than rollout.max_prompt_tokens"
                )
            for turn in range(limits.max_turns):
                room = rollout.max_response_tokens - len(tokens)
                max_tokens = min(room, limits.max_turn_tokens or room)
                request = Turn(prompt.position, sample_index, turn, prompt.token_ids + tokens, max_tokens, num_routed)
                response = await respond(request)
                if isinstance(response, ValueError):
                    raise EnvironmentFailed(f"the generator refused turn {turn}: {response}")
                _add_response(completion, response, is_first=turn == 0)
                responses.append(response)
                num_routed = len(prompt.token_ids) + len(tokens) - 1
                truncated = response.finish_reason == "length"
                num_truncated += truncated
                step = await environment.step(Response(response.text, truncated, self._tools))
                if step.reward is not None:
                    rewards.append(step.reward)
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
        if truncated:
            completion.finish_reason = "length"
        if not rewards and not self._config.reward:
            raise EnvironmentFailed(f"the environment gave no reward in {turn + 1} turns", "reward")
        completion.metadata = {
            "turns": turn + 1,
            "truncated_turns": num_truncated,
            "transcript": transcript,
            "info": step.info,
        }
        completion.routes = joined_routes(responses)
        reward = float(sum(rewards))
        return Episode(prompt, completion, reward, {"environment": reward} if rewards else {})


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
