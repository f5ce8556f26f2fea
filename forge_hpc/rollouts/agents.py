"""Episodes that agents play: programs of the user's that ask the run's endpoint, and know nothing else of the run.

    prompt ─► agent ─► endpoint ─► generators ─► endpoint ─► agent ─► … ─► its reward
                          └─────► the tokens of its conversations ──────► documents

When an agent asks, and with how many requests at once, is its own affair: there is no order that a synchronous run
could keep, so such a run does not repeat to the last bit. Every episode goes on by itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from forge_hpc.config import Config
from forge_hpc.config.schema import SamplingConfig
from forge_hpc.data.types import Completion, Episode, Prompt
from forge_hpc.endpoint import Endpoint, EndpointEpisode
from forge_hpc.endpoint.conversations import Branch
from forge_hpc.environments import EnvironmentFailed, EnvironmentPool
from forge_hpc.environments.agent import AgentResult
from forge_hpc.environments.pool import Busy
from forge_hpc.rollouts.episodes import Admission, Played
from forge_hpc.rollouts.slots import Slot
from forge_hpc.rollouts.streaming import stream
from forge_hpc.workers.places import Place


class AgentPlayer(Admission):
    """Has agents play episodes of prompts."""

    def __init__(self, config: Config, tokenizer: Any, endpoint: Endpoint, environments: EnvironmentPool) -> None:
        super().__init__(config, environments)
        self._tokenizer = tokenizer
        self._endpoint = endpoint

    def stream(
        self,
        prompts: Sequence[Prompt],
        num: int | None = None,
        sampling: SamplingConfig | None = None,
        seed: int | None = None,
        *,
        key: int | None = None,
    ) -> AsyncIterator[Played]:
        """As ``EpisodePlayer.stream``; a ``key`` has no meaning here. With ``sampling`` agents cannot say how their
        requests are sampled: an evaluation is greedy where it says so."""
        del key
        num = self._config.rollout.group_size if num is None else num

        async def play_all(hand_over: Callable[[Played], None]) -> None:
            def end(place: tuple[int, int], task: asyncio.Task[Episode | EnvironmentFailed]) -> None:
                if not task.cancelled() and task.exception() is None:
                    hand_over((place, task.result()))

            async with asyncio.TaskGroup() as tasks:
                for index, prompt in enumerate(prompts):
                    for sample_index in range(num):
                        play = partial(self.play, prompt, sample_index, sampling, seed)
                        task = tasks.create_task(self.admit(prompt, Slot(self._slots), play))
                        task.add_done_callback(partial(end, (index, sample_index)))

        return stream(play_all)

    async def play(
        self,
        prompt: Prompt,
        sample_index: int,
        sampling: SamplingConfig | None = None,
        seed: int | None = None,
        away_from: Place | None = None,
    ) -> Episode:
        """One episode. Raises EnvironmentFailed, and what has failed on the run's side."""
        with self._endpoint.open(prompt, sample_index, sampling, seed) as episode:
            async with self._environments.open(away_from) as agent:
                self._full_since = None
                episode.on_busy = busy = Busy()
                running = asyncio.ensure_future(
                    agent.run(self._example(prompt), self._endpoint.base_url, episode.key, busy)
                )
                try:
                    waited: set[asyncio.Future[Any]] = {running, episode.failure}
                    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                    if episode.failure.done():
                        raise episode.failure.result()
                    result = running.result()
                except EnvironmentFailed as error:
                    if error.kind != "raised" or episode.limit is None:
                        raise
                    result = AgentResult(reward=0.0, info={"error": str(error)})  # a limit has ended it
                finally:
                    running.cancel()
        return self._episode(prompt, episode, result)

    def _example(self, prompt: Prompt) -> dict[str, Any]:
        """What the data has, and a seed."""
        data = self._config.data
        example = {**prompt.fields, data.prompt_field: prompt.question, "seed": prompt.seed}
        return example | ({} if data.target_field is None else {data.target_field: prompt.target})

    def _episode(self, prompt: Prompt, played: EndpointEpisode, result: AgentResult) -> Episode:
        sampled = played.conversations.sampled
        branches = played.conversations.branches(played.sample_index)
        if not branches:
            raise EnvironmentFailed(
                "the agent got no response that can be trained on"
                + (
                    ": its requests ask for another temperature or top_p than rollout.sampling's"
                    if sampled
                    else " from the endpoint, or waited for none"
                )
            )
        if result.reward is None and not self._config.reward:
            raise EnvironmentFailed("the agent gave no reward", "reward")
        first, *others = branches
        completion = first.completion
        completion.text = sampled[-1].completion.text if result.answer is None else result.answer
        versions = [version for branch in branches for version in branch.completion.policy_versions]
        completion.policy_versions = min(versions), max(versions)
        is_cut = sampled[-1].completion.finish_reason == "length"
        completion.finish_reason = "length" if is_cut or played.limit == "tokens" else played.limit or "stop"
        completion.metadata = {
            "turns": len(sampled),
            "truncated_turns": sum(response.completion.finish_reason == "length" for response in sampled),
            "branches": len(branches),
            "transcript": first.said,
            "info": result.info,
        }
        opening = dataclasses.replace(prompt, text=self._tokenizer.decode(first.opening), token_ids=first.opening)
        rewards = {} if result.reward is None else {"environment": result.reward}
        more = [_with_its_opening(branch) for branch in others]
        return Episode(opening, completion, result.reward or 0.0, rewards, branches=more)


def _with_its_opening(branch: Branch) -> Completion:
    """All of a branch: a document of its own that has no prompt."""
    opening, completion = branch.opening, branch.completion
    mask = [True] * len(completion.token_ids) if completion.loss_mask is None else list(completion.loss_mask)
    return dataclasses.replace(
        completion,
        token_ids=[*opening, *completion.token_ids],
        logprobs=[*[0.0] * len(opening), *completion.logprobs],
        loss_mask=[*[False] * len(opening), *mask],
    )
