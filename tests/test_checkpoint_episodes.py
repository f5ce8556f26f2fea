"""The buffer of finished episodes comes back from a checkpoint to the last bit."""

from __future__ import annotations

import io
import json
import math
import pickle
from dataclasses import fields, replace
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from time import process_time
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import pandas
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


def test_routes_of_experts_come_back_in_as_many_bytes() -> None:
    group, other = make_group(0), make_group(1)
    for episode in group.episodes:
        episode.completion.routes = np.random.default_rng(0).integers(0, 256, (13, 3, 2)).astype(np.uint8)
        branch = np.random.default_rng(1).integers(0, 256, (8, 3, 2)).astype(np.uint8)
        episode.branches = [replace(episode.completion, routes=branch)]
    loaded, without = load_groups(dump_groups([group, other]))
    for ours, theirs in zip(loaded.episodes, group.episodes, strict=True):
        for one, other_one in zip(
            [ours.completion, *ours.branches], [theirs.completion, *theirs.branches], strict=True
        ):
            routes, expected = one.routes, other_one.routes
            assert routes is not None and expected is not None and routes.dtype == np.uint8
            assert np.array_equal(routes, expected)
    assert_same(without, other)


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


FIELDS = {
    "bytes": b"\x00\xff",
    "decimal": Decimal("1.10"),
    "id": UUID(int=7),
    "day": date(2026, 1, 1),
    "moment": datetime(2026, 1, 1, 12, 30, 0, 5),
    "utc": datetime(2026, 1, 1, tzinfo=UTC),
    "offset": datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    "zone": datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
    "time": time(1, 2, 3, 4),
    "duration": timedelta(days=-1, microseconds=5),
    "nanoseconds": pandas.Timestamp(1, unit="ns"),
    "zoned nanoseconds": pandas.Timestamp(1, unit="ns", tz="Europe/Berlin"),
    "duration in nanoseconds": pandas.Timedelta(5, unit="ns"),
    "array": np.arange(6, dtype=np.int16).reshape(2, 3),
    "empty array": np.zeros((0, 2), np.float32),
    "array of texts": np.array(["a", None, b"c"], object),
    "moments": np.array(["2026-01-01T00:00:00.000000001"], "datetime64[ns]"),
    "scalar": np.float32(0.1),
    "pair": (1, b"x"),
    "nested": [{"bytes": b"x", "deeper": [Decimal(2)]}],
    "mistaken": {"$": "bytes", "value": "no bytes"},
    "a lone surrogate": "\ud800",
    "nan": math.nan,
}


def test_fields_that_json_has_no_word_for_come_back_as_they_were() -> None:
    group = make_group(3)
    group.prompt.fields.update(FIELDS)
    [loaded] = load_groups(dump_groups([group]))
    for name, expected in FIELDS.items():
        actual = loaded.prompt.fields[name]
        assert type(actual) is type(expected)
        if isinstance(expected, np.ndarray):
            assert actual.dtype == expected.dtype and actual.shape == expected.shape
            assert actual.tolist() == expected.tolist()
        else:
            assert str(actual) == str(expected)
            assert actual == expected or name == "nan"
    assert loaded.prompt.fields["zone"].fold == 1 and loaded.prompt.fields["zone"].tzinfo.key == "Europe/Berlin"


def test_what_has_no_known_kind_is_named() -> None:
    for odd, message in ((object(), "object <object"), ({1: 2}, "keys that are no text"), (np.zeros(1, "i4,i4"), "i4")):
        group = make_group(3)
        group.prompt.fields["odd"] = [odd]
        with pytest.raises(ValueError, match=f"the episodes of prompt 3 cannot be saved: .*{message}"):
            dump_groups([make_group(2), group])


def test_episodes_of_an_older_format_are_read_as_they_were_written() -> None:
    group = make_group(1)
    group.prompt.fields["price"] = {"#": 3}
    head, older = json.dumps({"format": FORMAT}).encode(), json.dumps({"format": 2}).encode()
    data = repacked(repacked(dump_groups([group]), head, older), b'"#"', b'"$"')  # as format 2 wrote any JSON
    assert load_groups(data)[0].prompt.fields["price"] == {"$": 3}


def test_a_thousand_long_episodes_are_quick_and_compact() -> None:
    groups = [make_group(position, num_episodes=8, num_tokens=4096) for position in range(128)]
    started = process_time()
    data = dump_groups(groups)
    dumped = process_time()
    loaded = load_groups(data)
    loaded_at = process_time()
    assert dumped - started < 20 and loaded_at - dumped < 20  # less than one on a quiet machine
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
