"""From completions to groups: every sample gets its reward, and the samples of a prompt are compared as one group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from forge_hpc.config import Config
from forge_hpc.data.types import Completion, Episode, Group, Prompt
from forge_hpc.rewards import RewardError, RewardPool, RewardPools
from forge_hpc.rollouts.streaming import stream

_LARGEST = np.finfo(np.float32).max
"""Log-probabilities beyond it are infinite in a document."""

Sample: TypeAlias = Completion | Episode | Exception
"""What a generator or an environment gave: an EnvironmentFailed in the place of an episode, a ValueError in that of
each completion of a prompt that the generator refused."""


def make_groups(
    prompts: Sequence[Prompt],
    samples: AsyncIterator[tuple[tuple[int, int], Sample]],
    rewards: RewardPool | RewardPools,
    config: Config,
) -> AsyncGenerator[Group, None]:
    """Reward each sample as it comes, while others are generated: one that hangs holds up none of them. Each prompt's
    group comes when all of its ``rollout.group_size`` samples have their rewards; they are compared when all groups of
    the step are there (``to_documents``).

    ``samples`` have the indices of their prompt and of themselves: ``generators.generate.stream(prompts)``. Episodes
    come with what their environment gave, to which the rewards of their last response are added.

    Counted and left out are the samples of a prompt that the generator refused, an empty completion, one with a
    log-probability that is not finite, and one whose environment (an error in its place) or reward failed.
    """

    async def reward_all(hand_over: Callable[[Group], None]) -> None:
        async def complete(prompt: Prompt, scores: Mapping[int, asyncio.Task[_Scored]]) -> None:
            hand_over(_group(prompt, [await scores[index] for index in sorted(scores)]))

        scores: list[dict[int, asyncio.Task[_Scored]]] = [{} for _ in prompts]
        async with asyncio.TaskGroup() as tasks:
            async for (place, index), sample in samples:
                scores[place][index] = tasks.create_task(_score(prompts[place], sample, rewards))
                if len(scores[place]) == config.rollout.group_size:
                    tasks.create_task(complete(prompts[place], scores[place]))
            if any(len(own) != config.rollout.group_size for own in scores):
                raise ValueError(f"not every prompt has rollout.group_size={config.rollout.group_size} samples")

    return stream(reward_all)


_Scored: TypeAlias = Episode | RewardError | ValueError


async def _score(prompt: Prompt, sample: Sample, rewards: RewardPool | RewardPools) -> _Scored:
    if isinstance(sample, ValueError):
        return sample
    if isinstance(sample, Exception):
        return RewardError(str(sample), "environment")
    episode = sample if isinstance(sample, Episode) else Episode(prompt, sample, 0.0)
    if not episode.completion.num_tokens:
        return RewardError("the completion is empty", "empty")
    sequences = [episode.completion, *episode.branches]
    if not all((np.abs(sequence.arrays()[1]) <= _LARGEST).all() for sequence in sequences):
        return RewardError("the generator gave a log-probability that is not finite", "logprobs")
    try:
        total, terms = await rewards.score(episode.prompt, episode.completion)
    except RewardError as error:
        return error
    episode.reward += total
    episode.rewards |= terms
    return episode


def _group(prompt: Prompt, scored: Sequence[_Scored]) -> Group:
    if refusal := next((result for result in scored if isinstance(result, ValueError)), None):
        return Group(prompt, [], len(scored), [("refused", str(refusal))] * len(scored))
    episodes = [result for result in scored if isinstance(result, Episode)]
    failures = [(result.kind, str(result)) for result in scored if isinstance(result, RewardError)]
    return Group(prompt, episodes, len(failures), failures)


def has_signal(group: Group) -> bool:
    """Whether the group's rewards differ: if not, there is nothing to learn from comparing them."""
    return len({episode.reward for episode in group.episodes}) > 1


def unequal_openings(group: Group) -> tuple[str, str] | None:
    """Two openings of the group's episodes that differ: they are compared with each other, and are not one task."""
    texts = list(dict.fromkeys(episode.prompt.text for episode in group.episodes))
    return (texts[0], texts[1]) if len(texts) > 1 else None
