"""The buffer of finished episodes comes back from a checkpoint to the last bit."""

from __future__ import annotations

import io
import json
import math
import pickle
import time
from dataclasses import fields
from datetime import UTC, datetime

import numpy as np
import pytest

from forge_hpc.checkpoint.episodes import FORMAT, dump_groups, load_groups
from forge_hpc.config.errors import UserError
from forge_hpc.data.types import Completion, Episode, Group, Prompt


def make_group(position: int, num_episodes: int = 4, num_tokens: int = 9, seed: int = 0) -> Group:
    rng = np.random.default_rng([seed, position])
    prompt = Prompt(
        position,
        'Two\nlines, "quotes", \u2028, 你好, \U0001f600, a lone surrogate \ud800 and \x00',
        rng.integers(0, 200_000, 5).tolist(),
        "42",
        {"level": 3, "ratio": 0.1 + 0.2, "nested": {"list": [1, None, True, "x"]}, "empty": []},
    )
    episodes = []
    for index in range(num_episodes):
        tokens = rng.integers(0, 200_000, num_tokens + index)
        completion = Completion(
            sample_index=index,
            text=f"answer {index}\n",
            token_ids=tokens.tolist(),
            logprobs=rng.normal(size=len(tokens)).astype(np.float32).tolist(),
            finish_reason="stop" if index % 2 else "length",
            policy_versions=(position, position + index),
        )
        episodes.append(Episode(prompt, completion, rng.normal(), {"exact": 0.1, "length": -1e-300}, rng.normal()))
    return Group(prompt, episodes, num_failed=position % 3)


def assert_same(actual: object, expected: object) -> None:
    """Equal in types too, which == is not: 1 == 1.0 == True."""
    assert type(actual) is type(expected)
    if isinstance(expected, Prompt | Completion | Episode | Group):
        for field in fields(expected):
            assert_same(getattr(actual, field.name), getattr(expected, field.name))
    elif isinstance(expected, list | tuple):
        assert isinstance(actual, list | tuple) and len(actual) == len(expected)
        for left, right in zip(actual, expected, strict=True):
            assert_same(left, right)
    elif isinstance(expected, float) and math.isnan(expected):
        assert isinstance(actual, float) and math.isnan(actual)
    else:
        assert actual == expected


def test_groups_come_back_as_they_were() -> None:
    groups = [make_group(position) for position in range(5)]
    loaded = load_groups(dump_groups(groups))
    assert_same(loaded, groups)
    assert all(episode.prompt is group.prompt for group in loaded for episode in group.episodes)


def test_what_is_empty_or_odd_comes_back_too() -> None:
    other = make_group(7)
    group = make_group(1)
    group.episodes[0].completion.logprobs[:5] = [0.1, math.inf, -math.inf, math.nan, -0.0]  # 0.1 is no float32
    group.episodes[1].completion.token_ids = [2**40, 0]  # as many as its log-probabilities or not
    group.episodes[2].completion.token_ids = group.episodes[2].completion.logprobs = []
    group.episodes[3].prompt = other.prompt
    group.episodes[3].reward = math.nan
    groups = [group, Group(other.prompt, [], 8), other]
    loaded = load_groups(dump_groups(groups))
    assert_same(loaded, groups)
    assert math.copysign(1, loaded[0].episodes[0].completion.logprobs[4]) == -1
    assert load_groups(dump_groups([])) == []


def test_rewards_computed_with_numpy_come_back_as_numbers() -> None:
    group = make_group(0)
    group.episodes[0].reward = np.float32(0.5)  # type: ignore[assignment]
    group.episodes[0].rewards["exact"] = np.int64(1)  # type: ignore[assignment]
    [loaded] = load_groups(dump_groups([group]))
    assert (loaded.episodes[0].reward, loaded.episodes[0].rewards["exact"]) == (0.5, 1)


def test_what_json_has_no_word_for_is_named() -> None:
    group = make_group(3)
    group.prompt.fields["when"] = datetime(2026, 1, 1, tzinfo=UTC)
    with pytest.raises(ValueError, match=r"the episodes of prompt 3 cannot be saved: datetime .* is no JSON value"):
        dump_groups([make_group(2), group])


def test_a_thousand_long_episodes_are_quick_and_compact() -> None:
    groups = [make_group(position, num_episodes=8, num_tokens=4096) for position in range(128)]
    started = time.process_time()
    data = dump_groups(groups)
    dumped = time.process_time()
    loaded = load_groups(data)
    loaded_at = time.process_time()
    assert dumped - started < 1 and loaded_at - dumped < 1
    assert len(data) < 1.02 * 8 * sum(len(e.completion.token_ids) for g in groups for e in g.episodes)
    assert_same(loaded[::40], groups[::40])


def test_no_pickle_is_read_and_a_newer_format_is_refused() -> None:
    data = dump_groups([make_group(0)])
    with pytest.raises(ValueError, match="no saved episodes"):
        load_groups(data[: len(data) // 2])
    with pytest.raises(ValueError, match="pickled"):
        load_groups(pickle.dumps([1]))
    head, newer = json.dumps({"format": FORMAT}).encode(), json.dumps({"format": 9}).encode()
    with pytest.raises(UserError, match="newer forge_hpc"):
        load_groups(repacked(data, head, newer))


def repacked(data: bytes, old: bytes, new: bytes) -> bytes:
    """With other bytes in the JSON lines, and a zip around them that is right again."""
    with np.load(io.BytesIO(data)) as arrays:
        content = dict(arrays)
    content["groups"] = np.frombuffer(content["groups"].tobytes().replace(old, new), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **content)
    return buffer.getvalue()
