"""A data set of reasoning-gym as an environment of one turn: its question follows from the prompt's seed."""

from __future__ import annotations

import inspect
import re
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.data.types import Prompt
from forge_hpc.environments.base import Response, Step

INSTRUCTIONS = "\n\nWrite your final answer between <answer> and </answer>."
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_RUNS_ANSWERS = re.compile(r"\beval\(answer\b")
"""In 0.1.25 some scorers read a list by evaluating it."""


class ReasoningGym:
    """A question of one of reasoning-gym's data sets; the last ``<answer>``, or else the whole response, is scored.

    Args:
        dataset: its name: ``chain_sum``, ``spell_backward``, …
        config: keyword arguments of ``reasoning_gym.create_dataset`` beside ``size`` and ``seed``.
        instructions: put after the question.
        runs_answers: takes data sets, too, whose scorer evaluates what the policy wrote as Python: as you, in the
            process of the environment, outside of the sandbox.
    """

    def __init__(
        self,
        dataset: str,
        config: dict[str, Any] | None = None,
        instructions: str = INSTRUCTIONS,
        runs_answers: bool = False,
    ) -> None:
        try:
            import reasoning_gym
        except ImportError as error:
            raise UserError(
                f"reasoning-gym cannot be imported: {error}",
                "pip install reasoning-gym, here or in a virtual environment that environment.venv names",
            ) from None
        self._make, self._name, self._config = reasoning_gym.create_dataset, dataset, config or {}
        self._instructions = instructions
        try:
            scorer = type(self._make(dataset, seed=0, size=1, **self._config)).score_answer
        except (AssertionError, TypeError, ValueError) as error:
            raise UserError(f"reasoning-gym's {dataset!r} cannot be made: {error}", "see args of environment") from None
        if _RUNS_ANSWERS.search(inspect.getsource(scorer)) and not runs_answers:
            raise UserError(
                f"the scorer of reasoning-gym's {dataset!r} runs what the policy answers as Python, as you",
                "choose another data set, or say that you want it: args.runs_answers=true",
            )

    async def reset(self, prompt: Prompt) -> str:
        self._data = self._make(self._name, seed=prompt.seed, size=1, **self._config)
        self._item = self._data[0]
        return f"{self._item['question']}{self._instructions}"

    async def step(self, response: Response) -> Step:
        answer = (_ANSWER.findall(response) or [response])[-1].strip()
        score = float(self._data.score_answer(answer=answer, entry=self._item))
        return Step(reward=score, done=True, info={"answer": answer, "target": str(self._item["answer"])})

    async def close(self) -> None:
        pass
