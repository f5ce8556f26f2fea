"""What must hold of a step's rollouts, or the run fails with the cause instead of learning nonsense."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forge_hpc.config import Config
from forge_hpc.data.types import Document, Group
from forge_hpc.rollouts.groups import unequal_openings

logger = logging.getLogger(__name__)


class SignalWatch:
    """Ends a run in which no group carries a signal: all rewards in each group equal, nothing to learn from.

    Args:
        state: the recipe's, with what ``state_dict`` gave to it in an earlier start.
    """

    def __init__(self, config: Config, state: Mapping[str, Any] | None = None) -> None:
        self._limit, state = config.algorithm.max_steps_without_signal, state or {}
        self.num_steps: int = state.get("steps_without_signal", 0)
        """Steps without a signal up to now, since the last one that had it."""
        self.num_in_all: int = state.get("all_steps_without_signal", 0)
        """Steps without a signal of the whole run."""

    def state_dict(self) -> dict[str, Any]:
        """What it has counted, for the recipe's state."""
        return {"steps_without_signal": self.num_steps, "all_steps_without_signal": self.num_in_all}

    def metrics(self) -> dict[str, float]:
        return {"steps/without_signal": self.num_in_all}

    def check(self, step: int, documents: Sequence[Document], metrics: Mapping[str, float]) -> bool:
        """Whether a group carries a signal. Raises RuntimeError after too many steps without one."""
        if any(document.advantage != 0 for document in documents):
            self.num_steps = 0
            return True
        self.num_steps += 1
        self.num_in_all += 1
        # Not at each: there may be thousands.
        if self.num_in_all.bit_count() == 1 or self.num_steps == (self._limit + 1) // 2:
            text = "step %d: no group carries a signal (reward/mean %.3f); %d such steps so far, %d of %d in a row"
            logger.warning(text, step, metrics["reward/mean"], self.num_in_all, self.num_steps, self._limit)
        if self.num_steps >= self._limit:
            raise RuntimeError(
                f"no learning signal: in the last {self.num_steps} steps all rewards of each group were equal "
                f"(reward/mean {metrics['reward/mean']:.3f}). Is the task too hard or too easy for the model, "
                "or the reward blind to what differs?"
            )
        return False


NUM_RECENT, MAX_NOT_FINITE = 100, 0.1
"""Not more than this share of so many completions, or of one step that has more, may be without log-probabilities that
are finite: a run that leaves out single ones learns what it would have learned, one that leaves out many does not."""
_WHY_NOT_FINITE = "Has the model diverged (grad_norm, trainer.optimizer.lr), or is model.dtype too narrow for it?"
_MAX_QUOTED_CHARS = 100


class EpisodeWatch:
    """Says once each, where the user sees it, what makes the figures of a run mean little, and ends one whose
    generators are broken.

    Args:
        warn: shows a line (``MetricLogger.warn``).
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._warned: set[str] = set()
        self._recent: deque[tuple[int, int]] = deque()
        """Of the last steps: completions with log-probabilities that are not finite, and all."""

    def check(self, step: int, groups: Sequence[Group]) -> None:
        """Look at the groups of a step: whether generators gave the log-probabilities of what they sampled, whether
        most episodes were lost, and whether each group is one task.

        Raises RuntimeError where too many log-probabilities are not finite.
        """
        num = sum(group.num_failed + len(group.episodes) for group in groups)
        self._check_logprobs(step, sum(kind == "logprobs" for group in groups for kind, _ in group.failures), num)
        for source in sorted({group.prompt.source for group in groups}):
            self._check_lost(step, source, [group for group in groups if group.prompt.source == source])
        for group in groups:
            if (openings := unequal_openings(group)) is not None:
                first, second = (_quote(text, openings) for text in openings)
                self._warn_once(
                    "openings",
                    f"step {step}: the episodes of prompt {group.prompt.position} are compared with each other and do "
                    f"not open alike ({first}, {second}): is the task drawn from prompt.seed, and are the "
                    "environment's episodes apart from each other (environment.max_open_episodes=1)?",
                )

    def _check_lost(self, step: int, source: str, groups: Sequence[Group]) -> None:
        num_failed = sum(group.num_failed for group in groups)
        num = num_failed + sum(len(group.episodes) for group in groups)
        if 2 * num_failed > num:
            causes = [message for group in groups for _, message in group.failures]
            cause = f", the last one because of: {causes[-1]}" if causes else ""
            of = f" of {source}" if source else ""
            self._warn_once(f"lost{of}", f"step {step}: {num_failed} of {num} episodes{of} were left out{cause}")

    def _check_logprobs(self, step: int, num_bad: int, num: int) -> None:
        self._recent.append((num_bad, num))
        while sum(num for _, num in self._recent) - self._recent[0][1] >= NUM_RECENT:
            self._recent.popleft()
        all_bad, in_all = (sum(counts) for counts in zip(*self._recent, strict=True))
        if in_all >= NUM_RECENT and all_bad > MAX_NOT_FINITE * in_all:
            raise RuntimeError(
                f"step {step}: of the last {in_all} completions {all_bad} have log-probabilities from their generator "
                f"that are not finite. {_WHY_NOT_FINITE}"
            )
        if num_bad:
            self._warn_once(
                "logprobs",
                f"step {step}: {num_bad} of {num} completions have log-probabilities from their generator that are not "
                f"finite, and are left out, as all such ones (rewards/failed_logprobs). {_WHY_NOT_FINITE}",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(message)


def _quote(text: str, texts: Sequence[str]) -> str:
    """A text from a little before the place where the two differ."""
    same = next((i for i, pair in enumerate(zip(*texts, strict=False)) if len(set(pair)) > 1), min(map(len, texts)))
    start = max(0, same - _MAX_QUOTED_CHARS // 2)
    return ("…" if start else "") + repr(text[start : start + _MAX_QUOTED_CHARS])
