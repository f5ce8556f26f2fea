"""What must hold at every step, or the run fails with the cause instead of learning nonsense."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from forge_hpc.config import Config
from forge_hpc.data.types import Document

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
