"""The run directory: permissions, status, restarts, lock."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_hpc.config.errors import UserError
from forge_hpc.run_dir import STATES, RunDir, atomic_write_text, make_private_dir


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
    expected = {"state", "step", "policy_version", "restarts", "job_id", "heartbeat", "message"}
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
    import sys
    from forge_hpc.run_dir import RunDir
    with RunDir(sys.argv[1]).lock("41"):
        print("locked", flush=True)
        sys.stdin.read()
""")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock on ``tmp_path``."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_live_holder_excludes_others_and_is_named(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=rf"in use by job 41 \(host .*, pid {holder.pid}\)"):
        RunDir(tmp_path).lock("42")
    assert holder.stdin is not None
    holder.stdin.close()
    assert holder.wait(10) == 0
    assert RunDir(tmp_path).lock_holder() is None
    with RunDir(tmp_path).lock("42"):
        pass


def test_a_killed_holder_leaves_the_directory_free_at_once(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait(10)
    assert RunDir(tmp_path).lock_holder() is not None
    with RunDir(tmp_path).lock("42", stale_s=600):
        assert RunDir(tmp_path).lock_holder()["job_id"] == "42"


def test_one_process_cannot_lock_twice(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    with run_dir.lock("1"), pytest.raises(UserError, match="in use"):
        RunDir(tmp_path).lock("1")
    with run_dir.lock("1"):
        pass


def foreign_record(run_dir: RunDir, heartbeat: float) -> None:
    record = {"job_id": "7", "host": "far", "boot_id": "other", "pid": 1, "token": "t", "heartbeat": heartbeat}
    atomic_write_text(run_dir.path / "lock.json", json.dumps(record))


def test_a_holder_on_another_machine_that_beats_is_alive_and_one_that_does_not_is_dead(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    foreign_record(run_dir, 0.0)
    done = threading.Event()

    def beat() -> None:
        count = 0.0
        while not done.wait(0.05):
            foreign_record(run_dir, count := count + 1)

    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(UserError, match="job 7"):
        run_dir.lock("8", stale_s=5)
    done.set()
    beating.join()
    with run_dir.lock("8", stale_s=0.3):
        assert run_dir.lock_holder()["job_id"] == "8"


def test_an_earlier_start_of_the_same_slurm_job_is_dead(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    foreign_record(run_dir, 0.0)
    with run_dir.lock("7", stale_s=600):
        assert run_dir.lock_holder()["host"] != "far"


def test_the_run_directory_needs_no_torch() -> None:
    code = "import sys, forge_hpc.run_dir, forge_hpc.observability.report as _, forge_hpc.observability.logs as _; "
    code += "print([name for name in ('torch', 'tensorboard', 'vllm', 'monarch', 'wandb') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
