"""The run directory: permissions, status, restarts, lock."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forge_hpc import run_lock
from forge_hpc.config.errors import UserError
from forge_hpc.files import atomic_write_text, make_private_dir
from forge_hpc.run_dir import STATES, RunDir


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o377], ids=["umask-000", "umask-022", "umask-377"])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    old = os.umask(request.param)
    yield
    os.umask(old)


@pytest.mark.usefixtures("umask")
def test_directories_are_0700_and_files_0600_under_any_umask(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run").create()
    run_dir.write_status(state="pending")
    log_dir = run_dir.create_log_dir("12", 0)
    make_private_dir(run_dir.tls)
    with run_dir.lock():
        paths = [path for path in run_dir.path.rglob("*")]
        assert {path.name for path in paths if path.is_file()} == {"status.json", ".lock", "lock.json"}
        assert all(mode(path) == (0o700 if path.is_dir() else 0o600) for path in [run_dir.path, log_dir, *paths])


def test_an_empty_directory_made_by_hand_becomes_private_and_a_foreign_one_stays(tmp_path: Path) -> None:
    empty, foreign = tmp_path / "empty", tmp_path / "foreign"
    for path in (empty, foreign):
        path.mkdir()
        path.chmod(0o755)
    (foreign / "notes.txt").touch()
    RunDir(empty).create()
    RunDir(foreign).create()
    assert (mode(empty), mode(foreign)) == (0o700, 0o755)


def test_a_run_directory_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/forge-hpc-run")):
        with pytest.raises(UserError, match=str(path)):
            RunDir(path).create()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_run_directory_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot write"):
        RunDir(path).create()


def test_a_status_keeps_what_is_not_given_and_moves_its_heartbeat(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    assert run_dir.read_status() is None
    first = run_dir.write_status(state="running", step=3, job_id="7", message="hello")
    second = run_dir.write_status(step=4)
    assert (second.state, second.step, second.job_id, second.message) == ("running", 4, "7", "hello")
    assert second.heartbeat >= first.heartbeat > 0
    assert run_dir.write_status(state="failed").message == ""
    assert run_dir.read_status() == RunDir(tmp_path).read_status()
    expected = {"format", "state", "step", "policy_version", "restarts", "job_id", "heartbeat", "message"}
    expected |= {"lead_s", "lent", "total_steps"}
    assert set(json.loads(run_dir.status.read_text())) == expected


def test_an_unknown_state_and_a_first_status_without_state_are_refused(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    with pytest.raises(ValueError, match="unknown state 'done'"):
        run_dir.write_status(state="done")
    with pytest.raises(ValueError, match="needs a state"):
        run_dir.write_status(step=1)
    for state in STATES:
        assert run_dir.write_status(state=state).state == state


def test_a_damaged_status_is_a_user_error(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    for text in ("{", "[]", "{}"):
        run_dir.status.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            run_dir.read_status()


def test_a_status_of_a_newer_version_is_refused_and_one_without_a_version_is_read(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    run_dir.write_status(state="running", step=3)
    value = json.loads(run_dir.status.read_text())
    run_dir.status.write_text(json.dumps(value | {"format": 2}))
    for use in (run_dir.read_status, lambda: run_dir.write_status(step=4)):
        with pytest.raises(UserError, match=r"status.json was written by a newer forge_hpc \(format 2") as raised:
            use()
        assert "--run-dir" in (raised.value.hint or "")
    assert json.loads(run_dir.status.read_text()) == value | {"format": 2}
    del value["format"]
    run_dir.status.write_text(json.dumps(value))
    assert (status := run_dir.read_status()) is not None and status.step == 3


def test_a_concurrent_reader_always_sees_a_whole_status(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    run_dir.write_status(state="running", message="x" * 100_000)
    done = threading.Event()
    reads: list[int] = []

    def read() -> None:
        while not done.is_set():
            status = RunDir(tmp_path).read_status()
            reads.append(len(status.message) if status else -1)

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(200):
        run_dir.write_status(step=step, message=("x" if step % 2 else "yy") * 100_000)
    done.set()
    reader.join()
    assert len(reads) > 10
    assert set(reads) <= {100_000, 200_000}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_restarts_count_by_job(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    assert run_dir.next_restart("12") == run_dir.next_restart() == 0
    for expected in range(11):
        assert run_dir.next_restart("12") == expected
        run_dir.create_log_dir("12", expected)
    run_dir.create_log_dir("1", 40)
    run_dir.create_log_dir(None, 0)
    assert (run_dir.next_restart("12"), run_dir.next_restart("1"), run_dir.next_restart()) == (11, 41, 1)
    assert run_dir.log_dir(None, 0).name == "local.0"
    os.utime(run_dir.log_dir("12", 3), (2e9, 2e9))
    assert run_dir.latest_log_dir() == run_dir.log_dir("12", 3)


HOLDER = textwrap.dedent("""
    import fcntl, sys, time
    from forge_hpc import run_lock
    from forge_hpc.run_dir import RunDir
    path, job_id, requeues, beat_s, elsewhere = sys.argv[1:]
    run_lock.LOCK_HEARTBEAT_S = float(beat_s)
    if elsewhere == "elsewhere":  # as on another machine, over a file system that keeps locks to one host
        run_lock.boot_id = lambda: "another machine"
        fcntl.lockf = lambda *args: None
    with RunDir(path).lock(job_id, requeues=int(requeues)) as lock:
        print("locked", flush=True)
        while not lock.lost.wait(0.02):  # what the supervisor does: look, and leave
            pass
        print("lost", flush=True)
""")


@contextlib.contextmanager
def holding(
    path: Path, job_id: str = "41", requeues: int = 0, beat_s: float = 0.1, where: str = "here"
) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it loses it, or is ended."""
    command = [sys.executable, "-c", HOLDER, str(path), job_id, str(requeues), str(beat_s), where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def fast_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "LOCK_HEARTBEAT_S", 0.1)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def record_of(run_dir: RunDir) -> dict[str, Any]:
    record = run_dir.lock_holder()
    assert record is not None
    return record


def test_a_live_holder_excludes_others_and_is_named(tmp_path: Path) -> None:
    with holding(tmp_path) as holder:
        with pytest.raises(UserError, match=rf"in use by job 41 \(host .*, pid {holder.pid}\)"):
            RunDir(tmp_path).lock("42")
        assert RunDir(tmp_path).is_locked()


def test_a_released_lock_leaves_a_tombstone_that_nobody_takes_for_a_holder(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    with run_dir.lock("42"):
        assert run_dir.is_locked()
    assert json.loads((tmp_path / "lock.json").read_text())["released"]
    assert run_dir.lock_holder() is None and not run_dir.is_locked()
    with run_dir.lock("43"):
        pass


def test_a_killed_holder_leaves_the_directory_free_at_once(tmp_path: Path) -> None:
    with holding(tmp_path) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    assert RunDir(tmp_path).lock_holder() is not None and not RunDir(tmp_path).is_locked()
    with RunDir(tmp_path).lock("42", stale_s=600):
        assert record_of(RunDir(tmp_path))["job_id"] == "42"


def test_one_process_cannot_lock_twice(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    with run_dir.lock("1"), pytest.raises(UserError, match="in use"):
        RunDir(tmp_path).lock("1")
    with run_dir.lock("1"):
        pass


def foreign_record(run_dir: RunDir, beats: int = 0, restart: int = 0, term: int = 1) -> None:
    """The record of job 7 on another machine, whose clock stands still."""
    record = {
        "job_id": "7",
        "restart": restart,
        "host": "far",
        "boot_id": "other",
        "pid": 1,
        "token": "t",
        "term": term,
    }
    atomic_write_text(run_dir.path / "lock.json", json.dumps(record | {"heartbeat": 0.0, "beats": beats}))


@contextlib.contextmanager
def foreign_beats(run_dir: RunDir) -> Iterator[None]:
    """Job 7 beats on another machine, and takes no notice of others."""
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(0.05):
            foreign_record(run_dir, count := count + 1)

    beating = threading.Thread(target=beat)
    foreign_record(run_dir)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()


def test_a_holder_on_another_machine_that_beats_is_alive_and_one_that_does_not_is_dead(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    with foreign_beats(run_dir):
        with pytest.raises(UserError, match="job 7"):
            run_dir.lock("8", stale_s=5)
        assert run_dir.is_locked()
    assert not run_lock.is_locked(tmp_path, watch_s=0.3)
    with run_dir.lock("8", stale_s=0.3):
        assert record_of(run_dir)["job_id"] == "8"


def test_what_the_clock_says_does_not_matter(tmp_path: Path, fast_beats: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDir(tmp_path).create()
    foreign_record(run_dir)
    stopped = time.time()
    monkeypatch.setattr(time, "time", lambda: stopped)
    with run_dir.lock("8", stale_s=0.3):  # its time is that of 1970, and it is dead; ours stands still, and we live
        first = record_of(run_dir)
        wait_until(lambda: run_dir.lock_holder() != first)


def test_a_wait_ends_when_it_is_told_to_and_leaves_the_record(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    looks = []

    def stop() -> None:
        looks.append(time.monotonic())
        if len(looks) == 3:
            raise KeyboardInterrupt

    for requeues in (0, 1):  # to see whether it is dead, and to see it go
        looks.clear()
        foreign_record(run_dir)
        with pytest.raises(KeyboardInterrupt):
            run_dir.lock("7", requeues=requeues, stop=stop, stale_s=1)
        assert record_of(run_dir)["host"] == "far"  # our claim is withdrawn: later starts still know who holds it
    with run_dir.lock("8", stale_s=0.3):
        pass


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_later_start_of_a_job_makes_an_earlier_one_leave_and_then_begins(tmp_path: Path, where: str) -> None:
    with holding(tmp_path, "7", requeues=1, where=where) as earlier:
        began = time.monotonic()
        with RunDir(tmp_path).lock("7", requeues=2, stale_s=2):
            waited = time.monotonic() - began
            assert earlier.poll() is not None or earlier.wait(5) == 0
            assert earlier.stdout is not None and earlier.stdout.read() == "lost\n"
            assert record_of(RunDir(tmp_path))["restart"] == 2
    if where == "elsewhere":
        assert waited >= 2  # nothing else tells that it has gone


def test_an_earlier_start_of_a_job_cannot_take_it_from_a_later_one(tmp_path: Path) -> None:
    with holding(tmp_path, "7", requeues=2) as later:
        with pytest.raises(UserError, match="in use by job 7"):
            RunDir(tmp_path).lock("7", requeues=1)
        assert later.poll() is None


def test_an_earlier_start_that_died_elsewhere_is_waited_for_as_long_as_a_live_one_would_take(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    foreign_record(run_dir)
    began = time.monotonic()
    with run_dir.lock("7", requeues=1, stale_s=0.5):
        assert time.monotonic() - began >= 0.5
        assert record_of(run_dir)["host"] != "far"


def test_an_earlier_start_that_does_not_let_go_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "LOCK_TAKEOVER_S", 0.5)
    with holding(tmp_path, "7") as earlier:
        earlier.send_signal(signal.SIGSTOP)
        with pytest.raises(UserError, match=rf"earlier start of job 7 still works in .*: host .*, pid {earlier.pid}"):
            RunDir(tmp_path).lock("7", requeues=1, stale_s=0.2)
        earlier.send_signal(signal.SIGCONT)
    run_dir = RunDir(tmp_path)
    with foreign_beats(run_dir), pytest.raises(UserError, match="host far, pid 1"):
        run_dir.lock("7", requeues=1, stale_s=1)


def test_a_late_beat_of_an_earlier_start_takes_nothing_back(tmp_path: Path, fast_beats: None) -> None:
    run_dir = RunDir(tmp_path).create()
    with run_dir.lock("7", requeues=1) as lock:
        foreign_record(run_dir)
        wait_until(lambda: record_of(run_dir)["restart"] == 1)
        assert not lock.lost.is_set()
        foreign_record(run_dir, restart=2, term=3)
        assert lock.lost.wait(10)
    assert record_of(run_dir)["restart"] == 2  # it is not ours to remove


def test_without_file_locks_the_heartbeat_decides(
    tmp_path: Path, fast_beats: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", no_locks)
    with holding(tmp_path), pytest.raises(UserError, match="in use by job 41"):
        RunDir(tmp_path).lock("42", stale_s=5)
    with RunDir(tmp_path).lock("42", stale_s=0.3):
        assert "has no file locks" in caplog.text


def test_a_damaged_record_and_a_lock_that_cannot_be_made_are_user_errors(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    for text in ("{", "[]"):
        (tmp_path / "lock.json").write_text(text)
        with pytest.raises(UserError, match=r"lock.json is damaged"):
            run_dir.lock("1")
    with pytest.raises(UserError, match=r"cannot lock the run directory .*: No such file"):
        RunDir(tmp_path / "nothing").lock("1")


def test_the_run_directory_needs_no_torch() -> None:
    code = "import sys, forge_hpc.run_dir, forge_hpc.observability.report as _, forge_hpc.observability.logs as _; "
    code += "print([name for name in ('torch', 'tensorboard', 'vllm', 'monarch', 'wandb') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
