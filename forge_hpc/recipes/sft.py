"""Supervised fine-tuning: the trainers alone, on the answers of the data.

examples ──► documents (loss on the assistant's tokens) ──► trainers
"""

from __future__ import annotations

from typing import Literal

from forge_hpc.config import Config
from forge_hpc.config.needs import POLICY, ModelNeed, Needs
from forge_hpc.recipes.base import Recipe, Session


class SFT(Recipe):
    """Trains ``trainer.training.steps`` optimizer steps on ``trainer.training.global_batch_size`` examples each.

    Every ``evaluation.interval`` steps, before the first and after the last: the loss on held-out documents. At the
    end, on the hardware of the trainers, generators answer the held-out prompts.
    """

    def needs(self, config: Config) -> Needs:
        """The policy; then a generator, where held-out prompts have a reference answer to compare with."""
        answers = config.evaluation.num_prompts > 0 and config.data.target_field is not None and bool(config.reward)
        after: Literal["after", "none"] = "after" if answers else "none"
        return Needs({POLICY: ModelNeed(loss="sft")}, after, "examples", rewards=False, environments=False, columns=())

    async def run(self, session: Session) -> None:
        """The loop."""
        num_examples = session.config.trainer.training.global_batch_size
        documents = await session.documents()
        await session.start()
        await session.evaluate(session.step)
        for step in session.remaining_steps():
            metrics = await session.train_step(step, documents.take(num_examples))
            await session.end_step(step, metrics | documents.metrics(), {"documents": documents.state_dict()})
            await session.evaluate(step)
        await session.finish()
