"""KTO: Kahneman-Tversky optimization (https://arxiv.org/abs/2402.01306) on answers with a label, good or bad: no pairs.
Nothing is sampled: the trainers alone.

    labelled answers ──► reference, policy (z) ──► policy

    loss = w_s (1 - sigmoid( s beta (log pi(y) - log ref(y) - z) )), s = 1 of a good answer, -1 of a bad one

z = max(0, mean of log pi(y') - log ref(y')) estimates the divergence of the two, without gradient, from the step's
prompts with the answers of each other, y'. The reference is the frozen model that the policy starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from forge_hpc.config import Config, UserError
from forge_hpc.config.fields import NOT_NEGATIVE, POSITIVE, setting
from forge_hpc.config.needs import POLICY, REFERENCE, ModelNeed, Needs
from forge_hpc.config.schema import DataConfig
from forge_hpc.recipes.base import Recipe, Session

if TYPE_CHECKING:
    from forge_hpc.data.types import Document

LOSS = "forge_hpc.losses.kto:KTOLoss"


@dataclass
class KTOArgs:
    label: str = "label"
    """Field that says whether the answer in ``data.target_field`` is good: true or false, 1 or 0."""
    beta: float = setting(0.1, POSITIVE)
    """How strongly the policy is held to the reference."""
    desirable_weight: float = setting(1.0, NOT_NEGATIVE)
    """Of good answers in the loss."""
    undesirable_weight: float = setting(1.0, NOT_NEGATIVE)
    """Of bad ones: where there are n times as many good answers, about n."""


class KTO(Recipe):
    """Trains ``trainer.training.steps`` steps on ``trainer.training.global_batch_size`` answers each."""

    Args: ClassVar[type] = KTOArgs

    def needs(self, config: Config) -> Needs:
        """The policy, and the reference."""
        a = self.args
        weights = {"desirable_weight": a.desirable_weight, "undesirable_weight": a.undesirable_weight}
        policy = ModelNeed(loss=LOSS, loss_args={"beta": a.beta, **weights})
        reference = ModelNeed(trained=False, offload=config.reference.device == "cpu")
        models, columns = {POLICY: policy, REFERENCE: reference}, ("side", "kl")
        return Needs(models, "none", "examples", rewards=False, environments=False, columns=columns)

    def check(self, config: Config) -> None:
        """The answers of others are compared with."""
        if config.data.target_field is None:
            raise UserError("data.target_field is null", "name the field of the answers")
        if (size := config.trainer.training.global_batch_size) < 2:
            raise UserError(
                f"trainer.training.global_batch_size is {size}", "a step takes the answers of others: 2 or more"
            )

    def renderer(self, tokenizer: Any, data: DataConfig) -> Callable[[Any, str], list[Document]]:
        """Answers with their labels."""
        from forge_hpc.data.pairs import LabelRenderer

        return LabelRenderer(tokenizer, data, self.args.label)

    async def run(self, session: Session) -> None:
        """The loop."""
        size = session.config.trainer.training.global_batch_size
        documents = await session.documents()
        await session.start()
        await session.evaluate(session.step)
        for step in session.remaining_steps():
            batch = documents.take(size)
            kl = await divergence(session, batch)
            for document in batch:
                document.columns["kl"] = kl
            metrics = await session.train_step(step, batch) | {"kto/kl": kl}
            await session.end_step(step, metrics | documents.metrics(), {"documents": documents.state_dict()})
            await session.evaluate(step)
        await session.finish()

    async def validate(self, session: Session, documents: Sequence[Document]) -> dict[str, float]:
        """The figures of a step, of held-out answers."""
        kl, ratios = await divergence(session, documents), await log_ratios(session, documents)
        sides = np.array([document.columns["side"] for document in documents])
        weights = np.where(sides > 0, self.args.desirable_weight, self.args.undesirable_weight)
        losses = weights / (1 + np.exp(self.args.beta * sides * (ratios - kl)))
        return {"loss": float(losses.mean()), "kto/accuracy": float((sides * (ratios - kl) > 0).mean()), "kto/kl": kl}


async def divergence(session: Session, documents: Sequence[Document]) -> float:
    """z: of each prompt with the answer of the document before it, where a row holds both."""
    from forge_hpc.data.pairs import exchanged

    others = exchanged(documents, session.config.trainer.training.seq_len)
    return max(0.0, float((await log_ratios(session, others)).mean())) if others else 0.0


async def log_ratios(session: Session, documents: Sequence[Document]) -> np.ndarray:
    """[documents]: log pi(y) - log ref(y), sums over tokens."""
    policy = await session.trainers.logprobs(documents)
    reference = await session.trainers.logprobs(documents, model=REFERENCE)
    return np.array([np.subtract(p, r, dtype=np.float64).sum() for p, r in zip(policy, reference, strict=True)])
