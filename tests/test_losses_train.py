"""Every loss trains the demo's task: `pytest -m training -s tests/test_losses_train.py`, minutes on two cores.

All begin from one warm start, with the demo's learning rate and steps, and must carry by the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import PROJECT, read, run_local

from forge_hpc.config.registry import LOSSES

pytestmark = [pytest.mark.training, pytest.mark.slow, pytest.mark.timeout(3600)]
MIN_ACCURACY = 0.85
TIMEOUT_S = 1800  # a minute on a free machine

# Each with its own advantage and defaults, but for options that stand here.
CASES: dict[str, list[str]] = {
    "grpo": [],
    "dr_grpo": [],
    "dapo": [],
    "ppo": ["algorithm.advantage=batch_mean_std"],
    "cispo": [],
    "gspo": [],
    "sapo": [],
    "rloo": [],
    "reinforce": [],
    "simple_grpo": ["reference.enable=true", "algorithm.kl_coef=0.01"],
    "grpo, corrected": ["algorithm.loss=grpo", "algorithm.mismatch.cap=2", "rollout.max_staleness=1"],
    "my own": ["algorithm.loss=OWN:Own", "algorithm.loss_args={scale: 2}"],
}
OWN = """
from dataclasses import dataclass
from forge_hpc.losses import PolicyLoss

@dataclass(frozen=True)
class Own(PolicyLoss):
    scale: float = 1.0

    def term(self, x):
        return -self.scale * x.advantages * x.logprobs, {}
"""


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("warm_start")
    result = run_local(directory / "run", [], TIMEOUT_S, PROJECT / "configs/sft/demo.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    return directory / "run/export"


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    rows = ["loss             accuracy before, after    reward of the last 5 steps    s a step"]
    yield rows
    print("\n" + "\n".join(rows))


def test_every_loss_has_a_case() -> None:
    assert set(LOSSES) <= set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_each_loss_learns_to_carry(case: str, warm_start: Path, table: list[str], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    options = [option.replace("OWN", str(tmp_path / "own.py")) for option in CASES[case]]
    loss = [f"algorithm.loss={case}"] if case in LOSSES else []
    overrides = [f"model.path={warm_start}", "checkpoint.interval=0", *loss, *options]
    result = run_local(tmp_path / "run", overrides, TIMEOUT_S)
    assert result.returncode == 0, result.stdout + result.stderr
    before, after = (record["accuracy"] for record in read(tmp_path / "run", "evaluations.jsonl"))
    metrics = read(tmp_path / "run")
    reward = sum(record["reward/mean"] for record in metrics[-5:]) / 5
    seconds = sum(record["time/step_s"] for record in metrics) / len(metrics)
    table.append(f"{case:16} {before:15.3f} {after:6.3f} {reward:29.3f} {seconds:11.2f}")
    assert after >= MIN_ACCURACY > before
