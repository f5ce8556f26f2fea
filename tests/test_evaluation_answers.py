"""What is kept of the answers of an evaluation, and how its progress is shown."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from forge_hpc.config.schema import LoggingConfig
from forge_hpc.data.types import Completion, Episode, Group, Prompt
from forge_hpc.evaluation import answers as answers_module
from forge_hpc.evaluation.answers import Answers
from forge_hpc.evaluation.figures import Graded
from forge_hpc.observability import console as console_module
from forge_hpc.observability.console import ConsoleProgress
from forge_hpc.observability.jsonl import read_jsonl
from forge_hpc.observability.logger import MetricLogger
from forge_hpc.run_dir import RunDir


def prompt(position: int) -> Prompt:
    return Prompt(position, f"{position}+1=", [1], str(position + 1))


def completion(text: str, index: int = 0) -> Completion:
    return Completion(index, text, [1, 2], [0.0, 0.0], "stop", (3, 3))


def collect(limit: int, num_samples: int, tell=lambda text: None) -> Answers:
    """Three prompts, answered in another order than theirs; the last one's greedy answer failed."""
    found = Answers(5, ["", "", ""], num_samples, limit, lambda *counts: None, tell)
    for place in (2, 0, 1):
        for sample in [*range(num_samples), None]:
            if place == 2 and sample is None:
                found.add(place, sample, prompt(place), ValueError("too long"), Graded(), error="too long")
            else:
                read = {"exact": "7", "length": None}  # length does not say what it took for the answer
                found.add(place, sample, prompt(place), completion("7"), Graded(True, 1.0), {"exact": 1.0}, read)
    return found


def test_answers_are_kept_in_order_whole_prompts_at_a_time_up_to_the_bound() -> None:
    records = collect(limit=8, num_samples=2).records()
    assert [(r["position"], r["sample"]) for r in records] == [(p, s) for p in (0, 1) for s in (None, 0, 1)]
    first = {"step": 5, "position": 0, "sample": None, "prompt": "0+1=", "target": "1", "right": True, "reward": 1.0}
    first |= {
        "response": "7",
        "num_tokens": 2,
        "finish_reason": "stop",
        "rewards": {"exact": 1.0},
        "read": {"exact": "7"},
    }
    assert records[0] == first
    assert collect(limit=0, num_samples=0).records() == []


def test_of_each_of_several_sets_as_many_answers_are_kept() -> None:
    found = Answers(5, ["a", "a", "a", "b", "b"], 1, 4, lambda *counts: None, lambda text: None)
    for place in range(5):
        for sample in (None, 0):
            found.add(place, sample, prompt(place), completion("7"), Graded(True, 1.0))
    assert [(r["set"], r["position"], r["sample"]) for r in found.records()] == [
        ("a", 0, None), ("a", 0, 0), ("b", 3, None), ("b", 3, 0)
    ]  # fmt: skip


def test_an_answer_that_failed_is_kept_with_its_reason() -> None:
    last = collect(limit=3, num_samples=0).records()[-1]
    assert (last["right"], last["reward"], last["error"]) == (False, None, "too long") and "response" not in last


def test_status_is_told_how_far_an_evaluation_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "TELL_S", -1.0)
    told: list[str] = []
    assert collect(limit=0, num_samples=0, tell=told.append).has_told
    assert told == [f"evaluating step 5: {n} of 3 answers" for n in (1, 2)]


def test_answers_of_steps_after_the_checkpoint_are_forgotten_and_none_is_written_twice(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run").create()
    config = LoggingConfig(console="none", tensorboard=False)
    with MetricLogger(run_dir, config) as logger:
        for step in (0, 5, 10):
            logger.log_evaluation(step, {"accuracy": 0.5}, [{"step": step, "right": True}])
    with MetricLogger(run_dir, config, resume_step=5) as logger:
        assert [path.name for path in sorted(run_dir.answers.iterdir())] == [
            "step-00000000.jsonl",
            "step-00000005.jsonl",
        ]
        logger.log_evaluation(5, {"accuracy": 0.5}, [{"step": 5, "right": False}])
        assert list(read_jsonl(run_dir.answers / "step-00000005.jsonl")) == [{"step": 5, "right": True}]
        logger.log_evaluation(10, {"accuracy": 0.5}, [{"step": 10, "right": False}])
    assert list(read_jsonl(run_dir.answers / "step-00000010.jsonl")) == [{"step": 10, "right": False}]
    modes = {path.stat().st_mode & 0o077 for path in (run_dir.answers, *run_dir.answers.iterdir())}
    assert modes == {0}


def test_a_long_evaluation_shows_how_far_it_is_and_every_one_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    progress = ConsoleProgress("lines", 50, 0, "grpo", out)
    for done in range(1, 41):
        now[0] += 0.7
        progress.show_evaluation(10, done, 40, done // 2)
    progress.evaluated(10, {"accuracy": 0.5, "accuracy_low": 0.3, "pass@4": 0.75, "pass@4_low": 0.6, "time_s": 28.0})
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and lines[0].startswith("grpo evaluation of step 10  16/40 answers  0.500 right")
    assert lines[-1] == "grpo evaluation of step 10  accuracy 0.500  pass@4 0.750"
    alone = io.StringIO()
    ConsoleProgress("lines", None, 0, "eval", alone).evaluated(0, {"accuracy": 1.0})
    assert alone.getvalue() == "evaluation  accuracy 1.000\n"


def test_rollouts_can_hold_whole_groups(tmp_path: Path) -> None:
    def group(position: int) -> Group:
        episodes = [Episode(prompt(position), completion("7", i), float(i), {}, i - 0.5) for i in range(2)]
        return Group(prompt(position), episodes, num_failed=1)

    run_dir = RunDir(tmp_path / "run").create()
    config = LoggingConfig(console="none", tensorboard=False, num_rollouts_per_step=3, num_groups_per_step=2)
    with MetricLogger(run_dir, config) as logger:
        logger.log_rollouts(1, [Group(prompt(9), [], num_failed=3), *(group(position) for position in range(5))])
    records = [json.loads(line) for line in run_dir.rollouts.read_text().splitlines()]
    assert [(r["position"], r["sample"]) for r in records] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert [r["advantage"] for r in records[:2]] == [-0.5, 0.5] and records[0]["num_failed"] == 1
    assert all(r["finish_reason"] == "stop" for r in records)
