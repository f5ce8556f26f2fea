"""What a recipe needs: models, generators, rewards, environments. Placement, checks and the controller ask it alone.

Of its models, each trained or frozen, ``policy`` is the one that is published, to generators where there are any, and
exported. A frozen model called
``reference`` is asked for the log-probabilities of what the policy is trained on (``Document.ref_logprobs``) by the
trainers themselves. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from forge_hpc.config.errors import UserError

POLICY, REFERENCE, REWARD_MODEL = "policy", "reference", "reward_model"
HEADS = ("lm", "value")


@dataclass(frozen=True)
class ModelNeed:
    """A model beside the others, sharded as they are; a frozen one may have processes of its own, as the cluster says.

    Example:
        models = {"policy": ModelNeed(), "critic": ModelNeed(head="value"), "teacher": ModelNeed(False, "org/large")}

    Raises:
        UserError: an unknown head, or something that only a trained model has.
    """

    trained: bool = True
    """False: parameters in the compute dtype, without gradient, optimizer or checkpoint."""
    path: str | None = None
    """Weights, as ``model.path`` names them; None: those that the policy starts from. With LoRA a frozen model of the
    same weights is the policy without its adapters, and takes no memory."""
    head: str = "lm"
    """``lm``: log-probabilities; ``value``: one number a token, from a model of the same architecture: 0 at
    first, but for weights that a reward model's training has left."""
    offload: bool = False
    """A frozen model's parameters wait in host memory, and visit the GPU a layer at a time."""
    loss: str | None = None
    """What it is trained with, as ``algorithm.loss`` names it, with its own defaults, or ``sft``. None: the run's
    ``algorithm.loss``; with a value head ``losses.ValueLoss``."""
    loss_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of that loss."""
    lr: float | None = None
    """Its learning rate; None: ``trainer.optimizer.lr``. The schedule is the run's."""

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise UserError(f"a model's head is {self.head!r}", f"it is one of {', '.join(HEADS)}")
        if self.trained and self.offload:
            raise UserError("a model that is trained cannot be offloaded", "offload frozen ones: trained=False")
        if not self.trained and (self.loss is not None or self.lr is not None):
            raise UserError("a frozen model has no loss and no learning rate", "set trained=True")
        if not self.trained and self.head == "value" and self.path is None:
            raise UserError(
                "a frozen model has no value head but one that was trained before", "set trained=True, or its path"
            )


@dataclass(frozen=True)
class Needs:
    """What a recipe needs of a run, under one configuration."""

    models: Mapping[str, ModelNeed] = field(default_factory=lambda: {POLICY: ModelNeed()})
    """By name. None: a run without trainers, whose steps are none."""
    generators: Literal["beside", "after", "none"] = "beside"
    """``beside`` the trainers; ``after`` them, on a node that they have left; or none."""
    learns_from: Literal["samples", "examples", "nothing"] = "samples"
    """What the policy samples, or what the data says."""
    rewards: bool = True
    """Without a reward, or an environment that gives one, there is nothing to do."""
    environments: bool = True
    """Whether it can play ``environment``."""
    drops_truncated: bool = False
    """Whether it leaves out what ``algorithm.drop_truncated`` says, by ``rollouts.documents.to_documents``."""
    columns: tuple[str, ...] | None = None
    """Columns of documents that it fills: a loss that takes another one is refused before the run is queued. None: not
    said, then it is found at the first step."""

    def __post_init__(self) -> None:
        if (policy := self.models.get(POLICY)) is not None and policy.head == "value" and self.generators != "none":
            raise UserError("a policy with a value head writes nothing", 'set generators="none"')

    @property
    def trains(self) -> bool:
        """Whether there are optimizer steps, and a model of the run's own at its end."""
        return any(model.trained for model in self.models.values())

    @property
    def has_algorithm(self) -> bool:
        """Whether a model is trained with ``algorithm.loss``."""
        return any(model.trained and model.loss is None for model in self.models.values())


def check_models(models: Mapping[str, ModelNeed]) -> None:
    """Raises UserError: no policy, or one that is frozen or has no language-model head; a name that is no name."""
    policy = models.get(POLICY)
    if policy is None or not policy.trained or policy.path is not None:
        raise UserError(
            "a recipe's models need a policy that is trained, from model.path",
            f"add {POLICY!r}: ModelNeed() to them",
        )
    if (reference := models.get(REFERENCE)) is not None and reference.trained:
        raise UserError("the model 'reference' is trained", "write ModelNeed(trained=False), or give it another name")
    for name in models:
        if not name.isidentifier():  # it is a directory of the checkpoint
            raise UserError(f"a model is called {name!r}", "take letters, digits and underscores")
