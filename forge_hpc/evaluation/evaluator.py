"""Evaluation of the policy by answers to held-out prompts: over all generators, with rewards or environments."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from forge_hpc.config import Config
from forge_hpc.config.schema import SamplingConfig
from forge_hpc.data.types import Completion, Episode, Prompt
from forge_hpc.evaluation.answers import Answers
from forge_hpc.evaluation.figures import Graded, evaluation_seed, figures_of_sets
from forge_hpc.observability.logger import MetricLogger

if TYPE_CHECKING:
    from forge_hpc.rewards import RewardPool, RewardPools
    from forge_hpc.rollouts.sources import SampleStream

FILLINGS = 8
"""So many times the sequences that an engine decodes at once are asked for in one call of an evaluation."""


@dataclass(frozen=True)
class HeldOutSet:
    """Held-out prompts, and who grades the answers to them."""

    label: str
    """What its figures are called; empty for the only one of a run without ``evaluation.sets``."""
    prompts: Sequence[Prompt]
    rewards: RewardPool | RewardPools


class Evaluator:
    """Asks, grades and writes.

    Args:
        sets: what is held out.
        ask: for answers to prompts: (prompts, num, sampling, seed, key=replica) to a stream of completions, or of
            episodes where there is an environment.
        warn: shows the user a line.
        tell: writes the status's message.
    """

    def __init__(
        self,
        config: Config,
        sets: Sequence[HeldOutSet],
        ask: SampleStream,
        num_generators: int,
        metrics: MetricLogger,
        warn: Callable[[str], None],
        tell: Callable[[str], None],
    ) -> None:
        self._config = config
        self._prompts = [prompt for one in sets for prompt in one.prompts]
        self._labels = [one.label for one in sets for _ in one.prompts]
        self._pools = [one.rewards for one in sets for _ in one.prompts]  # by prompt, as are the labels
        self._num_generators = num_generators
        self._ask = ask
        self._metrics = metrics
        self._warn = warn
        self._tell = tell

    async def evaluate(self, step: int, more: Mapping[str, float] | None = None) -> dict[str, float]:
        """Accuracy of the policy after ``step``: greedy, and pass@k of ``evaluation.samples`` sampled answers; over all
        prompts, and where there are several sets for each of them as ``LABEL/accuracy``.

        Seeds are the evaluation's own, and every call has its generator to itself (``key``): a run that takes turns
        (``rollout.max_staleness`` 0) learns the same, to the last bit, however often it evaluates. A resumed run
        evaluates what it was interrupted in, and nothing twice: the figures are then empty.

        Args:
            more: figures that are logged with it: a step has one evaluation.
        """
        prompts = self._prompts
        if not prompts or self._metrics.is_evaluated(step, "accuracy"):
            return {}
        start, config = time.perf_counter(), self._config.evaluation
        limit = self._config.logging.num_answers_per_evaluation
        show = partial(self._metrics.show_evaluation, step)
        answers = Answers(step, self._labels, config.samples, limit, show, self._tell)
        greedy = await self._answer(1, replace(self._config.rollout.sampling, temperature=0.0), 0, answers)
        sampled: list[list[Graded]] = []
        seed = evaluation_seed(self._config.seed, step)
        if config.samples:
            sampling = self._config.rollout.sampling
            if config.temperature is not None:
                sampling = replace(sampling, temperature=config.temperature)
            sampled = await self._answer(config.samples, sampling, seed, answers)
        values = await asyncio.to_thread(figures_of_sets, self._labels, greedy, sampled, config.k, seed)
        self._warn_of_failures(step, values)
        values["time_s"] = time.perf_counter() - start
        values = {**(more or {}), **values}
        self._metrics.log_evaluation(step, values, answers.records())
        if answers.has_told:
            self._tell("")
        return values

    def _warn_of_failures(self, step: int, values: Mapping[str, float]) -> None:
        """Where most answers have none or no reward: of all sets together, or of one."""
        for label in dict.fromkeys(["", *self._labels]):
            prefix, of = (f"{label}/", f" of {label}") if label else ("", "")
            num = int(values[f"{prefix}num_prompts"]) * (1 + self._config.evaluation.samples)
            num_failed = int(values[f"{prefix}num_failed"])
            if 2 * num_failed > num:
                self._warn(
                    f"evaluation after step {step}: {num_failed} of {num} answers{of} failed or have no reward, and "
                    "count as wrong: controller.log says why"
                )

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

        prompt, rewards = self._prompts[place], self._pools[place]
        if isinstance(answer, Exception):
            answers.add(place, sample, prompt, answer, Graded(), error=str(answer))
            return Graded()
        episode = answer if isinstance(answer, Episode) else Episode(prompt, answer, 0.0)
        try:
            judged = await rewards.judge(episode.prompt, episode.completion, show=True)
        except RewardError as error:
            answers.add(place, sample, episode.prompt, answer, Graded(), error=str(error))
            return Graded()
        is_played = "environment" in episode.rewards
        right = episode.reward >= 1 - 1e-6 if is_played else judged.right
        read = next(iter(judged.read.values()), None) if not is_played else None
        graded = Graded(right, episode.reward + judged.total, read)
        answers.add(place, sample, episode.prompt, answer, graded, episode.rewards | judged.terms, judged.read)
        return graded
