"""What a start costs: CPU seconds of all processes of a job of four hosts until the first step of a small run.

    python benchmarks/start.py                              # this build (root, Debian's Slurm)
    python benchmarks/start.py --other ../before --rounds 2 # A B A B against another checkout, and the ratio
    python benchmarks/start.py --floor                      # what the imports alone cost, by role

User and system time of every process in the job's tree and of the children that it has waited for, from /proc when the
first step is in ``metrics.jsonl``; by role, and the wall time by phase. CPU seconds count what the machine does for
others less than wall time does, but a crowded one makes them longer too: compare rounds that alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "tests"))

from slurm_cluster import SlurmCluster  # noqa: E402

OVERRIDES = [
    "model.path=builtin:qwen3-tiny",
    "trainer.training.steps=1000",
    "trainer.lr_scheduler.warmup_steps=0",
    "rollout.prompts_per_step=16",
    "evaluation.num_prompts=0",
    "generator.engine.kv_cache_memory_gib=0.25",
]
ROLES = {
    r"forge_hpc\.run\b": "supervisors",
    r"forge_hpc\.cluster\.worker": "Monarch workers",
    r"forge_hpc\.controller": "controller",
    r"forge_hpc\.gate": "gate",
    r"forge_hpc\.rewards": "reward workers",
}
FLOOR = {
    "supervisors": (4, "forge_hpc.run"),
    "Monarch workers": (4, "forge_hpc.cluster.worker, monarch.actor"),
    "controller": (1, "monarch.actor, transformers.models.auto.tokenization_auto"),
    "trainers": (2, "torchtitan.components.optimizer, torchtitan.distributed, torchtitan.models.qwen3"),
    "generators": (2, "vllm.v1.engine.llm_engine, vllm.v1.worker.cpu_worker"),
}
"""By role: processes, and what they cannot be without."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, metavar="DIR", help="a checkout to compare with")
    parser.add_argument("--rounds", type=int, default=1, metavar="N")
    parser.add_argument("--floor", action="store_true", help="measure the imports alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if args.floor:
        floor()
        return
    builds = {"this": PROJECT, **({"other": args.other.resolve()} if args.other else {})}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in builds}
    with SlurmCluster(nodes=4) as cluster:
        for number in range(args.rounds):
            for name, project in builds.items():
                cost, phases = start(cluster, project)
                found[name].append(cost)
                by_role = ", ".join(
                    f"{role} {seconds:.1f}" for role, seconds in sorted(cost.items(), key=lambda x: -x[1])
                )
                walls = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items())
                print(
                    f"round {number + 1}, {name}: {sum(cost.values()):.1f} CPU s: {by_role}\n    wall: {walls}",
                    flush=True,
                )
    totals = {name: statistics.median(sum(cost.values()) for cost in costs) for name, costs in found.items()}
    print(", ".join(f"{name}: median {total:.1f} CPU s" for name, total in totals.items()))
    if args.other:
        print(f"this / other: {totals['this'] / totals['other']:.2f}")
    if args.json:
        args.json.write_text(json.dumps(found))


def start(cluster: SlurmCluster, project: Path) -> tuple[dict[str, float], dict[str, float]]:
    """CPU seconds by role, and wall seconds by phase, of one start."""
    folder = Path(tempfile.mkdtemp(prefix="start-"))
    run_dir, path = folder / "run", f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**cluster.env, "PATH": path, "PYTHONPATH": str(project)}
    (folder / "reward.py").write_text("def length(prompt, response, target, **fields):\n    return len(response) / 6\n")
    command = ["sbatch", "--parsable", "--nodes=4", f"--output={folder}/out", f"{project}/sbatch/grpo.sh"]
    command += ["--run-dir", str(run_dir), f"reward=[{{name: {folder}/reward.py:length}}]", *OVERRIDES]
    job = cluster.run(*command, env=env, cwd=project).stdout.strip()
    metrics, until = run_dir / "metrics.jsonl", time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text().count("\n")):
        if time.monotonic() > until:
            raise SystemExit(f"no step: {(folder / 'out').read_text()[-2000:]}")
        time.sleep(0.1)
    cost = by_role(job)
    phases: dict[str, float] = {}
    until = time.monotonic() + 5  # older builds do not say
    while not phases and time.monotonic() < until:
        for line in (run_dir / "starts.jsonl").read_text().splitlines():
            phases = json.loads(line).get("seconds", phases)
        time.sleep(0.1)
    cluster.run("scancel", job)
    cluster.wait_for_job(job, ("CANCELLED",))
    shutil.rmtree(folder, ignore_errors=True)
    return cost, phases


def by_role(job: str) -> dict[str, float]:
    """CPU seconds of the job's processes, and of the children that they have waited for."""
    ticks, cost = os.sysconf("SC_CLK_TCK"), defaultdict[str, float](float)
    for process in Path("/proc").iterdir():
        try:
            if f"SLURM_JOB_ID={job}\0".encode() not in (process / "environ").read_bytes() + b"\0":
                continue
            command = (process / "cmdline").read_text().replace("\0", " ")
            fields = (process / "stat").read_text().rpartition(") ")[2].split()
            log = str((process / "fd/1").readlink())
        except OSError:  # no process, or one that has just ended
            continue
        role = next((role for pattern, role in ROLES.items() if re.search(pattern, command)), "")
        if not role and (actor := re.search(r"(trainer|generator)-\d+\.log", log)) is not None:
            role = f"{actor[1]}s"
        if not role:
            role = "other actors" if "monarch" in command else "shells and srun"
        cost[role] += sum(map(int, fields[11:15])) / ticks
    return dict(cost)


def floor() -> None:
    """Imports alone, CPU seconds of a process each, best of three."""
    whole = 0.0
    for role, (num, modules) in FLOOR.items():
        seconds = min(imports(modules) for _ in range(3))
        whole += num * seconds
        print(f"{role:<16} {num} x {seconds:5.2f} CPU s  {modules}")
    print(f"{'together':<16} {whole:9.2f} CPU s")


def imports(modules: str) -> float:
    """CPU seconds of a Python that imports these, with the garbage left where it is."""
    prepare = "import gc; gc.disable(); "
    if "titan" in modules:
        prepare += "import forge_hpc.models.device as d; d.prepare_torchtitan(); "
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "PYTHONPATH": str(PROJECT)}
    before = os.times()
    subprocess.run([sys.executable, "-c", f"{prepare}import {modules}"], env=env, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
