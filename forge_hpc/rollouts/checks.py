"""What must hold at every step, or the run fails with the cause instead of learning nonsense."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from forge_hpc.config import Config
from forge_hpc.data.types import Document, Group
from forge_hpc.rollouts.groups import unequal_openings

logger = logging.getLogger(__name__)

ROUNDING = {"float32": 1e-4, "bfloat16": 0.05}
"""Nats that rounding explains, in the coarser of the dtypes that the two compute in.

Healthy runs show, in the mean of a step: float32 on the CPU 1e-7 to 1e-5 (synchronous, with LoRA, with environments);
bfloat16 0.002 and 0.015 (trained, and random weights, 0.3 M parameters), 0.0075 (Qwen3 0.6B), 0.0078 (the same under
tensor parallelism 2). Other weights show 1 and more: a few nats.
"""
CUDA_FLOAT32 = 10
"""On CUDA, float32 may be multiplied in TF32, with three decimal digits: so many times as much. Not measured."""
MOVEMENT = 0.5
"""Nats that an optimizer step explains; s steps explain sqrt(s) times as much, as those of a random walk do.

Measured at a learning rate of 1e-3 and random weights, where a policy moves fastest: 0.32 after one step, 0.44 after
two, 0.53 after four. PPO's clip at its usual 0.2 ends the pull on a token at 0.2.
"""
BEYOND = 10
"""A mismatch so many times as large as rounding explains ends the run; of what the steps explain, twice as much."""


class MismatchBounds(NamedTuple):
    """Of a step's mean |log-probability of the generator - of the trainer| over the sampled tokens, nats."""

    explained: float
    """What rounding and staleness explain; more is warned of."""
    largest: float
    """More ends the run: whatever moved, these are not samples of the policy."""


class MismatchWatch:
    """Judges how far generator and trainer are apart on the sampled tokens, which rounding and staleness keep small.

    Args:
        on_cuda: whether they compute there.
        warn: shows the user a line.
    """

    def __init__(self, config: Config, on_cuda: bool, warn: Callable[[str], None]) -> None:
        dtypes = {config.model.dtype, config.trainer.training.mixed_precision_param if on_cuda else "float32"}
        dtypes |= {"bfloat16"} if _COARSER & config.generator.engine.extra.keys() else set()
        coarsest = "bfloat16" if "bfloat16" in dtypes else "float32"
        rounding = ROUNDING[coarsest] * (CUDA_FLOAT32 if on_cuda and coarsest == "float32" else 1)
        # A lower temperature divides the errors of logits too, and leaves fewer tokens in doubt: 0.025 at 0.5, 0.075 at
        # 0.1, 0.18 at 0.02 in bfloat16, where it is 0.015 at 1.
        self._rounding = rounding / math.sqrt(min(1.0, config.rollout.sampling.temperature or 1.0))
        self._max_staleness = config.rollout.max_staleness
        self._warn = warn
        self.num_steps = 0
        """Steps of this start whose mismatch was not explained."""

    def bounds(self, step: int, documents: Sequence[Document]) -> MismatchBounds:
        """Those of a step on documents. One whose policy version is not known is taken to be as old as may be."""
        versions = [document.policy_version for document in documents]
        ages = [self._max_staleness if version is None else step - 1 - version for version in versions]
        moved = MOVEMENT * math.sqrt(max([0, *ages]))
        return MismatchBounds(self._rounding + moved, BEYOND * self._rounding + 2 * moved)

    def check(self, step: int, metrics: Mapping[str, float], bounds: MismatchBounds) -> None:
        """Warn of a step that was taken: the first time, the second, the fourth and so on."""
        mismatch = metrics.get("mismatch/logprob_abs_mean", 0.0)
        if mismatch <= bounds.explained:
            return
        self.num_steps += 1
        if self.num_steps & (self.num_steps - 1) == 0:
            self._warn(
                f"step {step}: generator and trainer differ by {mismatch:.2g} nats in the mean log-probability of the "
                f"sampled tokens; rounding and staleness explain {bounds.explained:.2g} ({self.num_steps} such steps). "
                "algorithm.mismatch corrects for it"
            )


_COARSER = {"dtype", "quantization", "kv_cache_dtype"}
"""Arguments of vLLM that make the engine round more than ``model.dtype`` does."""


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
        logger.warning("step %d: no group carries a signal (reward/mean %.3f)", step, metrics["reward/mean"])
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
        num_failed = sum(group.num_failed for group in groups)
        num = num_failed + sum(len(group.episodes) for group in groups)
        self._check_logprobs(step, sum(kind == "logprobs" for group in groups for kind, _ in group.failures), num)
        if 2 * num_failed > num:
            causes = [message for group in groups for _, message in group.failures]
            cause = f", the last one because of: {causes[-1]}" if causes else ""
            self._warn_once("lost", f"step {step}: {num_failed} of {num} episodes were left out{cause}")
        for group in groups:
            if (openings := unequal_openings(group)) is not None:
                first, second = (_quote(text, openings) for text in openings)
                self._warn_once(
                    "openings",
                    f"step {step}: the episodes of prompt {group.prompt.position} are compared with each other and do "
                    f"not open alike ({first}, {second}): is the task drawn from prompt.seed, and are the "
                    "environment's episodes apart from each other (environment.max_open_episodes=1)?",
                )

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
