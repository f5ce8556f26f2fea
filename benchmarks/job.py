"""What a job takes beside its steps: from its start to the end of the first one, for its saves, and for its end.

    python benchmarks/job.py [--config configs/grpo/qwen3_0_6b.yaml] [--steps 7] [--warm 2] [key=value ...]

Jobs of a shipped configuration on all GPUs of this host, one after the other: a model with random weights of its
dimensions, data of random words, 32 prompts of 8 answers of at most 512 tokens a step, synchronous. Compiled things are
in folders of their own: the first job finds none, ``--warm`` others find what it has left. Every second step is saved;
saves of the second and later say for what part of a step they hold up training. The end is from the last step's until
nothing of the job is left, with the last save. Without a GPU it is a tiny model on the CPU, for its own sake.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from experts import alone
from faults import Watched
from rows import PROJECT, median, row
from shipped import MODELS, ON_THE_CPU, TINY, write_data, write_model

from forge_hpc.config import load_config

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT")
COLD_S, WARM_S, END_S, HELD_UP = 100.0, 45.0, 2.0, 0.01
TOGETHER = "a generator and a trainer that share a GPU start one after the other"
TOGETHER_FACTOR = 1.25
"""Up to how many times the target that is the reason."""
KNOWN_END = "the last save has no step to go on beside, and killed processes give back GPUs within 2 s"
KNOWN_END_S = 5.0
RUN_S = 400.0
STEP = ("rollout.prompts_per_step=32", "rollout.group_size=8", "rollout.max_response_tokens=512")


@dataclass(frozen=True)
class Job:
    """One job."""

    start_s: float
    """Until the end of the first step."""
    end_s: float
    """From the end of the last step."""
    phases: dict[str, float]
    held_up: list[float]
    """Of saves: for what part of a step training is held up."""


def job(run_dir: Path, config: Path, overrides: Sequence[str], steps: int) -> Job:
    watched = Watched(run_dir, str(config), [*overrides, f"trainer.training.steps={steps}"])
    began = time.time()
    watched.start()
    try:
        records = watched.wait_for(steps, RUN_S)
        assert watched.process is not None
        code = watched.process.wait(RUN_S)
    finally:
        watched.end()
    ended = time.time()
    if code:
        raise SystemExit(f"{run_dir}: exit code {code}: {(run_dir.parent / 'output').read_text()[-2000:]}")
    phases = [json.loads(line).get("seconds") for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    # A save counts with the step that comes after it, and what it still waits for with the one that is saved next.
    pairs = [pair for pair in pairwise(records[2:]) if pair[0]["step"] % 2]
    found = Job(
        start_s=records[0]["wall_time"] - began,
        end_s=ended - records[-1]["wall_time"],
        phases=next((each for each in phases if each), {}),
        held_up=[sum(each["time/checkpoint_s"] for each in pair) / pair[0]["time/step_s"] for pair in pairs],
    )
    print(f"{run_dir.name}: first step after {found.start_s:.1f} s ({in_words(found.phases)}), end "
          f"{found.end_s:.1f} s, held up by a save {[round(each, 4) for each in found.held_up]} of a step",
          flush=True)  # fmt: skip
    return found


def in_words(phases: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())


def report_start(what: str, jobs: Sequence[Job], target: float, gpus: int) -> None:
    job = sorted(jobs, key=lambda each: each.start_s)[len(jobs) // 2]
    known = TOGETHER if gpus == 1 and job.start_s <= TOGETHER_FACTOR * target else ""
    row(f"job: start to the end of the first step, {what}", job.start_s, target=target if gpus else None,
        better="less", unit="s", note=in_words(job.phases), known=known)  # fmt: skip


def report(jobs: Sequence[Job], gpus: int) -> None:
    row("job: training held up by a save, of a step", median([share for job in jobs for share in job.held_up]),
        target=HELD_UP if gpus else None, better="less")  # fmt: skip
    end_s = median([each.end_s for each in jobs])
    row("job: from the last step to the end", end_s, target=END_S if gpus else None, better="less", unit="s",
        known=KNOWN_END if end_s <= KNOWN_END_S else "")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=PROJECT / "configs/grpo/qwen3_0_6b.yaml")
    parser.add_argument("--steps", type=int, default=7, help="of each job, at least 5")
    parser.add_argument("--warm", type=int, default=2, help="jobs with warm caches, at least one")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if args.steps < 5 or args.warm < 1:
        parser.error("--steps is at least 5, --warm at least 1")
    if (path := load_config(args.config).model.path) not in MODELS:
        parser.error(f"{args.config}: the dimensions of {path} are not here: {', '.join(MODELS)}")
    gpus = torch.cuda.device_count()
    family, shape = MODELS[path]
    if not gpus:
        shape = TINY
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="forge-hpc-benchmark-") as name:
        directory = Path(name)
        os.environ.update({cache: str(directory / cache.lower()) for cache in CACHES})
        alone(write_model, directory / "model", family, shape, "bfloat16" if gpus else "float32")
        given = [f"model.path={directory / 'model'}", *write_data(directory, shape["vocab_size"])]
        given += [f"cluster.gpus_per_node={gpus}", *STEP] if gpus else ON_THE_CPU
        given += ["rollout.max_staleness=0", "trainer.lr_scheduler.warmup_steps=0", "checkpoint.interval=2"]
        given += args.overrides
        cold = job(directory / "cold", args.config, given, args.steps)
        report_start("nothing compiled before", [cold], COLD_S, gpus)
        warm = [job(directory / f"warm-{number}", args.config, given, args.steps) for number in range(args.warm)]
        report_start("caches warm", warm, WARM_S, gpus)
        report([cold, *warm], gpus)


if __name__ == "__main__":
    main()
