"""Policy gradients on groups: GRPO (https://arxiv.org/abs/2402.03300), and as ``algorithm`` says DAPO, Dr. GRPO, GSPO,
CISPO, RLOO, REINFORCE and PPO's clip without a critic. Synchronous or asynchronous: one loop, one dial.

    prompts ──► generators ──► rewards ──► advantages ──► trainers
                    ▲                                         │
                    └──────── weights, by policy version ◄────┘

The session's rollouts generate; with ``rollout.max_staleness`` 0 the two take turns, above it generation runs ahead.
"""

from __future__ import annotations

from forge_hpc.config import Config, UserError
from forge_hpc.config.needs import POLICY, REFERENCE, ModelNeed, Needs
from forge_hpc.recipes.base import Recipe, Session


class GRPO(Recipe):
    """Trains ``trainer.training.steps`` steps, each on the groups of ``rollout.prompts_per_step`` prompts."""

    def needs(self, config: Config) -> Needs:
        """The policy, trained with ``algorithm.loss``, and for a KL penalty the frozen model that it starts from."""
        models = {POLICY: ModelNeed()}
        if config.reference.enable:
            models[REFERENCE] = ModelNeed(trained=False, offload=config.reference.device == "cpu")
        return Needs(models, drops_truncated=True, columns=())

    def check(self, config: Config) -> None:
        """An advantage compares."""
        if (size := config.rollout.group_size) < 2:
            raise UserError(
                f"the advantage compares completions of a group, and rollout.group_size is {size}",
                "set rollout.group_size to 2 or more, as a rule 8",
            )

    async def run(self, session: Session) -> None:
        """The loop."""
        from forge_hpc.advantages import advantage_function
        from forge_hpc.config.algorithm import resolve_advantage
        from forge_hpc.config.rewards import reward_weights
        from forge_hpc.rollouts.checks import SignalWatch
        from forge_hpc.rollouts.documents import set_advantages, to_documents
        from forge_hpc.rollouts.figures import measure

        algorithm = session.config.algorithm
        advantage = advantage_function(resolve_advantage(algorithm))
        weights = reward_weights(session.config)
        signal = SignalWatch(session.config, session.state)

        await session.start()
        await session.evaluate(session.step)
        async with session.rollouts() as rollouts:
            for step in session.remaining_steps():
                groups = await rollouts.take()
                metrics = measure(groups, step)
                set_advantages(groups, advantage, weights)
                documents = to_documents(
                    groups,
                    drop_zero_signal=algorithm.drop_zero_signal_groups,
                    drop_truncated=algorithm.drop_truncated,
                )
                learns = signal.check(step, documents, metrics) or not algorithm.drop_zero_signal_groups
                metrics |= await session.train_step(step, documents, update=learns)
                await session.publish(step)
                metrics |= rollouts.metrics() | signal.metrics()
                await session.end_step(step, metrics, rollouts.state_dict() | signal.state_dict(), groups)
                await session.evaluate(step)
        await session.finish()
