"""What is made of what Slurm says of its release and of a partition: no Slurm is needed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_slurm_causes import facts
from test_supervisor import returns, supervise  # noqa: F401

from forge_hpc import slurm
from forge_hpc.config import Config
from forge_hpc.slurm import Preemption, known_of, parse_release, preemption
from forge_hpc.supervisor.deadlines import KILL_WAIT_S
from forge_hpc.supervisor.ending import Cause, Return
from forge_hpc.supervisor.supervisor import Supervisor

R22, R24, R26 = (22, 5, 8), (24, 11, 5), (26, 5, 5)
# Of scontrol, from 24.11.5.
CONFIG = "Configuration data as of 1795263000\nPreemptMode = REQUEUE\nPreemptType             = preempt/{}\n"
CONFIG += "PreemptExemptTime       = 00:00:00\nSLURM_VERSION           = 24.11.5\n"
PARTITION = "PartitionName=low\n   MaxTime=UNLIMITED Nodes=n[1-2] GraceTime=40 PreemptMode=CANCEL\n"


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a scontrol and a sacctmgr into PATH that answer so."""

    def put(config: str, partition: str = PARTITION, qos: str | None = None) -> None:
        (tmp_path / "config").write_text(config)
        (tmp_path / "partition").write_text(partition)
        (tmp_path / "qos").write_text(qos or "")
        for name, body in {"scontrol": 'cat "$(dirname "$0")/$2"', "sacctmgr": 'cat "$(dirname "$0")/qos"'}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{body if qos is not None or name == 'scontrol' else 'exit 1'}\n")
            (tmp_path / name).chmod(0o700)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


def test_mode_and_grace_time_are_the_partitions_or_the_qoss(says) -> None:
    says(CONFIG.format("partition_prio"))
    assert preemption(facts()) == Preemption(R24, "CANCEL", 40)
    says(CONFIG.format("qos"), qos="requeue|00:01:30\n")
    assert preemption(facts()) == Preemption(R24, "REQUEUE", 90)
    says(CONFIG.format("qos"), qos="cluster|00:00:00\n")
    assert preemption(facts()) == Preemption(R24, "REQUEUE", 0)
    says(CONFIG.format("qos"))  # no accounting, or it is down
    assert preemption(facts()) == Preemption(R24, "", None)


def test_a_silent_slurm_says_nothing_of_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert preemption(facts()) is None


GRACE = {"TimeLimit": "01:00:00"}  # the captured job is in its grace time
LATER = {"PreemptTime": "None", "Restarts": "1"}


@pytest.mark.parametrize(
    ("release", "mode", "said", "way", "may"),
    [
        (R22, "REQUEUE", GRACE, Return.REQUEUE, False),
        (R22, "CANCEL", GRACE, Return.REQUEUE, False),
        (R24, "REQUEUE", GRACE, Return.SLURM, True),
        (R24, "CANCEL", GRACE, Return.SUCCESSOR, False),
        (R24, "", GRACE, Return.REQUEUE, True),
        (R24, "REQUEUE", {**GRACE, "Requeue": "0"}, Return.REQUEUE, False),
        (R24, "REQUEUE", {**GRACE, "JobState": "COMPLETING"}, Return.REQUEUE, False),
        (R24, "REQUEUE", LATER, Return.REQUEUE, True),
        (R24, "CANCEL", LATER, Return.REQUEUE, False),
        (R24, "REQUEUE", {**LATER, "Restarts": "0"}, Return.REQUEUE, False),
        (R26, "REQUEUE", GRACE, Return.SLURM, True),
        (R26, "CANCEL", GRACE, Return.REQUEUE, False),
        (R26, "REQUEUE", LATER, Return.REQUEUE, False),
        ((25, 5, 3), "CANCEL", GRACE, Return.SUCCESSOR, False),
    ],
)
def test_the_measured_tables_decide(release, mode, said, way, may) -> None:
    how, job = Preemption(release, mode, 40), facts(**said)
    assert (how.way_back(job), how.may_start_again(job)) == (way, may)
    without = Preemption(release, mode, 0)
    assert without.way_back(job) is Return.REQUEUE


def test_the_end_of_a_grace_time_follows_from_its_beginning_where_the_job_has_no_limit() -> None:
    preempted = float(facts().said["PreemptTime"])
    unlimited = facts(EndTime="Unknown")
    assert Preemption(R22, "REQUEUE", 40).end_of_grace(unlimited) == preempted + 40
    assert Preemption(R22, "REQUEUE", None).end_of_grace(unlimited) is None
    assert Preemption(R22, "REQUEUE", 40).end_of_grace(facts()) == facts().end_time  # which Slurm tells


@pytest.mark.parametrize(("grace_s", "expected"), [(120.0, 110), (None, KILL_WAIT_S)])
def test_a_run_without_a_time_limit_uses_its_grace_time(
    supervise: Callable[..., Supervisor],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    grace_s: float | None,
    expected: float,
) -> None:
    unlimited = facts(EndTime="Unknown")
    monkeypatch.setattr(slurm, "job_facts", lambda job_id, **_: unlimited)
    monkeypatch.setattr(slurm, "preemption", lambda facts, **_: Preemption(R22, "REQUEUE", grace_s))
    monkeypatch.setattr(slurm, "controller_time", lambda **_: float(unlimited.said["PreemptTime"]) + 10)
    supervisor = supervise()
    supervisor.job.clock.read()
    request = supervisor.requests._meaning(signal.SIGTERM, time.monotonic())
    assert request.cause == "preempted" and request.within_s == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("release", "mode", "successor", "said", "how"),
    [
        (R22, "REQUEUE", True, ["requeue"], "requeued"),
        (R24, "REQUEUE", True, [], "Slurm starts it again"),
        (R24, "CANCEL", True, ["successor"], "job 32 goes on"),
        (R24, "CANCEL", False, ["successor", "requeue"], "requeued"),  # better PREEMPTED at its end than lost
        (R24, "", True, ["requeue"], "requeued"),
        (R26, "CANCEL", True, ["requeue"], "requeued"),
    ],
)
def test_a_preempted_run_comes_back_in_the_way_that_its_slurm_does_not_spoil(
    supervise: Callable[..., Supervisor],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    release: tuple[int, ...],
    mode: str,
    successor: bool,
    said: list[str],
    how: str,
) -> None:
    asked = []

    def submit(*args: object, **options: object) -> str:
        asked.append("successor")
        if not successor:
            raise slurm.SlurmRefused("Invalid account")
        return "32"

    monkeypatch.setattr(slurm, "job_facts", lambda job_id, **_: facts())
    monkeypatch.setattr(slurm, "preemption", lambda facts, **_: Preemption(release, mode, 40))
    monkeypatch.setattr(slurm, "requeue", lambda *_: asked.append("requeue"))
    monkeypatch.setattr(slurm, "submit_successor", submit)
    supervisor = supervise()
    supervisor.job.ask()  # at the signal
    assert returns(supervisor, Config(), Cause.PREEMPTED)[0] == how
    assert asked == said


def test_releases_are_read_from_what_slurms_commands_print_and_have_a_line_each() -> None:
    assert parse_release("slurm-wlm 24.11.5") == R24
    assert parse_release("slurm 23.02.0-rc1") == (23, 2, 0)
    assert parse_release("") == ()
    assert known_of(R22).startswith("tested with 22.05.8")
    assert "successor" in known_of(R24) and "successor" not in known_of(R26)
    assert known_of((23, 11, 4)).startswith("not tested")
    assert known_of((27, 11, 0)).startswith("untried")
