"""Models that are only asked: parameters in the compute dtype, no gradient, no optimizer, no checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forge_hpc.data.types import Document
from forge_hpc.training.lora import without_adapters
from forge_hpc.training.shard import ModelShard


class FrozenModel(ModelShard):
    """A model of its own, sharded as the policy is."""


class PolicyWithoutAdapters:
    """The model that the adapters of a LoRA run stand beside: the policy's own frozen weights, no second copy."""

    def __init__(self, policy: ModelShard) -> None:
        self._policy = policy

    def logprobs(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """As ``ModelShard.logprobs``."""
        with without_adapters(self._policy.model):
            return self._policy.logprobs(documents)
