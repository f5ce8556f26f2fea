"""What NFS does to a run directory, as far as it can be told without NFS; the real thing is tested in test_nfs.py."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forge_hpc import files, run_lock, slurm
from forge_hpc.cluster.allocation import Allocation
from forge_hpc.config import load_config
from forge_hpc.config.errors import UserError
from forge_hpc.control import StatusReader
from forge_hpc.files import in_thread, is_there, look, read_text
from forge_hpc.observability.jsonl import JsonlWriter, read_jsonl
from forge_hpc.run_dir import RunDir
from forge_hpc.status_writer import StatusWriter
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.ending import Cause, Ending
from forge_hpc.supervisor.starts import StartLog
from forge_hpc.supervisor.supervisor import Supervisor

BEAT_S = 0.05


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(run_lock, "LOCK_HEARTBEAT_S", BEAT_S)
    return RunDir(tmp_path / "run").create()


def leave_record(run_dir: RunDir, job_id: str = "7", term: int = 1, **more: Any) -> None:
    """The record of a holder on another machine."""
    record = {"job_id": job_id, "restart": 0, "host": "far", "boot_id": "other", "pid": 1, "token": "t", "term": term}
    files.atomic_write_json(run_dir.path / "lock.json", record | more)


def record_of(run_dir: RunDir) -> dict[str, Any]:
    return json.loads((run_dir.path / "lock.json").read_text())


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refuse_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)


# ---- a holder that was cut off


def test_a_holder_whose_record_has_vanished_has_lost_the_directory(run_dir: RunDir) -> None:
    with run_dir.lock("8") as lock:
        (run_dir.path / "lock.json").unlink()
        assert lock.lost.wait(60)
    assert not (run_dir.path / "lock.json").exists()


def test_a_holder_that_finds_its_successors_tombstone_has_lost_the_directory(run_dir: RunDir) -> None:
    with run_dir.lock("8") as lock:
        leave_record(run_dir, "8", term=2, released=True)  # it took over, worked and ended while this one was cut off
        assert lock.lost.wait(60)
        assert not lock.confirm(10)
    assert record_of(run_dir)["host"] == "far"


def test_what_a_dead_holder_had_under_way_is_written_over(run_dir: RunDir) -> None:
    leave_record(run_dir, "8", term=4)
    with run_dir.lock("9", stale_s=0.2) as lock:
        assert record_of(run_dir)["term"] == 5
        leave_record(run_dir, "8", term=4)
        wait_until(lambda: record_of(run_dir)["job_id"] == "9")
        assert lock.confirm(10)


def test_a_lock_that_was_given_to_another_is_a_lost_directory(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_dir.lock("8") as lock:
        refuse_locks(monkeypatch)
        assert lock.lost.wait(60)


def test_the_end_of_a_run_asks_whether_the_directory_is_still_its_own(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "LOCK_HEARTBEAT_S", 600)  # no beat has told
    with run_dir.lock("8") as lock:
        leave_record(run_dir, "8", term=2)
        assert not lock.lost.is_set() and not lock.confirm(10)


# ---- a holder that died


def test_a_holder_that_has_not_moved_for_longer_than_a_lease_is_dead_whatever_its_lock_says(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "LOCK_DEAD_S", 0.6)
    refuse_locks(monkeypatch)  # v3 keeps it until the dead machine boots
    leave_record(run_dir)
    began = time.monotonic()
    with run_dir.lock("8", stale_s=0.2) as lock:
        assert time.monotonic() - began >= 0.6
        assert not lock.lost.wait(5 * BEAT_S)  # it never had the lock, and does not miss it
        assert run_dir.is_locked()
    with run_dir.lock("9", stale_s=0.2):  # the tombstone is of its successor: nobody waits for the dead any more
        assert record_of(run_dir)["term"] == 3


def test_the_limits_of_a_takeover_stand_in_the_right_order() -> None:
    lease_s = 90.0  # of Linux' NFS server
    assert run_lock.LOCK_STALE_S < lease_s < run_lock.LOCK_DEAD_S < 120 < run_lock.LOCK_TAKEOVER_S


@pytest.mark.parametrize("hangs", ["open_private", "look"])
def test_a_start_that_hangs_in_the_file_system_hears_what_is_wanted_of_it(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hangs: str
) -> None:
    answers = threading.Event()
    leave_record(run_dir)
    real = getattr(run_lock, hangs)

    def hang(*args: Any) -> Any:
        answers.wait(60)
        return real(*args)

    asked = []

    def stop() -> None:
        asked.append(time.monotonic())
        if len(asked) > 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_lock, hangs, hang)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_dir.lock("8", stop=stop)
    finally:
        answers.set()
    assert "does not answer" in caplog.text
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "file-system"])
    assert record_of(run_dir)["host"] == "far"


def test_an_answer_that_takes_long_is_no_silence_of_the_holder(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_record(run_dir)
    looks = []

    def slow(signs: run_lock.Signs) -> Any:
        looks.append(time.monotonic())
        time.sleep(0.5)  # the file server pauses, for the holder too
        if len(looks) == 3:
            leave_record(run_dir, written=time.monotonic_ns())
        return record(signs)

    record = run_lock.Signs.record
    monkeypatch.setattr(run_lock.Signs, "record", slow)
    with pytest.raises(UserError, match="in use by job 7"):
        run_dir.lock("8", stale_s=0.4)
    looks.clear()
    assert run_lock.is_locked(run_dir.path, watch_s=0.4)


# ---- records in new files


def test_what_an_earlier_start_still_writes_goes_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    earlier = JsonlWriter(path, 0)
    earlier.write({"step": 1})
    later = JsonlWriter(path, 1)
    later.write({"step": 2, "who": "later"})
    earlier.write({"step": 2, "who": "earlier"})
    later.write({"step": 3})
    assert [(line["step"], line.get("who")) for line in read_jsonl(path)] == [(1, None), (2, "later"), (3, None)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_log_of_starts_goes_on_in_a_new_file_at_each_start(run_dir: RunDir) -> None:
    starts = StartLog(run_dir)
    starts.begin(job_id="7", restart=0, nodes=1)
    with (run_dir.path / "starts.jsonl").open("a") as earlier:
        earlier.write('{"torn')
        earlier.flush()
        starts.begin(job_id="7", restart=1, nodes=1, requeues=1)
        earlier.write("late\n")
    starts.end(state="failed", cause="crash", message="")
    assert [record["event"] for record in starts.read()] == ["begin", "begin", "end"]
    assert "late" not in (run_dir.path / "starts.jsonl").read_text()


def test_the_newest_event_file_of_an_earlier_start_becomes_another(tmp_path: Path) -> None:
    from forge_hpc.observability.tensorboard import TensorBoardWriter

    earlier = TensorBoardWriter(tmp_path, 0)
    earlier.write(1, {"loss": 1.0})
    [path] = tmp_path.iterdir()
    before = path.read_bytes()
    TensorBoardWriter(tmp_path, 1).close()
    earlier.write(2, {"loss": 2.0})
    earlier.close()
    assert path.read_bytes() == before


# ---- the status


@pytest.fixture
def stalled(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writes of the status hang until this is set."""
    answers, write = threading.Event(), RunDir.write_status
    run_dir.write_status(state="running", step=1, job_id="31")

    def hang(self: RunDir, **status: Any) -> Any:
        answers.wait(60)
        return write(self, **status)

    monkeypatch.setattr(RunDir, "write_status", hang)
    yield answers
    answers.set()


def test_who_tells_the_status_never_waits_for_the_file_system(run_dir: RunDir, stalled: threading.Event) -> None:
    status, began = StatusWriter(run_dir), time.monotonic()
    for step in range(2, 1000):
        status.update(step=step)
    status.update(state="saving", message="leaving")
    assert time.monotonic() - began < 5
    with pytest.raises(TimeoutError):
        status.flush(0.1)
    assert (read := run_dir.read_status()) is not None and read.step == 1
    stalled.set()
    status.flush(60)
    read = run_dir.read_status()
    assert read is not None and (read.step, read.state, read.message) == (999, "saving", "leaving")


def test_a_late_status_of_an_earlier_start_stands_for_one_heartbeat(run_dir: RunDir) -> None:
    run_dir.write_status(state="starting", job_id="31")
    status = StatusWriter(run_dir)
    status.update(state="running", step=7)
    status.flush(60)
    run_dir.write_status(state="preempted", step=5, message="late")
    status.update()
    status.flush(60)
    read = run_dir.read_status()
    assert read is not None and (read.state, read.step, read.message, read.job_id) == ("running", 7, "", "31")


def test_what_cannot_be_written_is_said_and_the_next_status_may_be(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    status = StatusWriter(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr("forge_hpc.run_dir.atomic_write_json", full)
        status.update(state="running", step=3)
        with pytest.raises(OSError, match="No space"):
            status.flush(60)
        assert "No space" in caplog.text
    status.update()
    status.flush(60)
    assert (read := run_dir.read_status()) is not None and read.step == 3


def test_the_requeue_does_not_wait_for_the_file_server(
    run_dir: RunDir, stalled: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []

    def requeue(job_id: str, nodes: object = ()) -> None:
        assert not stalled.is_set()
        did.append("requeued")
        stalled.set()

    monkeypatch.setattr(deadlines, "WRITE_S", 0.2)
    monkeypatch.setattr(slurm, "requeue", requeue)
    monkeypatch.setattr(slurm, "job_facts", lambda job_id, **_: None)
    config = load_config(None, ["model.path=builtin:qwen3-tiny", "slurm.requeue=auto"])
    supervisor = Supervisor(run_dir, Allocation("31", 0, 1, 0), summary=False)
    with run_dir.lock("31") as supervisor.first.lock:
        ending, starts = Ending(Cause.WALLTIME, "x"), StartLog(run_dir)
        assert supervisor.first.finish(config, ending, starts, run_dir.logs, began=True) == 75
    assert did == ["requeued"]
    read = run_dir.read_status()
    assert read is not None and (read.state, read.message) == ("preempted", "x; requeued")


def test_who_watches_opens_the_status_only_when_it_has_moved(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir.write_status(state="running", step=1)
    opened, read = [], RunDir.read_status

    def count(self: RunDir) -> Any:
        opened.append(1)
        return read(self)

    monkeypatch.setattr(RunDir, "read_status", count)
    seen = StatusReader(run_dir)
    steps = [status.step for _ in range(10) if (status := seen.status())]
    run_dir.write_status(step=2)
    opened.clear()
    assert seen.moved() and steps == [1] * 10
    steps = [status.step for _ in range(10) if (status := seen.status())]
    assert steps == [2] * 10
    assert len(opened) == 1 and not seen.moved()


# ---- names that were absent


def test_what_is_absent_is_asked_of_the_directory(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS: the names are there, and are found only once somebody has asked the server."""
    run_dir.write_status(state="running", step=3)
    StartLog(run_dir).begin(job_id="7", restart=0, nodes=1)
    JsonlWriter(run_dir.metrics, 0).write({"step": 1})
    leave_record(run_dir)
    run_dir.config.touch()
    log_dir = run_dir.create_log_dir("7", 4)
    elsewhere, real = run_dir.path.with_name("elsewhere"), files.ask

    def appear(path: Path) -> None:
        if elsewhere.exists():
            elsewhere.rename(run_dir.path)
        real(path)

    monkeypatch.setattr(files, "ask", appear)
    for find in (
        lambda: (status := run_dir.read_status()) and status.step == 3,
        lambda: run_dir.exists,
        lambda: run_dir.has_config,
        lambda: run_dir.latest_log_dir() == log_dir,
        lambda: run_dir.next_restart("7") == 5,
        lambda: run_dir.lock_holder(),
        lambda: run_dir.heartbeat(),
        lambda: StartLog(run_dir).read(),
        lambda: list(read_jsonl(run_dir.metrics)),
    ):
        run_dir.path.rename(elsewhere)
        assert find()


def test_a_directory_that_was_absent_is_asked_of_the_nearest_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = os.open

    def note(path: str, *args: Any, **more: Any) -> int:
        opened.append(str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", note)
    assert not is_there(tmp_path / "a" / "b" / "status.json")
    assert opened[-1] == str(tmp_path)
    assert look(tmp_path / "a" / "b") is None


def test_a_file_that_was_replaced_under_its_reader_is_read_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("new")
    failures, real = [1], Path.read_text

    def stale(self: Path, *args: Any, **more: Any) -> str:
        if failures and failures.pop():
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(self, *args, **more)

    monkeypatch.setattr(Path, "read_text", stale)
    assert read_text(tmp_path / "file") == "new"
    failures += [1, 1]
    with pytest.raises(OSError, match="Stale"):
        read_text(tmp_path / "file")


@pytest.mark.parametrize("has_statx", [True, False])
def test_a_look_tells_contents_apart_without_opening_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_statx: bool
) -> None:
    if not has_statx:
        monkeypatch.setattr(files, "_statx", None)
    path = tmp_path / "file"
    assert look(path) is None
    path.write_text("a")
    first = look(path)
    found = path.stat()
    assert first == (found.st_ino, 1, found.st_mtime_ns) == look(path)
    files.atomic_write_text(path, "b")
    assert look(path) != first
    with path.open() as file:
        assert look(file.fileno()) == look(path)


def test_work_in_a_thread_gives_its_result_its_error_or_is_left_behind() -> None:
    assert in_thread(lambda: 3) == 3
    with pytest.raises(ValueError, match="x"):
        in_thread(lambda: int("x"))
    leave = threading.Event()
    with pytest.raises(TimeoutError):
        in_thread(lambda: leave.wait(60), within_s=0.1)
    leave.set()


def test_the_controllers_loop_turns_while_its_status_cannot_be_written(
    run_dir: RunDir, stalled: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge_hpc.controller import conduct as controller

    monkeypatch.setattr(controller, "HEARTBEAT_S", 0.01)

    async def turn() -> None:
        beating = asyncio.create_task(controller.heartbeat(StatusWriter(run_dir)))
        for _ in range(100):
            await asyncio.sleep(0.01)
        assert not beating.done() and not stalled.is_set()
        beating.cancel()

    asyncio.run(asyncio.wait_for(turn(), 30))
