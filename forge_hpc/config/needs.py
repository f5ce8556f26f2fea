"""What a recipe needs: models, generators, rewards, environments. Placement, checks and the controller ask it alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

POLICY = "policy"
REFERENCE = "reference"


@dataclass(frozen=True)
class ModelNeed:
    """A model in the trainers' processes."""

    trained: bool = True
    """With an optimizer, and in the checkpoints; a frozen one is parameters in the compute dtype alone."""
    path: str | None = None
    """Directory or hub name; None: the model that the policy starts from."""
    head: Literal["lm", "value"] = "lm"
    """``value`` has one number a token in place of the vocabulary: a critic."""
    offload: bool = False
    """Wait on the CPU while it computes nothing."""
    loss: str | None = None
    """By name, as in ``algorithm.loss``; None takes that."""


@dataclass(frozen=True)
class Needs:
    """What a recipe needs of a run, under one configuration."""

    models: Mapping[str, ModelNeed] = field(default_factory=lambda: {POLICY: ModelNeed()})
    """By name, in the trainers. None: a run without trainers, whose steps are none."""
    generators: Literal["beside", "after", "none"] = "beside"
    """``beside`` the trainers; ``after`` them, on a node that they have left; or none."""
    learns_from: Literal["samples", "examples", "nothing"] = "samples"
    """What the policy samples, or what the data says."""
    rewards: bool = True
    """Without a reward, or an environment that gives one, there is nothing to do."""
    environments: bool = True
    """Whether it can play ``environment``."""

    @property
    def trains(self) -> bool:
        """Whether there are optimizer steps, and a model of the run's own at its end."""
        return any(model.trained for model in self.models.values())

    @property
    def has_algorithm(self) -> bool:
        """Whether a model is trained with ``algorithm.loss``."""
        return any(model.trained and model.loss is None for model in self.models.values())
