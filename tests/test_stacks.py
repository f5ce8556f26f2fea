"""What hangs leaves stacks behind: of processes that really hang, in Python, in C and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from runs import PROJECT, REWARD, run_local, small_run, status, wait_for
from test_cancelling import supervisor  # noqa: F401

from forge_hpc.cluster import stacks
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.controller_process import ControllerProcess
from forge_hpc.supervisor.ending import Cause
from forge_hpc.supervisor.signals import StopRequest
from forge_hpc.supervisor.supervisor import Supervisor

HANGS = {
    "in-c": "import itertools\ndef add_up():\n    sum(itertools.repeat(0))\nready()\nadd_up()",
    "in-python": "import threading\nlock = threading.Lock()\nlock.acquire()\ndef deadlock():\n    ready()\n"
    "    lock.acquire()\ndeadlock()",
    "in-a-thread": "import threading, time\ndef lost():\n    ready()\n    time.sleep(3600)\n"
    "threading.Thread(target=lost).start()",
}
BUSY = """import threading
def deep(n):
    return deep(n - 1) if n else 0
def work():
    while True:
        names = {}
        exec("def wide(n):\\n    return wide(n - 1) if n else 0", names)  # code that comes and goes
        names["wide"](20)
        deep(30)
threading.Thread(target=work, name="engine", daemon=True).start()
ready()
threading.Event().wait()
"""
READY = "def ready():\n    print('ready', flush=True)\n"
STAND_BY = "from forge_hpc.cluster.stacks import stand_by\nstand_by({!r})\n"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., psutil.Process]]:
    """Start a Python program that says when it is ready."""
    started = []

    def make(source: str, role: str | None = None) -> psutil.Popen:
        code = (STAND_BY.format(role) if role else "") + READY + source
        env = {**os.environ, "PYTHONPATH": str(PROJECT), stacks.FOLDER: str(stacks.folder_in(tmp_path))}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = psutil.Popen([sys.executable, "-c", code], env=env, **pipes)
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield make
    for process in started:
        if process.is_running():
            process.kill()
        process.wait()


def paragraph(text: str, process: psutil.Process) -> str:
    [found] = [part for part in text.split("--- ") if f", pid {process.pid}:" in part]
    return found


def test_a_process_shows_its_python_stacks_wherever_it_hangs(
    start: Callable[..., psutil.Process], tmp_path: Path
) -> None:
    hanging = {role: start(source, role) for role, source in HANGS.items()}
    text = stacks.collect(stacks.folder_in(tmp_path), list(hanging.values()))
    for role, function in {"in-c": "add_up", "in-python": "deadlock", "in-a-thread": "lost"}.items():
        shown = paragraph(text, hanging[role])
        assert shown.startswith(f"{role}, pid") and f" in {function}\n" in shown, shown
        assert hanging[role].is_running()  # it is for others to end
    again = stacks.collect(stacks.folder_in(tmp_path), [hanging["in-c"]])
    assert again.count(" in add_up\n") == 1  # what it does now, and not what it did


def test_a_process_that_takes_another_name_has_that_alone(start: Callable[..., psutil.Process], tmp_path: Path) -> None:
    renamed = start(STAND_BY.format("trainer-0") + HANGS["in-python"], "trainer")
    assert [path.name for path in stacks.folder_in(tmp_path).glob("[0-9]*")] == [f"{renamed.pid}.trainer-0"]
    assert paragraph(stacks.collect(stacks.folder_in(tmp_path), [renamed]), renamed).count(" in deadlock\n") == 1


def test_a_process_that_works_goes_on_however_often_it_is_asked(
    start: Callable[..., psutil.Process], tmp_path: Path
) -> None:
    working = start(BUSY, "generator-0")
    for _ in range(40):
        shown = stacks.collect(stacks.folder_in(tmp_path), [working])
        assert working.is_running() and working.status() != psutil.STATUS_ZOMBIE, (
            "its stacks moved while they were read"
        )
        assert " engine (most recent call first)" in shown and " in work\n" in shown, shown


def test_a_process_that_has_a_name_keeps_it_whoever_comes_later(
    start: Callable[..., psutil.Process], tmp_path: Path
) -> None:
    """Actors of a process begin beside each other: the one that is in all of them may come last."""
    later = "from forge_hpc.cluster.stacks import stand_by\nstand_by('mesh', for_want_of_another=True)\n"
    process, other = start(later + HANGS["in-python"], "trainer-0"), start(later + HANGS["in-python"])
    names = {path.name for path in stacks.folder_in(tmp_path).iterdir() if not path.name.startswith(".")}
    assert names == {f"{process.pid}.trainer-0", f"{other.pid}.mesh"}


def test_what_cannot_answer_shows_its_state_and_what_does_not_stand_by_lives(
    start: Callable[..., psutil.Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "ASK_S", 0.2)
    monkeypatch.setattr(stacks, "DUMP_S", 0.1)
    stopped, stranger = start("ready()\nimport time; time.sleep(3600)", "trainer-0"), start("ready()\ninput()")
    stopped.send_signal(signal.SIGSTOP)
    wait_for(lambda: stopped.status() == psutil.STATUS_STOPPED, "the stop", 60)
    ended = start("ready()", "generator-0")
    ended.wait(60)
    text = stacks.collect(stacks.folder_in(tmp_path), [stopped, stranger, ended])
    assert "T (stopped)" in paragraph(text, stopped) and "no answer within 0.3 s" in paragraph(text, stopped)
    assert paragraph(text, stranger).startswith("process, pid") and stranger.is_running()
    assert "has ended" in paragraph(text, ended)


def test_the_supervisors_of_all_nodes_write_what_is_below_them_when_they_are_asked(
    start: Callable[..., psutil.Process], tmp_path: Path
) -> None:
    hanging = start(HANGS["in-c"], "trainer-0")
    rendezvous, logs = Rendezvous(tmp_path / "rendezvous"), tmp_path / "logs"
    logs.mkdir()
    writers = [stacks.StackWriter(rendezvous, node, tmp_path, logs) for node in range(2)]
    told: list[str] = []

    def told_by(why: str) -> None:
        told.append(stacks.ask(rendezvous, why, 2, logs))

    for number, why in enumerate(("the trainers did not answer", "nor did they later"), 1):
        asking = threading.Thread(target=told_by, args=(why,))
        asking.start()
        wait_for(partial(rendezvous.look, f"stacks-{number}"), "the request", 60)
        for writer in writers:
            writer.look()
            writer.look()  # once each
        asking.join()
        for node, writer in enumerate(writers):
            text = writer.file.read_text()
            assert text.count("=== ") == number and f"node {node}: {why}\n" in text
            assert f"trainer-0, pid {hanging.pid}" in text and text.count(" in add_up\n") == number
            assert writer.file.stat().st_mode & 0o077 == 0
    assert told == [f"; the stacks of all processes: {logs}/stacks-*.log"] * 2


def test_a_supervisor_writes_them_itself_where_its_controller_hangs(tmp_path: Path) -> None:
    writer = stacks.StackWriter(Rendezvous(tmp_path / "rendezvous"), 0, tmp_path, tmp_path)
    told = writer.write_all("the controller gave no sign of life", 1)
    assert told.endswith(f"{tmp_path}/stacks-*.log")
    assert "node 0: the controller gave no sign of life\n" in writer.file.read_text()
    assert writer.write_all("again", 1) and writer.file.read_text().count("=== ") == 2
    writer.file.unlink()
    writer.file.mkdir()  # what cannot be written is not told of, and holds nothing up
    assert writer.write_all("once more", 1) == ""


def test_other_nodes_are_asked_at_once_and_have_no_more_time_than_the_first(
    start: Callable[..., psutil.Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = start(HANGS["in-c"], "trainer-0")
    rendezvous, given = Rendezvous(tmp_path / "rendezvous"), []
    writers = [stacks.StackWriter(rendezvous, node, tmp_path, tmp_path) for node in range(2)]
    collect = stacks.collect
    monkeypatch.setattr(stacks, "collect", lambda *args: (given.append(args[2]), collect(*args))[1])
    asking = threading.Thread(target=writers[0].write_all, args=("it is late", 2, 4.0))
    asking.start()
    wait_for(partial(rendezvous.look, "stacks-1"), "the request", 60)
    assert not writers[0].file.exists()
    for writer in reversed(writers):
        writer.look()
    asking.join()
    assert given == [4.0, 4.0] and writers[0].told.endswith(f"{tmp_path}/stacks-*.log")
    for node, writer in enumerate(writers):
        text = writer.file.read_text()
        assert text.count("=== ") == 1 and f"node {node}: it is late\n" in text  # the first one asked itself, too
        assert f"trainer-0, pid {hanging.pid}" in text and " in add_up\n" in text


@pytest.fixture
def watch(supervisor: Supervisor, tmp_path: Path) -> Callable[..., float]:  # noqa: F811
    """Wait for a controller after a request, beside a worker that lives; how long that took."""

    def wait(controller: psutil.Popen, request: StopRequest, writer: stacks.StackWriter) -> float:
        rendezvous, worker = Rendezvous(tmp_path / "rendezvous"), subprocess.Popen(["sleep", "600"])
        watched = ControllerProcess(controller, supervisor.node, supervisor.requests, supervisor.first.lock)
        begin = time.monotonic()
        try:
            watched._pass_on(request)
            assert watched.wait(worker, rendezvous, 600, writer) is request
        finally:
            worker.kill()
            worker.wait()
        return time.monotonic() - begin

    return wait


def test_a_controller_that_does_not_leave_in_time_is_killed_then_and_its_stacks_are_written_before(
    start: Callable[..., psutil.Process], watch: Callable[..., float], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    controller, trainer = start(HANGS["in-python"], "controller"), start(HANGS["in-c"], "trainer-0")
    writer = stacks.StackWriter(Rendezvous(tmp_path / "rendezvous"), 0, tmp_path, tmp_path)
    given_s = 8.0
    request = StopRequest(Cause.PREEMPTED, "preempted by another job", given_s + deadlines.REQUEUE_S)
    assert given_s < watch(controller, request, writer) < given_s + 2  # what comes afterwards has its time
    assert controller.returncode == -signal.SIGKILL and trainer.is_running()
    text = writer.file.read_text()
    assert "node 0: preempted by another job; the controller has not ended yet, and is killed in " in text
    assert " in deadlock\n" in paragraph(text, controller) and " in add_up\n" in paragraph(text, trainer)
    said = capsys.readouterr().err
    assert f"the controller has not ended in time; the stacks of all processes: {tmp_path}/stacks-*.log\n" in said


def test_a_controller_that_leaves_in_time_leaves_no_stacks(
    start: Callable[..., psutil.Process], watch: Callable[..., float], tmp_path: Path
) -> None:
    controller = start("ready()\ninput()", "controller")
    writer = stacks.StackWriter(Rendezvous(tmp_path / "rendezvous"), 0, tmp_path, tmp_path)
    watch(controller, StopRequest(Cause.PREEMPTED, "preempted by another job", 60.0), writer)
    assert controller.returncode == 0 and not writer.file.exists()


def test_what_is_to_end_at_once_waits_for_no_stacks_though_the_file_system_hangs(
    start: Callable[..., psutil.Process],
    watch: Callable[..., float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(deadlines, "LOOK_S", 0.1)
    asked = []

    class Hanging(stacks.StackWriter):
        def look(self) -> None:
            asked.append("look")
            time.sleep(20)

        def write(self, why: str, log_dir: Path, within_s: float = 0.0) -> None:
            asked.append("write")
            time.sleep(20)

    controller = start(HANGS["in-c"], "controller")
    writer = Hanging(Rendezvous(tmp_path / "rendezvous"), 0, tmp_path, tmp_path)
    assert watch(controller, StopRequest(Cause.CANCELLED, "stopped by SIGINT", 0.0), writer) < 3
    assert controller.returncode == -signal.SIGKILL and {*asked} == {"look", "write"}
    assert "stacks" not in capsys.readouterr().err


HANGING_LOSS = """
import itertools, torch
from forge_hpc.losses.base import LossOutput

calls = 0

def add_up(logprobs, mask, advantages, normalizer, **given):
    global calls
    calls += 1
    if calls > 3:
        sum(itertools.repeat(0))
    return LossOutput(-torch.where(mask, logprobs * advantages, 0).sum() / normalizer, {})
"""


@pytest.mark.training
def test_a_run_whose_trainer_hangs_in_c_code_names_the_file_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "loss.py").write_text(HANGING_LOSS)
    loss = f"algorithm.loss={tmp_path}/loss.py:add_up"
    run_dir, limits = tmp_path / "run", ("trainer.timeout_s=20", "cluster.max_restarts=0", loss)
    result = run_local(run_dir, small_run(tmp_path, 8, REWARD, *limits))
    assert result.returncode == 1
    assert "did not answer within 20 s; the stacks of all processes: " in status(run_dir)["message"]
    [file] = run_dir.glob("logs/*/stacks-0.log")
    assert str(file).replace("-0.log", "-*.log") in result.stderr
    text = file.read_text()
    assert " in add_up\n" in text.split("--- trainer-0, pid ")[1].split("--- ")[0]
    assert all(f"--- {role}, pid " in text for role in ("controller", "generator-0", "worker-0"))


def test_where_nobody_answers_there_is_nothing_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "ANSWER_S", 0.2)
    assert stacks.ask(Rendezvous(tmp_path / "rendezvous"), "it hangs", 2, tmp_path) == ""


def test_a_process_below_no_supervisor_stands_by_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(stacks.FOLDER, raising=False)
    stacks.stand_by("somebody")
    assert not stacks._catches_signal(os.getpid())
