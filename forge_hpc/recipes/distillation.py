"""On-policy distillation (https://arxiv.org/abs/2306.13649, https://arxiv.org/abs/2306.08543): a student learns from
teachers on what it samples itself.

    prompts ──► student (generators) ──► teachers ──► student (trainers) ──► weights ──► student (generators)

    minimise KL(student || teacher):   A_t = 1/K sum_k log teacher_k(y_t | x, y_<t) - log student(y_t | x, y_<t)

The gradient of the reverse Kullback-Leibler divergence at a sampled token is that of a policy gradient with advantage
A_t: ``algorithm.loss`` trains on it. Of several teachers it is the divergence to their geometric mean. Rewards are
measured where there is an evaluation, and do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from forge_hpc.config import Config, UserError
from forge_hpc.config.fields import POSITIVE, setting
from forge_hpc.config.needs import POLICY, ModelNeed, Needs
from forge_hpc.recipes.base import Recipe, Session


@dataclass
class DistillationArgs:
    teachers: list[str] = setting(factory=list, path=True)
    """Models with the student's tokenizer, as ``model.path`` names one: directories or hub names."""
    clip: float = setting(10.0, POSITIVE)
    """Largest advantage of a token, nats: what a teacher thinks impossible is not infinitely bad."""


class Distillation(Recipe):
    """Trains ``trainer.training.steps`` steps on the answers to ``rollout.prompts_per_step`` prompts each."""

    Args: ClassVar[type] = DistillationArgs

    def needs(self, config: Config) -> Needs:
        """The student, and the frozen teachers ``teacher_1`` to ``teacher_K``."""
        teachers = zip(self._names, self.args.teachers, strict=True)
        models = {POLICY: ModelNeed()} | {name: ModelNeed(trained=False, path=path) for name, path in teachers}
        return Needs(models, rewards=config.evaluation.num_prompts > 0, columns=("advantages",))

    @property
    def _names(self) -> list[str]:
        return [f"teacher_{number}" for number, _ in enumerate(self.args.teachers, 1)]

    def check(self, config: Config) -> None:
        """There must be a teacher."""
        if not self.args.teachers:
            raise UserError("recipe_args.teachers is empty", "name one: recipe_args.teachers=[runs/teacher/export]")

    async def run(self, session: Session) -> None:
        """The loop."""
        from forge_hpc.rollouts.documents import to_documents
        from forge_hpc.rollouts.figures import measure

        await session.start()
        await session.evaluate(session.step)
        async with session.rollouts() as rollouts:
            for step in session.remaining_steps():
                groups = await rollouts.take()
                metrics = measure(groups, step)
                documents = to_documents(groups)
                taught = [await session.trainers.logprobs(documents, model=name) for name in self._names]
                kls = []
                for number, document in enumerate(documents):
                    assert document.generator_logprobs is not None, "what was sampled has them"
                    of_teachers = [logprobs[number] for logprobs in taught]
                    advantages = advantages_of(of_teachers, document.generator_logprobs, self.args.clip)
                    document.columns["advantages"] = advantages
                    kls.append(-advantages[document.loss_mask])
                metrics["teacher/reverse_kl"] = float(np.concatenate(kls).mean())
                metrics |= await session.train_step(step, documents)
                await session.publish(step)
                await session.end_step(step, metrics | rollouts.metrics(), rollouts.state_dict(), groups)
                await session.evaluate(step)
        await session.finish()


def advantages_of(of_teachers: Sequence[np.ndarray], sampled: np.ndarray, clip: float) -> np.ndarray:
    """A_t: [L], from the [L] log-probabilities of each teacher and of the student that sampled."""
    return np.clip(np.mean(of_teachers, axis=0) - sampled, -clip, clip)
