"""How far generator and trainer may be apart on the tokens that the one sampled and the other trains on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from forge_hpc.config import Config
from forge_hpc.data.types import Document

ROUNDING = {"float32": 1e-4, "bfloat16": 0.05}
"""Nats that rounding explains, in the coarser of the dtypes that the two compute in.

Healthy runs show, in the mean of a step: float32 on the CPU 1e-7 to 1e-5 (synchronous, with LoRA, with environments);
bfloat16 0.002 and 0.015 (trained, and random weights, 0.3 M parameters), 0.0075 (Qwen3 0.6B), 0.0078 (the same under
tensor parallelism 2). Other weights show 1 and more: a few nats.
"""
ALIKE = 1e-6
"""Nats that rounding explains where both sides have the same kernels (``model.batch_invariant``): 0 was measured."""
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
        is_coarser = bool(_COARSER & config.generator.engine.extra.keys())
        dtypes |= {"bfloat16"} if is_coarser else set()
        coarsest = "bfloat16" if "bfloat16" in dtypes else "float32"
        rounding = ROUNDING[coarsest] * (CUDA_FLOAT32 if on_cuda and coarsest == "float32" else 1)
        # A lower temperature divides the errors of logits too, and leaves fewer tokens in doubt: 0.025 at 0.5, 0.075 at
        # 0.1, 0.18 at 0.02 in bfloat16, where it is 0.015 at 1.
        self._rounding = rounding / math.sqrt(min(1.0, config.rollout.sampling.temperature or 1.0))
        self._explained = ALIKE if config.model.batch_invariant and not is_coarser else self._rounding
        self._max_staleness = config.rollout.max_staleness
        self._optimizer_steps = config.algorithm.minibatches * config.algorithm.epochs  # of a step
        self._warn = warn
        self.num_steps = 0
        """Steps of this start whose mismatch was not explained."""

    def bounds(self, step: int, documents: Sequence[Document]) -> MismatchBounds:
        """Those of a step on documents. One whose policy version is not known is taken to be as old as may be."""
        versions = [document.policy_version for document in documents]
        ages = [self._max_staleness if version is None else step - 1 - version for version in versions]
        moved = MOVEMENT * math.sqrt(max([0, *ages]) * self._optimizer_steps)
        return MismatchBounds(self._explained + moved, BEYOND * self._rounding + 2 * moved)

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
