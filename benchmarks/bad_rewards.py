"""What a reward costs that hangs, raises, gives NaN and kills its process, against the same reward that does not.

    python benchmarks/bad_rewards.py [--steps 40] [--share 0.06] [--ahead 2] [--rounds 1] [key=value ...]

Runs of a small model that writes some 100 tokens a completion, synchronous and two steps ahead, each with and without
misbehaviour; a quarter of the ``--share`` of all completions meets each kind. Prints the mean and the median step, and
their ratios. The first steps are left out: the limit of a call is learned in them. Processes that end are
replaced, which takes cores from generation where there are few.
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

from rows import row

PROJECT = Path(__file__).resolve().parent.parent
WARM_UP_STEPS = 5
KINDS = ("timeout", "raised", "not_finite", "died")
REWARD = """
import os, signal, time, zlib

def length(prompt, response, target, *, share, **fields):
    number = zlib.crc32(f"{prompt}|{response}".encode()) % 10_000 / 10_000
    if number < share:
        match int(4 * number / share):
            case 0: time.sleep(3600)
            case 1: raise KeyError("nothing there")
            case 2: return float("nan")
            case 3: os.kill(os.getpid(), signal.SIGKILL)
    return len(response) / 100
"""


def run(directory: Path, steps: int, share: float, staleness: int, overrides: Sequence[str]) -> list[dict[str, float]]:
    """The records of a run's steps, without the first ones."""
    run_dir, reward = directory / f"run-{share}-{staleness}", directory / "reward.py"
    reward.write_text(REWARD)
    command = [sys.executable, "-m", "forge_hpc.submit", "--cluster", "local", "--run-dir", str(run_dir)]
    command += ["--config", str(PROJECT / "configs/grpo/demo.yaml"), "model.path=builtin:qwen3-tiny"]
    command += [f"trainer.training.steps={steps}", f"rollout.max_staleness={staleness}", "evaluation.num_prompts=0"]
    command += ["rollout.prompts_per_step=16", "rollout.max_response_tokens=256", "checkpoint.interval=0"]
    command += ["trainer.optimizer.lr=1e-6", f"reward=[{{name: {reward}:length, args: {{share: {share}}}}}]"]
    paths = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [*command, *overrides], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths}
    )
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][WARM_UP_STEPS:]


def values(records: Sequence[dict[str, float]], key: str) -> list[float]:
    return [record[key] for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--share", type=float, default=0.06)
    parser.add_argument(
        "--ahead", type=int, default=2, metavar="STEPS", help="rollout.max_staleness; 0: synchronous alone"
    )
    parser.add_argument("--rounds", type=int, default=1, help="of both, in turns")
    parser.add_argument("overrides", nargs="*", help="of the configuration, such as reward.0.workers=16")
    args = parser.parse_args()
    for staleness in sorted({0, args.ahead}):
        with tempfile.TemporaryDirectory(prefix="forge-hpc-benchmark-") as directory:
            records: dict[float, list[dict[str, float]]] = {0.0: [], args.share: []}
            for number in range(args.rounds):
                for share, found in records.items():
                    place = Path(directory, str(number))
                    place.mkdir(exist_ok=True)
                    found += run(place, args.steps, share, staleness, args.overrides)
            good, bad = records[0.0], records[args.share]
        print("synchronous" if staleness == 0 else f"{staleness} steps ahead", f"({len(bad)} steps)")
        failed = {kind: sum(values(bad, f"rewards/failed_{kind}")) for kind in KINDS}
        print("  left out:", ", ".join(f"{num:.0f} {kind}" for kind, num in failed.items()))
        for name, average in (("mean", statistics.mean), ("median", statistics.median)):
            good_s, bad_s = (average(values(records, "time/step_s")) for records in (good, bad))
            print(f"  {name} step: {bad_s:.2f} s, {good_s:.2f} s without, ratio {bad_s / good_s:.2f}", flush=True)
        row(f"a step whose rewards misbehave, {staleness} ahead", bad_s, good_s, unit="s", better="less",
            peer="s without")  # fmt: skip


if __name__ == "__main__":
    main()
