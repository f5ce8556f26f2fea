"""Best-of-n distillation, also called RAFT (https://arxiv.org/abs/2304.06767): the policy learns its own best answers.

    prompts ──► generators ──► rewards ──► best answers ──► trainers ──► weights ──► generators

    loss = mean( -log pi(token) ), over the tokens of the best of the n = ``rollout.group_size`` answers to each prompt

An answer counts where it is better than others to its prompt, and reaches ``min_reward``. It is what supervised
fine-tuning minimises, on samples of the policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from forge_hpc.config import Config, UserError
from forge_hpc.config.needs import POLICY, ModelNeed, Needs
from forge_hpc.recipes.base import Recipe, Session


@dataclass
class BestOfNArgs:
    min_reward: float = 0.0
    """What the best answer to a prompt must reach to be learned."""


class BestOfN(Recipe):
    """Trains ``trainer.training.steps`` steps, each on the best answers to ``rollout.prompts_per_step`` prompts."""

    Args: ClassVar[type] = BestOfNArgs

    def needs(self, config: Config) -> Needs:
        """The policy, trained with REINFORCE at an advantage of 1: the negative log-likelihood."""
        return Needs({POLICY: ModelNeed(loss="reinforce")}, columns=())

    def check(self, config: Config) -> None:
        """The best is one of several."""
        if (size := config.rollout.group_size) < 2:
            raise UserError(
                f"the best of several answers is learned, and rollout.group_size is {size}", "set it to 2 or more"
            )

    async def run(self, session: Session) -> None:
        """The loop."""
        from forge_hpc.rollouts.checks import SignalWatch
        from forge_hpc.rollouts.documents import to_document
        from forge_hpc.rollouts.figures import measure
        from forge_hpc.rollouts.groups import has_signal

        signal = SignalWatch(session.config, session.state)
        await session.start()
        await session.evaluate(session.step)
        async with session.rollouts() as rollouts:
            for step in session.remaining_steps():
                groups = await rollouts.take()
                metrics = measure(groups, step)
                best = [max(g.episodes, key=lambda episode: episode.reward) for g in groups if has_signal(g)]
                best = [episode for episode in best if episode.reward >= self.args.min_reward]
                metrics["best/num"] = len(best)
                for episode in best:
                    episode.advantage = 1.0
                documents = [to_document(e) for e in best or (e for g in groups for e in g.episodes)]
                learns = signal.check(step, documents, metrics)
                metrics |= await session.train_step(step, documents, update=learns)
                await session.publish(step)
                metrics |= rollouts.metrics() | signal.metrics()
                await session.end_step(step, metrics, rollouts.state_dict() | signal.state_dict(), groups)
                await session.evaluate(step)
        await session.finish()
