"""Scores completions: quick built-in rewards at once, all others in worker processes with a time limit.

A reward that hangs costs its worker, which is killed and replaced, and its episode, which the caller counts and leaves
out. It stalls neither the loop nor the other rewards (see ``workers``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from forge_hpc.config.errors import UserError
from forge_hpc.config.rewards import MODEL, by_label
from forge_hpc.config.schema import Config, RewardConfig
from forge_hpc.config.sources import run_sources
from forge_hpc.rewards.compute import compute
from forge_hpc.rewards.errors import RewardError
from forge_hpc.rewards.load import INLINE_REWARDS, Reward, load_reward
from forge_hpc.rewards.workers import RewardWorkers
from forge_hpc.workers.channel import Answer

if TYPE_CHECKING:
    from forge_hpc.data.types import Completion, Prompt
    from forge_hpc.workers.places import Place

logger = logging.getLogger(__name__)

_GIVE_UP_CALLS, _GIVE_UP_PROMPTS = 32, 3
"""A reward that has failed so often, for so many different prompts, and never worked, will not."""


class Judgement(NamedTuple):
    """What the rewards make of a completion."""

    total: float
    """The weighted sum."""
    terms: dict[str, float]
    """Each reward unweighted by its label, and its figures as ``label/name``."""
    read: dict[str, str | None]
    """What each took for the answer, by its label; None where it does not say."""
    right: bool = False
    """Whether the completion counts as right in an evaluation: by the first reward, which must be 1 or more. Those
    after it say how an answer was given."""


class RewardPool:
    """The rewards of a run, as one weighted sum.

    Example:
        async with RewardPool(config) as pool:
            total, terms = await pool.score(prompt, completion)
    """

    def __init__(
        self,
        config: Config,
        num_workers: int | None = None,
        others: Sequence[Place] = (),
        warn: Callable[[str], None] = logger.warning,
        with_model: bool = False,
    ) -> None:
        """``num_workers`` overrides each reward's ``workers``; ``others`` are the run's nodes beside this one, and
        ``warn`` tells the user. With ``with_model`` the reward of a trained model is computed here too; in a run its
        frozen model does that (``rollouts.reward_model``). Raises UserError for wrong arguments of inline ones."""
        rewards = [_with_sandbox(reward, config) for reward in config.reward if with_model or reward.name != MODEL]
        make = partial(_Term, num_workers=num_workers, others=others, warn=warn)
        self._terms = {label: make(reward) for label, reward in by_label(rewards).items()}

    async def start(self) -> Self:
        """Start a process of each reward that needs one and load the reward there; the other processes follow.

        Raises UserError where a reward cannot be loaded, or its own ``check`` fails.
        """
        try:
            await asyncio.gather(*(term.workers.start() for term in self._terms.values() if term.workers))
        except BaseException:
            await self.close()
            raise
        return self

    async def score(self, prompt: Prompt, completion: Completion) -> tuple[float, dict[str, float]]:
        """The weighted sum of all rewards; and each one unweighted by its label, with the figures that it gave beside
        its value as ``label/name``. Raises what ``judge`` raises."""
        judgement = await self.judge(prompt, completion)
        return judgement.total, judgement.terms

    async def judge(self, prompt: Prompt, completion: Completion, show: bool = False) -> Judgement:
        """What ``score`` gives and, with `show`, what each reward took for the answer.

        Rewards get the fields of the example, except one called ``prompt``, ``response`` or ``target``, and
        ``num_tokens`` (those that the policy wrote) and ``finish_reason`` of the completion.

        Raises RewardError where any of them raises, hangs, dies or gives NaN or infinity, and RuntimeError where a
        reward has never worked and will not.
        """
        fields = {k: v for k, v in prompt.fields.items() if k not in ("prompt", "response", "target")}
        fields |= {"num_tokens": completion.num_sampled, "finish_reason": completion.finish_reason}
        request: dict[str, Any] = {"prompt": prompt.text, "response": completion.text, "target": prompt.target}
        request |= {"fields": fields, "show": show}
        calls = [term.compute(request, prompt.position) for term in self._terms.values()]
        if len(calls) == 1:  # a task less
            results: list[Any] = [await calls[0]]
        else:  # all are waited for: a cancelled call would cost its worker
            results = await asyncio.gather(*calls, return_exceptions=True)
        terms: dict[str, float] = {}
        read: dict[str, str | None] = {}
        for label, result in zip(self._terms, results, strict=True):
            if isinstance(result, BaseException):
                raise result
            terms[label] = result["value"]
            terms |= {f"{label}/{name}": figure for name, figure in result["figures"].items()}
            read[label] = result.get("read")
        total = sum(term.config.weight * terms[label] for label, term in self._terms.items())
        return Judgement(total, terms, read, any(terms[label] >= 1 - 1e-6 for label in [*self._terms][:1]))

    async def close(self) -> None:
        """Kill all processes, with everything that they started, and wait for their end."""
        await asyncio.gather(*(term.workers.close() for term in self._terms.values() if term.workers))

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class RewardPools:
    """The rewards of all sources of a run (``config.sources``): each completion is judged by those of its prompt's."""

    def __init__(
        self, config: Config, others: Sequence[Place] = (), warn: Callable[[str], None] = logger.warning
    ) -> None:
        """``others`` and ``warn`` as for ``RewardPool``."""
        self._pools = {run.name: RewardPool(run.config, None, others, warn) for run in run_sources(config)}

    async def start(self) -> Self:
        """As ``RewardPool.start``, of all."""
        try:
            await asyncio.gather(*(pool.start() for pool in self._pools.values()))
        except BaseException:
            await self.close()
            raise
        return self

    async def score(self, prompt: Prompt, completion: Completion) -> tuple[float, dict[str, float]]:
        """As ``RewardPool.score``."""
        return await self._pools[prompt.source].score(prompt, completion)

    async def judge(self, prompt: Prompt, completion: Completion, show: bool = False) -> Judgement:
        """As ``RewardPool.judge``."""
        return await self._pools[prompt.source].judge(prompt, completion, show)

    async def close(self) -> None:
        """End the processes of all."""
        await asyncio.gather(*(pool.close() for pool in self._pools.values()))

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _with_sandbox(reward: RewardConfig, config: Config) -> RewardConfig:
    """``code`` runs its programs as the section ``sandbox`` says, unless its own args say otherwise; ``model`` has its
    path among them."""
    if reward.path is not None:
        return dataclasses.replace(reward, args={"path": reward.path})
    if reward.name != "code":
        return reward
    return dataclasses.replace(reward, args={"sandbox": dataclasses.asdict(config.sandbox), **reward.args})


class _Term:
    """One reward of the sum: in this process, or in its own."""

    def __init__(
        self, config: RewardConfig, num_workers: int | None, others: Sequence[Place], warn: Callable[[str], None]
    ) -> None:
        self.config = config
        self.workers: RewardWorkers | None = None
        self._inline: Reward | None = None
        if config.name in INLINE_REWARDS:
            self._inline = _load_inline(config)
        else:
            self.workers = RewardWorkers(config, num_workers, others=others, warn=warn)
        self._worked = False
        self._failed: Counter[int] = Counter()
        """Failures until the first success, by the prompt's position."""
        self._warned: set[str] = set()

    async def compute(self, request: dict[str, Any], position: int) -> Answer:
        try:
            answer = await self._answer(request)
        except RewardError as error:
            self._warn_once(error)
            if not self._worked:
                self._failed[position] += 1
                if self._failed.total() >= _GIVE_UP_CALLS and len(self._failed) >= _GIVE_UP_PROMPTS:
                    raise RuntimeError(f"failed {self._failed.total()} times and never worked: {error}") from error
            raise
        self._worked = True
        return answer

    async def _answer(self, request: dict[str, Any]) -> Answer:
        name = self.config.name
        if self.workers is None:
            assert self._inline is not None
            answer = compute(self._inline, request)
        else:
            answer = await self.workers.call(request)
        if "error" in answer:
            raise RewardError(f"reward {name}: {answer['error']}", answer["kind"])
        for what, value in {name: answer["value"], **answer["figures"]}.items():
            if not math.isfinite(value):
                raise RewardError(f"reward {name}{f': {what}' if what != name else ''} is {value}", "not_finite")
        return answer

    def _warn_once(self, error: RewardError) -> None:
        if error.kind not in self._warned:
            self._warned.add(error.kind)
            logger.warning("%s; the episode is left out, as all such ones (rewards/failed_%s)", error, error.kind)


def _load_inline(config: RewardConfig) -> Reward:
    try:
        return load_reward(config.name, config.args)
    except UserError as error:
        raise UserError(f"the reward {config.name} cannot be loaded: {error.message}", error.hint) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"the reward {config.name} cannot be loaded: {error}", "check its args") from None
