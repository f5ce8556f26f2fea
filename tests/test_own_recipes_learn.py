"""The recipes of the docs learn the demo's task as they stand there, from its warm start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import PROJECT, status
from test_docs import DOCS, FILE

pytestmark = [pytest.mark.training, pytest.mark.slow, pytest.mark.timeout(2 * 3600)]


def submit(directory: Path, config: str, run_dir: str, *overrides: str) -> Path:
    command = [sys.executable, "-m", "forge_hpc.submit", "--cluster", "local", "--config", config]
    env = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--run-dir", run_dir, *overrides], cwd=directory, env=env, check=True, timeout=3600)
    assert status(directory / run_dir)["state"] == "completed"
    return directory / run_dir


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages say that one stands: their files, the shipped configurations, and the demo's warm start."""
    directory = tmp_path_factory.mktemp("recipes")
    (directory / "configs").symlink_to(PROJECT / "configs")
    for page in ("dpo", "ppo", "distillation"):
        for name, content in FILE.findall((DOCS / f"{page}.md").read_text(encoding="utf-8")):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(content, encoding="utf-8")
    submit(directory, "configs/sft/demo.yaml", "warmstart")
    submit(directory, "my/teacher.yaml", "runs/teacher")
    return directory


@pytest.mark.parametrize(("name", "least"), [("ppo", 0.85), ("dpo", 0.85), ("distillation", 0.85)])
def test_a_recipe_of_the_docs_learns_to_carry(name: str, least: float, directory: Path) -> None:
    run_dir = directory / "runs" / name
    run_dir.mkdir(parents=True)
    shutil.copytree(directory / "warmstart", run_dir / "warmstart")
    submit(directory, f"my/{name}.yaml", f"runs/{name}")
    lines = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    print(name, [{key: line[key] for key in ("step", "accuracy", "accuracy_low", "accuracy_high")} for line in lines])
    assert lines[0]["accuracy"] == pytest.approx(0.266, abs=0.05)
    assert lines[-1]["accuracy"] >= least
