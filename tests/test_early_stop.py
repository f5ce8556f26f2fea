"""Several held-out sets in a run that stops early by one of them, and exports what was best."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import REWARD, read, run_local, small_run, status, unexplained_metrics
from safetensors.torch import load_file

from forge_hpc.config import UserError, load_config, validate
from forge_hpc.evaluation.early_stop import why_stopped
from forge_hpc.export import export
from forge_hpc.run_dir import RunDir

STEADY = """

def steady(prompt, response, target, **fields):
    return 0.5
"""


def stopped(figure: str, patience: int, values: list[float | None]) -> str | None:
    """Why a run stops whose evaluations, every 5 steps and before the first one, found these values."""
    overrides = [f"checkpoint.best={figure}", f"evaluation.patience={patience}"]
    records = [{"step": 5 * i} | ({} if value is None else {figure: value}) for i, value in enumerate(values)]
    return why_stopped(load_config(None, overrides), records)


def test_a_run_stops_after_so_many_evaluations_in_a_row_that_are_no_better() -> None:
    assert stopped("a/accuracy", 2, [0.9, 0.5, 0.6, 0.6]) is None  # before the first step nothing was learned
    assert stopped("a/accuracy", 2, [0.9, 0.5, 0.6, 0.6, 0.7, 0.5]) is None
    why = stopped("a/accuracy", 2, [0.9, 0.5, 0.6, 0.6, 0.5])
    assert why == "stopped early: no better a/accuracy in 2 evaluations, the best, 0.6, is of step 10"
    assert stopped("reward", 2, [0.9, 0.5, None, None]) is not None
    assert stopped("reward", 2, [0.9, None, None]) == "stopped early: no better reward in 2 evaluations, there was none"
    twice = [{"step": 5, "loss": 1.0}, {"step": 10, "loss": 2.0}, {"step": 10, "loss": 2.0, "accuracy": 0.5}]
    assert "in 1 evaluations" in str(
        why_stopped(load_config(None, ["checkpoint.best=loss", "evaluation.patience=1"]), twice)
    )
    assert stopped("a/loss", 1, [3.0, 2.0, 1.5, 1.2]) is None and stopped("a/loss", 1, [3.0, 2.0, 2.0]) is not None


def test_without_patience_no_run_stops_early() -> None:
    config = load_config(None, ["checkpoint.best=accuracy"])
    assert why_stopped(config, [{"step": step, "accuracy": 0.0} for step in range(100)]) is None


@pytest.mark.parametrize("key", ["evaluation.patience=3", "checkpoint.export_best=true"])
def test_what_goes_by_the_best_figure_needs_one(key: str) -> None:
    with pytest.raises(UserError, match=r"goes by checkpoint\.best, which is null"):
        validate(load_config(None, [key, "evaluation.num_prompts=5", "evaluation.interval=5"]))


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_run_stops_early_by_one_of_its_held_out_sets_and_exports_the_best_also_when_it_starts_again(
    tmp_path: Path,
) -> None:
    sums = "{label: sums, path: 'builtin:addition'}"
    steady = (
        f"{{label: steady, path: 'builtin:addition', num_prompts: 8, reward: [{{name: {tmp_path}/reward.py:steady}}]}}"
    )
    options = [
        f"evaluation.sets=[{sums}, {steady}]",
        "evaluation.interval=2",
        "evaluation.patience=2",
        "evaluation.samples=4",
        "evaluation.k=[1, 4]",
        "checkpoint.best=steady/reward",
        "checkpoint.export_best=true",
        "checkpoint.keep=1",
    ]
    run_dir, overrides = RunDir(tmp_path / "run"), small_run(tmp_path, 40, REWARD + STEADY, *options)
    result = run_local(run_dir.path, overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    why = "stopped early: no better steady/reward in 2 evaluations, the best, 0.5, is of step 2"
    assert why in result.stdout
    after = status(run_dir.path)
    assert (after["state"], after["step"], after["message"]) == ("completed", 6, why)
    assert sorted(path.name for path in run_dir.checkpoints.glob("step-*")) == ["step-00000002", "step-00000006"]
    evaluations = read(run_dir.path, "evaluations.jsonl")
    assert [record["step"] for record in evaluations] == [0, 2, 4, 6] and not unexplained_metrics(run_dir.path)
    for record in evaluations:
        assert (record["num_prompts"], record["sums/num_prompts"], record["steady/num_prompts"]) == (28, 20, 8)
        assert (record["steady/reward"], record["steady/best@4"], record["steady/accuracy"]) == (0.5, 0.5, 0.0)
        rewards = (20 * record["sums/reward"] + 8 * record["steady/reward"]) / 28
        assert record["reward"] == pytest.approx(rewards) and record["best@4"] >= record["reward_sampled"]
    answers = read(run_dir.path, "evaluations/step-00000002.jsonl")
    assert [answer["set"] for answer in answers] == ["sums"] * 100 + ["steady"] * 40

    best = load_file(export(run_dir, 2, tmp_path / "best") / "model.safetensors")
    exported = load_file(run_dir.export / "model.safetensors")
    assert best.keys() == exported.keys() and all(tensor.equal(exported[name]) for name, tensor in best.items())

    again = run_local(run_dir.path, overrides)
    assert again.returncode == 0, again.stdout + again.stderr
    assert status(run_dir.path)["message"] == why and len(read(run_dir.path)) == 6
    assert read(run_dir.path, "evaluations.jsonl") == evaluations
