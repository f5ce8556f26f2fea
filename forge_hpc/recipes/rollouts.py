"""From completions to groups, from groups to documents and figures: what all RL recipes share. No actor here."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from forge_hpc.advantages import advantage_function
from forge_hpc.config import Config
from forge_hpc.data.types import Completion, Document, Episode, Group, Prompt
from forge_hpc.rewards import RewardError, RewardPool


async def make_group(
    prompt: Prompt,
    completions: Sequence[Completion | Episode | Exception] | ValueError,
    rewards: RewardPool,
    config: Config,
) -> Group:
    """Reward a prompt's completions and compare them with each other.

    Episodes come with what their environment gave, to which the rewards of their last response are added. A prompt that
    the generator refused, an empty completion, and one whose environment (an error in its place) or reward failed are
    counted and left out.
    """
    if isinstance(completions, ValueError):
        return Group(prompt, [], num_failed=config.rollout.group_size)
    episodes, num_failed = [], 0
    for sample in completions:
        if isinstance(sample, Exception):
            num_failed += 1
            continue
        episode = sample if isinstance(sample, Episode) else Episode(prompt, sample, 0.0)
        try:
            if not episode.completion.token_ids:
                raise RewardError("the completion is empty")
            total, terms = await rewards.score(episode.prompt, episode.completion)
        except RewardError:
            num_failed += 1
        else:
            episode.reward += total
            episode.rewards |= terms
            episodes.append(episode)
    if not episodes:
        return Group(prompt, [], num_failed)
    advantages = advantage_function(config.algorithm.advantage)([episode.reward for episode in episodes])
    for episode, advantage in zip(episodes, advantages, strict=True):
        episode.advantage = float(advantage)
    return Group(prompt, episodes, num_failed)


def has_signal(group: Group) -> bool:
    """Whether the group's rewards differ: if not, its advantages are zero and nothing can be learned from it."""
    return len({episode.reward for episode in group.episodes}) > 1


def to_documents(groups: Sequence[Group], config: Config) -> list[Document]:
    """What a step trains on. Where no group carries a signal all are kept: every step is an optimizer step."""
    keep_all = not (config.algorithm.drop_zero_signal_groups and any(map(has_signal, groups)))
    return [_to_document(episode) for group in groups if keep_all or has_signal(group) for episode in group.episodes]


def _to_document(episode: Episode) -> Document:
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
    )


def measure(groups: Sequence[Group], step: int) -> dict[str, float]:
    """The figures of a step's rollouts, over all completions before any filtering."""
    episodes = [episode for group in groups for episode in group.episodes]
    if not episodes:
        raise RuntimeError(f"all completions of step {step} failed: no reward could be computed for any of them")
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
        **_measure_turns([episode.completion for episode in episodes]),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
        "response/truncated_fraction": float(np.mean([e.completion.finish_reason == "length" for e in episodes])),
        "groups/zero_signal": float(sum(not has_signal(group) for group in groups)),
        "episodes/failed": float(sum(group.num_failed for group in groups)),
        "staleness/max": float(staleness.max()),
        "staleness/mean": float(staleness.mean()),
        "tokens/generated": float(lengths.sum()),
    }


def _measure_turns(completions: Sequence[Completion]) -> dict[str, float]:
    """Of episodes with an environment: responses of one, and the share that a limit ended and not the environment."""
    turns = [completion.metadata["turns"] for completion in completions if "turns" in completion.metadata]
    if not turns:
        return {}
    return {
        "episode/turns_mean": float(np.mean(turns)),
        "episode/truncated_fraction": float(np.mean([c.finish_reason != "stop" for c in completions])),
    }


class RolloutClock:
    """How long the rollouts of a step take, and how long the generators had nothing to do before it."""

    def __init__(self) -> None:
        self.generate_s = 0.0
        """From the start of the last step whose rollouts ended to their end, rewards included."""
        self.wait_trainer_s = 0.0
        """Generators stood idle before the last step that they began."""
        self._in_flight = 0
        self._idle_since = time.perf_counter()

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
