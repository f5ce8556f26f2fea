"""A trained reward model as a reward: a frozen model says what each episode of a step is worth."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from forge_hpc.data.pairs import at_its_end
from forge_hpc.data.types import Document, Group
from forge_hpc.rollouts.documents import to_document

LABEL = "model"


class RewardModel:
    """Adds to the rewards of a step's episodes, all in one call: what is computed together is the same in every start,
    so that a synchronous run repeats to the last bit.

    Args:
        values: asks the model, as ``Trainers.values``.
        weight: of its value in the reward.
    """

    def __init__(self, values: Callable[[Sequence[Document]], Awaitable[list[np.ndarray]]], weight: float) -> None:
        self._values, self._weight = values, weight

    async def __call__(self, groups: Sequence[Group]) -> None:
        """Add the term ``model`` to each episode: the value behind the last token of prompt and response.

        Raises:
            RuntimeError: a value is not finite.
        """
        episodes = [episode for group in groups for episode in group.episodes]
        if not episodes:
            return
        values = await self._values([at_its_end(to_document(episode)) for episode in episodes])
        for episode, value in zip(episodes, values, strict=True):
            if not math.isfinite(worth := float(value[-1])):
                raise RuntimeError(f"the reward model gives {worth} for an answer to prompt {episode.prompt.position}")
            episode.rewards[LABEL] = worth
            episode.reward += self._weight * worth
