"""Several optimizer steps on the documents of one step: which of them each takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forge_hpc.data.types import Document


def minibatches(
    documents: Sequence[Document], num_minibatches: int, num_epochs: int, seed: Sequence[int]
) -> list[list[Document]]:
    """The minibatches of all epochs, in the order in which they are trained on; equally many in each.

    In every epoch all documents are dealt anew: groups are shuffled, and cut into ``num_minibatches`` whose numbers of
    groups differ by one at most. A group is never cut: the documents of one ``Document.group``, else those of one
    ``Document.prompt``. With fewer groups than minibatches there are as many minibatches as groups.

    Args:
        seed: of the run and the step. What is drawn follows from it and the documents' order alone, so it is the same
            on every rank and after every restart.
    """
    groups: dict[tuple[str, int], list[Document]] = {}
    for index, document in enumerate(documents):
        groups.setdefault(_group_of(index, document), []).append(document)
    units = list(groups.values())
    num_minibatches = min(num_minibatches, len(units))
    if num_minibatches == 1:
        return [list(documents)] * num_epochs
    parts = []
    for epoch in range(num_epochs):
        order = np.random.default_rng([*seed, epoch]).permutation(len(units))
        for chosen in np.array_split(order, num_minibatches):
            parts.append([document for unit in sorted(chosen.tolist()) for document in units[unit]])
    return parts


def _group_of(index: int, document: Document) -> tuple[str, int]:
    if document.group is not None:
        return "group", document.group
    return ("document", index) if document.prompt is None else ("prompt", document.prompt)
