"""Metrics, their sinks across restarts, progress, logs, reports."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import types
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import LoggingConfig
from forge_hpc.data.types import Completion, Episode, Group, Prompt
from forge_hpc.observability.all_steps import MOST, AllSteps, Series, quantile
from forge_hpc.observability.console import ConsoleProgress, format_duration
from forge_hpc.observability.jsonl import JsonlWriter, read_jsonl
from forge_hpc.observability.logger import MetricLogger
from forge_hpc.observability.metrics import METRIC_KEYS
from forge_hpc.observability.remote import finish_runs
from forge_hpc.observability.report import render_report, sparkline
from forge_hpc.observability.summary import final_summary, read_figures
from forge_hpc.observability.watching import render_status, render_watch
from forge_hpc.run_dir import RunDir

QUIET = LoggingConfig(console="none")


def record(step: int) -> dict[str, float]:
    """A full GRPO record whose reward names its step."""
    keys = [key for key in METRIC_KEYS if key not in ("step", "wall_time")]
    return dict.fromkeys(keys, 1.0) | {"reward/mean": step / 100, "tokens/generated": 500.0, "time/step_s": 0.5}


def group(position: int, num_episodes: int = 2) -> Group:
    prompt = Prompt(position, f"{position}+1=", [1, 2], str(position + 1))
    episodes = [
        Episode(prompt, Completion(index, "é\n", [3, 4], [-0.1, -0.2], "stop", (0, 1)), reward=1.0)
        for index in range(num_episodes)
    ]
    return Group(prompt, episodes)


def curve(run_dir: RunDir, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a tag as TensorBoard reads it."""
    events = EventAccumulator(str(run_dir.tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


# ---------------------------------------------------------------------------------------------------- JSONL
def test_a_torn_last_line_goes_and_so_do_steps_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(b'{"step": %d, "x": 1}\n' % step for step in range(1, 8)) + b'{"step": 8, "x"')
    assert [line["step"] for line in read_jsonl(path)] == [1, 2, 3, 4, 5, 6, 7]
    writer = JsonlWriter(path, resume_step=5)
    assert writer.last_step == 5
    writer.write({"step": 6, "x": 2})
    writer.close()
    assert [line["step"] for line in map(json.loads, path.read_text().splitlines())] == [1, 2, 3, 4, 5, 6]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_whole_object_without_its_line_end_counts_as_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    JsonlWriter(path, resume_step=2).close()
    assert path.read_bytes() == b'{"step": 1}\n'


def test_zeros_and_garbage_left_by_a_lost_host_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[1]\n{"x": 1}\n{"step": 2}\n\0\0\0\0')
    JsonlWriter(path, resume_step=9).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, 0)
    writer.write({"step": 1, "a": float("nan"), "b": [float("inf"), 1.0], "c": {"d": float("-inf")}})
    assert path.read_text() == '{"step": 1, "a": null, "b": [null, 1.0], "c": {"d": null}}\n'


def test_a_write_that_fails_halfway_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    code = """
        import resource, signal, sys
        from pathlib import Path
        from forge_hpc.observability.jsonl import JsonlWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = JsonlWriter(Path(sys.argv[1]), 0)
        writer.write({"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # stands for a full disk: a short write, then an error
        try:
            writer.write({"step": 2, "text": "x" * 200})
        except OSError:
            writer.write({"step": 3})
            print("refused")
    """
    path = tmp_path / "metrics.jsonl"
    output = subprocess.check_output([sys.executable, "-c", textwrap.dedent(code), str(path)], text=True)
    assert output == "refused\n"
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


# ---------------------------------------------------------------------------------------------------- restarts
def test_a_run_killed_at_any_moment_goes_on_with_no_step_doubled_or_missing(tmp_path: Path) -> None:
    """Three starts killed by SIGKILL while they write, each resumed at a multiple of ten, then one to the end."""
    code = """
        import sys
        from pathlib import Path
        from forge_hpc.config.schema import LoggingConfig
        from forge_hpc.observability.logger import MetricLogger
        from forge_hpc.run_dir import RunDir
        from tests.test_observability import group, record
        resume, last = int(sys.argv[2]), int(sys.argv[3])
        with MetricLogger(RunDir(sys.argv[1]), LoggingConfig(console="none"), resume) as logger:
            for step in range(resume + 1, last + 1):
                logger.log(step, record(step))
                logger.log_rollouts(step, [group(step), group(step)])
                print(step, flush=True)
    """
    run_dir = RunDir(tmp_path / "run").create()
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}

    def start(resume: int, last: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(code), str(run_dir), str(resume), str(last)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=root)

    resume = 0
    for kill_after in (13, 27, 44):
        with start(resume, 100_000) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) >= kill_after:
                    process.send_signal(signal.SIGKILL)
                    break
        resume = kill_after // 10 * 10
    with start(resume, 60) as process:
        assert process.wait(60) == 0

    steps = list(range(1, 61))
    records = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    assert [item["step"] for item in records] == steps
    assert all(METRIC_KEYS.keys() <= item.keys() for item in records)
    assert [item["step"] for item in read_jsonl(run_dir.rollouts)] == [step for step in steps for _ in range(2)]
    assert curve(run_dir, "reward/mean") == [(step, step / 100) for step in steps]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in run_dir.path.rglob("*") if path.is_file())


def test_tensorboard_forgets_steps_after_the_checkpoint_and_a_torn_event(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    with MetricLogger(run_dir, QUIET) as logger:
        for step in range(1, 8):
            logger.log(step, {"x": float(step)})
    (file,) = run_dir.tensorboard.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    with MetricLogger(run_dir, QUIET, resume_step=4) as logger:
        assert curve(run_dir, "x") == [(step, step) for step in range(1, 5)]
        logger.log(5, {"x": 50.0, "not finite": float("nan")})
    assert curve(run_dir, "x") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]


def test_event_files_sort_by_start_even_if_a_clock_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDir(tmp_path).create()
    MetricLogger(run_dir, QUIET).close()
    (first,) = run_dir.tensorboard.iterdir()
    monkeypatch.setattr(time, "time", lambda: 1e9)
    MetricLogger(run_dir, QUIET).close()
    assert sorted(run_dir.tensorboard.iterdir())[0] == first


def test_tensorboard_can_be_switched_off(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    MetricLogger(run_dir, LoggingConfig(console="none", tensorboard=False)).close()
    assert not run_dir.tensorboard.exists()


def test_a_step_logged_twice_is_refused(tmp_path: Path) -> None:
    with MetricLogger(RunDir(tmp_path).create(), QUIET) as logger:
        logger.log(1, {"x": 1.0})
        with pytest.raises(ValueError, match="step 1 is logged after step 1"):
            logger.log(1, {"x": 1.0})


def test_an_evaluation_that_a_restart_repeats_is_written_once(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    for resume_step, accuracy in ((0, 0.25), (0, 0.5)):
        with MetricLogger(run_dir, QUIET, resume_step) as logger:
            logger.log_evaluation(0, {"accuracy": accuracy})
            logger.log_evaluation(5, {"accuracy": accuracy + 0.25})
    assert [(item["step"], item["accuracy"]) for item in read_jsonl(run_dir.evaluations)] == [(0, 0.25), (5, 0.75)]
    assert curve(run_dir, "eval/accuracy") == [(0, 0.25), (5, 0.75)]


def test_rollouts_keep_the_first_episode_of_the_first_groups(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    with MetricLogger(run_dir, LoggingConfig(console="none", num_rollouts_per_step=2)) as logger:
        logger.log_rollouts(1, [group(4, num_episodes=0), group(5), group(6), group(7)])
        logger.log_rollouts(2, [])
    records = list(read_jsonl(run_dir.rollouts))
    assert [(item["step"], item["position"]) for item in records] == [(1, 5), (1, 6)]
    expected = {"prompt": "5+1=", "completion": "é\n", "reward": 1.0, "policy_versions": [0, 1], "target": "6"}
    assert records[0].items() >= expected.items()


def test_a_step_that_was_logged_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a lost node takes with it is what was not synced: nothing, in any file, when ``log`` returns."""
    synced: dict[str, int] = {}
    sync = os.fsync

    def fsync(fd: int) -> None:
        sync(fd)
        synced[str(Path(f"/proc/self/fd/{fd}").readlink())] = os.fstat(fd).st_size

    monkeypatch.setattr(os, "fsync", fsync)
    run_dir = RunDir(tmp_path).create()
    with MetricLogger(run_dir, QUIET) as logger:
        for step in (1, 2):
            logger.log(step, {"x": 1.0})
            files = [run_dir.metrics, *run_dir.tensorboard.iterdir()]
            assert len(files) == 2
            assert [synced[str(path)] for path in files] == [path.stat().st_size for path in files]


# ---------------------------------------------------------------------------------------------------- W&B
class Wandb(types.ModuleType):
    """Stands in for wandb: keeps what it is sent, and fails or hangs where it is told to."""

    class UsageError(Exception): ...

    class CommError(Exception): ...

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = self
        self.runs: dict[str, list[int]] = {}
        """Steps by the id of a run."""
        self.finished: list[str] = []
        self.raises: dict[str, Exception] = {}
        self.hangs: threading.Event | None = None
        """``finish`` waits for it."""

    def Settings(self, **options: object) -> None: ...

    def init(self, *, id: str, **options: object) -> Any:
        self._fail("init")
        self.runs.setdefault(id, [])
        log, finish = partial(self._log, id), partial(self._finish, id)
        return types.SimpleNamespace(log=log, finish=finish)

    def _log(self, id: str, values: dict[str, float], step: int) -> None:
        self._fail("log")
        self.runs[id].append(step)

    def _finish(self, id: str) -> None:
        if self.hangs is not None:
            self.hangs.wait()
        self.finished.append(id)

    def _fail(self, call: str) -> None:
        if call in self.raises:
            raise self.raises[call]


WITH_WANDB = LoggingConfig(console="none", wandb=True, tensorboard=False)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def log_steps(run_dir: RunDir, first: int, last: int) -> None:
    """What one start of a run does, to the end of its process."""
    with MetricLogger(run_dir, WITH_WANDB, resume_step=first - 1) as logger:
        for step in range(first, last + 1):
            logger.log(step, {"x": 1.0})
    finish_runs(60)


def test_a_restart_continues_its_run_at_wandb_and_another_run_of_the_same_name_does_not(
    tmp_path: Path, wandb: Wandb
) -> None:
    run_dir = RunDir(tmp_path / "run").create()
    log_steps(run_dir, 1, 2)
    log_steps(run_dir, 3, 3)
    run_dir.path.rename(tmp_path / "aside")
    log_steps(RunDir(tmp_path / "run").create(), 1, 1)
    log_steps(RunDir(tmp_path / "aside"), 4, 4)
    assert list(wandb.runs.values()) == [[1, 2, 3, 4], [1]]
    first, second = wandb.runs
    assert wandb.finished == [first, first, second, first]


@pytest.mark.parametrize("call", ["init", "log"])
def test_an_error_of_wandb_costs_its_curves_and_not_the_training(
    call: str, tmp_path: Path, wandb: Wandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.raises[call] = Wandb.CommError("the server\ndoes not answer")
    run_dir = RunDir(tmp_path).create()
    log_steps(run_dir, 1, 5)
    assert [record["step"] for record in read_jsonl(run_dir.metrics)] == [1, 2, 3, 4, 5]
    [warning] = caplog.messages
    assert warning.endswith("the training goes on: the server does not answer")


def test_who_is_not_logged_in_is_told_before_the_training_and_not_in_its_midst(
    tmp_path: Path, wandb: Wandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.raises["init"] = Wandb.UsageError("no API key")
    run_dir = RunDir(tmp_path).create()
    with pytest.raises(UserError, match="wandb does not start: no API key"):
        log_steps(run_dir, 1, 1)
    caplog.clear()
    log_steps(run_dir, 2, 2)
    [warning] = [message for message in caplog.messages if "W&B" in message]
    assert "no API key" in warning


def test_wandb_that_is_not_installed_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="not installed"):
        log_steps(RunDir(tmp_path).create(), 1, 1)


def test_a_wandb_that_does_not_finish_holds_up_neither_the_close_nor_the_end(
    tmp_path: Path, wandb: Wandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.hangs = threading.Event()
    with MetricLogger(RunDir(tmp_path).create(), WITH_WANDB) as logger:
        logger.log(1, {"x": 1.0})
    try:
        finish_runs(0.1)
        assert "W&B has not finished" in caplog.text
        assert not wandb.finished
    finally:
        wandb.hangs.set()
    finish_runs(60)
    assert list(wandb.runs.values()) == [[1]] and len(wandb.finished) == 1


# ---------------------------------------------------------------------------------------------------- console
class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_than_on_a_terminal_each_step_is_one_line_with_the_time_left() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress("auto", total_steps=50, done_steps=10, label="grpo", stream=stream)
    for step in (11, 12):
        progress.update(step, record(step) | {"time/step_s": 2.0, "tokens/generated": 2000})
    assert stream.getvalue().splitlines() == [
        "grpo step 11/50  reward 0.110  1,000 tokens/s  1m18s left",
        "grpo step 12/50  reward 0.120  1,000 tokens/s  1m16s left",
    ]


def test_sft_shows_its_loss_and_trained_tokens() -> None:
    stream = io.StringIO()
    ConsoleProgress("lines", None, 0, "sft", stream).update(
        1, {"loss": 2.5, "tokens/trained": 30.0, "time/step_s": 0.1}
    )
    assert stream.getvalue() == "sft step 1  loss 2.500  300 tokens/s\n"


def test_a_terminal_gets_a_bar_and_none_gets_nothing() -> None:
    for mode, expected in (("auto", True), ("none", False)):
        stream = FakeTerminal()
        progress = ConsoleProgress(mode, 2, 0, "grpo", stream)
        progress.update(1, record(1))
        progress.close()
        assert ("reward 0.010" in stream.getvalue()) is expected
        assert "\x1b" in stream.getvalue() or not expected


def test_durations_read_well() -> None:
    assert [format_duration(s) for s in (0.4, 61, 3700, 90000)] == ["0s", "1m01s", "1h01m", "1d01h"]


# ---------------------------------------------------------------------------------------------------- logs
def run_logged(log_file: Path, body: str) -> subprocess.CompletedProcess[str]:
    """A process that sets up logging with role trainer-0, then runs ``body``."""
    code = f"""
import ctypes, logging, os, subprocess, sys, threading, warnings
from pathlib import Path
from forge_hpc.observability.logs import setup_logging
terminal = setup_logging(Path({str(log_file)!r}), "trainer-0")
{textwrap.dedent(body)}
"""
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60)


def test_all_that_a_process_says_lands_in_its_private_log_and_nothing_on_the_terminal(tmp_path: Path) -> None:
    log_file = tmp_path / "logs" / "12.0" / "trainer-0.log"
    body = """
        logging.getLogger("my.part").info("by logging")
        print("by print")
        os.write(2, b"by descriptor\\n")
        subprocess.run(["echo", "by child"])
        warnings.warn("by warning")
        thread = threading.Thread(target=lambda: 1 / 0, name="side")
        thread.start()
        thread.join()
        open("made.txt", "w").close()
        print(oct(os.stat("made.txt").st_mode)[-3:], file=terminal.stdout)
        raise ValueError("the cause")
    """
    result = run_logged(log_file, "os.chdir(sys.argv[0] and " + repr(str(tmp_path)) + ")\n" + textwrap.dedent(body))
    assert (result.returncode, result.stdout, result.stderr) == (1, "600\n", "")
    text = log_file.read_text()
    for said in ("by print", "by descriptor", "by child", "by warning", "ZeroDivisionError", "thread side"):
        assert said in text
    line = next(line for line in text.splitlines() if "by logging" in line)
    date, level, role, name, *_ = line.split()
    assert (level, role, name) == ("INFO", "trainer-0", "my.part:")
    assert (
        date.endswith("Z") and abs(time.time() - time.mktime(time.strptime(date[:19], "%Y-%m-%dT%H:%M:%S"))) < 15 * 3600
    )
    assert text.splitlines()[-1] == "ValueError: the cause"
    assert stat.S_IMODE(log_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(log_file.parent.stat().st_mode) == 0o700


def test_the_stack_of_a_crash_is_logged(tmp_path: Path) -> None:
    log_file = tmp_path / "logs" / "trainer-0.log"
    result = run_logged(log_file, "ctypes.string_at(0)")
    assert result.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in log_file.read_text()


# ---------------------------------------------------------------------------------------------------- reports
@pytest.fixture
def finished(tmp_path: Path) -> RunDir:
    """A completed run of 20 steps."""
    run_dir = RunDir(tmp_path / "demo").create()
    run_dir.config.write_text("trainer:\n  training:\n    steps: 20\n")
    with MetricLogger(run_dir, QUIET) as logger:
        logger.log_evaluation(0, {"accuracy": 0.25})
        for step in range(1, 21):
            logger.log(step, record(step))
        logger.log_evaluation(20, {"accuracy": 0.95})
    run_dir.export.mkdir()
    run_dir.write_status(state="completed", step=20, policy_version=20)
    (run_dir.create_log_dir(None, 0) / "controller.log").write_text("line\nthe cause\n")
    return run_dir


def test_the_summary_says_what_was_learned_where_it_is_and_what_to_do_next(finished: RunDir) -> None:
    figures = read_figures(finished)
    assert (figures.num_steps, figures.tokens_per_s, figures.steps_s) == (20, 1000.0, 10.0)
    text = final_summary(finished, wall_s=125)
    for part in (
        "demo: completed after 20 steps",
        "0.030 (first 5 steps) -> 0.180 (last 5 steps)",
        "0.250 (before) -> 0.950 (after)",
        "1,000 tokens/s over 10s of steps",
        "2m05s",
        f"report {finished}",
        f"--logdir {finished.tensorboard}",
        f"vllm serve {finished.export}",
    ):
        assert part in text
    assert "resume" not in text
    finished.write_status(state="failed", message="trainer-0 died")
    assert "resume" in final_summary(finished) and "trainer-0 died" in final_summary(finished)


@pytest.mark.parametrize("name", ["reward/mean", "loss"])
def test_of_a_run_of_few_steps_the_mean_of_all_is_said_once(name: str, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "short").create()
    run_dir.write_status(state="completed", step=9)
    for num, said in ((1, "1.000 (mean of 1 step)"), (2, "1.500 (mean of 2 steps)"), (9, "5.000 (mean of 9 steps)")):
        run_dir.metrics.write_text(
            "".join(f'{{"step": {n}, "{name}": {n}, "time/step_s": 1}}\n' for n in range(1, num + 1))
        )
        for text in (final_summary(run_dir), *[render_report(run_dir)] * (name != "loss")):
            assert said in text and "first 5 steps" not in text
        lately = fmean(range(max(1, num - 4), num + 1))
        assert f"{lately:.3f}  {f'mean of the last {min(num, 5)} steps' if num > 1 else 'last step'}" in render_status(
            run_dir
        )
    with run_dir.metrics.open("a") as file:
        file.write(f'{{"step": 10, "{name}": 10, "time/step_s": 1}}\n')
    assert "3.000 (first 5 steps) -> 8.000 (last 5 steps)" in final_summary(run_dir)


def test_the_report_shows_curve_times_and_quantiles(finished: RunDir) -> None:
    text = render_report(finished)
    for part in ("completed at step 20 of 20", "▁", "█", "| time/step_s ", "| step | greedy accuracy |", "| 90%"):
        assert part in text or part.replace("| ", "") in text
    assert "the cause" not in text and "Parts overlap" in text.partition("## Where the time goes")[2]
    finished.write_status(state="failed")
    assert "the cause" in render_report(finished)


def test_status_and_watch_name_the_state_and_a_silent_run(finished: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    finished.write_status(state="running", step=12, job_id="77", message="all well")
    text = render_watch(finished, num_steps=3)
    for part in ("running  all well", "12/20", "77", "0s ago", "0.180"):
        assert part in text
    assert [line.split()[0] for line in text.splitlines()[-4:]] == ["step", "18", "19", "20"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 600)
    assert "10m00s ago  (silent" in render_status(finished)


def test_a_run_that_has_not_begun_is_reported_and_no_run_is_a_user_error(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path).create()
    with pytest.raises(UserError, match="no run in"):
        render_status(run_dir)
    run_dir.write_status(state="pending")
    assert "No training step" in render_report(run_dir)
    assert "pending" in render_watch(run_dir) and "pending" not in final_summary(RunDir(tmp_path / "none"))


def test_sparklines_and_quantiles_are_right_at_their_edges() -> None:
    assert (sparkline([]), sparkline([3.0]), sparkline([1, 1]), sparkline([0, 1])) == ("", "▁", "▁▁", "▁█")
    assert sparkline([0, 0, 1, 1], width=2) == "▁█"
    assert len(sparkline(list(range(1000)), width=60)) == 60
    assert (quantile([3.0], 0.9), quantile([0, 1, 2], 0.5), quantile([0, 10], 0.25)) == (3.0, 1, 2.5)


def test_the_figures_of_a_run_of_any_length_are_read_in_bounded_memory() -> None:
    num = 3 * MOST
    steps = AllSteps({"step": n, "loss": math.sin(n), "time/step_s": 2.0} for n in range(num))
    loss = steps["loss"]
    assert (steps.num, len(steps.newest), loss.count, len(loss.kept) <= MOST) == (num, 5, num, True)
    assert loss.total == sum(math.sin(n) for n in range(num)) and steps["time/step_s"].total == 2.0 * num
    assert steps.first("loss") == fmean(math.sin(n) for n in range(5))
    assert steps.last("loss") == fmean(math.sin(n) for n in range(num - 5, num))
    exact = [math.sin(n) for n in range(num)]
    assert loss.quantile(1.0) == max(exact) and (loss.low, loss.high) == (min(exact), max(exact))
    for share in (0.1, 0.5, 0.9):
        assert abs(loss.quantile(share) - quantile(exact, share)) < 0.01
    few = Series(most=4)
    for value in range(10):
        few.add(value)
    assert list(few.kept) == [0, 4, 8], "every fourth"
    assert steps["absent"].count == 0 and steps.first("absent") is None
