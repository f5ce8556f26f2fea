"""The shipped recipes learn the demo's task from its warm start, by the configurations that we ship."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import PROJECT, status

pytestmark = [pytest.mark.training, pytest.mark.slow, pytest.mark.timeout(2 * 3600)]


def submit(directory: Path, config: str, run_dir: str, *overrides: str) -> Path:
    command = [sys.executable, "-m", "forge_hpc.submit", "--cluster", "local", "--config", config]
    env = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--run-dir", run_dir, *overrides], cwd=directory, env=env, check=True, timeout=3600)
    assert status(directory / run_dir)["state"] == "completed"
    return directory / run_dir


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the demo's warm start, and a teacher of all sums."""
    directory = tmp_path_factory.mktemp("recipes")
    (directory / "configs").symlink_to(PROJECT / "configs")
    submit(directory, "configs/sft/demo.yaml", "warmstart")
    submit(directory, "configs/distillation/teacher.yaml", "runs/teacher")
    return directory


@pytest.mark.parametrize(
    ("name", "least", "options"),
    [
        ("ppo", 0.85, []),
        ("ppo", 0.85, ["algorithm.minibatches=4", "algorithm.epochs=2", "trainer.optimizer.lr=5e-4"]),
        ("grpo", 0.85, ["algorithm.minibatches=4", "algorithm.epochs=2", "trainer.optimizer.lr=5e-4"]),
        ("online_dpo", 0.85, []),
        ("distillation", 0.85, ["recipe_args.teachers=[runs/teacher/export]"]),
        ("best_of_n", 0.5, []),
    ],
    ids=["ppo", "ppo, several optimizer steps", "grpo, several optimizer steps", "dpo", "distillation", "best of n"],
)
def test_a_shipped_recipe_learns_to_carry(
    name: str, least: float, options: list[str], directory: Path, request: pytest.FixtureRequest
) -> None:
    run = f"runs/{name}-{len(options)}"
    (directory / run).mkdir(parents=True)
    shutil.copytree(directory / "warmstart", directory / run / "warmstart")
    run_dir = submit(directory, f"configs/{name}/demo.yaml", run, *options)
    lines = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    print(request.node.name, [{key: line[key] for key in ("step", "accuracy", "accuracy_low")} for line in lines])
    assert lines[0]["accuracy"] == pytest.approx(0.266, abs=0.05)
    assert lines[-1]["accuracy"] >= least


def figures(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    print(run_dir.name, lines)
    return lines


def with_warm_start(directory: Path, run: str) -> str:
    (directory / run).mkdir(parents=True)
    shutil.copytree(directory / "warmstart", directory / run / "warmstart")
    return run


def test_offline_dpo_learns_to_carry_from_pairs(directory: Path) -> None:
    lines = figures(submit(directory, "configs/dpo/demo.yaml", with_warm_start(directory, "runs/offline-dpo")))
    assert lines[-1]["dpo/accuracy"] >= 0.95 and lines[-1]["accuracy"] >= 0.6


def test_kto_learns_which_sums_are_right(directory: Path) -> None:
    lines = figures(submit(directory, "configs/kto/demo.yaml", with_warm_start(directory, "runs/kto")))
    assert lines[-1]["kto/accuracy"] >= 0.8


def test_a_reward_model_knows_right_sums_and_teaches_them(directory: Path) -> None:
    run = with_warm_start(directory, "runs/reward-model")
    judged = figures(submit(directory, "configs/reward_model/demo.yaml", run))
    assert judged[-1]["preference/accuracy"] >= 0.85
    taught = with_warm_start(directory, "runs/taught")
    lines = figures(submit(directory, "configs/reward_model/grpo.yaml", taught, f"reward.1.path={run}/export"))
    assert lines[-1]["accuracy"] >= lines[0]["accuracy"] + 0.1
