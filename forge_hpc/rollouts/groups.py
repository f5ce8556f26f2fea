"""From completions to groups, from groups to documents and figures: what all RL recipes share. No actor here."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from forge_hpc.advantages import StepAdvantage
from forge_hpc.config import Config
from forge_hpc.data.types import Completion, Document, Episode, Group, Prompt
from forge_hpc.rewards import RewardError, RewardPool
from forge_hpc.rollouts.buffer import EpisodeBuffer
from forge_hpc.rollouts.streaming import stream


def episode_buffer(config: Config, steps_done: int, position: int) -> EpisodeBuffer:
    """The buffer of a run in which ``position`` is that of the first prompt after ``steps_done`` steps."""
    a, rollout, last_step = config.algorithm, config.rollout, config.trainer.training.steps
    size = rollout.prompts_per_step
    if not a.dynamic_sampling:
        return EpisodeBuffer(size, rollout.max_staleness, steps_done, position, last_step)
    limit = a.max_steps_without_signal * size
    return EpisodeBuffer(size, rollout.max_staleness, steps_done, position, last_step, has_signal, limit)


Sample: TypeAlias = Completion | Episode | Exception
"""What a generator or an environment gave: an EnvironmentFailed in the place of an episode, a ValueError in that of
each completion of a prompt that the generator refused."""


def make_groups(
    prompts: Sequence[Prompt],
    samples: AsyncIterator[tuple[tuple[int, int], Sample]],
    rewards: RewardPool,
    config: Config,
) -> AsyncGenerator[Group, None]:
    """Reward each sample as it comes, while others are generated: one that hangs holds up none of them. Each prompt's
    group, as ``make_group`` makes it, comes when all of its ``rollout.group_size`` samples have their rewards.

    ``samples`` have the indices of their prompt and of themselves: ``generators.generate.stream(prompts)``.
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


async def make_group(
    prompt: Prompt, samples: Sequence[Sample] | ValueError, rewards: RewardPool, config: Config
) -> Group:
    """Reward a prompt's samples. They are compared when all groups of the step are there: ``to_documents``.

    Episodes come with what their environment gave, to which the rewards of their last response are added. A prompt that
    the generator refused, an empty completion, and one whose environment (an error in its place) or reward failed are
    counted and left out.
    """
    if isinstance(samples, ValueError):
        samples = [samples] * config.rollout.group_size
    return _group(prompt, await asyncio.gather(*(_score(prompt, sample, rewards) for sample in samples)))


_Scored: TypeAlias = Episode | RewardError | ValueError


async def _score(prompt: Prompt, sample: Sample, rewards: RewardPool) -> _Scored:
    if isinstance(sample, ValueError):
        return sample
    if isinstance(sample, Exception):
        return RewardError(str(sample), "environment")
    episode = sample if isinstance(sample, Episode) else Episode(prompt, sample, 0.0)
    if not episode.completion.token_ids:
        return RewardError("the completion is empty", "empty")
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


def set_advantages(groups: Sequence[Group], advantage: StepAdvantage) -> None:
    """Compare the rewards of a step's episodes: each gets its advantage."""
    groups = [group for group in groups if group.episodes]
    advantages = advantage([[episode.reward for episode in group.episodes] for group in groups])
    for group, values in zip(groups, advantages, strict=True):
        for episode, value in zip(group.episodes, values, strict=True):
            episode.advantage = float(value)


def to_documents(groups: Sequence[Group], drop_zero_signal: bool = False) -> list[Document]:
    """The episodes of a step as documents.

    With ``drop_zero_signal`` without groups whose advantages are all zero. Where no group carries a signal all are
    kept: the step measures them and trains on none.
    """
    kept = [group for group in groups if any(episode.advantage != 0 for episode in group.episodes)]
    if not kept or not drop_zero_signal:
        kept = [group for group in groups if group.episodes]
    return [to_document(episode) for group in kept for episode in group.episodes]


def to_document(episode: Episode) -> Document:
    """Prompt and response; what the policy wrote of it is trained."""
    prompt, response = episode.prompt.token_ids, episode.completion.token_ids
    logprobs = np.zeros(len(prompt) + len(response), dtype=np.float32)
    logprobs[len(prompt) :] = episode.completion.logprobs
    loss_mask = np.arange(len(logprobs)) >= len(prompt)
    if episode.completion.loss_mask is not None:
        loss_mask[len(prompt) :] = episode.completion.loss_mask
    return Document(
        token_ids=np.array(prompt + response, dtype=np.int32),
        loss_mask=loss_mask,
        generator_logprobs=logprobs,
        advantage=episode.advantage,
        policy_version=episode.policy_version,
    )


def measure(groups: Sequence[Group], step: int) -> dict[str, float]:
    """The figures of a step's rollouts, over all completions before any filtering."""
    episodes = [episode for group in groups for episode in group.episodes]
    failures = [failure for group in groups for failure in group.failures]
    if not episodes:
        cause = failures[-1][1] if failures else "older than rollout.max_staleness allows"
        raise RuntimeError(f"all completions of step {step} failed, at last with: {cause}")
    kinds = Counter(kind for kind, _ in failures)
    rewards = np.array([episode.reward for episode in episodes])
    lengths = np.array([episode.completion.num_sampled for episode in episodes])
    staleness = np.array([step - 1 - episode.policy_version for episode in episodes])
    terms: dict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        for name, value in episode.rewards.items():
            terms[name].append(value)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        **{f"reward/{name}": float(np.mean(values)) for name, values in terms.items()},
        **_measure_turns(groups),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/truncated_fraction": _truncated_fraction([episode.completion for episode in episodes]),
        "groups/drawn": float(len(groups)),
        "groups/zero_signal": float(sum(not has_signal(group) for group in groups)),
        "episodes/failed": float(sum(group.num_failed for group in groups)),
        **{f"rewards/failed_{kind}": float(kinds[kind]) for kind in RewardError.KINDS},
        "staleness/max": float(staleness.max()),
        "staleness/mean": float(staleness.mean()),
        "tokens/generated": float(lengths.sum()),
    }


def _truncated_fraction(completions: Sequence[Completion]) -> float:
    """The share of responses that a limit cut off; an episode has one a turn."""
    cut_off = sum(c.metadata.get("truncated_turns", c.finish_reason == "length") for c in completions)
    return cut_off / sum(c.metadata.get("turns", 1) for c in completions)


def _measure_turns(groups: Sequence[Group]) -> dict[str, float]:
    """Of episodes with an environment: responses of one, the share that a limit ended and not the environment (or after
    a last response that a limit cut off), and the groups that were not one task."""
    completions = [episode.completion for group in groups for episode in group.episodes]
    turns = [completion.metadata["turns"] for completion in completions if "turns" in completion.metadata]
    if not turns:
        return {}
    return {
        "episode/turns_mean": float(np.mean(turns)),
        "episode/truncated_fraction": float(np.mean([c.finish_reason != "stop" for c in completions])),
        "groups/unequal_openings": float(sum(unequal_openings(group) is not None for group in groups)),
    }


def unequal_openings(group: Group) -> tuple[str, str] | None:
    """Two openings of the group's episodes that differ: they are compared with each other, and are not one task."""
    texts = list(dict.fromkeys(episode.prompt.text for episode in group.episodes))
    return (texts[0], texts[1]) if len(texts) > 1 else None


class RolloutClock:
    """How long the rollouts of a step take, and how long the generators had nothing to do before it."""

    def __init__(self) -> None:
        self.generate_s = 0.0
        """From the start of the last step whose rollouts ended to their end, rewards included."""
        self.wait_trainer_s = 0.0
        """Generators stood idle before the last step that they began."""
        self._in_flight = 0
        self._idle_since = time.perf_counter()

    def metrics(self) -> dict[str, float]:
        return {"time/generate_s": self.generate_s, "time/wait_trainer_s": self.wait_trainer_s}

    def begin(self, num_calls: int) -> float:
        """The rollouts of a step begin as so many calls; returns the time to hand to ``end``."""
        now = time.perf_counter()
        self.wait_trainer_s = 0.0 if self._in_flight else now - self._idle_since
        self._in_flight += num_calls
        return now

    def end(self, started: float) -> None:
        """One of the calls has ended."""
        now = time.perf_counter()
        self.generate_s = now - started
        self._in_flight -= 1
        if not self._in_flight:
            self._idle_since = now
