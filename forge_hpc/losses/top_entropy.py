"""A policy loss on the tokens alone where the policy was in doubt (https://arxiv.org/abs/2506.01939)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def entropy_threshold(entropies: Sequence[np.ndarray], masks: Sequence[np.ndarray], quantile: float) -> float:
    """The smallest entropy of the tokens that are learned from.

    Of the N trained tokens of a whole step, on all ranks, those with the 1 + floor(quantile (N - 1)) largest entropies
    are, and all others that are equal to the smallest of these. So it depends neither on rows nor on microbatches.

    Args:
        entropies: of the distribution at each token of a document, [L], for all documents of the step.
        masks: where it is trained, [L]: True, or any number but 0.
        quantile: above 0, at most 1, which leaves none out. The paper's is 0.2.

    Returns:
        Nats; 0 where no token is trained.
    """
    found = np.concatenate([values[np.asarray(mask) != 0] for values, mask in zip(entropies, masks, strict=True)])
    if not len(found):
        return 0.0
    smallest = len(found) - 1 - int(quantile * (len(found) - 1))
    return float(np.partition(found, smallest)[smallest])
