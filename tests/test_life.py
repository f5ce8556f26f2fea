"""A user's day with runs that exist: what is where, why it waits, what it says, where it stands, and how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import PROJECT, wait_for

from forge_hpc import cancel
from forge_hpc.cli import main
from forge_hpc.cluster import stacks
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.commands import COMMANDS
from forge_hpc.config.errors import UserError
from forge_hpc.observability import overview as overviews
from forge_hpc.observability.overview import tail_jsonl
from forge_hpc.observability.terminal import Column, fitted
from forge_hpc.run_dir import RunDir
from forge_hpc.slurm import job, queue
from forge_hpc.slurm.client import SlurmAbsent, SlurmRefused
from forge_hpc.slurm.job import is_active_state, is_job_id, is_waiting_state
from forge_hpc.standing import read_stacks, standing_table
from forge_hpc.supervisor.starts import StartLog
from forge_hpc.sweep_dir import SweepDir

Make = Callable[..., RunDir]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make a run in ``runs/`` of a new folder, where commands are then given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(
        name: str, state: str = "running", steps: int = 3, job_id: str | None = None, nodes: int = 4, **status: object
    ) -> RunDir:
        run_dir = RunDir(tmp_path / "runs" / name).create()
        lines = [{"step": n, "wall_time": 100.0 + n, "reward/mean": n / 10, "time/step_s": 0.5} for n in range(steps)]
        run_dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        StartLog(run_dir).begin(job_id=job_id, restart=0, nodes=nodes)
        run_dir.write_status(state=state, step=steps, job_id=job_id, total_steps=60, **status)  # type: ignore[arg-type]
        return run_dir

    return run


@pytest.fixture
def squeue(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that squeue prints; asked for in ``asked``."""
    lines: list[str] = []
    monkeypatch.setattr(queue, "ask", lambda *command, **_: "\n".join(lines))
    return lines


def age(run_dir: RunDir, seconds: float) -> None:
    """Have the last sign of life been so long ago."""
    said = json.loads(run_dir.status.read_text())
    run_dir.status.write_text(json.dumps(said | {"heartbeat": time.time() - seconds}))


# -- status


def test_status_of_200_runs_takes_less_than_a_second_and_no_torch(make: Make) -> None:
    first = make("run-0", job_id="0", steps=50)
    said = first.status.read_text()
    for number in range(1, 200):
        shutil.copytree(first.path, copy := first.path.with_name(f"run-{number}"))
        (copy / "status.json").write_text(said.replace('"job_id": "0"', f'"job_id": "{number}"'))
    command = [sys.executable, "-X", "importtime", "-m", "forge_hpc.cli", "status", "--all"]
    env = {**os.environ, "PYTHONPATH": str(PROJECT), "PATH": str(Path(sys.executable).parent)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"status --all of 200 runs: {cpu_s:.2f} s of CPU")
    assert len(done.stdout.splitlines()) == 201 and cpu_s < 1.0
    assert done.stderr.count("note: there is no squeue here") == 1
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not {"torch", "vllm", "monarch", "omegaconf", "transformers"} & imported


def test_the_table_of_all_runs_says_what_the_files_and_slurm_know(
    make: Make, squeue: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make("waits", "pending", 0, "70_3")
    make("runs", job_id="80", restarts=2)
    age(make("vanished", job_id="81"), 100)
    make("done", "completed", 60)
    squeue += ["70_3|PENDING|Resources|1:00:00|N/A|8||(null)", "80|RUNNING|None|1-02:03:04|1795889264|4|n[1-4]|(null)"]
    squeue.append("a line")
    assert main(["status", "--all"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert re.search(r"pending, queued +0/60 +70_3 +8 ", rows["waits"])
    assert re.search(r"running +3/60 +0\.100 +2 +80 +4 +1d02h +\d+s ago$", rows["runs"])
    assert "running, lost" in rows["vanished"] and re.search(r"completed +60/60 +5\.700 ", rows["done"])

    assert main(["status", "--json", "--all", "runs"]) == 0
    found = {Path(line["run"]).name: line for line in json.loads(capsys.readouterr().out)}
    assert found["waits"]["waits_for"] == "Resources; Slurm has not planned its start"
    assert (found["runs"]["time_left_s"], found["runs"]["nodes"], found["runs"]["lost"]) == (93784.0, 4, None)
    assert found["vanished"]["lost"] == "job 81 is not known to Slurm any more"
    assert main(["status", "70_3"]) == 0  # by its job
    said = capsys.readouterr().out
    assert "70_3  PENDING, 8 nodes\n" in said and "\nwaits for  Resources; Slurm has not planned its start\n" in said
    assert main(["status", "70"]) == 0 and main(["status", "--json", "81"]) == 0  # by the array's
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["job_id"] == "81"


@pytest.mark.parametrize("width", [60, 40, 20])
def test_tables_fit_narrow_terminals(
    make: Make, squeue: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    make("a-name-that-somebody-has-thought-about-for-a-long-time", job_id="80", message="words " * 30)
    monkeypatch.setenv("COLUMNS", str(width))
    squeue.append("80|RUNNING|None|2:00|1795889264|4|n[1-4]")
    assert main(["status", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width and lines[1].startswith("a-") and "\033" not in "".join(lines)
    if width == 60:
        assert "running" in lines[1] and "3/60" in lines[1] and "ago" in lines[1]


def test_a_table_leaves_out_columns_by_their_rank_and_those_without_a_word() -> None:
    columns = (Column("run", right=False), Column("nothing", 1), Column("worth", 2), Column("least", 3))
    rows = [["a-run", "", "12", "345"]]
    assert fitted(columns, rows, None) == ["run    worth  least", "a-run     12    345"]
    assert fitted(columns, rows, 14) == ["run    worth", "a-run     12"]
    assert fitted(columns, rows, 3) == ["run", "a-…"]
    columns = (Column("run", right=False), Column("least", 3), Column("at", 1, right=False))
    rows = [["a-run", "345", "a place of many words that is long"]]
    assert fitted(columns, rows, 40) == ["run    least  at", "a-run    345  a place of many words tha…"]
    assert fitted(columns, rows, 12) == ["run", "a-run"]


def test_runs_that_cannot_be_read_are_a_line_of_the_table_and_an_error_alone(
    make: Make, squeue: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make("good")
    make("torn").status.write_text('{"state": "runn')
    assert main(["status", "--all"]) == 0
    said = capsys.readouterr()
    assert re.search(r"^torn +unreadable", said.out, re.MULTILINE) and "torn: " in said.err and "damaged" in said.err
    for command in (["status"], ["watch"], ["logs"], ["cancel"], ["attach"], ["stacks"]):
        assert main([*command, "runs/torn"]) == 2
        error, hint = capsys.readouterr().err.splitlines()
        assert "no log" in error or ("damaged" in error and hint.startswith("hint: remove it")), error


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_runs_of_another_user_are_a_line_of_the_table_and_an_error_alone(
    make: Make, tmp_path: Path, squeue: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make("mine").path.chmod(0o755)
    make("theirs").path.chmod(0o700)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    (tmp_path / "runs/mine/status.json").chmod(0o644)
    os.seteuid(65534)
    try:
        assert main(["status", "--all"]) == 0
        for command in ("status", "watch", "logs", "cancel", "attach", "stacks"):
            assert main([command, "runs/theirs"]) == 2
    finally:
        os.seteuid(0)
    said = capsys.readouterr()
    assert said.err.count("no permission to read") == 6


def test_what_slurm_cannot_be_asked_is_left_out_and_said_once(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make("one", job_id="1")
    make("two", job_id="2")
    for refusal, words in ((SlurmAbsent("squeue"), "no squeue here"), (SlurmRefused("squeue: busy"), "squeue: busy")):

        def refuse(*_: object, refusal: SlurmRefused = refusal, **__: object) -> str:
            raise refusal

        monkeypatch.setattr(queue, "ask", refuse)
        assert main(["status", "--all"]) == 0
        said = capsys.readouterr()
        assert said.err.count("note: ") == 1 and words in said.err and said.out.count("running") == 2
    monkeypatch.setattr(queue, "ask", lambda *_, **__: (_ for _ in ()).throw(SlurmRefused("Invalid job id specified")))
    assert queue.queued_jobs(["7"]) == {}


def test_the_end_of_a_long_file_is_read_alone_and_torn_lines_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overviews, "_BLOCK", 64)
    file = tmp_path / "metrics.jsonl"
    assert tail_jsonl(file, 3) == []
    file.write_text("".join(f'{{"step": {n}, "text": "{"x" * n}"}}\n' for n in range(100)) + '{"step": 100')
    assert [record["step"] for record in tail_jsonl(file, 3)] == [97, 98, 99]
    assert len(tail_jsonl(file, 1000)) == 100
    file.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    assert [record["step"] for record in tail_jsonl(file, 3)] == [0, 2]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("59", 59),
        ("1:00", 60),
        ("2:03:04", 7384),
        ("1-02:03:04", 93784),
        ("-1:00", -1),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_slurms_durations_are_read(text: str, seconds: float | None) -> None:
    assert queue.duration_s(text) == seconds


def test_states_of_all_releases_are_ends_or_ways_there() -> None:
    ends = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT"
    waits = "PENDING REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT"
    on_the_way = "COMPLETING CONFIGURING RESIZING RUNNING SIGNALING STAGE_OUT STOPPED SUSPENDED EXPEDITING"
    assert not any(map(is_active_state, ends.split()))
    assert all(map(is_active_state, [*waits.split(), *on_the_way.split()]))
    assert all(map(is_waiting_state, waits.split()))
    assert not any(map(is_waiting_state, [*ends.split(), *on_the_way.split()]))
    ids = {"70": True, "70_3": True, "70+1": True, "local": False, "70_[1-3]": False, "": False}
    assert {job_id: is_job_id(job_id) for job_id in ids} == ids


# -- watch


def test_watch_of_a_queued_job_says_why_it_waits_and_until_when(
    make: Make, squeue: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge_hpc.commands import watch
    from forge_hpc.observability.watching import render_watch

    run_dir = make("waits", "pending", 0, "70")
    start = time.time() + 3600
    squeue.append(f"70|PENDING|Priority|1:00:00|{start:.0f}|8||(null)")
    assert f"Priority; expected to start {time.strftime('%H:%M', time.localtime(int(start)))}" in render_watch(run_dir)

    monkeypatch.setattr(watch, "_REFRESH_S", 0.0)
    monkeypatch.setattr(watch, "_WAITING_S", 0.0)
    looks = iter([None, None, "job 70 is gone"])
    monkeypatch.setattr(watch.Liveness, "lost", lambda *_: next(looks))
    assert main(["watch"]) == 1
    said = capsys.readouterr()
    assert said.out.count("waits for") == 1  # without a terminal what has not changed is not said again
    assert "\033" not in said.out and said.err == "error: job 70 is gone\n"


@pytest.mark.parametrize(
    ("reason", "dependency", "text"),
    [
        ("Dependency", "afterok:7(unfulfilled),afterany:8_3(unfulfilled)", "Dependency afterok:7,afterany:8_3; Slurm"),
        ("Resources", "(null)", "Resources; Slurm has not planned its start"),
        ("JobHeldUser", "(null)", "JobHeldUser; to let it go: scontrol release 70"),
        (
            "DependencyNeverSatisfied",
            "afterok:7(failed)",
            "DependencyNeverSatisfied afterok:7(failed): forge-hpc cancel 70",
        ),
    ],
)
def test_a_job_that_waits_names_what_it_waits_for_and_how_it_goes_on(
    squeue: list[str], reason: str, dependency: str, text: str
) -> None:
    squeue.append(f"70|PENDING|{reason}|1:00:00|N/A|8||{dependency}")
    assert text in queue.queued_jobs(["70"])["70"].waits_for()


def test_watch_shows_progress_curve_times_and_events_in_lines_that_fit(make: Make) -> None:
    from forge_hpc.observability.watching import render_watch

    run_dir = make("runs", steps=30)
    steps = [
        {"step": n, "wall_time": 2.0 * n, "reward/mean": n / 30, "time/step_s": 2.0, "time/train_s": 1.5}
        | {"time/generate_s": 0.5, "tokens/generated": 200.0, "loss": 0.1}
        for n in range(1, 31)
    ]
    run_dir.metrics.write_text("".join(json.dumps(step) + "\n" for step in steps))
    StartLog(run_dir).end(state="preempted", cause="preempted", message="preempted by another job")
    log = run_dir.create_log_dir(None, 0) / "controller.log"
    log.write_text("2026-11-28T10:00:00.123Z WARNING controller x: generator 1 did not come back\nTraceback\n")
    text = render_watch(run_dir, width=60)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 60
    assert any(line.startswith("progress") and "30/60  50%  about 1m00s to go" in line for line in lines)
    assert "train 75%, generate 25% of a step" in text and "100 tokens/s" in text and "▁" in text and "█" in text
    assert "generator 1 did not come back" in text and "start 1 from step 0 on 4 nodes" in text
    assert "  preempted: preempted by another job" in text


# -- logs


@pytest.fixture
def logged(make: Make) -> RunDir:
    run_dir = make("runs", "completed")
    logs = run_dir.create_log_dir("70", 1)
    for rank in range(3):
        lines = [f"2026-11-28T10:00:0{n}.{rank}00Z INFO    trainer-{rank} x: step {n}\n" for n in range(3)]
        (logs / f"trainer-{rank}.log").write_text("".join([*lines, "a library\n"]))
    for name in ("controller", "worker-0", "worker-1", "generator-4"):
        (logs / f"{name}.log").write_text(f"of {name}\nwithout an end")
    (run_dir.logs / "slurm-70.out").write_text("of the job\n")
    return run_dir


def test_logs_of_a_role_are_merged_by_time_and_of_a_rank_its_own(
    logged: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*arguments: str) -> list[str]:
        assert main(["logs", *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    merged = shown("--role", "trainer")
    assert [line.split()[2:] for line in merged if "step" in line] == [
        [f"trainer-{rank}", "x:", "step", str(n)] for n in range(3) for rank in range(3)
    ]
    assert [line for line in merged if "library" in line] == [f"trainer-{rank}: a library" for rank in range(3)]
    assert (
        merged.index("trainer-0: a library") == merged.index("2026-11-28T10:00:02.000Z INFO    trainer-0 x: step 2") + 1
    )
    assert shown("--role", "trainer", "-n", "2") == merged[-2:]
    assert (
        shown("--role", "trainer", "--rank", "1", "-n", "1") == shown("--role", "trainer-1", "-n", "1") == ["a library"]
    )
    assert shown("--role", "generator") == ["of generator-4", "without an end"]
    assert shown("--role", "worker", "--follow")[-2:] == ["worker-0: without an end", "worker-1: without an end"]
    assert shown("--role", "slurm") == ["of the job"] and shown() == ["of controller", "without an end"]


def test_an_unknown_role_or_rank_is_told_which_there_are(logged: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--role", "trainers"], ["--role", "trainer", "--rank", "7"], ["--rank", "7"]):
        assert main(["logs", *arguments]) == 2
        there = "there are: controller, generator-4, slurm, trainer (--rank 0 to 2), worker (--rank 0 to 1)"
        assert there in capsys.readouterr().err


def test_follow_goes_on_with_the_next_start(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from forge_hpc import log_files

    monkeypatch.setattr(log_files, "_NEW_START_S", 0.0)
    monkeypatch.setattr(log_files, "_POLL_S", 0.01)
    run_dir = make("runs")
    (run_dir.create_log_dir(None, 0) / "controller.log").write_text("first\nbeg")
    code: list[int] = []
    following = threading.Thread(target=lambda: code.append(main(["logs", "--follow"])))
    following.start()
    said = ""

    def shows(text: str) -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return text in said

    wait_for(lambda: shows("first\n"), "the first line", 60)
    with (run_dir.log_dir(None, 0) / "controller.log").open("a") as log:
        log.write("un\n")
    wait_for(lambda: shows("begun\n"), "the whole line", 60)
    (run_dir.create_log_dir(None, 1) / "controller.log").write_text("second\n")
    wait_for(lambda: shows("second\n"), "the next start", 60)
    run_dir.write_status(state="completed")
    following.join(60)
    assert code == [0]


# -- cancel


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    """One that ends at the second Ctrl-C."""
    code = (
        "import signal, time\ncame = []\nsignal.signal(signal.SIGINT, lambda *_: came.append(1))\n"
        "print('ready', flush=True)\nwhile len(came) < 2: time.sleep(0.05)"
    )
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    reaper = threading.Thread(target=started.wait)
    reaper.start()
    yield started
    started.kill()
    reaper.join()


def test_cancel_now_does_not_wait_for_a_save(
    make: Make, process: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make("runs")
    holder = {"pid": process.pid, "host": os.uname().nodename, "job_id": None}
    monkeypatch.setattr(RunDir, "lock_holder", lambda _: holder)
    monkeypatch.setattr(RunDir, "is_locked", lambda _: True)
    assert main(["cancel", "--now", "runs/runs"]) == 0
    assert process.returncode == 0 and (status := run_dir.read_status()) and status.state == "cancelled"
    assert "saves" not in capsys.readouterr().err
    holder["host"] = "elsewhere"
    run_dir.write_status(state="running")
    assert main(["cancel", "runs/runs"]) == 2
    assert "the run's process is on elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("states", "held", "now", "told"),
    [
        (["RUNNING", "RUNNING", "COMPLETING", None], True, False, ["INT"]),
        (["RUNNING", "CANCELLED"], True, True, ["TERM"]),
        (["RUNNING", "CANCELLED"], False, False, ["TERM"]),  # it has not begun
        (["PENDING", "CANCELLED"], False, False, ["TERM"]),
        # preempted while it saved: Slurm would start it again
        (["RUNNING", "COMPLETING", "PENDING", "CANCELLED"], True, False, ["INT", "TERM"]),
    ],
)
def test_a_job_is_asked_to_save_where_there_is_something_to_save(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    states: list[str | None],
    held: bool,
    now: bool,
    told: list[str],
) -> None:
    run_dir, said, left = make("runs", job_id="7"), list[str](), iter(states)
    monkeypatch.setattr(RunDir, "lock_holder", lambda _: {"job_id": "7"} if held else None)
    monkeypatch.setattr(cancel, "job_state", lambda _: (state, "None") if (state := next(left)) else None)
    monkeypatch.setattr(cancel, "ask_to_cancel", lambda _: said.append("INT"))
    monkeypatch.setattr(cancel, "cancel_job", lambda _: said.append("TERM"))
    monkeypatch.setattr(cancel, "_ASK_SLURM_S", 0.0)
    monkeypatch.setattr(cancel, "_POLL_S", 0.0)
    assert main(["cancel", *(["--now"] if now else []), "7"]) == 0
    assert said == told and (status := run_dir.read_status()) and status.state == "cancelled"


# -- stacks


def test_stacks_of_a_running_run_are_a_table_of_where_its_processes_stand(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make("runs", nodes=1)
    log_dir, rendezvous = run_dir.create_log_dir(None, 0), Rendezvous(run_dir.rendezvous / "local.0")
    assert main(["stacks"]) == 2 and "are not together yet: it is running" in capsys.readouterr().err
    start = {"log_dir": str(log_dir), "rendezvous": str(rendezvous.directory), "num_nodes": 1}
    rendezvous.publish("start", start)
    program = tmp_path / "mine.py"
    program.write_text("def deadlock():\n    print('ready', flush=True)\n    input()\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom forge_hpc.cluster.stacks import stand_by\n"
    code += "stand_by('trainer-0')\nimport mine\nmine.deadlock()"
    env = {**os.environ, "PYTHONPATH": str(PROJECT), stacks.FOLDER: str(stacks.folder_in(tmp_path))}
    hanging = subprocess.Popen(
        [sys.executable, "-c", code], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    over = threading.Event()

    def supervise() -> None:
        writer = stacks.StackWriter(rendezvous, 0, tmp_path, log_dir)
        while not over.wait(0.05):
            writer.look()

    supervisor = threading.Thread(target=supervise)
    try:
        assert hanging.stdout is not None and hanging.stdout.readline() == "ready\n"
        supervisor.start()
        assert main(["stacks", "--json"]) == 0
        [found] = [line for line in json.loads(capsys.readouterr().out) if line["pid"] == hanging.pid]
        assert (found["node"], found["role"], found["function"]) == (0, "trainer-0", "deadlock")
        assert found["place"] == f"{program}:3"
        assert main(["stacks"]) == 0
        said = capsys.readouterr()
        assert f"  deadlock   {program}:3\n" in said.out
        assert said.err.endswith(f"all of their stacks: --full, or {log_dir}/stacks-*.log\n")
    finally:
        over.set()
        supervisor.join()
        hanging.kill()
        hanging.wait()
    monkeypatch.setattr(stacks, "ANSWER_S", 0.2)
    assert main(["stacks"]) == 2 and "no node of" in capsys.readouterr().err
    run_dir.write_status(state="completed")
    assert main(["stacks"]) == 2 and "it is completed" in capsys.readouterr().err


def test_a_process_stands_where_our_code_or_the_users_is_deepest() -> None:
    text = (
        "=== now, node 2: asked\n\n--- trainer-1, pid 7: python -m x\n    python: D (disk sleep) in nfs_wait\n"
        'Thread 0x1 (most recent call first):\n  File "/e/site-packages/torch/a.py", line 1 in idle\n\n'
        'Thread 0x2 (most recent call first):\n  File "/e/site-packages/torch/b.py", line 4 in all_reduce\n'
        '  File "/p/forge_hpc/training/engine.py", line 9 in step\n'
        '  File "/p/forge_hpc/actors/trainer.py", line 2 in f\n\n'
        'Current thread 0x3 (most recent call first):\n  File "/usr/lib/python3.12/selectors.py", line 468 in select\n'
        "\n--- process, pid 8: /usr/bin/sleep 600\n\n--- generator-0, pid 9: python\n(no answer within 2 s)\n"
    )
    first, second, third = read_stacks(2, text)
    assert (first.node, first.role, first.function) == (2, "trainer-1", "step")
    assert first.place == "forge_hpc/training/engine.py:9  python: D (disk sleep) in nfs_wait"
    assert (second.function, third.place) == ("sleep 600", "does not answer")
    table = "\n".join(standing_table([first, second, third], 80))
    assert "trainer-1" in table and "does not answer" in table and "sleep" not in table


# -- no Slurm on the PATH


def test_what_needs_slurm_says_that_there_is_none_and_changes_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that waits is not cancelled by who cannot ask for it."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    run_dir = make("waits", "pending", 0, "70")
    for command, words in (
        (["cancel", "runs/waits"], "is job 70 of Slurm, and there is no Slurm here"),
        (["cancel", "--now", "runs/waits"], "is job 70 of Slurm, and there is no Slurm here"),
        (["attach", "runs/waits", "--", "true"], "error: there is no squeue here"),
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert words in said and re.fullmatch(r"error: .*\nhint: .*\n", said), said
    status = run_dir.read_status()
    assert status is not None and status.state == "pending"


# -- attach, completion


def test_attach_says_why_there_is_nothing_to_attach_to(
    make: Make, squeue: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make("done", "completed")
    make("here")
    make("waits", "pending", 0, "70")
    squeue.append("70|PENDING|Priority|1:00:00|N/A|8||(null)")
    for name, words in (("done", "is completed"), ("here", "is not a job of Slurm"), ("waits", "Priority")):
        assert main(["attach", f"runs/{name}", "--", "true"]) == 2
        assert words in capsys.readouterr().err


def test_attach_without_a_terminal_takes_a_command_alone(
    make: Make, squeue: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make("runs", job_id="80")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["attach", "runs/runs"]) == 2
    said = capsys.readouterr().err
    assert "error: a shell needs a terminal" in said and "-- nvidia-smi" in said


def test_attach_to_a_node_that_the_job_has_not_says_which_it_has(
    make: Make, squeue: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make("runs", job_id="80")
    squeue.append("80|RUNNING|None|1:00:00|1795889264|2|n[1-2]|(null)")
    monkeypatch.setattr("forge_hpc.attach.ask", lambda *command, **_: "n1\nn2\n")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    for node in ("²", "2", "n3"):
        assert main(["attach", "runs/runs", "--node", node, "--", "true"]) == 2
        assert f"job 80 has no node {node}\nhint: it has n1, n2" in capsys.readouterr().err


def test_status_all_shows_the_runs_of_a_sweep_and_a_pipeline_together(
    make: Make, squeue: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = [*(f"rates/{number}" for number in (10, 2, 0, 1)), "alone", "chain/2-grpo", "chain/1-sft"]
    for seconds, name in enumerate(reversed(names), 1_000_000_000):
        run_dir = make(name, state="completed")
        os.utime(run_dir.path / "status.json", (seconds, seconds))
    (run_dir.path.parents[1] / "notes.txt").touch()
    assert main(["status", "--all"]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert shown == ["rates/0", "rates/1", "rates/2", "rates/10", "alone", "chain/1-sft", "chain/2-grpo"]
    assert main(["status", "--all", "runs/rates"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["10", "2", "0", "1"]
    assert main(["status"]) == 0
    assert "rates/10" in capsys.readouterr().out, "the newest"


def test_a_folder_of_runs_is_no_run_and_a_sweep_is_several(
    make: Make, squeue: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (0, 1):
        make(f"sweep/{number}")
    SweepDir(tmp_path / "runs/sweep").write([["seed=0"], ["seed=1"], ["seed=2"]])  # the last one has been removed
    (tmp_path / "runs/nowhere").symlink_to(tmp_path / "gone")
    assert main(["status", "runs/sweep"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "0", "1"]
    assert main(["watch", "runs/sweep"]) == 2
    assert capsys.readouterr().err.startswith("error: runs/sweep has 2 runs\nhint: name one of them, such as ")
    assert main(["cancel", "runs"]) == 2  # never a guess
    assert re.search("hint: it is a folder of runs, such as .*/sweep/[01]$", capsys.readouterr().err)


@pytest.mark.parametrize("refused", [[], ["70_1"]])
def test_of_a_sweep_those_that_wait_are_cancelled_first_and_one_that_slurm_keeps_holds_up_no_other(
    refused: list[str], make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make(str(number), "pending", job_id=f"70_{number}") for number in range(3)]
    asked: list[str] = []

    def ask(program: str, *arguments: str, **_: object) -> str:
        job_id = arguments[-1]
        if program == "scancel":
            asked.append(job_id)
            if job_id in refused:
                raise SlurmRefused("scancel: Access/permission denied")
        elif job_id in asked:  # as Slurm forgets a task that waits
            raise SlurmRefused(f"scontrol: Job {job_id} not found")
        text = f"JobId=7{job_id[-1]} ArrayJobId=70 ArrayTaskId={job_id[-1]} JobState=PENDING Reason=Resources"
        return f"{text} Restarts=0 NumNodes=4 Partition=main"

    monkeypatch.setattr(job, "ask", ask)
    if refused:
        with pytest.raises(UserError, match="denied"):
            cancel.cancel_runs(runs, now=False)
    else:
        assert cancel.cancel_runs(runs, now=False) == 0
    assert asked == ["70_2", "70_1", "70_0"]
    ended = [run for run in runs if (status := run.read_status()) is not None and status.state == "cancelled"]
    assert ended == [run for run in runs if f"70_{run.name}" not in refused]
    assert [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()] == [str(run) for run in ended]


@pytest.mark.parametrize("words", ["Invalid job id specified", "Job 70_3 not found"])
def test_a_job_that_slurm_has_forgotten_has_left_the_queue(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr(job, "ask", lambda *_, **__: (_ for _ in ()).throw(SlurmRefused(f"scontrol show: {words}")))
    assert job.job_state("70_3") is None
    job.ask_to_cancel("70_3")
    job.cancel_job("70_3")


def test_bash_completes_commands_options_choices_and_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    tried = {
        "st": "status stacks",
        "status --a": "--all",
        "submit --cluster ": "auto slurm allocation local",
        "submit trainer.optimizer.l": "trainer.optimizer.lr=",
        "submit --config ": "",
        "completion z": "zsh",
        "status runs/": "",
    }
    lines = [f"source {script}"]
    for words in tried:
        empty = '""' if words.endswith(" ") else ""
        lines += [f"COMP_WORDS=(forge-hpc {words}{empty})", "COMP_CWORD=$((${#COMP_WORDS[@]} - 1))"]
        lines += ["_forge_hpc 2>/dev/null", 'echo "${COMPREPLY[*]}"']
    done = subprocess.run(["bash", "-c", "\n".join(lines)], text=True, capture_output=True, check=False)
    assert done.stdout.split("\n")[:-1] == list(tried.values()), done.stderr
    assert main(["completion", "zsh"]) == 0
    said = capsys.readouterr().out
    assert "bashcompinit" in said and all(name in said for name in COMMANDS)
    assert "compadd -S ''" in said, "no space after key="
