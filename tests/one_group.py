"""The group of one prompt, for tests that have its samples."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from forge_hpc.config import Config
from forge_hpc.data.types import Group, Prompt
from forge_hpc.rewards import RewardPool
from forge_hpc.rollouts.groups import Sample, make_groups


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
