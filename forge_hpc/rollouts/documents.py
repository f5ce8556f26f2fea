"""From groups to documents: the episodes of a step are compared, and become what the trainers take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forge_hpc.advantages import StepAdvantage
from forge_hpc.data.types import Completion, Document, Episode, Group


def set_advantages(groups: Sequence[Group], advantage: StepAdvantage) -> None:
    """Compare the rewards of a step's episodes: each gets its advantage."""
    groups = [group for group in groups if group.episodes]
    advantages = advantage([[episode.reward for episode in group.episodes] for group in groups])
    for group, values in zip(groups, advantages, strict=True):
        for episode, value in zip(group.episodes, values, strict=True):
            episode.advantage = float(value)


def to_documents(groups: Sequence[Group], *, drop_zero_signal: bool = False) -> list[Document]:
    """The episodes of a step as documents.

    With ``drop_zero_signal`` without groups whose advantages are all zero. Where no group carries a signal all are
    kept: the step measures them and trains on none.
    """
    kept = [group for group in groups if any(episode.advantage != 0 for episode in group.episodes)]
    if not kept or not drop_zero_signal:
        kept = [group for group in groups if group.episodes]
    return [document for group in kept for episode in group.episodes for document in documents_of(episode)]


def documents_of(episode: Episode) -> list[Document]:
    """One document, and of an agent one more for each further branch of its conversations."""
    return [to_document(episode), *(_document(episode, [], branch) for branch in episode.branches)]


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
