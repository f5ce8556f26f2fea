"""A campaign of faults against one run on a real Slurm cluster of four hosts: `make chaos` (SEED=n, ARGS=names).

A synchronous run of two nodes, checkpointed every step, suffers one fault after the other, in a seeded order, each at
a seeded moment. It must come back by itself every time (where a user has ended it, by being submitted again). At the
end the same run is done without a fault: all metrics that do not measure time, and the final weights, must be the same
to the last bit, so that no step is missing, doubled or trained on other prompts.

    python tests/chaos.py [--seed N] [--list] [FAULT ...]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from runs import PROJECT, REWARD, processes, read, small_run, status, wait_for
from slurm_cluster import SlurmCluster

from forge_hpc.cluster.starts import StartLog
from forge_hpc.run_dir import RunDir

PARTITIONS = (
    "PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 State=UP",
    "PartitionName=cancel Nodes={nodes} PriorityTier=1 PreemptMode=CANCEL GraceTime=30 State=UP",
    "PartitionName=now Nodes={nodes} PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 State=UP",
    "PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF State=UP",
)
OPTIONS = {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE", "SlurmdTimeout": "20", "KillWait": "30"}
SAME = ("step", "policy_version", "reward/mean", "loss", "grad_norm", "tokens/generated", "tokens/trained")
RECOVERY_S = 240.0
STEPS_BETWEEN = 3


PARTITION = {"preempted, CANCEL": "cancel", "preempted, no grace": "now"}  # low for all other faults


def slurmds(name: str) -> list[psutil.Process]:
    """The living slurmd of a host."""
    found = psutil.process_iter(["name", "cmdline", "status"])
    return [p for p in found if p.info["name"] == "slurmd" and name in (p.info["cmdline"] or [])]


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """Records of ``starts.jsonl``."""
    return StartLog(RunDir(run_dir)).read()


@dataclass
class Row:
    """What a fault did."""

    fault: str
    detected_s: list[float] = field(default_factory=list)
    recovered_s: list[float] = field(default_factory=list)
    steps_repeated: int = 0
    problem: str = ""


class Campaign:
    """One run, its cluster, and what can be done to it."""

    def __init__(self, cluster: SlurmCluster, directory: Path, seed: int) -> None:
        self.cluster = cluster
        self.directory = directory
        self.run_dir = directory / "run"
        self.random = random.Random(seed)
        self.disk = directory / "disk"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = {**cluster.env, "PATH": path, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        self.partition = "low"
        self.fault_time = 0.0

    # ---- the run

    def submit(self, run_dir: Path, steps: int, *sbatch: str, partition: str = "low") -> str:
        """Queue the run, or queue it again; the job's id."""
        command = ["sbatch", "--parsable", "--nodes=2", f"--partition={partition}"]
        command += [f"--output={self.directory}/slurm-%j.out", *sbatch, "sbatch/grpo.sh", "--run-dir", str(run_dir)]
        command += small_run(self.directory, steps, REWARD, "checkpoint.interval=1", "evaluation.num_prompts=0")
        command += ["algorithm.max_steps_without_signal=100000", "generator.timeout_s=15"]
        command += ["trainer.lr_scheduler.decay_ratio=null"]  # the rate must not depend on how long the campaign takes
        done = self.cluster.run(*command, env=self.env, cwd=PROJECT, timeout_s=900)
        return done.stdout.split()[0]

    @property
    def step(self) -> int:
        records = read(self.run_dir)
        return records[-1]["step"] if records else 0

    @property
    def job(self) -> str:
        return str(status(self.run_dir)["job_id"])

    def wait_for_steps(self, num: int, timeout_s: float = RECOVERY_S) -> None:
        """Wait until ``num`` further steps have been done, at a moment in a step that follows from the seed."""
        target = self.step + num
        wait_for(lambda: self.step >= target, f"step {target}", timeout_s)
        time.sleep(self.random.random() * 0.5)

    def kill(self, word: str, signum: signal.Signals = signal.SIGKILL) -> None:
        """Signal a process of the run, found by its command line or log."""
        found = processes(self.run_dir, word)
        assert found, f"no process {word}"
        found[0].send_signal(signum)

    def log_time(self, since: float, pattern: str) -> float | None:
        """When the controllers' logs, or the record of starts, first said something after ``since``."""
        times = []
        for path in self.run_dir.glob("logs/*/controller.log"):
            for line in path.read_text(errors="replace").splitlines():
                if re.search(pattern, line) and (match := re.match(r"(\S+)Z ", line)):
                    times.append(datetime.fromisoformat(f"{match[1]}+00:00").timestamp())
        times += [record["time"] for record in self.ends()]
        return min((moment for moment in times if moment >= since - 0.5), default=None)

    def other_host(self) -> int:
        """Index of the host that the job's second node, with the generator, is."""
        nodes = self.cluster.job(self.job)["NodeList"]
        names = self.cluster.run("scontrol", "show", "hostnames", nodes).stdout.split()
        return [host.name for host in self.cluster.hosts].index(names[1])

    # ---- faults

    def preempt(self) -> None:
        """A job of higher priority takes the nodes for a few seconds."""
        high = ["sbatch", "--parsable", "--partition=high", "--nodes=4", "--exclusive", "--wrap=sleep 3"]
        job = self.cluster.run(*high, f"--output={self.directory}/high.out", env=self.env).stdout.strip()
        self.cluster.wait_for(lambda: self.cluster.job(job)["JobState"] == "COMPLETED", 180)

    def move_to(self, partition: str) -> None:
        """Have the run go on in another partition."""
        if self.partition != partition:
            self.cancel()
            self.partition = partition
            self.submit(self.run_dir, 100000, partition=partition)
            self.wait_for_steps(STEPS_BETWEEN)

    def cancel(self) -> None:
        job = self.job
        self.fault_time = time.time()
        self.cluster.run("scancel", job)
        wait_for(lambda: self.cluster.job(job)["JobState"] == "CANCELLED", "the end of the job", 60)
        assert status(self.run_dir)["state"] == "cancelled", status(self.run_dir)

    def scancel(self) -> None:
        self.cancel()
        self.submit(self.run_dir, 100000, partition=self.partition)

    def walltime(self) -> None:
        self.cancel()
        self.submit(self.run_dir, 100000, "--time=2", partition=self.partition)
        before = len(self.ends())
        wait_for(lambda: len(self.ends()) > before, "the walltime", 240)
        self.fault_time = self.ends()[-1]["time"]
        assert self.ends()[-1]["cause"] == "walltime", self.ends()[-1]

    def starts(self, event: str) -> list[dict[str, Any]]:
        """Records of starts: those that ``begin``, or those that ``end``."""
        return [record for record in read_starts(self.run_dir) if record["event"] == event]

    def ends(self) -> list[dict[str, Any]]:
        return self.starts("end")

    def slurmd(self) -> None:
        host = self.cluster.hosts[self.other_host()]
        for process in slurmds(host.name):
            process.kill()

    def mend_slurmd(self) -> None:
        for host in self.cluster.hosts:
            if not slurmds(host.name):
                command = ["slurmd", "-D", "-N", host.name, "-f", str(self.cluster.conf)]
                self.cluster._daemon(f"slurmd-{host.name}", self.cluster.on_host(host, *command))
                self.cluster.wait_for(lambda h=host: "down" not in self.node_state(h.name), 60)

    def node_state(self, name: str) -> str:
        return self.cluster.run("sinfo", "-h", "-n", name, "-o", "%T", "-p", "low").stdout

    def partition_network(self) -> None:
        self.cut = self.cluster.hosts[self.other_host()].link
        subprocess.run(["ip", "link", "set", self.cut, "down"], check=True)

    def mend_network(self) -> None:
        subprocess.run(["ip", "link", "set", self.cut, "up"], check=True)

    def fill_disk(self) -> None:
        with (self.disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 65536)
        wait_for(lambda: read(self.run_dir)[-1]["checkpoint/failed"] > 0, "a failed save", 60)
        self.wait_for_steps(STEPS_BETWEEN)  # training goes on

    def free_disk(self) -> None:
        (self.disk / "filler").unlink()
        newest = self.step
        wait_for(lambda: self.newest_checkpoint() > newest, "a good save", 60)

    def newest_checkpoint(self) -> int:
        return max(int(path.name[5:]) for path in (self.run_dir / "checkpoints").glob("step-*"))

    def corrupt(self) -> None:
        self.cancel()
        newest = self.run_dir / "checkpoints" / f"step-{self.newest_checkpoint():08d}"
        shard = max(newest.rglob("*.distcp"), key=lambda path: path.stat().st_size)
        with shard.open("r+b") as file:
            file.seek(shard.stat().st_size // 2)
            file.write(b"damage")
        self.submit(self.run_dir, 100000, partition=self.partition)


FAULTS: dict[str, tuple[Callable[[Campaign], None], Callable[[Campaign], None] | None, str, str]] = {
    # name: (what is done, what is done afterwards, how it shows in the log, final state of the start it happened in)
    "generator killed": (lambda c: c.kill("generator-0.log"), None, "reports of generator", ""),
    "generator stuck": (lambda c: c.kill("generator-0.log", signal.SIGSTOP), None, "did not answer within", ""),
    "trainer rank killed": (lambda c: c.kill("trainer-0.log"), None, "reports of trainer", ""),
    "controller killed": (lambda c: c.kill("forge_hpc.recipes"), None, "-", "preempted"),
    "worker loop killed": (lambda c: c.kill("--node 1"), None, "node 1: its Monarch worker", "preempted"),
    "slurmd killed": (Campaign.slurmd, Campaign.mend_slurmd, "node 1|reports of", "preempted"),
    "preempted, REQUEUE": (Campaign.preempt, None, "leaving after this step", "preempted"),
    "preempted, CANCEL": (Campaign.preempt, None, "leaving after this step", "preempted"),
    "preempted, no grace": (Campaign.preempt, None, "leaving after this step", "preempted"),
    "walltime": (Campaign.walltime, None, "leaving after this step", "preempted"),
    "scancel": (Campaign.scancel, None, "-", "cancelled"),
    "checkpoint disk full": (Campaign.fill_disk, Campaign.free_disk, "the checkpoint of step", ""),
    "newest damaged": (Campaign.corrupt, None, "passing over", "cancelled"),
    "network cut": (Campaign.partition_network, Campaign.mend_network, "reports of|is lost", "preempted"),
}


def written(run_dir: Path) -> dict[int, float]:
    """By step: when its record was written (unix s)."""
    return {record["step"]: record["wall_time"] for record in read(run_dir)}


def inject(campaign: Campaign, name: str, row: Row) -> None:
    """One fault, from a run that trains to a run that trains again."""
    fault, mend, sign, state = FAULTS[name]
    campaign.move_to(PARTITION.get(name, "low"))
    campaign.wait_for_steps(STEPS_BETWEEN)
    ends, begins = len(campaign.ends()), len(campaign.starts("begin"))
    campaign.fault_time, seen_before = time.time(), written(campaign.run_dir)
    fault(campaign)
    since = back = campaign.fault_time
    if state:  # another start takes over
        back = wait_for(
            lambda: [s["time"] for s in campaign.starts("begin")[begins:] if s["time"] > since],
            f"another start after {name}",
            RECOVERY_S,
        )[0]
        seen_before = {**seen_before, **{s: t for s, t in written(campaign.run_dir).items() if t < back}}
    # A step that is done again has its record written anew.
    new = wait_for(
        lambda: sorted(t for s, t in written(campaign.run_dir).items() if t > back and s not in seen_before),
        f"a step after {name}",
        RECOVERY_S,
    )
    row.recovered_s.append(new[0] - since)
    now = written(campaign.run_dir)
    row.steps_repeated = max(row.steps_repeated, sum(now[step] != moment for step, moment in seen_before.items()))
    if (seen := campaign.log_time(since, sign)) is not None:
        row.detected_s.append(max(0.0, seen - since))
    if mend is not None:
        mend(campaign)
    ended = campaign.ends()[ends:]
    if state and name != "slurmd killed" and state not in [end["state"] for end in ended]:
        row.problem = f"the start ended as {[end['state'] for end in ended]}, not {state}"
    if not state and ended:
        row.problem = f"the start ended: {ended[-1]['message']}"


def compare(run: Path, plain: Path) -> str:
    """What differs between the run that suffered and the one that did not; empty if nothing."""
    one, other = read(run), read(plain)
    if [r["step"] for r in one] != [r["step"] for r in other]:
        return "steps are missing or doubled"
    different = [r["step"] for r, o in zip(one, other, strict=True) if any(r[key] != o[key] for key in SAME)]
    if different:
        return f"metrics differ from step {different[0]}"
    weights = [(path / "export/model.safetensors").read_bytes() for path in (run, plain)]
    return "" if weights[0] == weights[1] else "the final weights differ"


def show(rows: list[Row]) -> None:
    """The table."""

    def seconds(values: list[float]) -> str:
        return f"{max(values):.1f} s" if values else "-"

    print(f"\n{'fault':<22}{'times':>6}{'detected':>11}{'recovered':>11}{'steps repeated':>16}  result")
    for row in rows:
        cells = (len(row.recovered_s), seconds(row.detected_s), seconds(row.recovered_s), row.steps_repeated)
        print(f"{row.fault:<22}{cells[0]:>6}{cells[1]:>11}{cells[2]:>11}{cells[3]:>16}  {row.problem or 'ok'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("faults", nargs="*", help="names of faults; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="list the faults")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(FAULTS))
        return 0
    if unknown := set(arguments.faults) - FAULTS.keys():
        print(f"error: no fault {sorted(unknown)[0]}\nhint: --list", file=sys.stderr)
        return 2
    names = arguments.faults or list(FAULTS)
    random.Random(arguments.seed).shuffle(names)
    directory = Path(tempfile.mkdtemp(prefix="forge-hpc-chaos-"))
    rows, difference = [Row(name) for name in names], "not compared"
    disk = directory / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)], check=True)
    begin = time.monotonic()
    try:
        with SlurmCluster(nodes=4, partitions=PARTITIONS, options=OPTIONS) as cluster:
            campaign = Campaign(cluster, directory, arguments.seed)
            campaign.run_dir.mkdir(mode=0o700)
            (disk / "checkpoints").mkdir()
            (campaign.run_dir / "checkpoints").symlink_to(disk / "checkpoints")
            campaign.submit(campaign.run_dir, 100000)
            for name, row in zip(names, rows, strict=True):
                try:
                    inject(campaign, name, row)
                except AssertionError as error:
                    row.problem = " ".join(str(error).split())
                    break
                print(f"{time.monotonic() - begin:6.0f} s  {name}: {row.problem or 'ok'}", flush=True)
            else:
                campaign.cancel()
                steps = campaign.step + STEPS_BETWEEN
                job = campaign.submit(campaign.run_dir, steps)
                plain = campaign.submit(directory / "plain", steps)
                for last in (job, plain):
                    cluster.wait_for_job(last, timeout_s=1200)
                difference = compare(campaign.run_dir, directory / "plain")
    finally:
        subprocess.run(["umount", str(disk)], check=False)
        show(rows)
    if not difference:
        shutil.rmtree(directory)
        print(f"\nNothing lost: the run equals one without faults, to the last bit. Seed {arguments.seed}.")
    else:
        print(f"\nerror: {difference}; everything is in {directory}", file=sys.stderr)
    return int(bool(difference) or any(row.problem for row in rows))


if __name__ == "__main__":
    sys.exit(main())
