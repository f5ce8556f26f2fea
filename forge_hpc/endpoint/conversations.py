"""What was said and sampled in one episode: a tree of token sequences, and the documents that it makes.

A request whose messages begin with those of an earlier one and the response to it goes on from that response's own
tokens. One that does not, because the client has edited its past or asks something else, begins a branch of its own.

    opening ─► response ─► result ─► response          one branch: every response is trained on, once
                      └──► another ─► response         a second one; what it shares with the first is context there
    summary of it ───────► response                    a third one, from a fresh rendering
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forge_hpc.data.types import Completion, joined_routes


@dataclass(eq=False)
class Sampled:
    """A response, and where it was given."""

    context: list[int]
    """Everything before it."""
    completion: Completion
    parent: Sampled | None
    """The response that the context goes on from."""
    num_own: int
    """Tokens of the context before which all is the parent's, its response included; 0 where there is none."""
    is_trained: bool
    """Whether it was drawn from the distribution that the trainer knows."""
    said: list[dict[str, Any]] = field(default_factory=list)
    """For people: the messages since the parent's response, and this one."""
    children: list[Sampled] = field(default_factory=list)


class Conversations:
    """Of one episode."""

    def __init__(self) -> None:
        self.sampled: list[Sampled] = []
        """In the order in which they were given."""
        self._by_messages: dict[bytes, Sampled] = {}
        self._by_text: list[tuple[str, Sampled]] = []

    def find_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[Sampled | None, int]:
        """The response that a conversation goes on from, and how many of the messages end with it."""
        found: tuple[Sampled | None, int] = (None, 0)
        for number, key in enumerate(_keys(messages, tools), 1):
            if (sampled := self._by_messages.get(key)) is not None:
                found = sampled, number
        return found

    def find_text(self, prompt: str | list[int]) -> tuple[Sampled | None, int]:
        """The response that a raw prompt goes on from, and how many of its characters, or tokens, end with it."""
        best: tuple[Sampled | None, int] = (None, 0)
        if isinstance(prompt, str):
            for text, sampled in self._by_text:
                if len(text) >= best[1] and prompt.startswith(text):
                    best = sampled, len(text)
            return best
        for sampled in self.sampled:
            size = len(sampled.context) + len(sampled.completion.token_ids)
            if size >= best[1] and prompt[:size] == sampled.context + sampled.completion.token_ids:
                best = sampled, size
        return best

    def add(self, sampled: Sampled) -> None:
        """Keep a response that the client has been given."""
        self.sampled.append(sampled)
        if sampled.parent is not None:
            sampled.parent.children.append(sampled)

    def remove(self, sampled: Sampled) -> None:
        """The client has hung up before it had the response: nothing that happened follows from it."""
        if sampled.children or sampled not in self.sampled:
            return
        self.sampled.remove(sampled)
        if sampled.parent is not None:
            sampled.parent.children.remove(sampled)
        self._by_messages = {key: other for key, other in self._by_messages.items() if other is not sampled}
        self._by_text = [(text, other) for text, other in self._by_text if other is not sampled]

    def answers_chat(
        self,
        sampled: Sampled,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        answer: Mapping[str, Any],
    ) -> None:
        """A response was told to the client as the message ``answer``: conversations that say so go on from it."""
        *_, key = _keys([*messages, answer], tools)
        self._by_messages[key] = sampled

    def answers_text(self, sampled: Sampled, prompt: str, text: str) -> None:
        """The same of a raw prompt."""
        self._by_text.append((prompt + text, sampled))

    def branches(self, sample_index: int) -> list[Branch]:
        """The sequences to train on, the one that began first at the front; each sampled token is trained in one."""
        taken: set[int] = set()
        found = []
        for leaf in (sampled for sampled in self.sampled if not sampled.children):
            path: list[Sampled] = [leaf]
            while path[0].parent is not None:
                path.insert(0, path[0].parent)
            if (branch := _branch(path, taken, sample_index)) is not None:
                found.append((self.sampled.index(path[0]), branch))
            taken.update(map(id, path))
        return [branch for _, branch in sorted(found, key=lambda item: item[0])]


class NothingKept(Conversations):
    """Of whoever asks a model that is not trained: each request stands for itself, and its tokens are counted."""

    def __init__(self) -> None:
        super().__init__()
        self._counts = (0, 0)

    def take_counts(self) -> tuple[int, int]:
        """Tokens of prompts and of responses since the last call; a prompt counts once for each of its choices."""
        counts, self._counts = self._counts, (0, 0)
        return counts

    def add(self, sampled: Sampled) -> None:
        num_prompt, num_generated = self._counts
        self._counts = num_prompt + len(sampled.context), num_generated + sampled.completion.num_tokens

    def answers_chat(self, *_: Any, **__: Any) -> None: ...

    def answers_text(self, *_: Any, **__: Any) -> None: ...


@dataclass
class Branch:
    """A sequence to train on."""

    opening: list[int]
    """Up to its first response."""
    completion: Completion
    said: list[dict[str, Any]]


def _branch(path: Sequence[Sampled], taken: set[int], sample_index: int) -> Branch | None:
    """The tokens from the root of a tree to a leaf; None where nothing of it is to be trained."""
    trained = [sampled for sampled in path if sampled.is_trained and id(sampled) not in taken]
    if not any(sampled.completion.token_ids for sampled in trained):
        return None
    opening, last = path[0].context, path[-1].completion
    token_ids: list[int] = []
    logprobs: list[float] = []
    mask: list[bool] = []
    for sampled in path:
        between = sampled.context[sampled.num_own :] if sampled.parent is not None else []
        token_ids += between
        logprobs += [0.0] * len(between)
        mask += [False] * len(between)
        is_trained = sampled in trained
        own = sampled.completion
        token_ids += own.token_ids
        logprobs += own.logprobs if is_trained else [0.0] * len(own.token_ids)
        mask += [is_trained] * len(own.token_ids)
    end = len(mask) - mask[::-1].index(True)  # what comes behind is in no loss
    token_ids, logprobs, mask = token_ids[:end], logprobs[:end], mask[:end]
    versions = [version for sampled in path for version in sampled.completion.policy_versions]
    routes = joined_routes(sampled.completion for sampled in path)
    completion = Completion(
        sample_index,
        last.text,
        token_ids,
        logprobs,
        last.finish_reason,
        (min(versions), max(versions)),
        loss_mask=mask,
        routes=None if routes is None else routes[: len(opening) + end - 1],
    )
    return Branch(opening, completion, [message for sampled in path for message in sampled.said])


def _keys(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """What identifies the first 1, 2, … messages: those that say the same have the same key."""
    key, keys = hashlib.blake2b(_json(tools), digest_size=16).digest(), []
    for message in messages:
        key = hashlib.blake2b(key + _json(_said(message)), digest_size=16).digest()
        keys.append(key)
    return keys


def _said(message: Mapping[str, Any]) -> list[Any]:
    """What a message says. Clients write messages anew: names of calls and space around a response may differ."""
    content, is_response = message["content"], message["role"] == "assistant"
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return [message["role"], content.strip() if is_response else content, calls]


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
