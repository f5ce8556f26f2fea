"""A whole run of the shipped loop on random weights, synchronous and a step ahead in turns: speed, and how much of
training and generation overlap.

    python benchmarks/whole_run.py [--tiny] [--together | --in-turns] [--steps 6] [--rounds 2] [key=value ...]

A model of 0.4 B that adds numbers badly, at most 512 tokens a response; ``--tiny`` is one for the CPU. With
``--together`` trainers and generators are on all GPUs at once (docs/colocate.md); with ``--in-turns`` they share all
GPUs in turns, beside runs as they are without, both synchronous. The reward is the length of the answer, so that every
step trains. The first two steps of each run, in which things are compiled, do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rows import PROJECT, median, row

from forge_hpc.data.builtin import write_tiny_qwen3

WARM_UP_STEPS = 2
FIRST_LOADS = 4
"""Steps whose weights are loaded in the way that is written down, to be repeated from then on."""
STANDS_STILL = 0.01
TOGETHER = (
    "cluster.colocate=true", "generator.engine.gpu_memory_utilization=0.45", "generator.engine.sleep_level=0"
)  # fmt: skip
REWARD = "def length(prompt, response, target, **fields):\n    return len(response) / 100\n"
LARGE: dict[str, Any] = {
    "dim": 1024, "hidden_dim": 3072, "num_layers": 28, "num_heads": 16, "num_kv_heads": 8, "head_dim": 128
}  # fmt: skip


def on_gpus(num: int) -> list[str]:
    """The demo's configuration on so many GPUs, in place of two CPU cores."""
    options = [f"cluster.gpus_per_node={num}", "model.dtype=bfloat16", "trainer.training.seq_len=4096"]
    return [*options, "trainer.training.local_batch_size=null", "trainer.training.mixed_precision_param=bfloat16"]


def kinds(args: argparse.Namespace) -> dict[str, list[str]]:
    """The runs that are compared: the options of each."""
    synchronous, ahead = (f"rollout.max_staleness={staleness}" for staleness in (0, 1))
    if args.in_turns:
        return {"without": [synchronous], "in turns": [synchronous, "cluster.colocate=true"]}
    shared = TOGETHER if args.together else ()
    return {"synchronous": [synchronous, *shared], "a step ahead": [ahead, *shared]}


def run(directory: Path, name: str, options: Sequence[str], args: argparse.Namespace) -> list[dict[str, float]]:
    """The records of a run's steps, without the first ones."""
    length = 32 if args.tiny else 512
    command = [sys.executable, "-m", "forge_hpc.submit", "--cluster", "local", "--run-dir", str(directory / name)]
    command += ["--config", str(PROJECT / "configs/grpo/demo.yaml"), f"model.path={directory / 'model'}"]
    command += [f"reward=[{{name: {directory / 'reward.py'}:length}}]", *options]
    command += [f"trainer.training.steps={args.steps + WARM_UP_STEPS}", f"rollout.max_response_tokens={length}"]
    command += ["evaluation.num_prompts=0", "checkpoint.interval=0", "trainer.optimizer.lr=1e-6"]
    command += ["trainer.lr_scheduler.warmup_steps=0"]
    command += ["algorithm.max_steps_without_signal=1000000", "rollout.sampling.temperature=1.0"]
    if not args.tiny:
        # Turns cost a pause a step, so they are for steps of seconds: more answers than an engine has places for.
        num_prompts = 128 if args.in_turns else 32
        command += [*on_gpus(torch.cuda.device_count()), f"rollout.prompts_per_step={num_prompts}"]
    else:
        command += ["rollout.prompts_per_step=8", "generator.engine.kv_cache_memory_gib=0.25"]
    paths = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([*command, *args.overrides], check=True, stdout=subprocess.DEVNULL, env=environ)
    lines = (directory / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][WARM_UP_STEPS:]


def of(records: Sequence[dict[str, float]], key: str) -> float | None:
    found = [record[key] for record in records if key in record]
    return median(found) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    shared = parser.add_mutually_exclusive_group()
    shared.add_argument("--together", action="store_true", help="trainers and generators on all GPUs at once")
    shared.add_argument("--in-turns", action="store_true", help="the same in turns, beside runs without")
    parser.add_argument("--steps", type=int, default=6, help="of each run that count")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    records: dict[str, list[dict[str, float]]] = {name: [] for name in kinds(args)}
    with tempfile.TemporaryDirectory(prefix="forge-hpc-benchmark-") as name:
        directory = Path(name)
        write_tiny_qwen3(directory / "model", seed=0, **({} if args.tiny else LARGE))
        (directory / "reward.py").write_text(REWARD)
        for number in range(args.rounds):
            for place, (kind, options) in enumerate(kinds(args).items()):
                records[kind] += run(directory, f"run-{place}-{number}", options, args)
    if args.in_turns:
        report_turns(records["without"], records["in turns"])
    else:
        report_overlap(records["synchronous"], records["a step ahead"], args.together)


def rate(records: Sequence[dict[str, float]]) -> float:
    """Tokens a second of the whole loop."""
    tokens, seconds = (sum(record[key] for record in records) for key in ("tokens/generated", "time/step_s"))
    return tokens / seconds


def parts(records: Sequence[dict[str, float]], *names: str) -> dict[str, float]:
    """Median seconds of parts of a step."""
    return {name: of(records, f"time/{name}_s") or 0.0 for name in ("step", "generate", "train", "weight_sync", *names)}


def in_words(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())


def report_overlap(synchronous: Sequence[dict[str, float]], ahead: Sequence[dict[str, float]], together: bool) -> None:
    whole = "whole run, on the same GPUs" if together else "whole run"
    for name, found in (("synchronous", synchronous), ("a step ahead", ahead)):
        row(f"{whole}, {name}: generated", rate(found), unit="tokens/s")
    row(f"{whole}, synchronous: MFU of the trainer", of(synchronous, "perf/mfu") or 0.0)
    seconds = parts(synchronous)
    longest = max(seconds["generate"], seconds["train"])
    # Two steps may come at once and the next ones after a while: their mean is what a step takes.
    mean_s = sum(record["time/step_s"] for record in ahead) / len(ahead)
    row(f"{whole}, a step ahead: the longer of generation and training over the step", longest, mean_s,
        target=None if together else 0.95, unit="s", peer="s the step",
        note=f"synchronous: {in_words(seconds)}")  # fmt: skip
    later = [record for record in ahead if record["step"] > FIRST_LOADS]
    for who, key in (("training", "time/publish_s"), ("generation", "perf/generator_weights_s")):
        stood_s = sum(record[key] for record in later if key in record) if later else None
        row(f"{whole}, a step ahead: {who} stands still for weights, of the time", stood_s,
            sum(record["time/step_s"] for record in later), target=STANDS_STILL, better="less", unit="s",
            peer="s in all")  # fmt: skip


def report_turns(without: Sequence[dict[str, float]], in_turns: Sequence[dict[str, float]]) -> None:
    is_on_gpus = torch.cuda.device_count() > 1  # where there is one, both kinds of runs share it
    row("whole run, in turns on the same GPUs: generated", rate(in_turns), rate(without), unit="tokens/s",
        target=1.4 if is_on_gpus else None, peer="without turns",
        note=f"without: {in_words(parts(without))}")  # fmt: skip
    seconds = parts(in_turns, "sleep", "wake")
    row("whole run, in turns: falling asleep and waking, of a step", seconds["sleep"] + seconds["wake"],
        seconds["step"], better="less", unit="s", peer="s the step", note=in_words(seconds))  # fmt: skip


if __name__ == "__main__":
    main()
