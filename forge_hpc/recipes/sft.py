"""Supervised fine-tuning: the trainers alone, on the answers of the data.

examples ──► documents (loss on the answer) ──► trainers
"""

from __future__ import annotations

from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import DocumentStream
from forge_hpc.recipes.session import Session, load_held_out
from forge_hpc.rewards import RewardPool


async def sft(session: Session) -> None:
    """Train ``trainer.training.steps`` optimizer steps on ``trainer.training.global_batch_size`` examples each."""
    config = session.config
    documents = DocumentStream(open_sources(config), session.tokenizer, config)
    documents.load_state_dict(session.state.get("documents", documents.state_dict()))
    trainers = await session.start_trainers()
    for step in session.remaining_steps():
        batch = documents.take(config.trainer.training.global_batch_size)
        metrics = await trainers.train_step(batch)
        session.record(step, metrics | {"examples/too_long": documents.num_too_long})
        await session.save_if_due(step, {"documents": documents.state_dict()})
    await session.finish()
    if held_out := load_held_out(session):
        await session.stop_trainers()
        await session.start_generators(session.run_dir.export)
        async with RewardPool(config) as rewards:
            await session.evaluate(session.step, held_out, rewards)
