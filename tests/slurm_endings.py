"""What this machine's Slurm does with a job that was preempted, however it ends: an experiment, printed as a table.

    make endings                 the machine's own Slurm, about 10 minutes
    make endings SLURM=24.11     another release (tests/slurm_release.sh)

A job has a plan: what it does in each of its lives, either when it is preempted there (`leave`) or by itself
(`then fail`). `keep` forbids Slurm to start it again (scontrol update Requeue=0) before it ends. One job a plan, in
partitions with PreemptMode REQUEUE and CANCEL, with and without a grace time, with and without a time limit; a plan
that is over completes. The table has the job's last state and how often it was started, twice where a time limit makes
a difference. docs/slurm.md holds the tables, and slurm/preemption.py what forge_hpc makes of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from slurm_cluster import ClusterError, SlurmCluster

GRACE_S = 25  # the tasks must get away in it, also on a busy machine
PLANS = (
    # in the first preemption
    "stay",
    "leave",
    "complete",
    "fail",
    "cancel",
    "keep complete",
    "keep fail",
    "requeue",
    # after it
    "requeue, then fail",
    "requeue, then cancel",
    "requeue, then requeue",
    "requeue, then keep complete",
    "requeue, then keep fail",
    "stay, then fail",
    "leave, then fail",
    # in the second preemption, and after it
    "requeue, leave",
    "requeue, complete",
    "requeue, fail",
    "requeue, keep complete",
    "requeue, requeue",
    "requeue, requeue, then fail",
    "requeue, requeue, then keep complete",
    "leave, leave",
)
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "PREEMPTED", "NODE_FAIL", "TIMEOUT")
MANY_LIVES = 5
LIMITS = ("limit", "no limit")

TASK = r"""#!/bin/bash
# task LOG ACTION...: one action for each life of the job
log=$1; shift
plan=("$@") life=${SLURM_RESTART_COUNT:-0}
action=${plan[life]:-then complete}
tell() { echo "$life $*" >>"$log"; }
act() {
  local word
  for word in $1; do
    case $word in
      stay) sleep 600 ;;
      requeue) tell requeue "$(scontrol requeue "$SLURM_JOB_ID" 2>&1)"; sleep 600 ;;
      cancel) scancel "$SLURM_JOB_ID"; sleep 600 ;;
      keep) tell keep "$(scontrol update "JobId=$SLURM_JOB_ID" Requeue=0 2>&1)" ;;
      leave) exit 75 ;;
      complete) exit 0 ;;
      fail) exit 1 ;;
    esac
  done
}
trap 'trap "" TERM; tell signal; act "$action"' TERM
tell start "$SLURMD_NODENAME"
if [[ $action == then* ]]; then trap "" TERM; act "${action#then }"; fi
while :; do sleep 600 & wait $!; done
"""


@dataclass
class Job:
    """One job with its plan, and what it has told."""

    cluster: SlurmCluster
    plan: str
    log: Path
    id: str = ""
    preempted: set[int] = field(default_factory=set)

    @property
    def actions(self) -> list[str]:
        return [action.strip() for action in self.plan.split(",")]

    def submit(self, *options: str) -> None:
        script = self.log.with_suffix(".sh")
        task = self.log.parent / "task"
        words = " ".join(f"'{action}'" for action in self.actions)
        script.write_text(f"#!/bin/bash\nsrun --kill-on-bad-exit=1 {task} {self.log} {words}\n")
        command = ["sbatch", "--parsable", "--nodes=1", "--exclusive", "--mem=0", "--requeue", "--output=/dev/null"]
        self.id = self.cluster.run(*command, *options, str(script)).stdout.strip()

    def said(self, what: str) -> list[list[str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [words for words in map(str.split, lines) if words[1] == what]

    def preempt(self) -> None:
        """Where a life waits for its preemption: a job that must have its node, and that is soon over."""
        for life, _, host, *_ in self.said("start"):
            number = int(life)
            waits = number < len(self.actions) and not self.actions[number].startswith("then")
            if waits and number not in self.preempted:
                self.preempted.add(number)
                urgent = ["sbatch", "--partition=urgent", "--exclusive", "--time=1", f"--nodelist={host}"]
                self.cluster.run(*urgent, "--output=/dev/null", "--wrap", "sleep 1")

    def verdict(self) -> str | None:
        """How it has ended; None while it has not."""
        state = self.cluster.job(self.id)["JobState"]
        starts = len(self.said("start"))  # after the state, which does not change any more
        if state not in FINAL and starts < MANY_LIVES:
            return None
        return f"{state if state in FINAL else 'no end'}, {starts}"


def partitions() -> Iterator[str]:
    yield "PartitionName=main Nodes={nodes} Default=YES PreemptMode=OFF PriorityTier=1"
    yield "PartitionName=urgent Nodes={nodes} PreemptMode=OFF PriorityTier=10"
    for mode, grace_s in product(("REQUEUE", "CANCEL"), (GRACE_S, 0)):
        name = f"{mode}-{grace_s}"
        yield f"PartitionName={name} Nodes={{nodes}} PreemptMode={mode} GraceTime={grace_s} PriorityTier=1"


def group(cluster: SlurmCluster, directory: Path, options: list[str], timeout_s: float) -> dict[str, str]:
    """All plans at once, each on a node of its own; how each ended."""
    directory.mkdir()
    task = directory / "task"
    task.write_text(TASK)
    task.chmod(0o755)
    jobs = [Job(cluster, plan, directory / f"{number}.log") for number, plan in enumerate(PLANS)]
    for job in jobs:
        job.submit(*options)
    found: dict[str, str] = {}
    deadline = time.monotonic() + timeout_s
    while open_jobs := [job for job in jobs if job.plan not in found]:
        late = time.monotonic() > deadline
        for job in open_jobs:
            job.preempt()
            if verdict := job.verdict() or ("not over" if late else None):
                found[job.plan] = verdict
                if "no" in verdict:
                    cluster.run("scancel", job.id, check=False)
        time.sleep(0.5)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--timeout-s", type=float, default=240, help="for each of the eight groups of jobs")
    parser.add_argument("--keep", type=Path, help="directory for the jobs' own words (default: a temporary one)")
    arguments = parser.parse_args()
    directory = arguments.keep or Path(tempfile.mkdtemp(prefix="slurm-endings-"))
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    table: dict[str, dict[str, str]] = defaultdict(dict)
    try:
        cluster = SlurmCluster(nodes=len(PLANS) + 1, partitions=tuple(partitions()), options={"KillWait": "4"})
        with cluster:
            version = cluster.run("scontrol", "--version").stdout.strip()
            for mode, grace_s, limit in product(("REQUEUE", "CANCEL"), (GRACE_S, 0), LIMITS):
                name = f"{mode}, {f'grace {grace_s} s' if grace_s else 'no grace'}, {limit}"
                began = time.monotonic()
                options = [f"--partition={mode}-{grace_s}", f"--time={60 if limit == 'limit' else 0}"]
                where = directory / name.replace(" ", "-").replace(",", "")
                for plan, verdict in group(cluster, where, options, arguments.timeout_s).items():
                    table[plan][name] = verdict
                print(f"{version}: {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"### {version}\n")
    columns = [name.removesuffix(", limit") for name in table[PLANS[0]] if name.endswith(", limit")]
    print("| plan | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for plan in PLANS:
        cells = ({table[plan][f"{name}, {limit}"]: None for limit in LIMITS} for name in columns)
        print(f"| {plan} | " + " | ".join(" / ".join(cell) for cell in cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
