"""From values per token to the step's means: sequences in padded or packed rows, and what a loss is a mean over."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from forge_hpc.config.registry import NORMALIZATIONS as NORMALIZATIONS


class Sequences:
    """The sequences in rows of tokens [B, T].

    Args:
        mask: [B, T], True, or any number but 0, where a token is trained.
        segment_ids: [B, T] integers from 0 to T: slots of a row with the same number belong to one sequence, in any
            order and anywhere in the row. What is padding does not matter, nothing of it is trained. None: each row is
            one sequence. A sequence lies in one row, as ``forge_hpc.data.packing`` puts it, so what is said of it needs
            no other microbatch and no other rank. With ``group_ids`` in their place it is the same of groups.

    Raises:
        ValueError: a number above T (on the CPU; a GPU is not waited for).
    """

    def __init__(self, mask: torch.Tensor, segment_ids: torch.Tensor | None = None) -> None:
        self.mask = mask.bool()
        self.segment_ids = segment_ids
        if segment_ids is not None and segment_ids.device.type == "cpu" and (segment_ids > self.mask.shape[1]).any():
            raise ValueError(f"segment_ids go up to {int(segment_ids.max())}, in rows of {self.mask.shape[1]} tokens")

    @property
    def num_trained(self) -> torch.Tensor:
        """Sequences with a trained token: a scalar."""
        return (self._counts > 0).sum()

    @property
    def lengths(self) -> torch.Tensor:
        """[B, T]: trained tokens of each slot's sequence, at least 1."""
        return self._counts.clamp(min=1)[self._index]

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """[S]: the sum of ``values`` over the trained tokens of each sequence that has one. Differentiable."""
        return self._totals(torch.where(self.mask, values, 0))[self._counts > 0]

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """[B, T]: the sum of ``values`` over the trained tokens of each slot's sequence. Differentiable."""
        return self._totals(torch.where(self.mask, values, 0))[self._index]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """[B, T]: the mean of ``values`` over the trained tokens of each slot's sequence. Differentiable."""
        return self.total(values) / self.lengths

    @cached_property
    def _index(self) -> torch.Tensor:
        """[B, T]: a number for each sequence of the batch."""
        rows = torch.arange(self.mask.shape[0], device=self.mask.device)[:, None]
        if self.segment_ids is None:
            return rows.expand_as(self.mask)
        return rows * (self.mask.shape[1] + 1) + self.segment_ids

    @cached_property
    def _counts(self) -> torch.Tensor:
        """Trained tokens by that number."""
        return self._totals(self.mask.float())

    def _totals(self, values: torch.Tensor) -> torch.Tensor:
        # As many numbers as there can be: how many there are, the host would wait for the device to say.
        rows, slots = self.mask.shape
        num_numbers = rows if self.segment_ids is None else rows * (slots + 1)
        return values.new_zeros(num_numbers).index_add(0, self._index.flatten(), values.flatten())


@dataclass(frozen=True)
class StepMean:
    """A microbatch's share of a mean over the step: the shares of all microbatches and ranks add up to it."""

    mask: torch.Tensor
    divisors: torch.Tensor | float
    normalizer: torch.Tensor | float

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """``values``: [B, T]. Returns a scalar."""
        # where, not a product: padding may hold anything, and 0 * inf is NaN
        return torch.where(self.mask, values / self.divisors, 0).sum() / self.normalizer


def step_means(
    sequences: Sequences, normalization: str, max_tokens: int, normalizer: torch.Tensor | float | None
) -> tuple[StepMean, StepMean]:
    """How a loss and how its metrics are averaged.

    With N sequences that have a trained token, sequence i having |o_i| of them, l the loss of a token:

        token      1 / (|o_1| + ... + |o_N|) * sum_i sum_t l_it      every token counts the same
        sequence   1 / N * sum_i 1 / |o_i| * sum_t l_it              every sequence counts the same
        constant   1 / N * sum_i 1 / max_tokens * sum_t l_it         no sequence is weighted by its length

    Args:
        normalizer: the sum of all |o_i| of the step (token), or its N (sequence, constant): see ``step_normalizer``.
            None: those of this call.

    Returns:
        The mean for the loss and the one for metrics. They differ for ``constant`` alone, whose metrics are means over
        the sequences: a mean ratio or a clip fraction over a constant would be neither.
    """
    mask = sequences.mask
    if normalization == "token":
        mean = StepMean(mask, 1.0, mask.sum().clamp(min=1) if normalizer is None else normalizer)
        return mean, mean
    normalizer = sequences.num_trained.clamp(min=1) if normalizer is None else normalizer
    mean = StepMean(mask, sequences.lengths, normalizer)
    return (mean if normalization == "sequence" else StepMean(mask, max_tokens, normalizer)), mean


def step_normalizer(loss_fn: Any, num_tokens: int, num_sequences: int, num_groups: int | None = None) -> int:
    """The ``normalizer`` to call a loss with, from the step's trained tokens, sequences and groups on all ranks.

    The loss says which by its attribute ``normalization``; one that has none is a mean over tokens.
    """
    normalization = getattr(loss_fn, "normalization", "token")
    if normalization == "group":
        return num_sequences if num_groups is None else num_groups
    return num_tokens if normalization == "token" else num_sequences
