"""What must hold at every step, or the run fails with the cause instead of learning nonsense."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from forge_hpc.config import Config
from forge_hpc.data.types import Document, Group
from forge_hpc.recipes.rollouts import unequal_openings

logger = logging.getLogger(__name__)
MAX_MISMATCH = 1e-4
"""Largest mean |log-probability of the generator - of the trainer| in float32, same weights; measured 1e-7 to 1e-5."""


class SignalWatch:
    """Ends a run in which no group carries a signal: all rewards in each group equal, nothing to learn from.

    Args:
        num_steps: those without a signal that an earlier start ended with.
    """

    def __init__(self, config: Config, num_steps: int = 0) -> None:
        self._limit = config.algorithm.max_steps_without_signal
        self.num_steps = num_steps
        """Steps without a signal up to now, since the last one that had it."""

    def check(self, step: int, documents: Sequence[Document], metrics: Mapping[str, float]) -> None:
        """Raises RuntimeError after too many steps without a signal."""
        if any(document.advantage != 0 for document in documents):
            self.num_steps = 0
            return
        self.num_steps += 1
        logger.warning("step %d: no group carries a signal (reward/mean %.3f)", step, metrics["reward/mean"])
        if self.num_steps >= self._limit:
            raise RuntimeError(
                f"no learning signal: in the last {self.num_steps} steps all rewards of each group were equal "
                f"(reward/mean {metrics['reward/mean']:.3f}). Is the task too hard or too easy for the model, "
                "or the reward blind to what differs?"
            )


_MAX_QUOTED_CHARS = 100


class EpisodeWatch:
    """Says once each, where the user sees it, what makes the figures of a run mean little.

    Args:
        warn: shows a line (``MetricLogger.warn``).
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._said: set[str] = set()

    def check(self, step: int, groups: Sequence[Group]) -> None:
        """Look at the groups of a step: whether most episodes were lost, and whether each group is one task."""
        num_failed = sum(group.num_failed for group in groups)
        num = num_failed + sum(len(group.episodes) for group in groups)
        if 2 * num_failed > num:
            causes = [message for group in groups for _, message in group.failures]
            cause = f", the last one because of: {causes[-1]}" if causes else ""
            self._say("lost", f"step {step}: {num_failed} of {num} episodes were left out{cause}")
        for group in groups:
            if (openings := unequal_openings(group)) is not None:
                first, second = (_quote(text, openings) for text in openings)
                self._say(
                    "openings",
                    f"step {step}: the episodes of prompt {group.prompt.position} are compared with each other and do "
                    f"not open alike ({first}, {second}): is the task drawn from prompt.seed, and are the "
                    "environment's episodes apart from each other (environment.max_open_episodes=1)?",
                )

    def _say(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._warn(message)


def _quote(text: str, texts: Sequence[str]) -> str:
    """A text from a little before the place where the two differ."""
    same = next((i for i, pair in enumerate(zip(*texts, strict=False)) if len(set(pair)) > 1), min(map(len, texts)))
    start = max(0, same - _MAX_QUOTED_CHARS // 2)
    return ("…" if start else "") + repr(text[start : start + _MAX_QUOTED_CHARS])


def check_mismatch(config: Config, step: int, metrics: Mapping[str, float]) -> None:
    """Generator and trainer must agree on the sampled tokens where nothing but their kernels differs.

    Raises RuntimeError at staleness 0 in float32 on the CPU: weights are stale, or wrong.
    """
    from forge_hpc.models.device import device_type

    exact = config.rollout.max_staleness == 0 and config.model.dtype == "float32" and device_type() == "cpu"
    plain = config.rollout.sampling.top_p == 1 and config.rollout.sampling.top_k in (0, -1)
    mismatch = metrics.get("mismatch/logprob_abs_mean", 0.0)
    if exact and plain and mismatch > MAX_MISMATCH:
        raise RuntimeError(
            f"step {step}: generator and trainer differ by {mismatch:.2e} in the mean log-probability of the sampled "
            f"tokens (at most {MAX_MISMATCH:.0e} is rounding): the generators' weights are stale or wrong"
        )
