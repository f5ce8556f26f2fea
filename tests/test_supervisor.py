"""A node's supervisor where things go wrong around it: clocks, file systems, a silent Slurm, a hanging controller."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import PROJECT
from test_slurm_causes import facts

from forge_hpc import slurm
from forge_hpc.cluster.allocation import Allocation
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import Config, UserError, load_config, save_config, validate
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor import deadlines, walltime
from forge_hpc.supervisor import supervisor as supervision
from forge_hpc.supervisor.coming_back import come_back
from forge_hpc.supervisor.controller_process import ControllerProcess
from forge_hpc.supervisor.ending import Cause, Ending
from forge_hpc.supervisor.heartbeat import HeartbeatMonitor
from forge_hpc.supervisor.other_node import serve_node
from forge_hpc.supervisor.signals import StopRequest
from forge_hpc.supervisor.starts import StartLog
from forge_hpc.supervisor.supervisor import Supervisor
from forge_hpc.supervisor.walltime import SlurmClock, Walltime
from forge_hpc.supervisor.warm_start import patience_s, warm_start

JOB = Allocation("31", 0, 2, 2)


# ---- clocks


class Clocks:
    """This host's two clocks, and slurmctld's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.monotonic, self.skew_s = 1e9, 50.0, 0.0
        self.end_time = self.slurm + 3600.0
        self.answers = True
        monkeypatch.setattr(time, "time", lambda: self.wall)
        monkeypatch.setattr(time, "monotonic", lambda: self.monotonic)
        monkeypatch.setattr(slurm, "controller_time", lambda **_: self.slurm if self.answers else None)
        monkeypatch.setattr(slurm, "job_facts", lambda job_id, **_: self.job())
        self.start_time = self.slurm

    @property
    def slurm(self) -> float:
        return 1e9 + self.monotonic - 50.0 + self.skew_s

    def job(self) -> slurm.JobFacts:
        known = facts(PreemptTime="None", TimeLimit="01:00:00")
        return replace(known, end_time=self.end_time, start_time=self.start_time)

    def go_on(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


@pytest.mark.parametrize("skew_s", [0.0, 7200.0, -7200.0])
def test_the_walltime_ends_by_slurms_clock_whatever_this_hosts_says(clocks: Clocks, skew_s: float) -> None:
    clocks.skew_s = skew_s
    clocks.end_time = clocks.slurm + 3600
    limit = Walltime("31", lambda: 300.0, SlurmClock())
    assert limit.remaining_s() == pytest.approx(3600, abs=1)
    assert not limit.is_near()
    clocks.go_on(3200)
    assert not limit.is_near() and not limit.is_announced()
    clocks.go_on(101)
    assert limit.is_near() and limit.is_announced()


def test_a_clock_that_jumps_moves_no_walltime(clocks: Clocks) -> None:
    limit = Walltime("31", lambda: 300.0, SlurmClock())
    for jump_s in (86400.0, -3 * 86400.0):
        clocks.wall += jump_s
        clocks.go_on(walltime.ASK_S + 1)  # Slurm is asked again
        assert limit.remaining_s() == pytest.approx(clocks.end_time - clocks.slurm, abs=1)
        assert not limit.is_near()


def test_the_end_moves_with_slurms_and_goes_with_the_limit(clocks: Clocks) -> None:
    limit = Walltime("31", lambda: 300.0, SlurmClock())
    clocks.end_time += 1000
    assert limit.remaining_s() == pytest.approx(3600, abs=1)
    clocks.go_on(walltime.ASK_S + 1)
    assert limit.remaining_s() == pytest.approx(4600 - walltime.ASK_S - 1, abs=1)
    clocks.end_time = None
    clocks.go_on(walltime.ASK_S + 1)
    assert limit.remaining_s() is None and not limit.is_near()


def test_in_a_short_job_half_of_the_time_is_used(clocks: Clocks) -> None:
    clocks.end_time = clocks.slurm + 100
    limit = Walltime("31", lambda: 300.0, SlurmClock())
    assert not limit.is_near()
    clocks.go_on(51)
    assert limit.is_near()


def test_a_job_cannot_have_begun_in_the_future_where_slurms_clock_is_not_told(clocks: Clocks) -> None:
    clocks.answers, clocks.skew_s = False, 7200.0
    clocks.start_time, clocks.end_time = clocks.slurm - 10, clocks.slurm + 3600
    limit = Walltime("31", lambda: 300.0, SlurmClock())
    assert limit.remaining_s() == pytest.approx(3610, abs=1)  # not three hours
    clocks.answers = True
    clocks.go_on(walltime.ASK_S + 1)
    assert limit.remaining_s() == pytest.approx(3600 - walltime.ASK_S - 1, abs=1)


# ---- the log of starts


def test_a_start_without_an_end_counts_for_nothing_until_somebody_knows_why(tmp_path: Path) -> None:
    starts = StartLog(RunDir(tmp_path).create())
    assert starts.newest() == (None, None)
    for requeues in range(5):  # each was killed: preempted without grace, or its node was lost
        starts.begin(job_id="31", restart=requeues, nodes=2, requeues=requeues)
    assert starts.failures_without_progress() == 0
    begin, end = starts.newest()
    assert begin is not None and begin["requeues"] == 4 and end is None
    starts.changed(["seed: 1 -> 2"])
    starts.end(state="preempted", cause="crash", message="")
    assert starts.failures_without_progress() == 1
    assert starts.newest()[1] is not None


def test_the_steps_of_a_warm_start_are_progress(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    starts = StartLog(run_dir)
    for step in (10, 20, 20):
        RunDir(run_dir.warmstart).checkpoint(step).mkdir(parents=True, exist_ok=True)
        starts.begin(job_id="31", restart=0, nodes=1)
        starts.end(state="preempted", cause="walltime", message="")
    assert starts.failures_without_progress() == 2
    assert [record["step"] for record in starts.read() if record["event"] == "end"] == [0, 0, 0]


def test_what_any_of_several_adapters_has_saved_is_progress(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    (run_dir.adapters / "0").mkdir(parents=True)
    (run_dir.adapters / "sweep.json").write_text("{}")
    starts = StartLog(run_dir)
    for adapter, step in ((0, 10), (1, 10), (1, 20), (1, 20)):
        RunDir(run_dir.adapters / str(adapter)).checkpoint(step).mkdir(parents=True, exist_ok=True)
        starts.begin(job_id="31", restart=0, nodes=1)
        starts.end(state="preempted", cause="crash", message="")
    assert [record["step"] for record in starts.read() if record["event"] == "begin"] == [10, 20, 30, 30]
    assert starts.failures_without_progress() == 2  # not 4: only those that came to nothing end the run
    assert [record["progress"] for record in starts.read() if record["event"] == "end"] == [10, 20, 30, 30]


# ---- signs of life


def test_silence_counts_only_while_the_looker_looks_and_a_full_disk_is_no_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path).create()
    run_dir.write_status(state="running")
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def look(after_s: float) -> float:
        now[0] += after_s
        return monitor.silent_s()

    monitor = HeartbeatMonitor(run_dir)
    assert [look(2) for _ in range(3)] == [2, 4, 6]
    assert look(3600) == 10  # suspended, or the file server stood still
    run_dir.write_status()
    assert look(2) == 0

    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert look(2) == 2
    monkeypatch.setattr("forge_hpc.run_dir.atomic_write_json", full)
    with pytest.raises(OSError, match="No space"):
        run_dir.write_status()
    assert look(2) == 0


@pytest.fixture
def supervise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Supervisor]]:
    """Makes the supervisor of a node, in this process."""
    before = {signum: signal.getsignal(signum) for signum in (15, 2, 1, signal.SIGUSR2)}
    run_dir = RunDir(tmp_path / "run").create()
    run_dir.write_status(state="running", job_id="31")
    monkeypatch.setattr(deadlines, "RETRY_S", 0.01)

    def make(allocation: Allocation = JOB) -> Supervisor:
        supervisor = Supervisor(run_dir, allocation, summary=False)
        supervisor.first.lock = run_dir.lock("31", requeues=2)
        locks.append(supervisor.first.lock)
        return supervisor

    locks: list = []
    yield make
    for lock in locks:
        lock.release()
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_a_controller_that_hangs_is_killed_unless_it_is_the_file_system_that_does(
    supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = supervise()
    monkeypatch.setattr(deadlines, "LOOK_S", 0.02)
    monkeypatch.setattr(deadlines, "POLL_S", 0.02)
    can_write = [False] * 20 + [True]
    controller, worker = (subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE) for _ in range(2))
    watched = ControllerProcess(controller, supervisor.node, supervisor.requests, supervisor.first.lock)
    monkeypatch.setattr(watched, "_can_write", lambda: can_write.pop(0) if len(can_write) > 1 else True)
    try:
        assert watched.wait(worker, Rendezvous(supervisor.run_dir.rendezvous / "1"), 0.2) is None
        assert controller.returncode == -signal.SIGKILL
        assert "no sign of life" in watched.hung and can_write == [True]
    finally:
        for process in (controller, worker):
            process.kill()
            process.wait()


def test_the_other_nodes_bear_a_pause_of_the_file_server(
    supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    supervisor = supervise(Allocation("31", 1, 2, 2))
    config = load_config(None, ["model.path=builtin:qwen3-tiny"])
    save_config(config, supervisor.run_dir.config)
    monkeypatch.setattr(deadlines, "LOOK_S", 0.01)
    rendezvous = supervisor.node.rendezvous()
    rendezvous.publish("start", {"members": [0, 1], "tls": str(tmp_path), "log_dir": str(tmp_path)})
    worker = subprocess.Popen(["sleep", "600"])
    monkeypatch.setattr(supervisor.node, "start_worker", lambda *args: worker)
    look, looks = Rendezvous.look, []

    def sometimes(self: Rendezvous, name: str) -> object:
        looks.append(name)
        if len(looks) % 3:
            raise OSError((errno.ESTALE, errno.EIO)[len(looks) % 2], "the file server")
        if len(looks) > 20:
            rendezvous.publish("outcome", {"code": 0, "message": ""})
        return look(self, name)

    monkeypatch.setattr(Rendezvous, "look", sometimes)
    try:
        assert serve_node(supervisor.node, supervisor.requests) == 0
        assert len(looks) > 20
    finally:
        worker.kill()
        worker.wait()


# ---- the way out


class FakeSlurm:
    """Slurm's answers, one after the other; the last one stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, requeue: str, successor: str = "") -> None:
        self.said: list[str] = []
        self.requeue, self.successor = requeue.split(), successor.split()
        monkeypatch.setattr(slurm, "job_facts", lambda job_id, **_: facts(PreemptTime="None"))
        monkeypatch.setattr(slurm, "requeue", lambda job_id, nodes=(): self._answer("requeue", self.requeue))
        monkeypatch.setattr(slurm, "submit_successor", self._submit)

    def _submit(self, known: slurm.JobFacts, *args: object, **options: object) -> str:
        self.num_nodes = known.num_nodes
        self._answer("successor", self.successor)
        return "32"

    def _answer(self, what: str, answers: list[str]) -> None:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.said.append(f"{what} {answer}")
        if answer == "silent":
            raise slurm.SlurmSilent("Unable to contact slurm controller")
        if answer == "no":
            raise slurm.SlurmRefused("Requested operation is presently disabled")


def returns(supervisor: Supervisor, config: Config, cause: Cause) -> tuple[str, str | None]:
    return come_back(supervisor.run_dir, config, Ending(cause), supervisor.job, supervisor.requests)


def configure(requeue: str = "auto") -> Config:
    config = Config()
    config.slurm.requeue = requeue
    return config


@pytest.mark.parametrize(
    ("choice", "requeue", "successor", "said", "how"),
    [
        ("auto", "yes", "yes", ["requeue yes"], "requeued"),
        ("auto", "silent silent silent yes", "yes", [*["requeue silent"] * 3, "requeue yes"], "requeued"),
        ("auto", "no", "yes", ["requeue no", "successor yes"], "job 32 goes on"),
        ("auto", "no", "silent yes", ["requeue no", "successor silent", "requeue no", "successor yes"], "job 32"),
        ("auto", "no", "no", ["requeue no", "successor no"], "Slurm takes no successor"),
        ("successor", "yes", "yes", ["successor yes"], "job 32 goes on"),
        ("never", "yes", "yes", [], "slurm.requeue=never: go on with forge-hpc resume"),
        ("True", "yes", "yes", [], "slurm.requeue=True: go on"),  # of an older version's config.yaml
    ],
)
def test_how_a_run_comes_back(
    supervise: Callable[..., Supervisor],
    monkeypatch: pytest.MonkeyPatch,
    choice: str,
    requeue: str,
    successor: str,
    said: list[str],
    how: str,
) -> None:
    answers = FakeSlurm(monkeypatch, requeue, successor)
    supervisor = supervise()
    message, job = returns(supervisor, configure(choice), Cause.PREEMPTED)
    assert answers.said == said
    assert message.startswith(how) and job == ("32" if message.startswith("job 32") else None)


def test_a_successor_takes_as_many_nodes_as_the_job_began_with(
    supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = FakeSlurm(monkeypatch, "no", "yes")
    supervisor = supervise(Allocation("31", 0, 5, 2))  # Slurm says 2 by now: three were lost
    assert returns(supervisor, configure(), Cause.CRASH)[1] == "32"
    assert answers.num_nodes == 5


def test_a_successor_is_queued_from_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = []

    def ask(*command: str, **options: object) -> str:
        if command[0] == "sbatch":
            scripts.append(next(Path(word) for word in command if word.endswith("_successor.sh")))
            assert scripts[-1].read_text() == "#!/bin/bash\ntrue\n"
            assert options["env"]["FORGE_HPC_PROJECT"] == str(PROJECT)  # its script is no longer at its place
        return "32\n" if command[0] == "sbatch" else "#!/bin/bash\ntrue\n"

    monkeypatch.setattr("forge_hpc.slurm.successor.ask", ask)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "logs").touch()  # nothing can be written there
    assert slurm.submit_successor(facts(), tmp_path) == "32"
    (tmp_path / "logs").unlink()
    (tmp_path / "logs").mkdir()
    (tmp_path / "elsewhere").rmdir()  # and with no temporary directory where there is none needed
    assert slurm.submit_successor(facts(), tmp_path) == "32"
    assert [script.exists() for script in scripts] == [False, True]


def test_a_silent_slurm_is_asked_until_it_kills_or_for_a_while(
    supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = FakeSlurm(monkeypatch, "silent")
    monkeypatch.setattr(deadlines, "COME_BACK_S", 0.2)
    supervisor = supervise()
    assert "Slurm has not been reached" in returns(supervisor, configure(), Cause.CRASH)[0]
    assert len(answers.said) > 2
    answers.said.clear()
    monkeypatch.setattr(deadlines, "COME_BACK_S", 600)
    monkeypatch.setattr(deadlines, "KILL_WAIT_S", 0)
    supervisor.job.kill_at = time.monotonic() - 1
    assert "Slurm has not been reached" in returns(supervisor, configure(), Cause.CRASH)[0]
    assert len(answers.said) == 1


def test_a_scancel_ends_the_asking(supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch) -> None:
    FakeSlurm(monkeypatch, "silent")
    supervisor = supervise()
    cancel = StopRequest(Cause.CANCELLED, "cancelled (SIGTERM)", None)
    monkeypatch.setattr(supervisor.requests, "next", lambda: cancel)
    starts = StartLog(supervisor.run_dir)
    starts.begin(job_id="31", restart=0, nodes=2, requeues=2)
    assert supervisor.first.finish(configure(), Ending(Cause.CRASH, "it died"), starts, Path("logs"), began=True) == 130
    status = supervisor.run_dir.read_status()
    assert status is not None and status.state == "cancelled"


def test_a_run_comes_back_though_nothing_can_be_written(
    supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = FakeSlurm(monkeypatch, "yes")
    supervisor = supervise()
    starts = StartLog(supervisor.run_dir)

    def full(*args: object, **fields: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunDir, "write_status", full)
    monkeypatch.setattr(StartLog, "_append", full)
    for cause in (Cause.PREEMPTED, Cause.CRASH):
        assert supervisor.first.finish(configure(), Ending(cause, "over"), starts, Path("logs"), began=True) == 75
    assert answers.said == ["requeue yes"] * 2
    assert "No space left on device" in capfd.readouterr().err
    # a row of starts none of which can be counted must end
    assert supervisor.first.finish(configure(), Ending(Cause.CRASH, "over"), starts, Path("logs"), began=False) == 1
    assert len(answers.said) == 2


def test_an_error_of_the_file_system_is_worth_another_start_and_another_error_is_not(
    supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = FakeSlurm(monkeypatch, "yes")
    monkeypatch.setattr(slurm, "controller_time", lambda **_: None)
    config, codes = configure(), []
    config.cluster.max_restarts = 1
    supervisor = supervise(Allocation("31", 0, 1, 2))
    for error in (OSError(errno.ESTALE, "Stale file handle"), RuntimeError("NaN"), OSError(errno.EIO, "I/O error")):

        def start(*args: object, error: Exception = error) -> Ending:
            raise error

        monkeypatch.setattr(supervisor.first, "start", start)
        codes.append(supervisor.first.run_locked(config))
    assert codes == [75, 1, 1]
    assert answers.said == ["requeue yes"]
    ends = [record for record in StartLog(supervisor.run_dir).read() if record["event"] == "end"]
    assert [end["cause"] for end in ends] == ["crash", "failed", "crash"]
    assert "2 failures without progress" in ends[2]["message"]


def test_the_time_that_slurm_took_to_answer_is_not_there_for_saving(
    supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeSlurm(monkeypatch, "yes")
    request = supervise().requests._meaning(signal.SIGTERM, time.monotonic() - 4)
    assert request.within_s == pytest.approx(deadlines.KILL_WAIT_S - 4, abs=0.5)


def test_the_end_of_a_grace_time_is_read_by_slurms_clock(
    supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = supervise()
    now = facts().end_time - 20  # of a preemption with a grace time; this host's clock is far ahead of it, or behind
    monkeypatch.setattr(slurm, "job_facts", lambda job_id, **_: facts())
    monkeypatch.setattr(slurm, "controller_time", lambda **_: now)
    supervisor.job.clock.read()
    request = supervisor.requests._meaning(signal.SIGTERM, time.monotonic())
    assert request.cause == "preempted" and request.within_s == pytest.approx(20, abs=1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_temporary_directory_is_worth_another_start(
    supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    answers = FakeSlurm(monkeypatch, "yes")
    monkeypatch.setattr(slurm, "controller_time", lambda **_: None)
    monkeypatch.setattr(slurm, "script_arguments", lambda job_id: None)
    monkeypatch.setattr(supervision, "become_subreaper", lambda: None)
    monkeypatch.setenv("SLURM_JOB_ID", "31")

    def refuse(**options: object) -> str:
        raise OSError(code, os.strerror(code))

    supervisor = supervise(Allocation("31", 0, 1, 2))
    supervisor.first.lock.release()
    save_config(load_config(None, ["model.path=builtin:qwen3-tiny"]), supervisor.run_dir.config)
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert supervisor.run() == 75
    assert answers.said == ["requeue yes"]
    _, end = StartLog(supervisor.run_dir).newest()
    assert end is not None and end["cause"] == "crash" and os.strerror(code) in end["message"]


def test_a_node_that_is_not_the_first_and_has_no_temporary_directory_says_so(
    supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd
) -> None:
    supervisor = supervise(Allocation("31", 1, 2, 2))
    monkeypatch.setattr(supervision, "become_subreaper", lambda: None)
    save_config(load_config(None, ["model.path=builtin:qwen3-tiny"]), supervisor.run_dir.config)
    supervisor.node.rendezvous().publish("start", {"members": [0, 1], "tls": str(tmp_path), "log_dir": str(tmp_path)})

    def refuse(**options: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert supervisor.run() == 1
    assert "node 1: " in (said := capfd.readouterr().err) and os.strerror(errno.EROFS) in said


@pytest.mark.parametrize(
    ("code", "outcome", "request_cause", "cause", "message"),
    [
        (0, {"code": 0}, None, "completed", ""),
        (1, {"code": 1, "message": "NaN", "hint": "h"}, None, "failed", "NaN"),
        (1, {"code": 1, "message": "gone", "is_loss": True}, None, "crash", "gone"),
        (1, {"code": 1, "message": "NaN"}, "preempted", "failed", "NaN"),
        (3, {"code": 3, "message": "stopped"}, None, "crash", "stopped without being asked"),
        (3, {"code": 3, "message": "stopped"}, "cancelled", "cancelled", "why, before the first step"),
        (4, {"code": 4, "cause": "asked", "message": "why", "lost_nodes": []}, "walltime", "walltime", "why"),
        (4, {"code": 4, "cause": "node", "message": "gone", "lost_nodes": [1]}, None, "node", "gone"),
        (4, {"code": 4, "cause": "node", "message": "gone", "lost_nodes": [1]}, "preempted", "node", "gone"),
        (4, {"code": 4, "cause": "asked", "message": "why", "lost_nodes": []}, "cancelled", "cancelled", "why"),
        (4, None, None, "node", "a node is lost"),
        (4, None, "preempted", "preempted", "why"),
        (-9, None, None, "crash", "was killed by SIGKILL and left no reason"),
        (-9, None, "preempted", "preempted", "there was no time to save"),
        (-9, None, "cancelled", "cancelled", "why, before the first step"),
    ],
)
def test_how_a_start_has_ended_follows_from_what_the_controller_left_and_what_was_asked_of_it(
    supervise: Callable[..., Supervisor],
    code: int,
    outcome: dict | None,
    request_cause: str | None,
    cause: str,
    message: str,
) -> None:
    supervisor = supervise()
    rendezvous = supervisor.node.rendezvous()
    if outcome is not None:
        rendezvous.publish("outcome", outcome)
    request = StopRequest(Cause(request_cause), "why", 60.0) if request_cause else None
    process = SimpleNamespace(returncode=code)
    controller = ControllerProcess(process, supervisor.node, supervisor.requests, supervisor.first.lock)
    ending = supervisor.first._ending_of(configure(), controller, request, rendezvous, ["n1", "n2"])
    assert ending.cause is Cause(cause) and message in ending.message
    assert ending.lost_nodes == (("n2",) if outcome and outcome.get("lost_nodes") else ())


# ---- the warm start


@pytest.mark.parametrize(
    ("end", "expected"), [(None, "crash"), ("crash", "crash"), ("walltime", "crash"), ("failed", "failed")]
)
def test_a_crash_of_the_warm_start_is_one_of_the_run(
    supervise: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch, end: str | None, expected: str
) -> None:
    supervisor = supervise()
    warm = RunDir(supervisor.run_dir.warmstart).create()
    save_config(Config(), warm.config)
    starts = StartLog(warm)
    starts.begin(job_id=None, restart=0, nodes=1)
    if end is not None:
        starts.end(state="failed", cause=end, message="what happened")
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: popen(["false"], **options))
    ended = warm_start(supervisor.run_dir, Config(), supervisor.requests, supervisor.first.status)
    assert ended is not None and ended.cause == expected
    assert ("what happened" if end else "ended with 1") in ended.message


def test_a_warm_start_has_the_time_to_say_what_hangs_unless_there_is_less() -> None:
    warm = Config()
    asked = StopRequest(Cause.ASKED, "asked", None)
    assert patience_s(asked, warm) >= deadlines.heartbeat_timeout_s(warm) + deadlines.OTHERS_S
    warm.cluster.start_timeout_s = 2 * deadlines.SILENT_S
    assert patience_s(asked, warm) > 2 * deadlines.SILENT_S
    assert patience_s(replace(asked, within_s=30.0), warm) == 30.0 - deadlines.REQUEUE_S
    cancelled = StopRequest(Cause.CANCELLED, "stopped", None)
    assert patience_s(cancelled, warm) == deadlines.STOP_S + 2


# ---- the job script's part


@pytest.fixture
def after(tmp_path: Path) -> Callable[..., tuple[int, str, list[str]]]:
    """Runs `forge_hpc.run --after CODE` in a job whose Slurm says this; exit code, stderr, and what Slurm was asked."""

    def run_after(code: int, **said: str) -> tuple[int, str, list[str]]:
        text = facts_text(**{"PreemptTime": "None", "Restarts": "2"} | said)
        (tmp_path / "job").write_text(text)
        scontrol = tmp_path / "bin" / "scontrol"
        scontrol.parent.mkdir(exist_ok=True)
        scontrol.write_text(
            f'#!/bin/sh\necho "$1" >> {tmp_path}/asked\ncase "$1 $2" in "show job") cat {tmp_path}/job;; esac\n'
        )
        scontrol.chmod(0o700)
        (tmp_path / "asked").unlink(missing_ok=True)
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        env |= {"SLURM_JOB_ID": "31", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_RESTART_COUNT": "2"}
        env |= {"PATH": f"{scontrol.parent}:{env['PATH']}", "PYTHONPATH": str(PROJECT)}
        command = [sys.executable, "-m", "forge_hpc.run", "--run-dir", str(tmp_path / "run"), "--after", str(code)]
        done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=60, check=False)
        asked = (tmp_path / "asked").read_text().split() if (tmp_path / "asked").exists() else []
        return done.returncode, done.stderr, asked

    return run_after


def facts_text(**changes: str) -> str:
    return "\n".join(f"{key}={value}" for key, value in {**facts().said, **changes}.items())


@pytest.fixture
def started(tmp_path: Path) -> StartLog:
    """A run whose supervisor has begun, and said no more."""
    run_dir = RunDir(tmp_path / "run").create()
    save_config(load_config(None, ["cluster.max_restarts=1"]), run_dir.config)
    run_dir.write_status(state="running", job_id="31")
    starts = StartLog(run_dir)
    starts.begin(job_id="31", restart=4, nodes=2, requeues=2)
    return starts


def state_of(starts: StartLog) -> str:
    return json.loads((starts._path.parent / "status.json").read_text())["state"]


def test_a_supervisor_that_died_without_a_word_is_a_crash_and_the_job_is_requeued(
    after: Callable[..., tuple[int, str, list[str]]], started: StartLog
) -> None:
    code, err, asked = after(137)
    assert code == 137 and "requeue" in asked, err
    assert state_of(started) == "preempted"
    _, end = started.newest()
    assert end is not None and end["cause"] == "crash" and "srun: 137" in end["message"]
    code, err, asked = after(137)  # it has been seen to
    assert (code, asked) == (137, [])
    started.begin(job_id="31", restart=5, nodes=2, requeues=2)
    code, err, asked = after(137)
    assert code == 137 and "requeue" not in asked and "2 failures without progress" in err
    assert state_of(started) == "failed"


@pytest.mark.parametrize(
    ("said", "state", "requeued"),
    [
        ({"JobState": "COMPLETING"}, "cancelled", False),
        ({"JobState": "COMPLETING", "Restarts": "3"}, "running", False),  # Slurm starts it again
        ({"JobState": "COMPLETING", "Reason": "NodeDown"}, "preempted", True),
    ],
)
def test_slurm_is_asked_why_a_supervisor_died(
    after: Callable[..., tuple[int, str, list[str]]],
    started: StartLog,
    said: dict[str, str],
    state: str,
    requeued: bool,
) -> None:
    code, err, asked = after(137, **said)
    assert code == 137 and ("requeue" in asked) == requeued, err
    assert state_of(started) == state
    assert started.failures_without_progress() == (1 if requeued else 0)


def test_a_start_that_has_ended_or_was_never_begun_is_left_alone(
    after: Callable[..., tuple[int, str, list[str]]], started: StartLog
) -> None:
    assert after(75)[::2] == (75, [])  # it has left, and could not write it
    started.end(state="failed", cause="failed", message="")
    assert after(1)[::2] == (1, [])
    started.begin(job_id="31", restart=5, nodes=2, requeues=1)  # an earlier life of the job
    assert after(137)[::2] == (137, [])
    started.begin(job_id="31", restart=6, nodes=2, requeues=2)
    started.end(state="completed", cause="completed", message="")
    code, err, asked = after(1)
    assert (code, asked) == (0, []) and "the run is complete" in err
    started.begin(job_id="77", restart=0, nodes=2)
    assert after(137)[::2] == (137, [])


def test_with_pyxis_a_start_is_the_containers_fault_only_where_nobody_has_run_inside(
    after: Callable[..., tuple[int, str, list[str]]], tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path / "run").create()
    pyxis = ["slurm.container.runtime=pyxis", "slurm.container.image=team/forge:1", "cluster.max_restarts=1"]
    save_config(load_config(None, pyxis), run_dir.config)
    run_dir.write_status(state="pending", job_id="31")
    assert after(75)[::2] == (75, []), "it has left"
    with run_dir.lock("77"):  # so that the supervisor ends before it has begun
        env = os.environ | {"SLURM_JOB_ID": "31", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_RESTART_COUNT": "2"}
        env |= {"SLURM_STEP_ID": "0", "FORGE_HPC_OUTSIDE": str(tmp_path), "PYTHONPATH": str(PROJECT)}
        command = [sys.executable, "-m", "forge_hpc.run", "--run-dir", str(run_dir)]
        refused = subprocess.run(command, env=env, text=True, capture_output=True, timeout=60, check=False)
    assert refused.returncode == 1 and "in use by job 77" in refused.stderr, refused.stderr
    code, err, asked = after(1)
    assert code == 1 and "requeue" not in asked, err
    assert StartLog(run_dir).newest() == (None, None)
    shutil.rmtree(run_dir.rendezvous)  # as where srun could not start the container
    code, err, asked = after(1)
    assert "requeue" in asked and "srun has not started the run in its container (1)" in err


def test_a_run_that_another_start_has_is_left_alone(
    after: Callable[..., tuple[int, str, list[str]]], started: StartLog
) -> None:
    with RunDir(started._path.parent).lock("77"):
        code, err, asked = after(137)
    assert (code, asked) == (137, []) and "in use by job 77" in err
    assert started.newest()[1] is None


def test_what_the_job_script_runs_afterwards_loads_nothing_heavy() -> None:
    code = "import sys, forge_hpc.run; print([n for n in ('torch', 'vllm', 'monarch', 'numpy') if n in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == "[]"


@pytest.mark.parametrize(("value", "hint"), [("true", "write auto"), ("false", "write never"), ("yes!", "known: auto")])
def test_a_way_to_come_back_that_is_not_known_is_refused(value: str, hint: str) -> None:
    with pytest.raises(UserError, match=r"slurm.requeue is") as raised:
        validate(load_config(None, ["model.path=builtin:qwen3-tiny", f"slurm.requeue={value}"]), check_paths=False)
    assert hint in (raised.value.hint or "")
