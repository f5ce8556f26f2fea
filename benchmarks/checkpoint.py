"""What saving every step costs: the demo's task with a checkpoint after each step, and without any.

    python benchmarks/checkpoint.py [--steps 60] [--rounds 1] [key=value ...]

Prints the median step of both runs, their ratio, and for how long a step was held up by saving: ``time/checkpoint_s``
of ``metrics.jsonl``, over ``time/step_s``. The rest of the ratio is the writing, which takes its share of the cores
beside the training. The promise is that a step is held up for at most 5 % or 15 ms, whichever is more; the exit code
is 1 where it is not kept. The model has random weights, which cost as much as learned ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rows import NOT_KEPT, row

PROJECT = Path(__file__).resolve().parent.parent
WARM_UP_STEPS = 5
MAX_SHARE, MAX_S = 0.05, 0.015


def run(run_dir: Path, steps: int, interval: int, overrides: Sequence[str]) -> list[dict[str, float]]:
    """The records of a run's steps, without the first ones and the last one, which is always saved."""
    command = [sys.executable, "-m", "forge_hpc.submit", "--cluster", "local", "--run-dir", str(run_dir)]
    command += ["--config", str(PROJECT / "configs/grpo/demo.yaml"), "model.path=builtin:qwen3-tiny"]
    command += [f"trainer.training.steps={steps}", f"checkpoint.interval={interval}", "evaluation.num_prompts=0"]
    command += ["algorithm.max_steps_without_signal=1000000", *overrides]
    paths = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths})
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][WARM_UP_STEPS:-1]


def median(records: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(record[key] for record in records)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=1, help="of both, in turns")
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as trainer.processes_per_node=2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forge-hpc-benchmark-") as directory:
        records: dict[int, list[dict[str, float]]] = {1: [], 0: []}
        for number in range(args.rounds):
            for n, found in records.items():
                found += run(Path(directory, f"every-{n}-{number}"), args.steps, n, args.overrides)
    saved, bare = records[1], records[0]
    step_s, bare_s = median(saved, "time/step_s"), median(bare, "time/step_s")
    held_up_s = median(saved, "time/checkpoint_s")
    share = statistics.median(record["time/checkpoint_s"] / record["time/step_s"] for record in saved)
    print(f"medians of {len(saved)} steps")
    print(f"checkpoint.interval=1: a step takes {1e3 * step_s:.0f} ms")
    print(f"checkpoint.interval=0: a step takes {1e3 * bare_s:.0f} ms, ratio {step_s / bare_s:.2f}")
    print(f"held up by saving: {1e3 * held_up_s:.1f} ms, {100 * share:.1f} % of the step")
    kept = share <= MAX_SHARE or held_up_s <= MAX_S
    print(f"at most {100 * MAX_SHARE:.0f} % or {1e3 * MAX_S:.0f} ms: {'kept' if kept else 'not kept'}")
    row("a step held up by saving each, share of the step", share, target=MAX_SHARE, better="less",
        note=f"{1e3 * held_up_s:.1f} ms, of which {1e3 * MAX_S:.0f} are allowed in any case")  # fmt: skip
    row("a step that is saved", 1e3 * step_s, 1e3 * bare_s, unit="ms", better="less", peer="ms without a save")
    return 0 if kept else NOT_KEPT


if __name__ == "__main__":
    sys.exit(main())
