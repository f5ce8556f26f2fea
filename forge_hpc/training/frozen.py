"""Models that are only asked: parameters in the compute dtype, no gradient, no optimizer, no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from forge_hpc.config.needs import POLICY
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.schema import Config
from forge_hpc.config.split import frozen_apart
from forge_hpc.data.types import Document
from forge_hpc.training.build import Shape
from forge_hpc.training.engine import sampling_of
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


class FrozenModels:
    """Those that have processes of their own, on one rank of these. Every method is a collective call of all ranks.

    Args:
        directories: as ``training.models.Models``.

    Raises:
        UserError: a model that cannot be computed here.
    """

    def __init__(self, cfg: Config, directories: Mapping[str, Path]) -> None:
        needs = needs_of(cfg)
        own = {
            name: (directories.get(name, directories[POLICY]), need) for name, need in frozen_apart(cfg, needs).items()
        }
        available, sampling = Shape.of(cfg).activation_bytes(own), sampling_of(cfg, needs.models[POLICY])
        self._models = {name: FrozenModel(cfg, place, need, sampling, available) for name, (place, need) in own.items()}

    def logprobs(self, name: str, documents: Sequence[Document]) -> list[np.ndarray]:
        """As ``ModelShard.logprobs``."""
        return self._models[name].logprobs(documents)

    def values(self, name: str, documents: Sequence[Document]) -> list[np.ndarray]:
        """As ``ModelShard.values``."""
        return self._models[name].values(documents)
