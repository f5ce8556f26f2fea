"""GRPO (https://arxiv.org/abs/2402.03300), synchronous or asynchronous: one loop, one dial.

    prompts ──► generators ──► rewards ──► advantages ──► buffer ──► trainers
                    ▲                                                   │
                    └──────────────── weights, by policy version ◄──────┘

``rollout_loop`` produces groups and consumes prompts; new weights in the generators unblock it (``buffer.room``), and
with dynamic sampling every group that carries no signal, in whose place a further prompt is drawn.
The loop over the steps produces policy versions and consumes groups; a complete step unblocks it (``buffer.take``).
With ``rollout.max_staleness`` 0 the two take turns; above it, generation runs ahead while the trainers train.
"""

from __future__ import annotations

from contextlib import aclosing

from forge_hpc.controller.session import Session, background, load_held_out, load_prompts
from forge_hpc.data.types import Prompt
from forge_hpc.rewards import RewardPool
from forge_hpc.rollouts.buffer import episode_buffer
from forge_hpc.rollouts.checks import EpisodeWatch, SignalWatch
from forge_hpc.rollouts.documents import to_documents
from forge_hpc.rollouts.episodes import episode_player, start_environments
from forge_hpc.rollouts.figures import RolloutClock, measure
from forge_hpc.rollouts.groups import make_groups


async def grpo(session: Session) -> None:
    """Train ``trainer.training.steps`` optimizer steps, each on the groups of ``rollout.prompts_per_step`` prompts."""
    config, rollout = session.config, session.config.rollout
    synchronous = rollout.max_staleness == 0

    prompts, held_out = await load_prompts(session), await load_held_out(session)
    rewards = await RewardPool(config).start()
    session.on_close(rewards.close)
    environments = await start_environments(session)
    trainers, generators = await session.start_trainers_and_generators()
    player = episode_player(session, generators, environments)
    sample = generators.generate.stream if player is None else player.stream
    buffer = episode_buffer(config, session.step, prompts.position)
    buffer.restore(session.finished_groups, session.state)
    weights = await session.connect(trainers, generators, buffer)
    episodes, signal, clock = EpisodeWatch(session.warn), SignalWatch(config, session.state), RolloutClock()

    async def rollout_loop() -> None:
        while True:
            batch = buffer.begin(prompts.draw(await buffer.room()))
            # Synchronous: a generator admits all its prompts at once, so that the run repeats exactly.
            num = len(generators)
            shares = [batch[i::num] for i in range(num) if batch[i::num]] if synchronous else [[p] for p in batch]
            started = clock.begin(len(shares))
            for key, share in enumerate(shares):
                tasks.create_task(roll_out(share, key if synchronous else None, started))

    async def roll_out(share: list[Prompt], key: int | None, started: float) -> None:
        async with aclosing(make_groups(share, sample(share, key=key), rewards, config)) as groups:
            async for group in groups:
                await buffer.put(group)
        clock.end(started)

    if session.evaluation_is_due(session.step):
        await session.evaluate(session.step, held_out, rewards, player)
    async with background(rollout_loop()) as tasks:
        for step in session.remaining_steps():
            groups = await buffer.take()
            prompts.report(groups)
            episodes.check(step, groups)
            metrics = measure(groups, step)
            documents = to_documents(groups, config)
            is_signal = signal.check(step, documents, metrics)
            learns = is_signal or not config.algorithm.drop_zero_signal_groups
            metrics |= await session.train_step(step, documents, update=learns)
            evaluates = session.evaluation_is_due(step)
            if evaluates or step % rollout.sync_interval == 0:
                await weights.publish(step)
                if evaluates or synchronous:
                    await weights.delivered()
            metrics |= prompts.metrics() | buffer.metrics() | clock.metrics() | signal.metrics()
            session.record(step, metrics | {"time/weight_sync_s": weights.seconds}, groups)
            state = {"prompts": prompts.state_after(groups[-1].prompt.position)}
            await session.save_if_due(step, state | signal.state_dict() | buffer.state_dict())
            if evaluates:
                await session.evaluate(step, held_out, rewards, player)
    await session.finish()
