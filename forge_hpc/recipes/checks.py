"""What must hold at every step, or the run fails with the cause instead of learning nonsense."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from forge_hpc.config import Config
from forge_hpc.data.types import Document

logger = logging.getLogger(__name__)

ROUNDING = {"float32": 1e-4, "bfloat16": 0.05}
"""Nats that rounding explains at temperature 1 or above, in the coarser of the dtypes that the two compute in."""
CUDA_FLOAT32 = 10
"""On CUDA, float32 may be multiplied in TF32, with three decimal digits: so many times as much."""
MOVEMENT = 0.2
"""Nats that an optimizer step explains: PPO's clip at its usual 0.2 keeps a token's ratio within it."""
MAX_STEPS = 5
"""Beyond so many steps staleness explains no more: a policy that moves further has no use for such old samples."""
BEYOND = 10
"""A mismatch so many times as large as rounding explains, beside what the steps explain, ends the run."""


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
        # Errors of logits are divided by the temperature as they are; a temperature of 0 takes no step.
        self._rounding = rounding / min(1.0, config.rollout.sampling.temperature or 1.0)
        self._max_staleness = config.rollout.max_staleness
        self._warn = warn
        self.num_steps = 0
        """Steps of this start whose mismatch was not explained."""

    def bounds(self, step: int, documents: Sequence[Document]) -> MismatchBounds:
        """Those of a step on documents. One whose policy version is not known is taken to be as old as may be."""
        versions = [document.policy_version for document in documents]
        ages = [self._max_staleness if version is None else step - 1 - version for version in versions]
        moved = MOVEMENT * min(max(ages, default=0), MAX_STEPS)
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
        num_steps: those without a signal that an earlier start ended with.
        num_in_all: those of all earlier starts.
    """

    def __init__(self, config: Config, num_steps: int = 0, num_in_all: int = 0) -> None:
        self._limit = config.algorithm.max_steps_without_signal
        self.num_steps = num_steps
        """Steps without a signal up to now, since the last one that had it."""
        self.num_in_all = num_in_all
        """Steps without a signal of the whole run."""

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
