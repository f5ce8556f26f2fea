"""A pretrained model learns real tasks: SmolLM2-135M-Instruct on reasoning-gym's one-digit sums, on the CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from runs import run_local, status

pytestmark = [pytest.mark.training, pytest.mark.slow, pytest.mark.timeout(4 * 3600)]
MADE = os.environ.get("FORGE_HPC_REAL_MODEL")

CONFIG = """
recipe: grpo
name: sums
model: {{path: {directory}/model, dtype: float32}}
data:
  path: {directory}/train.jsonl
  eval_path: {directory}/test.jsonl
  system_prompt: Answer with a number.
reward: [{{name: numeric}}]
rollout:
  group_size: 8
  prompts_per_step: 4
  max_prompt_tokens: 96
  max_response_tokens: 12
trainer:
  optimizer: {{lr: 2e-5}}
  training: {{steps: 40, seq_len: 512, local_batch_size: 1, mixed_precision_param: float32}}
checkpoint: {{interval: 1000}}
evaluation: {{num_prompts: 50}}
cluster: {{gpus_per_node: 0}}
"""


@pytest.mark.skipif(
    not MADE, reason="python benchmarks/real_model.py DIR makes the model; then FORGE_HPC_REAL_MODEL=DIR"
)
def test_a_pretrained_model_learns_one_digit_sums(tmp_path: Path) -> None:
    config = tmp_path / "sums.yaml"
    config.write_text(CONFIG.format(directory=Path(MADE or "").resolve()))
    run_local(tmp_path / "run", [], timeout_s=4 * 3600 - 60, config=config)
    assert status(tmp_path / "run")["state"] == "completed"
    lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    before, after = (json.loads(line) for line in (lines[0], lines[-1]))
    assert before["num_prompts"] == after["num_prompts"] == 50
    print({key: (before[key], after[key]) for key in ("accuracy", "accuracy_low", "accuracy_high")})
    assert after["accuracy_low"] > before["accuracy_high"]
