"""Reward-model training: a model with one number at the end of an answer in place of the vocabulary learns from pairs
which answer is better (Bradley-Terry, https://arxiv.org/abs/1706.03741). The trainers alone.

    pairs ──► trainers

    loss = -log sigmoid( r(y+) - r(y-) ) + center (r(y+) + r(y-))^2, over pairs

Its export is a sequence classifier of one label for transformers; ``reward: [{name: model, path: …}]`` has it
reward another run (docs/reward_model.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from forge_hpc.config import Config, UserError
from forge_hpc.config.fields import NOT_NEGATIVE, setting
from forge_hpc.config.needs import POLICY, ModelNeed, Needs
from forge_hpc.config.schema import DataConfig
from forge_hpc.recipes.base import Recipe, Session

if TYPE_CHECKING:
    from forge_hpc.data.types import Document

LOSS = "forge_hpc.losses.bradley_terry:BradleyTerryLoss"


@dataclass
class RewardModelArgs:
    rejected: str = "rejected"
    """Field that holds the worse answer; ``data.target_field`` names that of the better one."""
    center: float = setting(0.0, NOT_NEGATIVE)
    """Weight of what keeps values around 0."""


class RewardModel(Recipe):
    """Trains ``trainer.training.steps`` steps on ``trainer.training.global_batch_size`` pairs each.

    Every ``evaluation.interval`` steps, before the first and after the last: loss, accuracy and margin on held-out
    pairs.
    """

    Args: ClassVar[type] = RewardModelArgs

    def needs(self, config: Config) -> Needs:
        """The model alone, with a value head."""
        model = ModelNeed(head="value", loss=LOSS, loss_args={"center": self.args.center})
        return Needs({POLICY: model}, "none", "examples", rewards=False, environments=False, columns=("side",))

    def check(self, config: Config) -> None:
        """A pair has two answers."""
        if config.data.target_field in (None, self.args.rejected):
            raise UserError(
                f"data.target_field is {config.data.target_field}, and recipe_args.rejected {self.args.rejected!r}",
                "name the fields of the better and of the worse answer: data.target_field=chosen",
            )

    def renderer(self, tokenizer: Any, data: DataConfig) -> Callable[[Any, str], list[Document]]:
        """Pairs, each document judged at its end; those with equal answers left out and counted."""
        from forge_hpc.data.pairs import PairRenderer, at_its_end

        pairs = PairRenderer(tokenizer, data, self.args.rejected)
        return lambda example, where: [at_its_end(document) for document in pairs(example, where)]

    async def run(self, session: Session) -> None:
        """The loop."""
        num_documents = 2 * session.config.trainer.training.global_batch_size
        documents = await session.documents()
        await session.start()
        await session.evaluate(session.step)
        for step in session.remaining_steps():
            metrics = await session.train_step(step, documents.take(num_documents))
            await session.end_step(step, metrics | documents.metrics(), {"documents": documents.state_dict()})
            await session.evaluate(step)
        await session.finish()

    async def validate(self, session: Session, documents: Sequence[Document]) -> dict[str, float]:
        """The figures of a step, of held-out pairs."""
        values = await session.trainers.values(documents, model=POLICY)
        rewards = np.array([value[-1] for value in values], dtype=np.float64)
        margins, sums = rewards[::2] - rewards[1::2], rewards[::2] + rewards[1::2]
        return {
            "loss": float((np.logaddexp(0, -margins) + self.args.center * sums**2).mean()),
            "preference/accuracy": float((margins > 0).mean()),
            "preference/margin": float(margins.mean()),
        }
