"""A campaign of faults against one run on a real Slurm cluster of four hosts: `make chaos` (SEED=n, ARGS=names).

A synchronous run of two trainer ranks and two generators on two nodes, checkpointed every step, suffers one fault after
the other, in a seeded order, each at a seeded moment and to a seeded victim. It must come back by itself every time
(where a user has ended it, by being submitted again). A row of the table says how long it took until the fault was
detected and until the next new step, how many steps were done again, and how many prompts of the steps around it were
skipped or used twice; a row that breaks a promise says which, and the campaign goes on. At the end the same run is done
without a fault: all metrics that do not measure time, and the final weights, must be the same to the last bit, so that
no step is missing, doubled or trained on other prompts.

    python tests/chaos.py [--seed N] [--list] [FAULT ...]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from runs import PROJECT, REWARD, lost_prompts, processes, read, small_run, status, wait_for
from slurm_cluster import Host, SlurmCluster

from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.starts import StartLog

PARTITIONS = (
    "PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 State=UP",
    "PartitionName=cancel Nodes={nodes} PriorityTier=1 PreemptMode=CANCEL GraceTime=30 State=UP",
    "PartitionName=now Nodes={nodes} PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 State=UP",
    "PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF State=UP",
)
OPTIONS = {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE", "SlurmdTimeout": "20", "KillWait": "30"}
SAME = ("step", "policy_version", "reward/mean", "loss", "grad_norm", "tokens/generated", "tokens/trained")
PROMPTS_PER_STEP = 16
STEPS_BETWEEN = 3
FOREVER = 100000

# The limits that rows are judged by, in seconds.
RECOVERY_S = 600.0
"""Until the next new step: a cold start, on a machine that may be busy."""
NOISE_S = 2.0
"""What a machine of two cores, on which all four hosts live, may take longer than the run itself."""
DEAD_S = 3.0 + NOISE_S
"""A dead process is known."""
CALL_S = 15.0
"""``generator.timeout_s``: the deadline of a call to a generator."""
STUCK_S = CALL_S + DEAD_S
CANCEL_S = 15.0 + NOISE_S
"""A cancelled run has ended."""
SLURM_S = 60.0
"""What Slurm takes: to preempt, or to put a job back into the queue after SlurmdTimeout (20 s)."""
CAMPAIGN_S = 3600.0
"""No fault begins later than this."""
COMPARISON_S = 1800.0
"""The end of the run, and beside it all of its steps without a fault."""


def slurmds(name: str) -> list[psutil.Process]:
    """The living slurmd of a host."""
    found = psutil.process_iter(["name", "cmdline", "status"])
    return [p for p in found if p.info["name"] == "slurmd" and name in (p.info["cmdline"] or [])]


@dataclass
class Row:
    """What a fault did."""

    fault: str
    times: int = 0
    detected_s: list[float] = field(default_factory=list)
    recovered_s: list[float] = field(default_factory=list)
    steps_repeated: int = 0
    prompts_lost: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        """ok, or what went wrong."""
        return "; ".join(self.problems) or ("ok" if self.times else "not injected")


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
        self.victim = 0
        """Number of the rank, replica or node that the last fault hit."""
        self.fault_time = 0.0
        self.start_s = 0.0
        """From its submission to the run's first step."""
        self.requeue_time = 0.0
        """When Slurm had put the job back into its queue because of a dead slurmd."""

    # ---- the run

    def submit(self, run_dir: Path, steps: int, *sbatch: str) -> str:
        """Queue the run, or queue it again; the job's id."""
        command = ["sbatch", "--parsable", "--nodes=2", f"--partition={self.partition}"]
        command += [f"--output={self.directory}/slurm-%j.out", *sbatch, "sbatch/grpo.sh", "--run-dir", str(run_dir)]
        command += small_run(self.directory, steps, REWARD, "checkpoint.interval=1", "evaluation.num_prompts=0")
        command += ["trainer.processes_per_node=2", "generator.replicas=2", f"generator.timeout_s={CALL_S}"]
        command += [f"rollout.prompts_per_step={PROMPTS_PER_STEP}", f"logging.num_rollouts_per_step={PROMPTS_PER_STEP}"]
        command += ["algorithm.max_steps_without_signal=100000"]
        # However long the campaign takes: the same rate, and so small that every step still has something to learn.
        command += ["trainer.lr_scheduler.decay_ratio=null", "trainer.optimizer.lr=1e-6"]
        done = self.cluster.run(*command, env=self.env, cwd=PROJECT, timeout_s=900)
        return done.stdout.split()[0]

    def resubmit(self, *sbatch: str) -> None:
        """What a user does with a run that was ended."""
        self.submit(self.run_dir, FOREVER, *sbatch)

    def begin(self) -> None:
        """Start the run for the first time, and measure how long that takes on this machine."""
        begin = time.monotonic()
        self.resubmit()
        self.wait_for_steps(1)
        self.start_s = time.monotonic() - begin

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

    def pick(self) -> int:
        """The next victim, one of two."""
        self.victim = self.random.randrange(2)
        return self.victim

    def kill(self, word: str, signum: signal.Signals = signal.SIGKILL) -> None:
        """Signal a process of the run, found by its command line or log."""
        found = processes(self.run_dir, word)
        assert found, f"no process {word}"
        self.fault_time = time.time()
        found[0].send_signal(signum)

    def log_time(self, pattern: str) -> float | None:
        """When the controllers' logs first said something after the fault."""
        times = []
        for path in self.run_dir.glob("logs/*/controller.log"):
            for line in path.read_text(errors="replace").splitlines():
                if re.search(pattern, line) and (match := re.match(r"(\S+)Z ", line)):
                    times.append(datetime.fromisoformat(f"{match[1]}+00:00").timestamp())
        return min((moment for moment in times if moment >= self.fault_time), default=None)

    def starts(self, event: str) -> list[dict[str, Any]]:
        """Records of starts: those that ``begin``, or those that ``end``."""
        return [record for record in StartLog(RunDir(self.run_dir)).read() if record["event"] == event]

    def end_time(self, cause: str) -> float | None:
        """When a supervisor first recorded an end by this cause after the fault."""
        times = [end["time"] for end in self.starts("end") if end["cause"] == cause]
        return min((moment for moment in times if moment >= self.fault_time), default=None)

    def host(self, node: int) -> Host:
        """The host that is the job's node number ``node``: 0 holds the trainers, 1 the generators."""
        nodes = self.cluster.job(self.job)["NodeList"]
        names = self.cluster.run("scontrol", "show", "hostnames", nodes).stdout.split()
        [host] = [host for host in self.cluster.hosts if host.name == names[node]]
        return host

    def newest_checkpoint(self) -> int:
        return max(int(path.name[5:]) for path in (self.run_dir / "checkpoints").glob("step-*"))

    def revive(self) -> None:
        """After a fault that went wrong: undo all that faults do, and have the run train again."""
        self.mend_network()
        self.mend_slurmd()
        (self.disk / "filler").unlink(missing_ok=True)
        self.end_jobs()
        self.resubmit()
        self.wait_for_steps(1)

    def end_jobs(self) -> None:
        """Cancel the run in whatever job it is, and others that a fault has left."""
        self.cluster.run("scancel", "--user=root")
        self.cluster.wait_for(lambda: not self.cluster.run("squeue", "--noheader").stdout.strip())

    def finish(self) -> str:
        """Let the run come to its end, beside one that nobody disturbs; what differs, empty if nothing."""
        self.end_jobs()
        steps, plain = self.step + STEPS_BETWEEN, self.directory / "plain"
        for job in (self.submit(self.run_dir, steps), self.submit(plain, steps)):
            self.cluster.wait_for_job(job, timeout_s=COMPARISON_S)
        return compare(self.run_dir, plain, steps)

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
            self.resubmit()

    def cancel(self) -> None:
        job = self.job
        self.fault_time = time.time()
        self.cluster.run("scancel", job)
        wait_for(lambda: self.cluster.job(job)["JobState"] == "CANCELLED", "the end of the job", 60)
        assert status(self.run_dir)["state"] == "cancelled", status(self.run_dir)

    def scancel(self) -> None:
        self.cancel()
        self.resubmit()

    def kill_generator(self) -> None:
        self.kill(f"generator-{self.pick()}.log")

    def stop_generator(self) -> None:
        self.kill(f"generator-{self.pick()}.log", signal.SIGSTOP)

    def wait_for_replacement(self) -> None:
        pattern = f"generator {self.victim} is replaced"
        wait_for(lambda: self.log_time(pattern), f"a replacement of generator {self.victim}", RECOVERY_S)

    def kill_trainer(self) -> None:
        self.kill(f"trainer-{self.pick()}.log")

    def kill_controller(self) -> None:
        self.kill("forge_hpc.controller")

    def kill_worker_loop(self) -> None:
        self.kill(f"--node {self.pick()}")

    def limit_walltime(self) -> None:
        self.cancel()
        self.resubmit(f"--time={1 + math.ceil(self.start_s / 60 + 0.5)}")
        self.wait_for_steps(1)

    def walltime(self) -> None:
        num_before = len(self.starts("end"))
        [end, *_] = wait_for(lambda: self.starts("end")[num_before:], "the walltime", RECOVERY_S)
        assert end["cause"] == "walltime", end
        self.fault_time = end["time"]

    def unlimit_walltime(self) -> None:
        self.cancel()
        self.resubmit()

    def kill_slurmd(self) -> None:
        job, host = self.job, self.host(self.pick())
        restarts = self.cluster.job(job)["Restarts"]
        self.fault_time = time.time()
        for process in slurmds(host.name):
            process.kill()
        wait_for(lambda: self.cluster.job(job)["Restarts"] != restarts, "Slurm's requeue", SLURM_S + NOISE_S)
        self.requeue_time = time.time()

    def mend_slurmd(self) -> None:
        for host in self.cluster.hosts:
            if not slurmds(host.name):
                command = ["slurmd", "-D", "-N", host.name, "-f", str(self.cluster.conf)]
                self.cluster._daemon(f"slurmd-{host.name}", self.cluster.on_host(host, *command))
                self.cluster.wait_for(lambda h=host: "down" not in self.node_state(h.name), 60)

    def node_state(self, name: str) -> str:
        return self.cluster.run("sinfo", "-h", "-n", name, "-o", "%T", "-p", "low").stdout

    def cut_network(self) -> None:
        """Between the generators' host and all others."""
        link = self.host(1).link
        self.fault_time = time.time()
        subprocess.run(["ip", "link", "set", link, "down"], check=True)

    def mend_network(self) -> None:
        for host in self.cluster.hosts:
            subprocess.run(["ip", "link", "set", host.link, "up"], check=True)
        # Until it has heard of a node again, Slurm gives no job that needs it to it: the next fault may be such a job.
        self.cluster.wait_for(lambda: "*" not in self.cluster.run("sinfo", "--noheader", "--format=%T").stdout, 180)

    def fill_disk(self) -> None:
        with (self.disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 65536)

    def free_disk(self) -> None:
        self.wait_for_steps(STEPS_BETWEEN)  # training goes on without a save
        (self.disk / "filler").unlink()
        newest = self.step
        wait_for(lambda: self.newest_checkpoint() > newest, "a good save", 60)

    def damage(self) -> None:
        """Overwrite some bytes of a shard of the newest checkpoint."""
        newest = self.run_dir / "checkpoints" / f"step-{self.newest_checkpoint():08d}"
        shard = self.random.choice(sorted(newest.rglob("*.distcp")))
        with shard.open("r+b") as file:
            file.seek(shard.stat().st_size // 2)
            file.write(b"damage")
        self.fault_time = time.time()
        self.resubmit()


@dataclass(frozen=True)
class Fault:
    """What is done to the run, and what must come of it."""

    inject: Callable[[Campaign], None]
    detected: Callable[[Campaign], float | None] | None
    """When the controller knew, a supervisor or, where these cannot, Slurm; None where there is nothing to know."""
    within_s: float = math.inf
    """So soon after the fault."""
    ends: str = ""
    """States in which starts of the run end by the fault, a regular expression; none by default."""
    counted: str = ""
    """The metric that counts it, where the start that it happens in goes on; else another start takes over."""
    repeats: int = 0
    """Optimizer steps that may be done again."""
    partition: str = "low"
    prepare: Callable[[Campaign], None] | None = None
    mend: Callable[[Campaign], None] | None = None
    """Done once the run trains again."""


def said(pattern: str) -> Callable[[Campaign], float | None]:
    """When a controller's log said so; {} is the victim."""
    return lambda campaign: campaign.log_time(pattern.format(campaign.victim))


def ended(cause: str) -> Callable[[Campaign], float | None]:
    """When a supervisor recorded such an end."""
    return lambda campaign: campaign.end_time(cause)


LEAVING = said("leaving after this step")
INTERVAL = 1
FAULTS: dict[str, Fault] = {
    "generator killed": Fault(
        Campaign.kill_generator,
        said("generator {} is lost"),
        DEAD_S,
        counted="recoveries/generators",
        mend=Campaign.wait_for_replacement,
    ),
    "generator stuck": Fault(
        Campaign.stop_generator,
        said("generator {} is lost"),
        STUCK_S,
        counted="recoveries/generators",
        mend=Campaign.wait_for_replacement,
    ),
    "trainer rank killed": Fault(
        Campaign.kill_trainer,
        said("Monarch reports of trainer"),
        DEAD_S,
        counted="recoveries/trainers",
        repeats=INTERVAL,
    ),
    "controller killed": Fault(Campaign.kill_controller, ended("crash"), DEAD_S, ends="preempted", repeats=INTERVAL),
    "worker loop killed": Fault(
        Campaign.kill_worker_loop,
        said("node {}: its Monarch worker|generator . is lost"),
        DEAD_S,
        ends="preempted",
        repeats=INTERVAL,
    ),
    "slurmd killed": Fault(
        Campaign.kill_slurmd,
        lambda campaign: campaign.requeue_time,
        SLURM_S,
        ends="(preempted)?",  # a start that is shut out by the next one records no end
        repeats=INTERVAL,
        mend=Campaign.mend_slurmd,
    ),
    "preempted, REQUEUE": Fault(Campaign.preempt, LEAVING, SLURM_S, ends="preempted"),
    "preempted, CANCEL": Fault(Campaign.preempt, LEAVING, SLURM_S, ends="preempted", partition="cancel"),
    "preempted, no grace": Fault(
        Campaign.preempt, LEAVING, SLURM_S, ends="preempted", repeats=INTERVAL, partition="now"
    ),
    "walltime": Fault(
        Campaign.walltime, None, ends="preempted", prepare=Campaign.limit_walltime, mend=Campaign.unlimit_walltime
    ),
    "scancel": Fault(Campaign.scancel, ended("cancelled"), CANCEL_S, ends="cancelled", repeats=INTERVAL),
    "checkpoint disk full": Fault(
        Campaign.fill_disk,
        said("the checkpoint of step .* failed"),
        counted="checkpoint/failed",
        mend=Campaign.free_disk,
    ),
    "newest damaged": Fault(
        Campaign.damage,
        said("passing over"),
        repeats=2 * INTERVAL,  # also what the cancelled start had not saved
        prepare=Campaign.cancel,
    ),
    "network cut": Fault(
        Campaign.cut_network,
        said("is lost|leaving after this step"),
        SLURM_S,
        ends="preempted",
        repeats=INTERVAL,
        mend=Campaign.mend_network,
    ),
}


def inject(campaign: Campaign, name: str, row: Row) -> None:
    """One fault, from a run that trains to a run that trains again. Raises AssertionError where it does not."""
    fault, run_dir = FAULTS[name], campaign.run_dir
    campaign.move_to(fault.partition)
    campaign.wait_for_steps(STEPS_BETWEEN)
    if fault.prepare is not None:
        fault.prepare(campaign)
    before, num_ends = read(run_dir), len(campaign.starts("end"))
    seen = {record["step"]: record["wall_time"] for record in before}
    repeated: set[int] = set()

    def new_records(since: float) -> list[dict[str, Any]]:
        """Of steps that were done for the first time, after ``since``."""
        records = read(run_dir)
        repeated.update(r["step"] for r in records if seen.setdefault(r["step"], r["wall_time"]) != r["wall_time"])
        return [r for r in records if r["wall_time"] > since and r["step"] not in repeated]

    row.times += 1
    campaign.fault_time = time.time()
    fault.inject(campaign)
    since = campaign.fault_time
    if fault.counted:
        num = before[-1][fault.counted]
        new = wait_for(
            lambda: [r for r in new_records(since) if r[fault.counted] > num],
            f"a step that counts {fault.counted}",
            RECOVERY_S,
        )
    else:
        [begin, *_] = wait_for(
            lambda: [start for start in campaign.starts("begin") if start["time"] > since], "another start", RECOVERY_S
        )
        new = wait_for(lambda: new_records(begin["time"]), "a new step", RECOVERY_S)
    row.recovered_s.append(new[0]["wall_time"] - since)
    detected = None if fault.detected is None else fault.detected(campaign)
    states = " ".join(end["state"] for end in campaign.starts("end")[num_ends:])
    if fault.mend is not None:
        fault.mend(campaign)
    campaign.wait_for_steps(1)

    if detected is not None:
        row.detected_s.append(detected - since)
        if detected - since > fault.within_s:
            row.problems.append(f"detected after {detected - since:.1f} s, more than {fault.within_s:g} s")
    elif fault.detected is not None:
        row.problems.append("not detected")
    if not re.fullmatch(fault.ends, states):
        row.problems.append(f"starts ended as '{states}', not as '{fault.ends}'")
    if (state := status(run_dir)["state"]) != "running":
        row.problems.append(f"the run is {state}")
    row.steps_repeated = max(row.steps_repeated, len(repeated))
    if len(repeated) > fault.repeats:
        row.problems.append(f"{len(repeated)} steps were done again, more than {fault.repeats}")
    # The last step's rollouts may be under way.
    steps = range(max(1, before[-1]["step"] - fault.repeats), campaign.step)
    lost = lost_prompts(run_dir, steps, PROMPTS_PER_STEP)
    row.prompts_lost += lost
    if lost:
        row.problems.append(f"{lost} prompts were skipped or used twice")


def compare(run: Path, plain: Path, steps: int) -> str:
    """What differs between the run that suffered and the one that did not; empty if nothing."""
    one, other = read(run), read(plain)
    if [r["step"] for r in one] != [r["step"] for r in other]:
        return "steps are missing or doubled"
    different = [r["step"] for r, o in zip(one, other, strict=True) if any(r[key] != o[key] for key in SAME)]
    if different:
        return f"metrics differ from step {different[0]}"
    if lost := lost_prompts(run, range(1, steps + 1), PROMPTS_PER_STEP):
        return f"{lost} prompts were skipped or used twice"
    weights = [(path / "export/model.safetensors").read_bytes() for path in (run, plain)]
    return "" if weights[0] == weights[1] else "the final weights differ"


def show(rows: Iterable[Row]) -> None:
    """The table: the longest of the times, the most of the steps."""

    def seconds(values: list[float]) -> str:
        return f"{max(values):.1f} s" if values else "-"

    line = "{:<22}{:>6}{:>10}{:>11}{:>16}{:>14}  {}"
    print("\n" + line.format("fault", "times", "detected", "recovered", "steps repeated", "prompts lost", "result"))
    for row in rows:
        times = (row.times, seconds(row.detected_s), seconds(row.recovered_s))
        print(line.format(row.fault, *times, row.steps_repeated, row.prompts_lost, row.result), flush=True)


def suffer(campaign: Campaign, names: Sequence[str], rows: dict[str, Row]) -> str:
    """All faults, then the comparison; what is wrong with the run at the end, empty if nothing."""
    begin = time.monotonic()
    for name in names:
        row, elapsed = rows[name], time.monotonic() - begin
        if elapsed > CAMPAIGN_S:
            row.problems.append(f"not injected: {CAMPAIGN_S:.0f} s are over")
            continue
        try:
            inject(campaign, name, row)
        except Exception as error:  # whatever it is: the row has failed, and the others are still to be seen
            row.problems.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
            try:
                campaign.revive()
            except Exception as further:
                return f"the run does not come back after {name}: {further}"
        print(f"{time.monotonic() - begin:6.0f} s  {name}: {row.result}", flush=True)
    return campaign.finish()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "faults", nargs="*", help="names of faults, one of them as often as it is given; all by default"
    )
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
    rows, difference = {name: Row(name) for name in names}, "the campaign was broken off"
    disk = directory / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)], check=True)
    try:
        with SlurmCluster(nodes=4, partitions=PARTITIONS, options=OPTIONS) as cluster:
            campaign = Campaign(cluster, directory, arguments.seed)
            campaign.run_dir.mkdir(mode=0o700)
            (disk / "checkpoints").mkdir()
            (campaign.run_dir / "checkpoints").symlink_to(disk / "checkpoints")
            campaign.begin()
            difference = suffer(campaign, names, rows)
    except Exception as error:
        difference = f"{type(error).__name__}: {error}"
    finally:
        subprocess.run(["umount", str(disk)], check=False)
        show(rows.values())
    num_failed = sum(row.result != "ok" for row in rows.values())
    if not difference:
        print(f"\nNothing lost: the run equals one without faults, to the last bit. Seed {arguments.seed}.")
    else:
        print(f"\nerror: {difference}", file=sys.stderr)
    if num_failed:
        print(f"error: {num_failed} of {len(rows)} rows broke a promise", file=sys.stderr)
    if difference or num_failed:
        print(f"hint: everything but the checkpoints is in {directory}", file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
