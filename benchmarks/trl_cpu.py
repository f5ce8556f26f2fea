"""Episodes a second beside TRL's GRPOTrainer on this machine's CPU, in turns: `A B A B`, medians.

    python benchmarks/trl_cpu.py [--task short|long] [--steps 20] [--rounds 2] [key=value ...]

TRL 1.16 and accelerate go into a temporary folder, without their dependencies: it runs on the torch and transformers of
this environment. Both sides take the same model (random weights), prompts, group size and limits, 128 episodes a step:

    short   the demo's model and task, at most 8 tokens a response
    long    a model of 25 M whose responses end with probability 1/128 a token, at most 512

Ours is a whole run (vLLM in a process of its own); theirs generates with transformers, in the trainer's process. The
first steps do not count.
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

from rows import PROJECT, median, row

from forge_hpc.data.builtin import write_tiny_qwen3

EPISODES, GROUP_SIZE = 128, 8
LARGE: dict[str, Any] = {"dim": 448, "hidden_dim": 1344, "num_layers": 9, "num_heads": 14}
TASKS: dict[str, tuple[int, dict[str, Any]]] = {"short": (8, {}), "long": (512, LARGE)}
WARM_UP_STEPS = {"short": 4, "long": 1}  # a step of TRL's takes minutes there
PARTS = {"short": 1, "long": 8}  # microbatches of TRL's trainer: 128 responses of 512 tokens at once take over 24 GB
TARGETS = {"short": 1.2, "long": 2.5}
FLOOR = 0.35
"""What is below this is missed for another reason than the known one."""
KNOWN = {"short": "vLLM alone takes 0.8 of TRL's step"}
REWARD = "def length(prompt, response, target, **fields):\n    return len(response) / 100\n"


def install(directory: Path) -> Path:
    """A folder with TRL."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory)]
    subprocess.run([*command, "trl==1.16.*", "accelerate"], check=True)
    return directory


def environ(*folders: Path) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


def ours(directory: Path, name: str, args: argparse.Namespace) -> list[float]:
    """Seconds of our steps; the parts of a step are printed."""
    length, run_dir = TASKS[args.task][0], directory / name
    command = [sys.executable, "-m", "forge_hpc.submit", "--cluster", "local", "--run-dir", str(run_dir)]
    command += ["--config", str(PROJECT / "configs/grpo/demo.yaml"), f"model.path={directory / 'model'}"]
    command += [f"reward=[{{name: {directory / 'reward.py'}:length}}]", f"rollout.group_size={GROUP_SIZE}"]
    command += [f"rollout.prompts_per_step={EPISODES // GROUP_SIZE}", f"rollout.max_response_tokens={length}"]
    command += [f"trainer.training.steps={args.steps + WARM_UP_STEPS[args.task]}", "trainer.optimizer.lr=1e-6"]
    command += ["trainer.lr_scheduler.warmup_steps=1", "evaluation.num_prompts=0", "checkpoint.interval=0"]
    command += ["algorithm.max_steps_without_signal=1000000"]
    command += [f"trainer.training.seq_len={max(512, 2 * length)}", "algorithm.drop_zero_signal_groups=false"]
    subprocess.run([*command, *args.overrides], check=True, stdout=subprocess.DEVNULL, env=environ(PROJECT))
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][
        WARM_UP_STEPS[args.task] :
    ]
    keys = ("step", "generate", "train", "weight_sync")
    parts = {key: round(median([record[f"time/{key}_s"] for record in records]), 4) for key in keys}
    print("ours", parts, "tokens", median([record["tokens/generated"] for record in records]), flush=True)
    return [record["time/step_s"] for record in records]


def theirs(directory: Path, name: str, args: argparse.Namespace, package: Path) -> list[float]:
    """Seconds of TRL's steps."""
    length, prompts = TASKS[args.task][0], [f"{a}+{b}=" for a in range(10, 60) for b in range(10, 60)]
    options = {
        "per_device_train_batch_size": EPISODES // PARTS[args.task], "gradient_accumulation_steps": PARTS[args.task],
        "max_steps": args.steps + WARM_UP_STEPS[args.task], "num_generations": GROUP_SIZE,
        "max_completion_length": length, "use_cpu": True, "bf16": False,
    }  # fmt: skip
    given = directory / f"{name}.json"
    given.write_text(json.dumps({"model": str(directory / "model"), "prompts": prompts, "episodes": EPISODES,
                                 "asynchronous": False, "options": options,
                                 "out": str(directory / f"{name}-steps.json")}))  # fmt: skip
    command = [sys.executable, str(PROJECT / "benchmarks/trl_trainer.py"), str(given)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environ(package))
    found = json.loads((directory / f"{name}-steps.json").read_text())
    return list(found["seconds"])[WARM_UP_STEPS[args.task] :]


def measure(args: argparse.Namespace, directory: Path) -> tuple[list[float], list[float]]:
    write_tiny_qwen3(directory / "model", seed=0, **TASKS[args.task][1])
    (directory / "reward.py").write_text(REWARD)
    package = Path(args.trl) if args.trl else install(directory / "trl")
    ours_s: list[float] = []
    theirs_s: list[float] = []
    for number in range(args.rounds):
        theirs_s += theirs(directory, f"theirs-{number}", args, package)
        print(f"TRL {median(theirs_s):.4f} s a step", flush=True)
        ours_s += ours(directory, f"ours-{number}", args)
    return ours_s, theirs_s


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="short")
    parser.add_argument("--steps", type=int, default=20, help="that count, of each run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trl", help="a folder that has TRL already")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of ours")
    args = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory(prefix="forge-hpc-benchmark-") as name:
        ours_s, theirs_s = measure(args, Path(name))
    is_as_known = median(theirs_s) / median(ours_s) >= FLOOR
    known = KNOWN.get(args.task, "") if is_as_known else ""
    row(f"episodes a second, {args.task} responses on the CPU", EPISODES / median(ours_s), EPISODES / median(theirs_s),
        target=TARGETS[args.task], peer="TRL 1.16", known=known)  # fmt: skip


if __name__ == "__main__":
    main()
