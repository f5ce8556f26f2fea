"""Evaluation of a model as it is: generators on every node, no trainers, no step.

held-out prompts ──► generators (and environments) ──► rewards ──► evaluations.jsonl
"""

from __future__ import annotations

from forge_hpc.config import Config, UserError
from forge_hpc.config.needs import Needs
from forge_hpc.recipes.base import Recipe, Session


class Evaluation(Recipe):
    """Evaluates ``model.path`` on ``evaluation.num_prompts`` prompts of ``data.eval_split``, as training does.

    A start that was interrupted begins again; an evaluation that was written is not repeated.
    """

    def needs(self, config: Config) -> Needs:
        """Generators."""
        return Needs({}, learns_from="nothing")

    def check(self, config: Config) -> None:
        """There must be something to evaluate."""
        if not config.evaluation.num_prompts:
            raise UserError(
                "evaluation.num_prompts=0 switches evaluation off, and this recipe does nothing else",
                "set evaluation.num_prompts to the number of held-out prompts",
            )

    async def run(self, session: Session) -> None:
        """All of it."""
        await session.start()
        await session.evaluate(session.step)
