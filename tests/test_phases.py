"""The phases of a start follow one another, across processes, and are told."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from forge_hpc.cluster.allocation import Allocation
from forge_hpc.observability.phases import StartPhases, start_table
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.job import OwnJob
from forge_hpc.supervisor.starts import StartLog


def test_phases_follow_one_another_and_go_on_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "time", lambda: now)
    phases = StartPhases({"queue": 30.0, "launch": 2.0})
    now = 101.0
    phases.end("gate")
    record = json.loads(json.dumps(phases.as_record()))
    now = 104.0  # until the other process has begun: a part of what it does first
    phases = StartPhases.resume(record)
    phases.end("environment")
    now = 106.5
    phases.end("evaluation")
    now = 107.0
    phases.end("evaluation")
    assert phases.seconds == {"queue": 30.0, "launch": 2.0, "gate": 1.0, "environment": 3.0, "evaluation": 3.0}
    assert phases.describe() == (
        "start to first step: 9.0 s, after 30 s in the queue (launch 2.0, gate 1.0, environment 3.0, evaluation 3.0)"
    )


def test_the_table_has_a_column_for_each_start_that_came_to_a_step(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    assert start_table(run_dir) == []
    starts = StartLog(run_dir)
    starts.phases({"gate": 1.0, "rollout": 2.0})
    starts.phases({"queue": 9.0, "gate": 0.25})
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in start_table(run_dir)]
    assert ["gate", "1.0", "0.2"] in rows and ["rollout", "2.0"] in [row[:2] for row in rows]
    assert ["queue", "", "9.0"] in rows


def test_the_wait_in_the_queue_is_what_slurm_tells_by_its_own_clock() -> None:
    job = OwnJob(Allocation("7", 0, 1, 0))
    assert job.waited_s(0.0) == {}
    job.clock = cast(Any, SimpleNamespace(now=lambda: 1070.0))
    job.facts = cast(Any, SimpleNamespace(start_time=1060.0, said={"SubmitTime": "1000"}))
    assert job.waited_s(4.0) == {"queue": 60.0, "launch": 6.0}
