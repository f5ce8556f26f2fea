"""What flows through the loop: prompts become completions, completions episodes, episodes documents to train on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np

HELD_OUT = 1 << 30
"""Positions of held-out prompts begin here; those of training, however long the run is, lie below it."""
_SPREAD = 0x278D_DE6D
"""Odd, so that the product with it modulo 2^30 gives each position a number of its own; and near the golden ratio of
2^30, so that any first n positions are spread evenly (Knuth, The Art of Computer Programming 3, 6.4)."""


@dataclass(slots=True)
class Prompt:
    """One example of the data, rendered for the model."""

    position: int
    """Place in the run's stream of prompts, from 0; unique in a run, it seeds sampling and routes at staleness 0. Those
    of held-out prompts begin at ``HELD_OUT``: what is drawn by position is never drawn in training and evaluation."""
    text: str
    token_ids: list[int]
    target: str
    fields: dict[str, Any] = field(default_factory=dict)
    """Every other field of the example, handed to rewards."""
    question: str = ""
    """The example's prompt before it was rendered; environments make their own opening of it."""
    source: str = ""
    """Which of ``config.sources`` it is of: whose environment it opens, and whose rewards judge it."""

    @property
    def seed(self) -> int:
        """What an environment draws its task from, in [0, 2^31): one for each position, held-out prompts from 2^30 on.

        Seeds of a run's positions are far from each other: there are generators whose task of seed s + 1 is the second
        one of seed s.
        """
        return (self.position & HELD_OUT) | (self.position * _SPREAD) % HELD_OUT


@dataclass(slots=True)
class Turn:
    """A request for the next response of an episode."""

    position: int
    """The prompt's."""
    sample_index: int
    """Place of the episode in its group, from 0."""
    turn: int
    """Responses that the episode has already, from 0; the three together seed the sampling."""
    token_ids: list[int]
    """Everything so far: the prompt, what was sampled, and what the environment said."""
    max_tokens: int
    """The response ends here at the latest."""
    num_routed: int = 0
    """Tokens at the beginning whose routes an earlier response has brought: those of this one begin behind them."""


@dataclass(slots=True)
class Completion:
    """What followed a prompt: one response, or with an environment all turns of an episode. L tokens."""

    sample_index: int
    """Place in its group, from 0."""
    text: str
    """The response without the token that ended it, other special tokens included; of several turns the last one."""
    token_ids: list[int]
    """[L]: the sampled tokens, end-of-sequence tokens included where they were sampled; between the turns those of
    the environment. Nothing was decoded and encoded again on the way: these are the tokens that the policy saw."""
    logprobs: list[float]
    """[L]: log-probability of each sampled token in the distribution that it was drawn from; 0 at others."""
    finish_reason: str
    """``stop`` (end of sequence, or a stop string or token; with an environment: it ended the episode), ``length`` (no
    room for more tokens) or ``turns`` (no more turns)."""
    policy_versions: tuple[int, int]
    """Policy versions that sampled the first and the last token."""
    loss_mask: list[bool] | None = None
    """[L]: True where the policy wrote the token. None: it wrote them all."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Empty without an environment, else ``turns`` (number of responses), ``transcript`` (list of ``{role, content}``
    after the prompt) and ``info`` (what the environment's last step added). JSON."""
    routes: np.ndarray | None = field(default=None, compare=False, repr=False)
    """[prompt + L - 1, layers, k], small integers: the experts that computed each token but the last, those of the
    prompt first; with ``algorithm.routing_replay``. Of a turn's response without the first ``Turn.num_routed``."""

    @property
    def num_tokens(self) -> int:
        """L."""
        return len(self.token_ids)

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy wrote."""
        return self.num_tokens if self.loss_mask is None else sum(self.loss_mask)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probabilities, [L] each; not to be changed."""
        return np.asarray(self.token_ids, np.int64), np.asarray(self.logprobs, np.float64)

    def __reduce__(self) -> tuple[Any, ...]:
        rest = (self.finish_reason, self.policy_versions, self.loss_mask, self.metadata, self.routes)
        if self.num_tokens < LONG:
            return Completion, (self.sample_index, self.text, self.token_ids, self.logprobs, *rest)
        return _unpack, (self.sample_index, self.text, *map(_narrow, self.arrays()), *rest)


def joined_routes(responses: Iterable[Completion]) -> np.ndarray | None:
    """Of responses that go on from one another, from the first token to the last one's last but one: each token has the
    experts that computed it first, a response's last token those of the next request. None where there are none."""
    routes = [response.routes for response in responses if response.routes is not None]
    return np.concatenate(routes) if routes else None


LONG = 64
"""Completions of so many tokens travel between processes as arrays; as two lists, 4,096 tokens cost whoever receives
them a millisecond of CPU time."""


class ReceivedCompletion(Completion):
    """A completion that came as arrays. Its lists are made when they are asked for."""

    __slots__ = ("_arrays", "_lists")

    _arrays: tuple[np.ndarray, np.ndarray] | None
    _lists: list[list[Any]]

    def __new__(cls, *_: Any, **__: Any) -> Self:
        self = super().__new__(cls)
        self._arrays, self._lists = None, [[], []]
        return self

    def _made(self) -> list[list[Any]]:
        if self._arrays is not None:  # from here on the lists count: they may be changed
            self._lists, self._arrays = [array.tolist() for array in self._arrays], None
        return self._lists

    @property  # type: ignore[override]
    def token_ids(self) -> list[int]:
        return self._made()[0]

    @token_ids.setter
    def token_ids(self, value: list[int]) -> None:
        self._made()[0] = value

    @property  # type: ignore[override]
    def logprobs(self) -> list[float]:
        return self._made()[1]

    @logprobs.setter
    def logprobs(self, value: list[float]) -> None:
        self._made()[1] = value

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids if self._arrays is None else self._arrays[0])

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return super().arrays() if self._arrays is None else self._arrays

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Completion):
            return NotImplemented
        return all(getattr(self, f.name) == getattr(other, f.name) for f in fields(Completion) if f.compare)

    __hash__ = None  # type: ignore[assignment]


def _unpack(sample_index: int, text: str, ids: np.ndarray, logprobs: np.ndarray, *rest: Any) -> Completion:
    completion = ReceivedCompletion(sample_index, text, [], [], *rest)
    completion._arrays = ids, logprobs
    return completion


def _narrow(values: np.ndarray) -> np.ndarray:
    """The same values in half the bytes, where that loses nothing."""
    with np.errstate(over="ignore"):
        small = values.astype(np.int32 if values.dtype.kind == "i" else np.float32)
    return small if np.array_equal(small, values, equal_nan=values.dtype.kind == "f") else values


@dataclass(slots=True)
class Episode:
    """A rewarded completion."""

    prompt: Prompt
    """What it began with; with an environment, as that opened the episode."""
    completion: Completion
    """Text, tokens, log-probabilities, policy versions, metadata."""
    reward: float
    """What the advantage compares: the weighted sum of ``rewards``."""
    rewards: dict[str, float] = field(default_factory=dict)
    """The unweighted terms that ``reward`` sums."""
    advantage: float = 0.0
    """How much better than the rest of its group."""
    branches: list[Completion] = field(default_factory=list)
    """Of an agent: what it sampled in other conversations than the first one, each from its first token on. What they
    share with it, or with each other, is masked in all but one."""

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy wrote."""
        return self.completion.num_sampled + sum(branch.num_sampled for branch in self.branches)

    @property
    def policy_version(self) -> int:
        """Version of the policy that began the episode; staleness counts from it."""
        return self.completion.policy_versions[0]


@dataclass(slots=True)
class Group:
    """All episodes of one prompt; advantages compare within it."""

    prompt: Prompt
    episodes: list[Episode]
    """Those that have a reward, by ``sample_index``."""
    num_failed: int = 0
    """Completions left out because they were bad, or their environment or their reward failed."""
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Why: the kind (of RewardError) and the message of each of them."""


@dataclass(slots=True)
class Document:
    """A token sequence to train on, before packing. Arrays have the length L of the sequence.

    Example:
        Document(ids, mask, columns={"returns": returns, "chosen": 1.0}, group=7)
    """

    token_ids: np.ndarray
    """[L] int32: prompt and response."""
    loss_mask: np.ndarray
    """[L] bool: True (or a number but 0) at the tokens whose prediction is trained (the response's)."""
    generator_logprobs: np.ndarray | None = None
    """[L] float32: the generator's log-probabilities at the masked tokens, 0 elsewhere; None in SFT."""
    advantage: float = 0.0
    ref_logprobs: np.ndarray | None = None
    """[L] float32: the reference model's log-probabilities at the masked tokens, 0 elsewhere."""
    policy_version: int | None = None
    """Of the policy that began to generate it; None: not known, or not generated."""
    columns: dict[str, np.ndarray | float] = field(default_factory=dict)
    """What else is said of its tokens ([L]) or of all of it (a number), by name: a loss gets those that it names, as
    float32. ``advantages`` here, one a token, takes the place of ``advantage``."""
    group: int | None = None
    """Documents of one number stand in one row, so that a loss sees them together: a pair, say, by its ``group_ids``.
    None: it stands alone."""
    prompt: int | None = None
    """Documents of one number go into one minibatch (``algorithm.minibatches``), since they were compared with each
    other: the position of their prompt. None: it goes by itself, or with its ``group``."""
    old_logprobs: np.ndarray | None = None
    """[L] float32: the policy's log-probabilities before the step, where it takes several optimizer steps and the loss
    takes its ratio against them; the trainers fill it."""
    routes: np.ndarray | None = None
    """[L - 1, layers, k]: the experts that computed each token but the last in the generator, which the trainer takes
    too (``algorithm.routing_replay``)."""
