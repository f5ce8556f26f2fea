"""Evaluation of a model as it is: generators on every node, no trainers, no step.

held-out prompts ──► generators (and environments) ──► rewards ──► evaluations.jsonl
"""

from __future__ import annotations

from forge_hpc.controller.session import Session, load_held_out
from forge_hpc.rewards import RewardPool
from forge_hpc.rollouts.episodes import episode_player, start_environments


async def eval(session: Session) -> None:
    """Evaluate ``model.path`` on ``evaluation.num_prompts`` prompts of ``data.eval_split``, as training does.

    A start that was interrupted begins again; an evaluation that was written is not repeated.
    """
    held_out = await load_held_out(session)
    async with RewardPool(session.config) as rewards:
        environments = await start_environments(session)
        generators = await session.start_generators()
        await session.evaluate(0, held_out, rewards, episode_player(session, generators, environments))
