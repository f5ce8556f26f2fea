"""Evaluation of the policy by answers to held-out prompts: over all generators, with rewards or environments."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from forge_hpc.config import Config
from forge_hpc.config.schema import SamplingConfig
from forge_hpc.data.types import Completion, Episode, Prompt
from forge_hpc.evaluation.answers import Answers
from forge_hpc.evaluation.figures import Graded, evaluation_seed, greedy_figures, sampled_figures
from forge_hpc.observability.logger import MetricLogger

if TYPE_CHECKING:
    from forge_hpc.rewards import RewardPool, RewardPools
    from forge_hpc.rollouts.sources import SampleStream

FILLINGS = 8
"""So many times the sequences that an engine decodes at once are asked for in one call of an evaluation."""


class Evaluator:
    """Asks, grades and writes.

    Args:
        prompts: the held-out ones.
        ask: for answers to them: (prompts, num, sampling, seed, key=replica) to a stream of completions, or of episodes
            where there is an environment.
        warn: shows the user a line.
        tell: writes the status's message.
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        ask: SampleStream,
        num_generators: int,
        rewards: RewardPool | RewardPools,
        metrics: MetricLogger,
        warn: Callable[[str], None],
        tell: Callable[[str], None],
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._num_generators = num_generators
        self._ask = ask
        self._rewards = rewards
        self._metrics = metrics
        self._warn = warn
        self._tell = tell

    async def evaluate(self, step: int, more: Mapping[str, float] | None = None) -> dict[str, float]:
        """Accuracy of the policy after ``step``: greedy, and pass@k of ``evaluation.samples`` sampled answers.

        Seeds are the evaluation's own, and every call has its generator to itself (``key``): a run that takes turns
        (``rollout.max_staleness`` 0) learns the same, to the last bit, however often it evaluates. A resumed run
        evaluates what it was interrupted in, and nothing twice: the figures are then empty.

        Args:
            more: figures that are logged with it: a step has one evaluation.
        """
        prompts = self._prompts
        if not prompts or self._metrics.is_evaluated(step):
            return {}
        start, config = time.perf_counter(), self._config.evaluation
        limit = self._config.logging.num_answers_per_evaluation
        show = partial(self._metrics.show_evaluation, step)
        answers = Answers(step, len(prompts), config.samples, limit, show, self._tell)
        greedy = await self._answer(1, replace(self._config.rollout.sampling, temperature=0.0), 0, answers)
        sampled: list[list[Graded]] = []
        seed = evaluation_seed(self._config.seed, step)
        if config.samples:
            sampling = self._config.rollout.sampling
            if config.temperature is not None:
                sampling = replace(sampling, temperature=config.temperature)
            sampled = await self._answer(config.samples, sampling, seed, answers)
        values = self._figures(step, "", range(len(prompts)), greedy, sampled, seed)
        values["time_s"] = time.perf_counter() - start
        for name in sorted({prompt.source for prompt in prompts} - {""}):
            places = [place for place, prompt in enumerate(prompts) if prompt.source == name]
            own = self._figures(step, f" of {name}", places, greedy, sampled, seed)
            values |= {f"source/{name}/{key}": value for key, value in own.items()}
        values = {**(more or {}), **values}
        self._metrics.log_evaluation(step, values, answers.records())
        if answers.has_told:
            self._tell("")
        return values

    def _figures(
        self,
        step: int,
        of: str,
        places: Sequence[int],
        greedy: Sequence[Sequence[Graded]],
        sampled: Sequence[Sequence[Graded]],
        seed: int,
    ) -> dict[str, float]:
        """Of the prompts at some places, which are those ``of`` a source."""
        values = greedy_figures([greedy[place][0] for place in places])
        own = [sampled[place] for place in places] if sampled else []
        if own:
            values |= sampled_figures(own, self._config.evaluation.k, seed)
        graded = [answer for group in (*(greedy[place] for place in places), *own) for answer in group]
        num_failed = sum(answer.reward is None for answer in graded)
        if 2 * num_failed > len(graded):
            self._warn(
                f"evaluation after step {step}: {num_failed} of {len(graded)} answers{of} failed or have no reward, "
                "and count as wrong: controller.log says why"
            )
        return values | {"num_prompts": len(places), "num_failed": num_failed}

    async def _answer(self, num: int, sampling: SamplingConfig, seed: int, answers: Answers) -> list[list[Graded]]:
        """``num`` answers to each prompt, or episodes of it. An answer is right if the first reward says so
        (``Judgement.right``), an episode if its environment gave 1 or more."""
        results = [[Graded()] * num for _ in self._prompts]
        # A call has a deadline (generator.timeout_s): it holds some fillings of an engine, not a whole test set.
        size = max(1, FILLINGS * self._config.generator.engine.max_num_seqs // num)
        sample = (lambda number: number) if sampling.temperature > 0 else (lambda number: None)

        async def grade(place: int, number: int, answer: Completion | Episode | Exception) -> None:
            results[place][number] = await self._grade(place, sample(number), answer, answers)

        async def share(replica: int, places: Sequence[int]) -> None:
            mine = [self._prompts[place] for place in places]
            stream: AsyncIterator[Any] = self._ask(mine, num, sampling, seed, key=replica)
            async for (index, number), answer in stream:
                tasks.create_task(grade(places[index], number, answer))

        async with asyncio.TaskGroup() as tasks:
            order = sorted(range(len(self._prompts)), key=lambda place: self._prompts[place].source)
            for replica in range(self._num_generators):
                places = order[replica :: self._num_generators]  # its part of every source
                for begin in range(0, len(places), size):
                    tasks.create_task(share(replica, places[begin : begin + size]))
        return results

    async def _grade(
        self, place: int, sample: int | None, answer: Completion | Episode | Exception, answers: Answers
    ) -> Graded:
        from forge_hpc.rewards import RewardError

        prompt = self._prompts[place]
        if isinstance(answer, Exception):
            answers.add(place, sample, prompt, answer, Graded(), error=str(answer))
            return Graded()
        episode = answer if isinstance(answer, Episode) else Episode(prompt, answer, 0.0)
        try:
            judged = await self._rewards.judge(episode.prompt, episode.completion, show=True)
        except RewardError as error:
            answers.add(place, sample, episode.prompt, answer, Graded(), error=str(error))
            return Graded()
        is_played = "environment" in episode.rewards
        right = episode.reward >= 1 - 1e-6 if is_played else judged.right
        graded = Graded(right, episode.reward + judged.total)
        answers.add(place, sample, episode.prompt, answer, graded, episode.rewards | judged.terms, judged.read)
        return graded
