"""Offline DPO: direct preference optimization (https://arxiv.org/abs/2305.18290) on data of pairs: a better answer
and a worse one to each prompt. Nothing is sampled: the trainers alone.

    pairs ──► reference ──► policy

    loss = -log sigmoid( beta (log pi(y+) - log ref(y+)) - beta (log pi(y-) - log ref(y-)) ), over pairs

or with ``loss: ipo`` the squared distance of the margin to 1/(2 beta) (https://arxiv.org/abs/2310.12036). The reference
is the frozen model that the policy starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from forge_hpc.config import Config, UserError
from forge_hpc.config.fields import POSITIVE, setting
from forge_hpc.config.needs import POLICY, REFERENCE, ModelNeed, Needs
from forge_hpc.config.schema import DataConfig
from forge_hpc.recipes.base import Recipe, Session
from forge_hpc.recipes.online_dpo import LOSSES

if TYPE_CHECKING:
    from forge_hpc.data.types import Document


@dataclass
class DPOArgs:
    rejected: str = "rejected"
    """Field that holds the worse answer; ``data.target_field`` names that of the better one."""
    beta: float = setting(0.1, POSITIVE)
    """How strongly the policy is held to the reference."""
    loss: str = setting("dpo", choices=LOSSES)
    """dpo or ipo."""


class DPO(Recipe):
    """Trains ``trainer.training.steps`` steps on ``trainer.training.global_batch_size`` pairs each.

    Every ``evaluation.interval`` steps, before the first and after the last: loss, accuracy and margin on held-out
    pairs. At the end, on the hardware of the trainers, generators answer the held-out prompts.
    """

    Args: ClassVar[type] = DPOArgs

    def needs(self, config: Config) -> Needs:
        """The policy with a loss on pairs, and the reference; then a generator, where there is a reward to say how good
        the answers to held-out prompts are."""
        if self.args.loss not in LOSSES:
            raise UserError(f"recipe_args.loss is {self.args.loss!r}", f"known: {', '.join(LOSSES)}")
        policy = ModelNeed(loss=LOSSES[self.args.loss], loss_args={"beta": self.args.beta})
        reference = ModelNeed(trained=False, offload=config.reference.device == "cpu")
        answers = config.evaluation.num_prompts > 0 and bool(config.reward)
        models = {POLICY: policy, REFERENCE: reference}
        return Needs(
            models, "after" if answers else "none", "examples", rewards=False, environments=False, columns=("side",)
        )

    def check(self, config: Config) -> None:
        """A pair has two answers, and who is to answer a prompt needs one without them."""
        if config.data.target_field in (None, self.args.rejected):
            raise UserError(
                f"data.target_field is {config.data.target_field}, and recipe_args.rejected {self.args.rejected!r}",
                "name the fields of the better and of the worse answer: data.target_field=chosen",
            )
        if config.data.prompt_field == config.data.target_field and self.needs(config).generators == "after":
            raise UserError(
                f"data.prompt_field is data.target_field={config.data.target_field}: no prompts to answer at the end",
                "name a field of prompts, or set reward=[]: held-out pairs are evaluated all the same",
            )

    def renderer(self, tokenizer: Any, data: DataConfig) -> Callable[[Any, str], list[Document]]:
        """Pairs, those with equal answers left out and counted."""
        from forge_hpc.data.pairs import PairRenderer

        return PairRenderer(tokenizer, data, self.args.rejected)

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
        policy = await session.trainers.logprobs(documents)
        reference = await session.trainers.logprobs(documents, model=REFERENCE)
        beta, is_ipo = self.args.beta, self.args.loss == "ipo"
        ratios = np.array(
            [
                (np.mean if is_ipo else np.sum)((own - ref)[document.loss_mask], dtype=np.float64)
                for own, ref, document in zip(policy, reference, documents, strict=True)
            ]
        )
        margins = ratios[::2] - ratios[1::2]
        losses = (margins - 1 / (2 * beta)) ** 2 if is_ipo else np.logaddexp(0, -beta * margins)
        return {
            "loss": float(losses.mean()),
            "dpo/accuracy": float((margins > 0).mean()),
            "dpo/margin": float(margins.mean()),
        }
