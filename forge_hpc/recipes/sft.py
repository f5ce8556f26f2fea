"""Supervised fine-tuning: the trainers alone, on the answers of the data.

examples ──► documents (loss on the assistant's tokens) ──► trainers
"""

from __future__ import annotations

import asyncio

from forge_hpc.config.split import evaluates_by_generation
from forge_hpc.controller.session import Session, load_held_out
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import DocumentStream, evaluation_documents
from forge_hpc.data.source import load_eval_examples
from forge_hpc.data.types import Document
from forge_hpc.rewards import RewardPool


async def sft(session: Session) -> None:
    """Train ``trainer.training.steps`` optimizer steps on ``trainer.training.global_batch_size`` examples each.

    Every ``evaluation.interval`` steps, before the first and after the last: the loss on held-out documents. At the
    end, on the hardware of the trainers, generators answer the held-out prompts.
    """
    config, interval = session.config, session.config.evaluation.interval
    documents = await asyncio.to_thread(load_documents, session)
    held_out, last = await asyncio.to_thread(load_held_out_documents, session), config.trainer.training.steps
    await session.start_trainers()

    async def validate(step: int) -> None:
        if interval and step % interval == 0 and step < last and not session.metrics.is_evaluated(step):
            session.metrics.log_evaluation(step, await session.validation_loss(held_out))

    await validate(session.step)
    for step in session.remaining_steps():
        metrics = await session.train_step(step, documents.take(config.trainer.training.global_batch_size))
        session.record(step, metrics | documents.metrics())
        await session.save_if_due(step, {"documents": documents.state_dict()})
        await validate(step)
    await session.finish()
    if not held_out:
        return
    loss = await session.validation_loss(held_out)
    if not evaluates_by_generation(config):
        session.metrics.log_evaluation(session.step, loss)
        return
    await session.stop_trainers()
    await session.start_generators(session.run_dir.export)
    async with RewardPool(config) as rewards:
        await session.evaluate(session.step, await load_held_out(session), rewards, more=loss)


def load_documents(session: Session) -> DocumentStream:
    """The stream of training documents, from the start or where the recipe's state says."""
    documents = DocumentStream(open_sources(session.config), session.tokenizer, session.config)
    return documents.load_state_dict(session.state.get("documents", documents.state_dict()))


def load_held_out_documents(session: Session) -> list[Document]:
    """The documents of ``evaluation``, none where it is off."""
    config = session.config
    if not config.evaluation.num_prompts:
        return []
    examples = load_eval_examples(config.data, config.seed)
    return evaluation_documents(examples, session.tokenizer, config, config.evaluation.num_prompts)
