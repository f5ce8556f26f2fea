"""Engines that outlive a run: the next one takes them, learns what it would learn alone, and finds none too many."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import DEMO, PROJECT, left_over, processes, read, small_run, status, wait_for
from slurm_cluster import SlurmCluster
from test_slurm_sweeps import learned
from test_stacks import HANGING_LOSS

from forge_hpc.cli import main
from forge_hpc.config.errors import UserError
from forge_hpc.config.user_code import forget_user_code, load_user_code
from forge_hpc.kept.directory import EnginesDir, keep_s_of, origin_of, why_not
from forge_hpc.kept.ending import refuse_busy

KEPT = "generator 0: its engine was kept"
LOSS = """
from dataclasses import dataclass

import factor
from forge_hpc.losses import PolicyLoss


@dataclass(frozen=True)
class Scaled(PolicyLoss):
    def term(self, x):
        return -factor.OF * x.advantages * x.logprobs, {"factor": x.logprobs * 0 + factor.OF}
"""


class Folder:
    """A folder in which somebody submits runs that keep their engines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engines = path / "runs/.engines"
        self.overrides = small_run(path, 2)
        (path / "loss.py").write_text(LOSS)
        self.write_factor(1.0)
        self.overrides += [f"algorithm.loss={path}/loss.py:Scaled", "algorithm.advantage=group_mean"]

    def write_factor(self, factor: float) -> None:
        (self.path / "factor.py").write_text(f"OF = {factor:.6f}\n")
        shutil.rmtree(self.path / "__pycache__", ignore_errors=True)

    def begin(self, name: str, *overrides: str, keep: str = "10m") -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "forge_hpc.cli", "submit", "--cluster", "local", "--config", str(DEMO)]
        command += ["--run-dir", f"runs/{name}", "--keep-engines", keep, *self.overrides, *overrides]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, cwd=self.path, text=True, stdout=pipe, stderr=pipe)

    def submit(self, name: str, *overrides: str, code: int = 0, keep: str = "10m") -> str:
        process = self.begin(name, *overrides, keep=keep)
        out, err = process.communicate(timeout=280)
        assert process.returncode == code, out + err
        return out + err

    def command(self, *words: str) -> str:
        command = [sys.executable, "-m", "forge_hpc.cli", *words]
        env = {**os.environ, "PYTHONPATH": str(PROJECT)}
        return subprocess.run(command, env=env, cwd=self.path, text=True, capture_output=True, check=True).stdout

    def state(self) -> dict[str, Any]:
        [file] = self.engines.glob("*/state.json")
        return json.loads(file.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    """One that has engines: those of ``runs/first``."""
    folder = Folder(tmp_path_factory.mktemp("folder"))
    try:
        said = folder.submit("first")
        assert KEPT not in said and len(processes(folder.engines, "forge_hpc.controller")) == 1
        yield folder
    finally:
        folder.command("engines", "--end")
    assert not left_over(folder.engines)


def test_a_run_on_kept_engines_equals_one_on_new_ones_whatever_ran_in_between(folder: Folder) -> None:
    folder.write_factor(2.0)  # a module that the loss imports
    reward = folder.path / "reward.py"
    before = reward.read_text()
    reward.write_text(before.replace("/ 6", "/ 3"))
    said = folder.submit("other", "trainer.optimizer.lr=1e-2", "seed=3", "rollout.group_size=4")
    assert KEPT in said and "start to first step" in said
    other, first = learned(folder.path / "runs/other"), learned(folder.path / "runs/first")
    assert {record["factor"] for record in other} == {2.0} and {record["factor"] for record in first} == {1.0}
    assert other[0]["reward/mean"] != first[0]["reward/mean"]
    folder.write_factor(1.0)
    reward.write_text(before)
    assert KEPT in folder.submit("again")
    assert learned(folder.path / "runs/again") == first != []
    models = [(folder.path / f"runs/{name}/export/model.safetensors").read_bytes() for name in ("first", "again")]
    assert models[0] == models[1]
    answers = [sorted((folder.path / f"runs/{name}/evaluations").iterdir()) for name in ("first", "again")]
    assert [file.read_text() for file in answers[0]] == [file.read_text() for file in answers[1]] != []
    phases = [next(r for r in read(folder.path / "runs" / name, "starts.jsonl") if r["event"] == "phases")
              for name in ("first", "again")]  # fmt: skip
    assert "gate" in phases[0]["seconds"] and "gate" not in phases[1]["seconds"]


def test_a_run_that_goes_on_takes_kept_engines_too(folder: Folder) -> None:
    more = "trainer.training.steps=3"
    assert KEPT in folder.submit("short", "trainer.training.steps=2", "trainer.lr_scheduler.decay_ratio=null")
    assert KEPT in folder.submit("short", more, "trainer.lr_scheduler.decay_ratio=null")
    assert [record["step"] for record in read(folder.path / "runs/short")] == [1, 2, 3]


def test_a_run_that_does_not_fit_is_refused_before_it_begins_and_the_engines_stay(folder: Folder) -> None:
    pids = processes(folder.engines, "generator-0")
    said = folder.submit("wide", "cluster.gpus_per_node=2", code=2)
    assert "error: cluster.gpus_per_node is 2, a node has 0" in said and "start to first step" not in said
    assert not (folder.path / "runs/wide/metrics.jsonl").exists() and processes(folder.engines, "generator-0") == pids
    assert KEPT in folder.submit("narrow", "trainer.training.steps=1", "checkpoint.interval=1")


def test_other_options_of_the_engine_take_a_new_one_and_a_line_says_which(folder: Folder) -> None:
    num = len(processes(folder.engines, "generator-0"))
    said = folder.submit(
        "engine", "generator.engine.max_num_seqs=100", "trainer.training.steps=1", "checkpoint.interval=1"
    )
    assert "generator 0: a new engine, other max_num_seqs" in said
    assert len(processes(folder.engines, "generator-0")) == num, "the other one has ended"


def test_engines_outlive_a_run_that_fails_and_one_that_is_cancelled(folder: Folder) -> None:
    (folder.path / "factor.py").write_text("OF = 1 / 0\n")
    said = folder.submit("bug", code=1)
    assert "error: " in said and "division by zero" in said, said
    assert status(folder.path / "runs/bug")["state"] == "failed"
    folder.write_factor(1.0)
    long = folder.begin("long", "trainer.training.steps=2000", "algorithm.max_steps_without_signal=1000")
    wait_for(lambda: len(read(folder.path / "runs/long")) >= 2, "two steps")
    assert folder.state()["run"] == str(folder.path / "runs/long")
    assert "at work for runs/long" in folder.command("engines")
    busy = folder.submit("late", code=2)
    assert "the kept engines are at work for runs/long" in busy and not (folder.path / "runs/late").exists()
    long.send_signal(signal.SIGINT)
    out, err = long.communicate(timeout=100)
    assert long.returncode == 130 and KEPT in out and "which is saved" in err, out + err
    by_name = folder.begin("named", "trainer.training.steps=2000", "algorithm.max_steps_without_signal=1000")
    wait_for(lambda: len(read(folder.path / "runs/named")) >= 2, "two steps")
    assert "cancelled" in folder.command("cancel", "runs/named")
    out, err = by_name.communicate(timeout=100)
    assert by_name.returncode == 130 and KEPT in out
    assert re.search(r"1 node, kept after named for another 10 min", folder.command("engines"))


def test_engines_end_at_their_deadline_with_all_processes(folder: Folder) -> None:
    folder.submit("last", "trainer.training.steps=1", "checkpoint.interval=1", keep="3s")
    wait_for(lambda: not list(folder.engines.glob("*/state.json")), "the end of the engines", 60)
    assert not left_over(folder.engines)
    assert folder.command("engines") == "no engines are kept in runs/\n"
    [place] = folder.engines.iterdir()
    wait_for(lambda: not EnginesDir(place).run_dir.is_locked(), "the end of the keeper", 30)
    assert not [path for path in (place / "tls", place / "mailbox") if path.exists()]


@pytest.mark.training
def test_a_run_that_hangs_on_kept_engines_names_the_file_in_its_own_folder_that_says_where(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    (tmp_path / "hanging.py").write_text(HANGING_LOSS)
    hanging = (f"algorithm.loss={tmp_path}/hanging.py:add_up", "cluster.max_restarts=0", "trainer.timeout_s=30")
    try:
        folder.submit("first", "trainer.training.steps=1", "checkpoint.interval=1")
        run = folder.begin("hangs", "trainer.training.steps=8", *hanging)
        wait_for(lambda: read(tmp_path / "runs/hangs"), "a step")
        asked = json.loads(folder.command("stacks", "runs/hangs", "--json"))
        assert {"controller", "trainer-0", "generator-0", "worker-0"} <= {process["role"] for process in asked}
        out, err = run.communicate(timeout=200)
        assert run.returncode == 1 and KEPT in out, out + err
        [file] = (tmp_path / "runs/hangs").glob("logs/*/stacks-0.log")
        told = f"did not answer within 30 s; the stacks of all processes: {file.parent}/stacks-*.log"
        assert told in status(tmp_path / "runs/hangs")["message"] and told in err
        text = file.read_text().split("=== ")[-1]
        assert " in add_up\n" in text.split("--- trainer-0, pid ")[1].split("--- ")[0]
        assert all(f"--- {role}, pid " in text for role in ("controller", "generator-0", "worker-0"))
        assert [*tmp_path.glob("**/stacks-*.log")] == [file]
    finally:
        folder.command("engines", "--end")
    assert not left_over(folder.engines)


def test_a_keeper_that_is_killed_takes_all_with_it_and_the_next_run_starts_anew(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    run = folder.begin("one", "trainer.training.steps=2000", "algorithm.max_steps_without_signal=1000")
    wait_for(lambda: processes(folder.engines, "forge_hpc.controller"), "the start of the controller")
    psutil.Process(folder.state()["pid"]).kill()
    out, err = run.communicate(timeout=60)
    assert run.returncode == 1 and "the keeper of the engines has died" in err, out + err
    assert status(tmp_path / "runs/one")["state"] == "failed"
    assert not left_over(folder.engines)
    assert "died" in folder.command("engines", "--end") and folder.command("engines").startswith("no engines")


def test_a_module_that_has_changed_is_read_anew(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("WORD = 'one'\n")
    (tmp_path / "code.py").write_text("import neighbour\ndef say():\n    return neighbour.WORD\n")
    files = [tmp_path / "neighbour.py", tmp_path / "code.py"]
    assert load_user_code(f"{tmp_path}/code.py:say", "reward")() == "one"
    (tmp_path / "neighbour.py").write_text("WORD = 'another'\n")
    assert load_user_code(f"{tmp_path}/code.py:say", "reward")() == "one", "Python keeps what was imported"
    forget_user_code(files)
    assert load_user_code(f"{tmp_path}/code.py:say", "reward")() == "another"
    forget_user_code(files)
    sys.path.remove(str(tmp_path))


def test_engines_are_for_runs_with_the_same_command_code_and_environment() -> None:
    environ = {"PATH": "/bin", "TOKEN": "secret", "COLUMNS": "80"}
    origin = origin_of(["python", "x"], environ)
    assert "secret" not in json.dumps(origin)
    assert why_not(origin, ["python", "x"], environ | {"COLUMNS": "60", "SSH_TTY": "1"}) == ""
    assert why_not(origin, ["srun", "x"], environ) == "the nodes, their set-up or the Python are others"
    changed = why_not(origin, ["python", "x"], {"PATH": "/bin", "TOKEN": "other", "NEW": "1"})
    assert changed == "the environment has changed (NEW, TOKEN)"
    assert why_not(origin | {"code": "old"}, ["python", "x"], environ) == "the code of forge_hpc has changed"


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400)])
def test_how_long_engines_are_kept_is_said_with_a_unit(text: str, seconds: float) -> None:
    assert keep_s_of(text) == seconds
    for wrong in (text[:-1], f"-{text}", "0s", "soon"):
        with pytest.raises(UserError, match="is no time"):
            keep_s_of(wrong)


def test_a_job_of_its_own_keeps_no_engines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--cluster", "slurm", "--dry-run", "--config", str(DEMO), "--keep-engines", "30m"]) == 2
    said = capsys.readouterr().err
    assert "this one would be a job of its own" in said and "salloc first, or --cluster local" in said
    assert main(["submit", "--keep-engines", "30m", "--sweep", "seed=0,1"]) == 2
    assert "--keep-engines is for one run at a time" in capsys.readouterr().err


def test_a_keeper_that_has_died_keeps_nobody_away(tmp_path: Path) -> None:
    directory = EnginesDir(tmp_path / "runs/.engines/here")
    directory.run_dir.create()
    directory.write("engines", origin_of(["x"], {}))
    directory.write("state", {"run": str(tmp_path), "host": os.uname().nodename, "pid": 1, "ends": None})
    refuse_busy(directory)
    with directory.run_dir.lock(), pytest.raises(UserError, match="at work"):
        refuse_busy(directory)


@pytest.mark.slurm
@pytest.mark.training
def test_engines_are_kept_within_an_allocation_on_all_its_nodes(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    forge = [sys.executable, "-m", "forge_hpc.cli"]
    submit = " ".join(
        [*forge, "submit", "--config", str(DEMO), "--keep-engines", "10m", *(f"'{o}'" for o in small_run(tmp_path, 1))]
    )
    (tmp_path / "hanging.py").write_text(HANGING_LOSS)
    hanging = f"algorithm.loss={tmp_path}/hanging.py:add_up trainer.timeout_s=20 cluster.max_restarts=0"
    hanging += " trainer.training.steps=8"
    script = tmp_path / "shell.sh"
    script.write_text(
        f"#!/bin/bash\ncd {tmp_path}\n{submit} --run-dir runs/a\n{submit} --run-dir runs/b\n"
        f"{' '.join(forge)} engines\n{submit} {hanging} --run-dir runs/c\n{' '.join(forge)} engines --end\n"
    )
    env = {**slurm_cluster.env, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    salloc = ["salloc", "--nodes=2", "--exclusive", "--mem=0", "bash", str(script)]
    done = slurm_cluster.run(*salloc, env=env, cwd=tmp_path, check=False, timeout_s=280)
    assert status(tmp_path / "runs/b").get("state") == "completed", done.stdout + done.stderr
    assert done.stdout.count(KEPT) == 2 and "2 nodes, kept after b for another 10 min" in done.stdout
    assert learned(tmp_path / "runs/a") == learned(tmp_path / "runs/b") != []
    files = sorted((tmp_path / "runs/c").glob("logs/*/stacks-*.log"))
    assert [file.name for file in files] == ["stacks-0.log", "stacks-1.log"], done.stdout + done.stderr
    roles = {role for file in files for role in re.findall(r"^--- (\S+), pid ", file.read_text(), re.MULTILINE)}
    assert {"controller", "trainer-0", "generator-0", "worker-0", "worker-1"} <= roles
    assert not left_over(tmp_path / "runs/.engines")


def test_runs_from_a_notebook_take_kept_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import forge_hpc
    from forge_hpc import submission

    asked: list[Any] = []

    def note(request: Any) -> Any:
        asked.append(request.keep_s)
        raise UserError("enough")

    monkeypatch.setattr(submission, "find_place", note)
    with pytest.raises(UserError, match="enough"):
        forge_hpc.Run.submit(DEMO, keep_engines="30m")
    assert asked == [1800]
