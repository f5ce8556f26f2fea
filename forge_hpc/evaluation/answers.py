"""The answers of one evaluation as they come: what is kept of them, and how far it is. No actor here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from forge_hpc.data.types import Completion, Episode, Prompt
from forge_hpc.evaluation.figures import Graded

TELL_S = 5.0
"""How often an evaluation says in ``status.json`` how far it is."""


class Answers:
    """Kept for ``RUN_DIR/evaluations/step-N.jsonl``: whole prompts, greedy and sampled answers, up to a bound.

    Args:
        step: whose policy answers.
        num_prompts: of the evaluation.
        num_samples: answers to each of them beside the greedy one.
        limit: answers kept at the most (``logging.num_answers_per_evaluation``).
        show: is told of every answer: how many there are, of how many, and how many are right.
        tell: is told every ``TELL_S`` seconds, in words.
    """

    def __init__(
        self,
        step: int,
        num_prompts: int,
        num_samples: int,
        limit: int,
        show: Callable[[int, int, int], None],
        tell: Callable[[str], None],
    ) -> None:
        self._step = step
        self._total = num_prompts * (1 + num_samples)
        self._num_kept = limit // (1 + num_samples)
        self._show, self._tell, self._told = show, tell, time.monotonic()
        self._records: dict[tuple[int, int], dict[str, Any]] = {}
        self._num_done = self._num_right = 0
        self.has_told = False
        """Whether ``tell`` was called."""

    def add(
        self,
        place: int,
        sample: int | None,
        prompt: Prompt,
        answer: Completion | Episode | Exception,
        graded: Graded,
        rewards: dict[str, float] | None = None,
        read: dict[str, str | None] | None = None,
        error: str | None = None,
    ) -> None:
        """An answer to the prompt at ``place`` has its verdict.

        Args:
            sample: number of a sampled answer; None is the greedy one.
            rewards: the unweighted terms.
            read: what each reward that says so took for the answer, by its label.
            error: why there is no answer, or no reward.
        """
        self._num_done += 1
        self._num_right += graded.right
        self._show(self._num_done, self._total, self._num_right)
        if time.monotonic() - self._told > TELL_S and self._num_done < self._total:
            self._told, self.has_told = time.monotonic(), True
            self._tell(f"evaluating step {self._step}: {self._num_done} of {self._total} answers")
        if place >= self._num_kept:
            return
        record: dict[str, Any] = {"step": self._step, "position": prompt.position, "sample": sample}
        record |= {"source": prompt.source} if prompt.source else {}
        record |= {"prompt": prompt.text, "target": prompt.target, "right": graded.right, "reward": graded.reward}
        if not isinstance(answer, Exception):
            completion = answer.completion if isinstance(answer, Episode) else answer
            record |= {"response": completion.text, "num_tokens": completion.num_sampled}
            record |= {"read": {label: text for label, text in (read or {}).items() if text is not None}}
            record |= {"finish_reason": completion.finish_reason, "rewards": rewards or {}, **completion.metadata}
        if error is not None:
            record["error"] = error
        self._records[place, -1 if sample is None else sample] = record

    def records(self) -> list[dict[str, Any]]:
        """What is kept, in the order of prompts; of each the greedy answer first."""
        return [self._records[key] for key in sorted(self._records)]
