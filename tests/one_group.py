"""Groups and documents, for tests that have the samples."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

import numpy as np

from forge_hpc.advantages import advantage_function
from forge_hpc.config import Config
from forge_hpc.config.algorithm import resolve_advantage
from forge_hpc.config.rewards import reward_weights
from forge_hpc.data.types import Document, Group, Prompt, Turn
from forge_hpc.rewards import RewardPool
from forge_hpc.rollouts.documents import set_advantages, to_documents
from forge_hpc.rollouts.groups import Sample, make_groups


def token_routes(turn: Turn, token_ids: list[int]) -> np.ndarray:
    """Of a response, where each token is its own one expert: what comes of them must be the tokens again."""
    return np.array([*turn.token_ids, *token_ids][turn.num_routed : -1], np.int32).reshape(-1, 1, 1)


async def make_group(
    prompt: Prompt, samples: Sequence[Sample] | ValueError, rewards: RewardPool, config: Config
) -> Group:
    """What ``make_groups`` makes of a prompt; one ValueError stands for all of its samples."""
    if isinstance(samples, ValueError):
        samples = [samples] * config.rollout.group_size
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, group_size=len(samples)))

    async def stream() -> AsyncIterator[tuple[tuple[int, int], Sample]]:
        for index, sample in enumerate(samples):
            yield (0, index), sample

    async with aclosing(make_groups([prompt], stream(), rewards, config)) as groups:
        return await anext(groups)


def documents_of(groups: Sequence[Group], config: Config) -> list[Document]:
    """The documents that GRPO makes of the groups of a step."""
    a = config.algorithm
    set_advantages(groups, advantage_function(resolve_advantage(a)), reward_weights(config))
    return to_documents(groups, drop_zero_signal=a.drop_zero_signal_groups, drop_truncated=a.drop_truncated)
