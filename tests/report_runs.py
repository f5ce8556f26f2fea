"""Run directories as runs leave them, written in a moment: for pages about runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runs import read

from forge_hpc.observability.metrics import METRIC_KEYS
from forge_hpc.run_dir import RunDir

BEGIN = 1_800_000_000.0
HOSTILE = (
    '<script>window.marked = true</script><img src=x onerror="window.marked = true">'
    "</pre></details><style>body{display:none}</style>&amp;\x00\x1b[31m\u202e'\"`${1}"
)
CONFIG = "recipe: grpo\nname: demo\nseed: {seed}\ntrainer:\n  optimizer:\n    lr: {lr}\n"


def metrics(num: int, shift: float = 0.0) -> Iterable[dict[str, Any]]:
    """Steps of two seconds, with a quarter of an hour between the two starts, and a generator lost on the way."""
    for step in range(1, num + 1):
        pause = 900.0 if step > num // 2 else 0.0
        values = dict.fromkeys(METRIC_KEYS, 1.0) | {
            "reward/mean": 1 - math.exp(-step / num * 3) + shift,
            "loss": math.sin(step) / 9,
            "entropy/mean": 2 * math.exp(-step / num),
            "perf/tokens_per_s": 1000.0 + step % 7,
            "time/step_s": 2.0,
            "time/train_s": 0.7,
            "time/generate_s": 1.2,
            "time/wait_generator_s": 0.9,
            "time/wait_trainer_s": 0.5,
            "recoveries/generators": float(step >= num // 4),
        }
        yield values | {"step": step, "wall_time": BEGIN + 60 + 2 * step + pause}


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def rollout(step: int, position: int, sample: int, text: str) -> dict[str, Any]:
    rewards = {"exact": 0.5, HOSTILE: 1.0}
    known = {"step": step, "position": position, "sample": sample, "prompt": text, "target": text, "completion": text}
    more = {"num_tokens": 3, "finish_reason": "stop", "reward": 0.5, "rewards": rewards, "advantage": None}
    return known | more


def with_sources(run_dir: RunDir, *names: str) -> RunDir:
    """The run as if its prompts had come from these sources: each has a reward, held-out accuracy and samples."""
    config = "".join(f"  - name: {name}\n    share: {1 + at}\n" for at, name in enumerate(names))
    run_dir.config.write_text(f"{run_dir.config.read_text()}sources:\n{config}")
    steps, evaluations = read(run_dir.path), read(run_dir.path, "evaluations.jsonl")
    for at, name in enumerate(names):
        for record in steps:
            record[f"source/{name}/reward/mean"] = record["reward/mean"] / (1 + at)
        for record in evaluations:
            share = (record["step"] + 1) / (steps[-1]["step"] + 1) / (1 + at)
            interval = {"accuracy": share, "accuracy_low": max(0, share - 0.1), "accuracy_high": min(1, share + 0.1)}
            record |= {f"source/{name}/{key}": value for key, value in interval.items()}
            record |= {f"source/{name}/pass@8": min(1.0, 2 * share), f"source/{name}/num_prompts": 50}
    for file, records in zip((run_dir.metrics, run_dir.evaluations), (steps, evaluations), strict=True):
        write_lines(file, records)
    samples = [rollout(1, position, sample, "1+1=") for position in range(3 * len(names)) for sample in range(4)]
    for record in samples:
        record["source"] = names[record["position"] // 3]
    write_lines(run_dir.rollouts, samples)
    return run_dir


def write_run(
    path: Path, num: int = 40, *, text: str = "1+1=", seed: int = 0, lr: str = "1e-6", shift: float = 0.0
) -> RunDir:
    """A run that was preempted, killed, changed and completed, with evaluations and whole groups of rollouts."""
    run_dir = RunDir(path).create()
    run_dir.config.write_text(CONFIG.format(seed=seed, lr=lr))
    write_lines(run_dir.metrics, metrics(num, shift))
    groups = [(step, position) for step in (1, num) for position in (0, 1)]
    write_lines(run_dir.rollouts, [rollout(*group, sample, text) for group in groups for sample in range(4)])
    accuracy = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "pass@8": 0.9, "num_prompts": 100}
    write_lines(run_dir.evaluations, [{"step": step, "wall_time": BEGIN} | accuracy for step in (0, num // 2, num)])
    half, begin = num // 2, {"event": "begin", "job_id": "7", "requeues": 0, "nodes": 2}
    end = {"event": "end", "state": "preempted", "cause": "preempted", "message": text, "step": half, "progress": half}
    write_lines(
        path / "starts.jsonl",
        [
            begin | {"time": BEGIN, "restart": 0, "step": 0},
            end | {"time": BEGIN + 70 + num},
            begin | {"time": BEGIN + 500, "restart": 1, "step": half},
            {"event": "changed", "time": BEGIN + 700, "changes": ["checkpoint.keep: 2 -> 1", text]},
            begin | {"time": BEGIN + 800, "restart": 2, "step": half},
            end | {"time": BEGIN + 970 + 2 * num, "state": "completed", "cause": "completed", "step": num},
        ],
    )
    log_dir = run_dir.create_log_dir("7", 0)
    (log_dir / "environment.json").write_text(
        json.dumps({"python": "3.11", "first node": text, "packages": {"torch": "2"}})
    )
    run_dir.write_status(state="completed", step=num, policy_version=num, restarts=2, total_steps=num, message=text)
    return run_dir
