"""SFT mixed into RL: documents of examples beside those of a step's episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from forge_hpc.config.schema import SFTMixConfig
from forge_hpc.data.prompts import DocumentStream
from forge_hpc.data.types import Document


class SFTMix:
    """Each step is minimised on L + coef * mean( -log pi(token) ), L being the loss on the episodes and the mean that
    over the trained tokens of ``algorithm.sft.documents`` examples.

    To the loss on the episodes these have no trained token. Their column ``sft`` has what the trainers weigh each of
    their tokens by, coef over the number of them: see ``TrainEngine``.
    """

    def __init__(self, stream: DocumentStream, config: SFTMixConfig) -> None:
        self._stream, self._config = stream, config

    def make_ahead(self) -> None:
        """Begin to make the examples of the next step."""
        self._stream.make_ahead(self._config.documents)

    def close(self) -> None:
        """End what makes them."""
        self._stream.close()

    def mix(self, documents: Sequence[Document]) -> list[Document]:
        """The step's documents, and the next examples behind them."""
        examples = self._stream.take(self._config.documents)
        weight = self._config.coef / sum(int(np.count_nonzero(example.loss_mask[1:])) for example in examples)
        own = [replace(document, columns={**document.columns, "sft": 0.0}) for document in documents]
        return [*own, *(_beside(documents[0], example, weight) for example in examples)]

    def state_dict(self) -> dict[str, Any]:
        """Where the examples stand. JSON can hold it."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Go on there."""
        self._stream.load_state_dict(state)
        return self


def _beside(episode: Document, example: Document, weight: float) -> Document:
    """An example with the fields and columns of an episode's document, for one batch has the same of all."""
    none = np.zeros(len(example.token_ids), dtype=np.float32)
    return replace(
        example,
        loss_mask=np.zeros(len(example.token_ids), dtype=bool),
        generator_logprobs=None if episode.generator_logprobs is None else none,
        columns=dict.fromkeys(episode.columns, 0.0) | {"sft": weight * example.loss_mask},
    )
