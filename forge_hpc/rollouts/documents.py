"""From groups to documents: the episodes of a step are compared, and become what the trainers take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from forge_hpc.advantages import StepAdvantage, Terms
from forge_hpc.data.types import Completion, Document, Episode, Group

Weights = Mapping[str, Mapping[str, float]]
"""Of the rewards of each source by their labels: ``config.rewards.reward_weights``."""


def set_advantages(groups: Sequence[Group], advantage: StepAdvantage, weights: Weights | None = None) -> None:
    """Compare the rewards of a step's episodes: each gets its advantage.

    Raises:
        ValueError: the advantage compares rewards apart, and ``weights`` are not given.
    """
    groups = [group for group in groups if group.episodes]
    if getattr(advantage, "sees_terms", False):
        if weights is None:
            raise ValueError("the advantage compares rewards apart: give their config.rewards.reward_weights too")
        advantages = advantage([_terms(group, weights[group.prompt.source]) for group in groups])
    else:
        advantages = advantage([[episode.reward for episode in group.episodes] for group in groups])
    for group, values in zip(groups, advantages, strict=True):
        for episode, value in zip(group.episodes, values, strict=True):
            episode.advantage = float(value)


def _terms(group: Group, weights: Mapping[str, float]) -> Terms:
    """Its rewards apart. What an episode did not get counts 0, as in the sum."""
    return {
        label: (weight, [episode.rewards.get(label, 0.0) for episode in group.episodes])
        for label, weight in weights.items()
    }


def to_documents(
    groups: Sequence[Group], *, drop_zero_signal: bool = False, drop_truncated: bool = False
) -> list[Document]:
    """The episodes of a step as documents.

    With ``drop_zero_signal`` without groups whose advantages are all zero, with ``drop_truncated`` without what a limit
    on tokens cut off. Where nothing is left that carries a signal all are kept, with no advantage: the step measures
    them and trains on none.
    """
    signals = [group for group in groups if any(episode.advantage != 0 for episode in group.episodes)]
    kept = signals if drop_zero_signal else groups
    documents = [d for group in kept for episode in group.episodes for d in documents_of(episode, drop_truncated)]
    if any(document.advantage != 0 for document in documents) or (documents and not drop_zero_signal):
        return documents
    every = [document for group in groups for episode in group.episodes for document in documents_of(episode)]
    return [replace(document, advantage=0.0) for document in every]


def documents_of(episode: Episode, drop_truncated: bool = False) -> list[Document]:
    """One document, and of an agent one more for each further branch of its conversations; with ``drop_truncated`` of
    those alone that no limit on tokens cut off."""
    parts: list[tuple[list[int], Completion]] = [
        (episode.prompt.token_ids, episode.completion),
        *(([], branch) for branch in episode.branches),
    ]
    return [
        _document(episode, prompt, completion)
        for prompt, completion in parts
        if not (drop_truncated and completion.finish_reason == "length")
    ]


def to_document(episode: Episode) -> Document:
    """Prompt and response; what the policy wrote of it is trained. Without an agent's further branches."""
    return _document(episode, episode.prompt.token_ids, episode.completion)


def _document(episode: Episode, prompt: list[int], completion: Completion) -> Document:
    response, sampled_logprobs = completion.arrays()
    token_ids = np.empty(len(prompt) + len(response), dtype=np.int32)
    token_ids[: len(prompt)], token_ids[len(prompt) :] = prompt, response
    logprobs = np.zeros(len(token_ids), dtype=np.float32)
    logprobs[len(prompt) :] = sampled_logprobs
    loss_mask = np.arange(len(token_ids)) >= len(prompt)
    if completion.loss_mask is not None:
        loss_mask[len(prompt) :] = completion.loss_mask
    return Document(
        token_ids=token_ids,
        loss_mask=loss_mask,
        generator_logprobs=logprobs,
        advantage=episode.advantage,
        policy_version=completion.policy_versions[0],
        prompt=episode.prompt.position,
        routes=completion.routes,
    )
