"""Ctrl-C: what it says, what it saves, and that a second one ends the run at once."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_hpc.cluster.allocation import Allocation
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import load_config
from forge_hpc.observability.summary import next_commands
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.controller_process import ControllerProcess, cancelled
from forge_hpc.supervisor.deadlines import STOP_S
from forge_hpc.supervisor.ending import Cause
from forge_hpc.supervisor.signals import Stopped, StopRequest
from forge_hpc.supervisor.supervisor import Supervisor


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    before = {signum: signal.getsignal(signum) for signum in (15, 2, 1, signal.SIGUSR2)}
    run_dir = RunDir(tmp_path / "run").create()
    run_dir.write_status(state="running", step=17, lead_s=60.0)
    supervisor = Supervisor(run_dir, Allocation("local", 0, 1, 0), summary=False)
    supervisor.requests.config = load_config(None, ["model.path=builtin:qwen3-tiny"])
    supervisor.first.lock = run_dir.lock()
    yield supervisor
    supervisor.first.lock.release()
    for signum, handler in before.items():
        signal.signal(signum, handler)


def interrupt(supervisor: Supervisor) -> None:
    supervisor.requests._signals.append((signal.SIGINT, time.monotonic()))


def test_the_first_ctrl_c_asks_to_save_and_the_second_ends_at_once(
    supervisor: Supervisor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = supervisor.run_dir.checkpoint(10)
    checkpoint.mkdir(parents=True)
    lines = tmp_path / "lines"
    controller = subprocess.Popen(["sh", "-c", f"cat > {lines}; sleep 600"], stdin=subprocess.PIPE)
    worker = subprocess.Popen(["sleep", "600"])

    def press_again_when_asked_to_save() -> None:
        while not lines.exists() or "leave" not in lines.read_text():
            time.sleep(0.05)
        pressed.append(time.monotonic())
        interrupt(supervisor)

    pressed: list[float] = []
    threading.Thread(target=press_again_when_asked_to_save, daemon=True).start()
    try:
        interrupt(supervisor)
        watched = ControllerProcess(controller, supervisor.node, supervisor.requests, supervisor.first.lock)
        request = watched.wait(worker, Rendezvous(supervisor.run_dir.rendezvous / "1"), 600)
        assert time.monotonic() - pressed[0] < STOP_S
    finally:
        for process in (controller, worker):
            process.kill()
            process.wait()
    assert request is not None and request.cancels and controller.returncode == -signal.SIGKILL
    assert lines.read_text().splitlines() == ["leave stopped by SIGINT", "stop"]
    said = capsys.readouterr().err
    assert "in at most 60 s" in said and "Ctrl-C again ends at once, and 7 optimizer steps will be done again" in said


def test_a_cancelled_run_that_is_then_preempted_has_less_time_and_stays_cancelled(supervisor: Supervisor) -> None:
    controller = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        watched = ControllerProcess(controller, supervisor.node, supervisor.requests, supervisor.first.lock)
        watched._pass_on(StopRequest(Cause.CANCELLED, "stopped by SIGINT", 600.0))
        watched._pass_on(StopRequest(Cause.PREEMPTED, "preempted by another job", 20.0))
        assert supervisor.requests.current is not None and supervisor.requests.current.cancels
        assert watched._deadline < time.monotonic() + 20
    finally:
        controller.kill()
        controller.wait()


def test_in_slurm_the_first_node_alone_decides_what_an_interrupt_means(supervisor: Supervisor) -> None:
    interrupt(supervisor)
    with pytest.raises(Stopped):  # somebody at the terminal of this node
        supervisor.requests.check_interrupt()
    supervisor.job.allocation = Allocation("7", 1, 2, 0)
    supervisor.requests.check_interrupt()


@pytest.mark.parametrize(
    ("step", "saved", "message", "hint"),
    [
        (0, None, "stopped by SIGINT, before the first step", "begins again"),
        (17, 17, "stopped by SIGINT after step 17, which is saved", "goes on; forge-hpc export"),
        (17, 10, "after step 17; the newest checkpoint is of step 10: 7 optimizer steps will be done again", "export"),
        (1, None, "after step 1; there is no checkpoint: 1 optimizer step will be done again", "goes on"),
    ],
)
def test_a_cancelled_run_says_what_is_lost_and_how_to_go_on(
    supervisor: Supervisor, step: int, saved: int | None, message: str, hint: str
) -> None:
    supervisor.run_dir.write_status(step=step)
    if saved is not None:
        supervisor.run_dir.checkpoint(saved).mkdir(parents=True)
    assert supervisor.requests.config is not None
    request = StopRequest(Cause.CANCELLED, "stopped by SIGINT", 60.0)
    ended = cancelled(supervisor.run_dir, supervisor.requests.config, request)
    assert ended.cause == "cancelled" and message in ended.message
    assert ended.hint is not None and hint in ended.hint and f"forge-hpc resume {supervisor.run_dir}" in ended.hint


def test_what_stops_a_run_that_stops_already_is_patient_but_for_ctrl_c(supervisor: Supervisor) -> None:
    supervisor.requests.current = StopRequest(Cause.CANCELLED, "stopped by SIGHUP", 60.0)
    assert supervisor.requests._time_to_save_s(signal.SIGHUP) == 60  # a terminal that closes may send two
    assert supervisor.requests._time_to_save_s(signal.SIGINT) == 0


def test_a_cancelled_run_with_a_checkpoint_is_told_how_to_get_its_model(supervisor: Supervisor) -> None:
    supervisor.run_dir.write_status(state="cancelled")
    assert not any("export" in command for command in next_commands(supervisor.run_dir))
    supervisor.run_dir.checkpoint(10).mkdir(parents=True)
    assert any(f"export {supervisor.run_dir}" in command for command in next_commands(supervisor.run_dir))
