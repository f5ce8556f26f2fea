"""From groups to documents: the episodes of a step are compared, and become what the trainers take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forge_hpc.advantages import advantage_function
from forge_hpc.config import Config
from forge_hpc.config.algorithm import resolve_advantage
from forge_hpc.data.types import Document, Episode, Group


def to_documents(groups: Sequence[Group], config: Config) -> list[Document]:
    """Compare the episodes of a step, and make documents of those that it trains on.

    Groups whose advantages are all zero are dropped where ``algorithm.drop_zero_signal_groups`` says so. Where no group
    carries a signal all are kept: the step measures them and trains on none.
    """
    groups = [group for group in groups if group.episodes]
    _set_advantages(groups, resolve_advantage(config.algorithm))
    kept = [group for group in groups if any(episode.advantage != 0 for episode in group.episodes)]
    if not kept or not config.algorithm.drop_zero_signal_groups:
        kept = groups
    return [_to_document(episode) for group in kept for episode in group.episodes]


def _set_advantages(groups: Sequence[Group], name: str) -> None:
    advantages = advantage_function(name)([[episode.reward for episode in group.episodes] for group in groups])
    for group, values in zip(groups, advantages, strict=True):
        for episode, advantage in zip(group.episodes, values, strict=True):
            episode.advantage = float(advantage)


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
        policy_version=episode.policy_version,
    )
