"""What flows through the loop: prompts become completions, completions episodes, episodes documents to train on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(slots=True)
class Prompt:
    """One example of the data, rendered for the model."""

    position: int
    """Place in the run's stream of prompts, from 0; unique in a run, it seeds sampling and routes at staleness 0."""
    text: str
    token_ids: list[int]
    target: str
    fields: dict[str, Any] = field(default_factory=dict)
    """Every other field of the example, handed to rewards."""


@dataclass(slots=True)
class Completion:
    """What the generator sampled for a prompt."""

    sample_index: int
    """Place in its group, from 0."""
    text: str
    token_ids: list[int]
    """Sampled tokens, the end-of-sequence token included where it was sampled."""
    logprobs: list[float]
    """Log-probability of each sampled token in the distribution that it was drawn from."""
    finish_reason: str
    """``stop`` (end of sequence) or ``length``."""
    policy_versions: tuple[int, int]
    """Policy versions that sampled the first and the last token."""


@dataclass(slots=True)
class Episode:
    """A rewarded completion."""

    prompt: Prompt
    completion: Completion
    reward: float
    rewards: dict[str, float] = field(default_factory=dict)
    """The unweighted terms that ``reward`` sums."""
    advantage: float = 0.0

    @property
    def policy_version(self) -> int:
        """Version of the policy that began the episode; staleness counts from it."""
        return self.completion.policy_versions[0]


@dataclass(slots=True)
class Group:
    """All episodes of one prompt; advantages compare within it."""

    prompt: Prompt
    episodes: list[Episode]
    num_failed: int = 0
    """Completions left out because they were bad or their reward failed."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Why: the kind (of RewardError) and the message of each of them."""


@dataclass(slots=True)
class Document:
    """A token sequence to train on, before packing. Arrays have the length L of the sequence."""

    token_ids: np.ndarray
    """[L] int32: prompt and response."""
    loss_mask: np.ndarray
    """[L] bool: True at the tokens whose prediction is trained (the response's)."""
    generator_logprobs: np.ndarray | None = None
    """[L] float32: the generator's log-probabilities at the masked tokens, 0 elsewhere; None in SFT."""
    advantage: float = 0.0
    ref_logprobs: np.ndarray | None = None
    """[L] float32: the reference model's log-probabilities at the masked tokens, 0 elsewhere."""
