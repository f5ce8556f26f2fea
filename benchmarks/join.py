"""What nodes that another job lends add to a running run, on a real Slurm cluster of hosts on this machine (root).

    python benchmarks/join.py [--lend 2] [--seconds 30] [--rounds 2]

A run of the tiny model on one node with one generator plays episodes whose time an environment determines: 200 ms a
turn, three turns, ``--places`` at once for each generator. It is measured alone and joined, in turns; each time the
job that lends is cancelled, and at the end no prompt may be lost. Two cores hold few generators: what the machine does
beside it shows in the figures, and a load above its cores makes them worthless.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rows import PROJECT, median, row

sys.path.insert(0, str(PROJECT / "tests"))
from slurm_cluster import SlurmCluster

ENVIRONMENT = """
import time
from forge_hpc.environments import Step

class Slow:
    def __init__(self, seconds: float, turns: int) -> None:
        self.seconds, self.left, self.chars = seconds, turns, 0
    async def reset(self, prompt):
        return None
    async def step(self, response):
        time.sleep(self.seconds)
        self.left, self.chars = self.left - 1, self.chars + len(response)
        return Step("ok", self.chars / 18 if not self.left else 0.0, not self.left)
    async def close(self):
        pass
"""
PROMPTS, GROUP = 8, 2


class Joined:
    """A run on one node, and what others lend it."""

    def __init__(self, cluster: SlurmCluster, directory: Path, places: int) -> None:
        self._cluster, self.run_dir = cluster, directory / "run"
        (directory / "slow.py").write_text(ENVIRONMENT)
        overrides = [f"environment.name={directory / 'slow.py'}:Slow", "environment.args={seconds: 0.2, turns: 3}"]
        overrides += ["environment.max_turns=3", "environment.max_turn_tokens=4", "model.path=builtin:qwen3-tiny"]
        overrides += ["reward=[]", "rollout.max_prompt_tokens=40", "rollout.max_response_tokens=48"]
        overrides += [f"rollout.prompts_per_step={PROMPTS}", f"rollout.group_size={GROUP}", "rollout.max_staleness=4"]
        overrides += ["rollout.window=2", f"generator.engine.max_num_seqs={places}", "checkpoint.interval=0"]
        overrides += ["generator.engine.kv_cache_memory_gib=0.25", "trainer.training.steps=100000"]
        overrides += ["algorithm.max_steps_without_signal=100000", "evaluation.num_prompts=0"]
        self.forge("submit", "--nodes", "1", "--run-dir", str(self.run_dir), *overrides)

    def forge(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "forge_hpc.cli", *arguments]
        environ = {**self._cluster.env, "PYTHONPATH": str(PROJECT)}
        done = subprocess.run(command, env=environ, cwd=PROJECT, text=True, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout

    def steps(self) -> list[dict[str, float]]:
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def lent(self) -> int:
        return int(json.loads((self.run_dir / "status.json").read_text())["lent"])

    def lend(self, nodes: int) -> str:
        # Hosts of the cluster share this machine's cores: each lent node is given one, or all would use all of them.
        one_core = f"taskset --pid --cpu-list $((SLURM_PROCID % {os.cpu_count()})) $$ > /dev/null"
        setup = f"slurm.setup=['{one_core}']"
        job = self.forge("join", str(self.run_dir), "--nodes", str(nodes), setup).split()[1]
        wait_for(lambda: self.lent() == nodes)
        return job

    def take_back(self, job: str) -> None:
        self._cluster.run("scancel", job)
        wait_for(lambda: self.lent() == 0)

    def rate(self, seconds: float) -> float:
        """Rollouts a second over the next ``seconds``, after two steps that may be partly of the time before."""
        begun = len(self.steps()) + 2
        wait_for(lambda: len(self.steps()) > begun)
        time.sleep(seconds)
        times = [step["wall_time"] for step in self.steps()[begun:]]
        return (len(times) - 1) * PROMPTS * GROUP / (times[-1] - times[0])


def wait_for(ready: Callable[[], object], timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError("the run does not come that far")
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lend", type=int, default=2, help="nodes, of one generator each")
    parser.add_argument("--places", type=int, default=2, help="episodes at once for each generator")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    alone, joined, loads = [], [], []
    with tempfile.TemporaryDirectory(prefix="forge-hpc-join-") as name, SlurmCluster(nodes=1 + args.lend) as cluster:
        run = Joined(cluster, Path(name), args.places)
        wait_for((run.run_dir / "metrics.jsonl").exists)
        for _ in range(args.rounds):
            alone.append(run.rate(args.seconds))
            job = run.lend(args.lend)
            joined.append(run.rate(args.seconds))
            loads.append(os.getloadavg()[0])
            run.take_back(job)
        run.forge("cancel", str(run.run_dir))
        stale = max(step["episodes/stale"] for step in run.steps())
    ratios = ", ".join(f"{b / a:.2f}" for a, b in zip(alone, joined, strict=True))
    row(f"rollouts of a run with 1 generator: with {args.lend} lent ones, alone", median(joined), median(alone),
        target=2.0, unit="rollouts/s",
        note=f"ratios {ratios}; episodes thrown away {stale:.0f}; load {max(loads):.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
