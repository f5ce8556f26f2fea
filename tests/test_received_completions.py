"""Completions on their way from a generator: as arrays, and for whoever asks the lists that they were."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest

from forge_hpc.data.types import LONG, Completion, Episode, Prompt, ReceivedCompletion
from forge_hpc.rollouts.documents import to_document

PROMPT = Prompt(0, "1+1=", [1, 2, 3], "2")


def completion(num_tokens: int, **values: object) -> Completion:
    rng = np.random.default_rng(num_tokens)
    logprobs = (-rng.random(num_tokens)).astype(np.float32).tolist()
    return dataclasses.replace(
        Completion(3, "said", rng.integers(0, 150_000, num_tokens).tolist(), logprobs, "length", (4, 5)), **values
    )


def received(sent: Completion) -> Completion:
    return pickle.loads(pickle.dumps(sent))


@pytest.mark.parametrize(
    "sent",
    [
        completion(LONG - 1),
        completion(LONG),
        completion(300, metadata={"turns": 2}, loss_mask=[True, False] * 150),
        completion(70, token_ids=[2**40, *range(69)], logprobs=[0.1, -math.inf, *[-1.0] * 68]),  # no int32, no float32
    ],
    ids=["short", "long", "of several turns", "wide"],
)
def test_a_completion_arrives_as_it_was_sent_to_the_last_bit(sent: Completion) -> None:
    got = received(sent)
    assert isinstance(got, ReceivedCompletion) == (sent.num_tokens >= LONG)
    assert got.num_tokens == sent.num_tokens and got.num_sampled == sent.num_sampled
    for ours, theirs in zip(got.arrays(), sent.arrays(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    document, expected = to_document(Episode(PROMPT, got, 1.0)), to_document(Episode(PROMPT, sent, 1.0))
    for name in ("token_ids", "loss_mask", "generator_logprobs"):
        ours, theirs = getattr(document, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    assert type(got.token_ids) is list and type(got.token_ids[0]) is int and type(got.logprobs[0]) is float
    assert got == sent and sent == got == received(got) == copy.deepcopy(got)
    assert dataclasses.asdict(got) == dataclasses.asdict(sent)
    assert dataclasses.replace(got, text="else") == dataclasses.replace(sent, text="else")


def test_what_is_changed_in_a_received_completion_is_what_is_trained_on() -> None:
    got = received(completion(100))
    got.token_ids[0] = 7
    got.logprobs = [-2.0] * 100
    got.token_ids += [8]
    got.logprobs += [-3.0]
    document = to_document(Episode(PROMPT, got, 1.0))
    assert document.token_ids[[3, -1]].tolist() == [7, 8] and len(document.token_ids) == 104
    assert document.generator_logprobs is not None and document.generator_logprobs[[3, -1]].tolist() == [-2.0, -3.0]
    assert received(got) == got and received(got) != received(completion(100))
