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

import time
from contextlib import aclosing
from typing import Any

from forge_hpc.controller.session import Session, background, load_held_out, load_prompts
from forge_hpc.data.types import Prompt
from forge_hpc.rewards import RewardPool
from forge_hpc.rollouts.checks import EpisodeWatch, SignalWatch
from forge_hpc.rollouts.episodes import episode_player, start_environments
from forge_hpc.rollouts.groups import RolloutClock, episode_buffer, make_groups, measure, to_documents


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
    buffer.restore(session.finished_groups)
    buffer.num_stale = session.state.get("stale_episodes", 0)
    weights = await session.connect(trainers, generators, buffer)
    first = prompts.position
    drawn: dict[int, dict[str, Any]] = {}  # by position of a prompt that may be the last of a step: the stream after it
    clock = RolloutClock()

    async def rollout_loop() -> None:
        while True:
            batch = buffer.begin([draw() for _ in range(await buffer.room())])
            # Synchronous: a generator admits all its prompts at once, so that the run repeats exactly.
            num = len(generators)
            shares = [batch[i::num] for i in range(num) if batch[i::num]] if synchronous else [[p] for p in batch]
            started = clock.begin(len(shares))
            for key, share in enumerate(shares):
                tasks.create_task(roll_out(share, key if synchronous else None, started))

    def draw() -> Prompt:
        prompt = next(prompts)
        if config.algorithm.dynamic_sampling or (prompts.position - first) % rollout.prompts_per_step == 0:
            drawn[prompt.position] = prompts.state_dict()
        return prompt

    async def roll_out(share: list[Prompt], key: int | None, started: float) -> None:
        async with aclosing(make_groups(share, sample(share, key=key), rewards, config)) as groups:
            async for group in groups:
                await buffer.put(group)
        clock.end(started)

    episodes = EpisodeWatch(session.warn)
    signal = SignalWatch(
        config, session.state.get("steps_without_signal", 0), session.state.get("all_steps_without_signal", 0)
    )
    if session.evaluation_is_due(session.step):
        await session.evaluate(session.step, held_out, rewards, player)
    async with background(rollout_loop()) as tasks:
        for step in session.remaining_steps():
            waited = time.perf_counter()
            groups = await buffer.take()
            prompts.report(groups)
            waited = time.perf_counter() - waited
            episodes.check(step, groups)
            metrics = measure(groups, step) | {"time/wait_generator_s": waited, "episodes/stale": buffer.num_stale}
            documents = to_documents(groups, config)
            is_signal = signal.check(step, documents, metrics)
            learns = is_signal or not config.algorithm.drop_zero_signal_groups
            metrics |= await session.train_step(step, documents, update=learns)
            evaluates = session.evaluation_is_due(step)
            if evaluates or step % rollout.sync_interval == 0:
                await weights.publish(step)
                if evaluates or synchronous:
                    await weights.delivered()
            metrics |= {
                "time/generate_s": clock.generate_s,
                "time/wait_trainer_s": clock.wait_trainer_s,
                "time/weight_sync_s": weights.seconds,
                "prompts/too_long": prompts.num_too_long,
                "prompts/bad": prompts.num_bad,
                "steps/without_signal": signal.num_in_all,
            }
            session.record(step, metrics, groups)
            after = [drawn.pop(group.prompt.position, {}) for group in groups][-1]
            counts = {"steps_without_signal": signal.num_steps, "all_steps_without_signal": signal.num_in_all}
            counts |= {"stale_episodes": buffer.num_stale}
            await session.save_if_due(step, {"prompts": prompts.with_rewards(after), **counts})
            if evaluates:
                await session.evaluate(step, held_out, rewards, player)
    await session.finish()
