"""A reward may give figures beside its value, and files are scored without a run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from one_group import make_group

from forge_hpc.cli import main
from forge_hpc.config.errors import UserError
from forge_hpc.config.rewards import check_reward
from forge_hpc.config.schema import Config, RewardConfig
from forge_hpc.data.fields import target_text
from forge_hpc.data.types import Completion, Episode, Group, Prompt
from forge_hpc.rewards import RewardError, RewardPool
from forge_hpc.rollouts.figures import measure

REWARDS = """
def words(prompt, response, target, **fields):
    return float(response == target), {"words": len(response.split()), "known": True}

async def sometimes(prompt, response, target, **fields):
    return (1.0, {"bonus": 2.0}) if response == target else 0.0

def bad(prompt, response, target, *, figures, **fields):
    return 1.0, figures
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(REWARDS)
    return file


def completion(text: str, index: int = 0) -> Completion:
    return Completion(index, text, [1], [0.0], "stop", (0, 0))


def test_figures_of_a_reward_are_logged_beside_its_value_and_no_part_of_the_sum(file: Path):
    async def main() -> Group:
        config = Config(reward=[RewardConfig(f"{file}:words", 2.0), RewardConfig(f"{file}:sometimes")])
        async with RewardPool(config, num_workers=1) as pool:
            samples = [completion("a b", 0), completion("a b c d", 1)]
            return await make_group(Prompt(0, "", [1], "a b"), samples, pool, config)

    group = asyncio.run(main())
    first, second = (episode.rewards for episode in group.episodes)
    assert first == {"words": 1.0, "words/words": 2.0, "words/known": 1.0, "sometimes": 1.0, "sometimes/bonus": 2.0}
    assert second == {"words": 0.0, "words/words": 4.0, "words/known": 1.0, "sometimes": 0.0}
    assert [episode.reward for episode in group.episodes] == [3.0, 0.0]
    figures = measure([group], 1)
    assert figures["reward/words"] == 0.5
    assert figures["reward/words/words"] == 3.0
    assert figures["reward/sometimes/bonus"] == 2.0  # the mean of those that have it
    assert isinstance(group.episodes[0], Episode)


@pytest.mark.parametrize(
    ("figures", "kind"),
    [({"n": float("nan")}, "not_finite"), ({"n": "many"}, "raised"), (3, "raised"), (None, "raised")],
)
def test_a_figure_that_is_no_finite_number_fails_the_call_with_its_cause(file: Path, figures: Any, kind: str):
    async def main() -> None:
        rewards = [RewardConfig(f"{file}:bad", args={"figures": figures})]
        async with RewardPool(Config(reward=rewards), num_workers=1) as pool:
            await pool.score(Prompt(0, "", [1], ""), completion("x"))

    with pytest.raises(RewardError) as error:
        asyncio.run(main())
    assert error.value.kind == kind


ROWS = [
    {"prompt": "1+1=", "response": r"<think>3</think>\boxed{2}", "target": 2},
    {"prompt": "1+1=<think>", "response": r"\boxed{2}", "target": "2"},
    {"prompt": "x", "completion": "It is 0.00005", "target": 5e-05, "reward": 1.0},
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_a_file_is_scored_without_a_run_and_shows_what_was_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert main(["reward", path, "reward=[{name: gsm8k}]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'a.jsonl:1  1  gsm8k 1 read "2"  target "2"'
    assert lines[1] == 'a.jsonl:2  0  gsm8k 0  target "2"'
    assert lines[2] == 'a.jsonl:3  1  gsm8k 1 read "0.00005"  target "5e-05"'
    assert lines[3] == "mean of 3, 0 failed: reward 0.6667  gsm8k 0.6667"


def test_scores_are_printed_as_json_where_asked_and_a_failure_ends_with_1(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path / "a.jsonl", [*ROWS, {"response": "2", "target": None}])
    config = tmp_path / "c.yaml"
    config.write_text("reward:\n  - {name: math}\n  - {name: mine.py:words, weight: 0.5}\n")
    assert main(["reward", path, "--config", str(config), "--json"]) == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record.get("reward") for record in records] == [1.0, 0.0, 1.0, None]
    assert records[0]["read"] == {"math": "2", "words": None}
    assert records[0]["rewards"]["words/words"] == 1.0
    assert "the target is no mathematics" in records[3]["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no line"),
        ("{", r"a.jsonl:1 is no JSON"),
        ("[1]", "a.jsonl:1 is no JSON object"),
        ('{"prompt": "x"}', "a.jsonl:1 has no response"),
        ('{"response": 3}', "a.jsonl:1 has no response"),
    ],
)
def test_a_file_that_cannot_be_scored_is_told_in_a_line(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.jsonl").write_text(text)
    assert main(["reward", str(tmp_path / "a.jsonl")]) == 2
    assert message in capsys.readouterr().err
    assert main(["reward", str(tmp_path / "none.jsonl")]) == 2
    assert main(["reward", "reward=[{name: math}]"]) == 2


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("math", {"tolerance": "1e-6"}, "tolerance is '1e-6', which is no float"),
        ("math", {"limit_s": "3"}, "limit_s is '3', which is no float"),
        ("length", {"max_tokens": 2.5}, "max_tokens is 2.5, which is no int"),
        ("code", {"require_all": "no"}, "require_all is 'no', which is no bool"),
        ("length", {"max_tokens": True}, "max_tokens is True, which is no int"),
    ],
)
def test_an_argument_of_another_type_is_told_before_anything_is_queued(name: str, args: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as error:
        check_reward("reward.0", RewardConfig(name, args=args))
    assert error.value.hint
    check_reward("reward.0", RewardConfig("math", args={"limit_s": 2.0, "tolerance": 1}))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (72, "72"), (5e-05, "5e-05"), ("073", "073"), ([1, "a"], '[1, "a"]'), ({"a": None}, '{"a": null}')],
)
def test_a_target_is_a_text_whatever_its_column_holds(value: Any, text: str):
    assert target_text(value) == text
