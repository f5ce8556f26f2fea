"""The one reader of what Slurm's commands print: of a job, and of the cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from forge_hpc.slurm.client import ANSWER_S, SlurmRefused, ask

Release = tuple[int, ...]
_ABSENT = ("", "(null)", "N/A")


@dataclass(frozen=True)
class JobFacts:
    """What Slurm says of a job at one moment."""

    job_id: str
    """What names this job alone: ``ARRAY_TASK`` for the task of an array (see `environment`)."""
    state: str
    """Such as RUNNING; COMPLETING as long as processes end, whatever the final state will be."""
    reason: str
    """``None`` (the word) where there is no reason."""
    preempted: bool
    """Preempted and not requeued."""
    end_time: float | None
    """When the job's time is over, or was, in unix seconds of slurmctld's clock: in the grace time its end. None: no
    limit."""
    start_time: float | None
    """When this start of the job began, by the same clock."""
    eligible_time: float | None
    """Before which it does not begin, by the same clock; None where it waits for something else first."""
    restarts: int
    can_requeue: bool
    """A batch job with Requeue=1."""
    partition: str
    """The one that it runs in; while pending, all that were asked for."""
    account: str | None
    qos: str | None
    time_limit: str | None
    num_nodes: int
    nodes: str
    """Slurm's list, such as ``n[1-4,7]``; a lost node is no longer in it."""
    excluded: str
    """Nodes that the job never takes, in the same form."""
    said: Mapping[str, str] = field(repr=False)
    """All of `scontrol show job`, by key."""

    @property
    def is_batch(self) -> bool:
        """It has a script; a job of salloc or srun has none, and Slurm starts it no second time."""
        return self.said.get("BatchFlag", "1") != "0"

    @classmethod
    def parse(cls, text: str, job_id: str | None = None) -> JobFacts:
        """Read the output of `scontrol show job` with times as unix seconds (SLURM_TIME_FORMAT=%s).

        Args:
            job_id: SLURM_JOB_ID of the job. That of an array's last task is the array's own, for which Slurm prints a
                record for each of its tasks.
        """
        said, users = _record(text, job_id)
        state, end, preempt_time = said["JobState"], said.get("EndTime", ""), said.get("PreemptTime", "None")
        start, eligible = said.get("StartTime", ""), said.get("EligibleTime", "")
        if state == "SIGNALING":  # for the moment that it takes to send a signal
            state = "RUNNING"
        # A scancel in the grace time leaves PreemptTime as it was and moves EndTime.
        cancelled = state == "CANCELLED" or (state == "COMPLETING" and preempt_time != end)
        preempted = preempt_time != "None" and not cancelled
        task = said.get("ArrayTaskId", "")  # such as 2-7%1 while they wait together
        return cls(
            job_id=f"{said['ArrayJobId']}_{task}" if task.isdigit() else said["JobId"],
            state=state,
            reason=said.get("Reason", "None"),
            preempted=preempted,
            end_time=float(end) if end.isdigit() and (preempted or said.get("TimeLimit") != "UNLIMITED") else None,
            start_time=float(start) if start.isdigit() else None,
            eligible_time=float(eligible) if eligible.isdigit() else None,
            restarts=int(said["Restarts"]),
            can_requeue=said.get("Requeue") == "1" and said.get("BatchFlag", "1") != "0",
            partition=said["Partition"],
            account=said.get("Account"),
            qos=said.get("QOS"),
            time_limit=said.get("TimeLimit"),
            num_nodes=int(said["NumNodes"].partition("-")[0]),
            nodes=said.get("NodeList", ""),
            excluded=said.get("ExcNodeList", ""),
            said=users | said,
        )


def _record(text: str, job_id: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """Two parts of a job's record: what Slurm says, and what stands below that, where users' texts are.

    The first part is lines of ``key=value``; below it each line is one key and its text, whatever that holds. Names and
    comments may hold line breaks, too: a name goes on to the line of its UserId.
    """
    records = re.split(r"\n(?=JobId=\d+ )", text.strip())
    own = next((record for record in records if record.startswith(f"JobId={job_id} ")), records[0])
    ids, _, own = own.partition("JobName=")
    name, _, own = own.partition("\n   UserId=" if "\n   UserId=" in own else "\n")
    head, command, rest = own.partition("\n   Command=")
    said, users = {"JobName": name}, dict[str, str]()
    for line in [ids, *head.splitlines()]:
        line, _, network = line.partition(" Network=")  # free text as well, and the last of its line
        said.update(re.findall(r"(\S+?)=(\S*)", line))
        if network:
            said["Network"] = network
    for key, value in re.findall(r"^   (\w+)=(.*)", command + rest, re.MULTILINE):
        users.setdefault(key, value.rstrip())
    return _without_absent(said), _without_absent(users)


def _without_absent(said: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in said.items() if value not in _ABSENT}


@dataclass(frozen=True)
class ClusterFacts:
    """What Slurm says of itself."""

    time: float | None
    """slurmctld's clock, in unix seconds to about a second; None where it does not say."""
    release: Release
    """Of slurmctld, such as (24, 11, 5)."""
    preempt_type: str
    preempt_mode: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the output of `scontrol show config` with times as unix seconds."""
        said = re.match(r"Configuration data as of (\d+)\s", text)
        time = float(said[1]) + 0.5 if said else None  # whole seconds
        release = parse_release(word(text, "SLURM_VERSION"))
        return cls(time, release, word(text, "PreemptType"), word(text, "PreemptMode"))


def cluster_facts(timeout_s: float = ANSWER_S) -> ClusterFacts:
    """What Slurm says of itself now. Raises SlurmRefused where it does not answer."""
    return ClusterFacts.parse(ask("scontrol", "show", "config", timeout_s=timeout_s))


def controller_time(timeout_s: float = ANSWER_S) -> float | None:
    """slurmctld's clock; None where Slurm does not answer, or does not say."""
    try:
        return cluster_facts(timeout_s).time
    except SlurmRefused:
        return None


def controller_release(timeout_s: float = ANSWER_S) -> Release:
    """The release of slurmctld. Raises SlurmRefused where it does not answer."""
    return cluster_facts(timeout_s).release


def parse_release(version: str) -> Release:
    """The numbers of ``slurm-wlm 24.11.5`` or ``23.02.0-rc1``."""
    found = re.search(r"\d+(?:\.\d+)+", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def word(said: str, key: str) -> str:
    """The value of a key; empty where it is not there."""
    found = re.search(rf"\b{key}\s*=\s*(\S+)", said)
    return found[1] if found else ""


def seconds(time: str) -> float | None:
    """``40``, or ``00:00:40``."""
    parts = time.split(":")
    return (
        sum(float(part) * 60**n for n, part in enumerate(reversed(parts))) if all(p.isdigit() for p in parts) else None
    )
