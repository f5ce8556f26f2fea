"""What each shipped recipe learns of the demo's task, over several seeds: held-out accuracy, with an interval.

    python benchmarks/recipes.py [--seeds 0 1 2] [--only ppo kto] [--at-once 1] [--out DIR] [key=value ...]

Each seed has a warm start and a teacher of its own, and each recipe goes on from that warm start by its shipped
configuration. Accuracy is that of 500 held-out sums at the last evaluation; the interval over seeds is Student's t at
95 %. Without a GPU a run takes a few minutes of two cores; on GPUs runs are dealt over them, in bfloat16, with heads of
64 in place of 32. ``--out`` keeps the run directories.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rows import PROJECT, row

from forge_hpc.cluster.worker import visible_gpus
from forge_hpc.data.builtin import write_tiny_qwen3
from forge_hpc.observability.compare import student_t

WAIT_S = 3600.0
SEVERAL = ("algorithm.minibatches=4", "algorithm.epochs=2", "trainer.optimizer.lr=5e-4")
TEACHER = ("recipe_args.teachers=[{seed}/teacher/export]",)


@dataclass(frozen=True)
class Case:
    """A recipe with its configuration, and what its figure has to come to."""

    config: str
    key: str = "accuracy"
    target: float | None = None
    options: tuple[str, ...] = ()


CASES: Mapping[str, Case] = {
    "ppo": Case("ppo/demo.yaml", target=0.85),
    "ppo, 8 optimizer steps a batch": Case("ppo/demo.yaml", target=0.85, options=SEVERAL),
    "grpo": Case("grpo/demo.yaml", target=0.85),
    "grpo, 8 optimizer steps a batch": Case("grpo/demo.yaml", target=0.85, options=SEVERAL),
    "online dpo": Case("online_dpo/demo.yaml", target=0.85),
    "distillation": Case("distillation/demo.yaml", target=0.85, options=TEACHER),
    "best of n": Case("best_of_n/demo.yaml", target=0.5),
    "dpo": Case("dpo/demo.yaml", target=0.6),
    "kto": Case("kto/demo.yaml", "kto/accuracy", 0.8),
    "reward model": Case("reward_model/demo.yaml", "preference/accuracy", 0.85),
    "grpo on the reward model": Case("reward_model/grpo.yaml", options=("reward.1.path={seed}/reward-model/export",)),
}  # fmt: skip
ON_GPU = (
    "cluster.gpus_per_node=1", "model.dtype=bfloat16", "trainer.training.mixed_precision_param=bfloat16",
    "trainer.compile.enable=false", "trainer.training.local_batch_size=16", "generator.engine.enforce_eager=true",
    "generator.engine.extra={kv_cache_memory_bytes: 536870912}", "generator.engine.gpu_memory_utilization=0.05",
    "cluster.frozen_processes=null",  # one GPU has all
)  # fmt: skip


class Runs:
    """Runs of the project by its command, in a folder of each seed."""

    def __init__(self, directory: Path, overrides: Sequence[str], gpus: Sequence[str]) -> None:
        self._directory, self._overrides, self._gpus = directory, overrides, gpus
        self._count = 0

    def folder(self, seed: int) -> Path:
        return self._directory / f"seed-{seed}"

    def submit(self, seed: int, name: str, config: str, *options: str) -> list[dict[str, Any]]:
        """The lines of its evaluations."""
        run_dir = self.folder(seed) / name
        command = [sys.executable, "-m", "forge_hpc.submit", "--cluster", "local", "--run-dir", str(run_dir)]
        command += ["--config", str(PROJECT / "configs" / config), f"seed={seed}"]
        command += [*(ON_GPU if self._gpus else ()), *options, *self._overrides]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])}
        if self._gpus:
            environ["CUDA_VISIBLE_DEVICES"] = self._gpus[self._count % len(self._gpus)]
            self._count += 1
        output = run_dir.with_suffix(".out")
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("wb") as file:
            code = subprocess.run(command, stdout=file, stderr=file, env=environ, timeout=WAIT_S).returncode
        if code:
            last = "\n".join(output.read_text(errors="replace").splitlines()[-8:])
            raise RuntimeError(f"{run_dir.name} of seed {seed}: exit code {code}\n{last}")
        path = run_dir / "evaluations.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def write_models(self, seed: int) -> None:
        """With heads that FlashAttention has, for student and teacher."""
        if self._gpus:
            write_tiny_qwen3(self.folder(seed) / "tiny", seed, head_dim=64)
            write_tiny_qwen3(self.folder(seed) / "small", seed, dim=256, num_layers=4, hidden_dim=768, head_dim=64)

    def warm_start(self, seed: int) -> None:
        self.submit(seed, "warmstart", "sft/demo.yaml", *self._model(seed, "tiny"))

    def teacher(self, seed: int) -> None:
        self.submit(seed, "teacher", "distillation/teacher.yaml", *self._model(seed, "small"))

    def _model(self, seed: int, name: str) -> list[str]:
        return [f"model.path={self.folder(seed) / name}"] if self._gpus else []

    def learn(self, seed: int, name: str) -> list[dict[str, Any]]:
        """From the warm start."""
        run = name.replace(",", "").replace(" ", "-")
        if (self.folder(seed) / run).exists():
            raise RuntimeError(f"{self.folder(seed) / run} is there already: give another --out")
        shutil.copytree(self.folder(seed) / "warmstart", self.folder(seed) / run / "warmstart")
        options = [option.format(seed=self.folder(seed)) for option in CASES[name].options]
        return self.submit(seed, run, CASES[name].config, *options)


def report(name: str, found: Mapping[int, list[dict[str, Any]]]) -> None:
    """A row of the table; as JSON all that was evaluated."""
    case = CASES[name]
    for seed, lines in found.items():
        kept = [{key: value for key, value in line.items() if isinstance(value, int | float)} for line in lines]
        print(json.dumps({"recipe": name, "seed": seed, "evaluations": kept}), flush=True)
    values = [lines[-1][case.key] for lines in found.values()]
    # what the first evaluation of a recipe knows before training
    before = [lines[0][case.key] for lines in found.values() if lines[0]["step"] == 0 and case.key in lines[0]]
    note = f"seeds: {', '.join(f'{value:.3f}' for value in values)}"
    if before:
        note = f"from {fmean(before):.3f}; {note}"
    if len(values) > 1:
        half = student_t(len(values) - 1) * stdev(values) / len(values) ** 0.5
        note = f"{max(0.0, fmean(values) - half):.3f} to {min(1.0, fmean(values) + half):.3f}; {note}"
    row(f"{name}: held-out {case.key}, {len(values)} seeds", fmean(values), target=case.target, note=note)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs at the same time")
    parser.add_argument("--out", type=Path, help="keep the run directories there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all runs")
    args = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory(prefix="forge-hpc-benchmark-") as name:
        runs = Runs((args.out or Path(name)).resolve(), args.overrides, visible_gpus())
        return learn(runs, args)


def learn(runs: Runs, args: argparse.Namespace) -> int:
    """All runs, as many at once as asked for; those that others build on begin first."""
    failed = 0
    for seed in args.seeds:
        runs.write_models(seed)
    with ThreadPoolExecutor(args.at_once) as pool:
        first = [pool.submit(runs.warm_start, seed) for seed in args.seeds]
        if "distillation" in args.only:
            first += [pool.submit(runs.teacher, seed) for seed in args.seeds]
        try:
            for each in first:
                each.result()
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        on_models = "grpo on the reward model"
        names = [each for each in CASES if each in args.only or (each == "reward model" and on_models in args.only)]
        names.sort(key=lambda each: each not in ("reward model", "kto", "dpo"))

        found: dict[str, dict[int, list[dict[str, Any]]]] = {}

        def one(seed: int, *chain: str) -> None:
            for name in chain:
                found.setdefault(name, {})[seed] = runs.learn(seed, name)

        chains = [(name, on_models) if name == "reward model" else (name,) for name in names if name != on_models]
        if on_models not in args.only:
            chains = [chain[:1] for chain in chains]
        started = {(chain, seed): pool.submit(one, seed, *chain) for chain in chains for seed in args.seeds}
        for (chain, _), future in started.items():
            try:
                future.result()
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                print(f"error: {', '.join(chain)}: {error}", file=sys.stderr, flush=True)
                failed = 1
    for name in CASES:
        if name in found and name in args.only:
            report(name, found[name])
        elif name in args.only:
            row(f"{name}: held-out {CASES[name].key}", None, target=CASES[name].target, note="failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
