"""Several runs from one command, and runs as objects, where there is no Slurm."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import PROJECT, left_over

from forge_hpc import Run
from forge_hpc.cli import main
from forge_hpc.config import UserError, load_config, read_config
from forge_hpc.config.load import override_of
from forge_hpc.run_dir import RunDir
from forge_hpc.sweep import combinations
from forge_hpc.sweep_dir import SweepDir

SFT, GRPO, EVAL = (str(PROJECT / f"configs/{name}/demo.yaml") for name in ("sft", "grpo", "eval"))
LOCAL = ["submit", "--cluster", "local", "--config", SFT]
DEAD = "slurm.setup=['exit 3']"
"""The run ends before it begins: these are about how it gets there."""


def test_the_values_of_all_arguments_multiply_and_the_last_varies_fastest() -> None:
    assert combinations(["trainer.optimizer.lr=1e-6,3e-6", "seed=0,1"]) == [
        ["trainer.optimizer.lr=1e-6", "seed=0"],
        ["trainer.optimizer.lr=1e-6", "seed=1"],
        ["trainer.optimizer.lr=3e-6", "seed=0"],
        ["trainer.optimizer.lr=3e-6", "seed=1"],
    ]


def test_a_value_that_holds_commas_stands_in_brackets_or_quotes() -> None:
    found = combinations(["evaluation.k=[1, 8],[4]", "data.split='a,b',c", "reward.0={name: exact}"])
    assert found[0] == ["evaluation.k=[1, 8]", "data.split='a,b'", "reward.0={name: exact}"]
    assert found[3] == ["evaluation.k=[4]", "data.split=c", "reward.0={name: exact}"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sweep", "trainer.optimizer.lrr=1,2"], ["unknown key", "did you mean trainer.optimizer.lr?"]),
        (["--sweep", "seed=1,x"], ["seed must be a whole number, not 'x'"]),
        (["--sweep", "seed="], ["no values"]),
        (["--sweep", "seed=0,1", "seed=2"], ["--sweep has seed twice"]),
        (["--sweep", "seed=[0,1"], ["not values between commas"]),
        (["--sweep", "slurm.time=1,2"], ["one array"]),
        (["--sweep", "seed=0,1", "--at-once", "0"], ["--at-once 0"]),
        (["--sweep", "seed=0,1", "--run-dir", "there"], ["there is there already", "forge-hpc resume"]),
        (["--sweep", "seed=0,1", "--hold"], ["--hold and --begin are for jobs of Slurm"]),
        (["--sweep", "seed=0,1", "--then", EVAL], ["--sweep and --then"]),
        (["--at-once", "2"], ["--at-once is for the runs of a --sweep"]),
        (["--after", "nowhere"], ["--after nowhere: no run in"]),
        (["--then", "nowhere.yaml"], ["no such configuration file"]),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_made(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    assert main([*LOCAL, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and all(word in said for word in words), said
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "file"]


def test_a_run_of_a_sweep_that_fails_keeps_no_other_from_its_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = SweepDir(tmp_path / "sweep")
    assert main([*LOCAL, "--run-dir", str(sweep), DEAD, "--sweep", "seed=4,5"]) == 1
    assert sweep.overrides() == [["seed=4"], ["seed=5"]]
    assert [read_config(run.config).seed for run in sweep.runs] == [4, 5]
    assert [run.read_status().state for run in sweep.runs] == ["failed", "failed"]
    assert "2 of 2 runs have failed" in capsys.readouterr().err


def test_the_stages_of_a_pipeline_begin_with_the_model_of_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = ["--then", GRPO, "--then", EVAL]
    assert main([*LOCAL, "--run-dir", str(tmp_path / "p"), DEAD, *stages]) == 3
    assert "2 of 3 runs have not begun" in capsys.readouterr().err
    names = ["1-demo-sft", "2-demo", "3-eval-demo"]
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == names
    models = [read_config(tmp_path / "p" / name / "config.yaml").model.path for name in names]
    exports = [str(tmp_path / "p" / name / "export") for name in names[:2]]
    assert models == ["builtin:qwen3-tiny", *exports]


def test_a_run_begins_after_one_that_has_completed_and_not_after_one_that_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = RunDir(tmp_path / "before").create()
    before.write_status(state="completed")
    arguments = [*LOCAL, "--run-dir", str(tmp_path / "run"), "--after", str(before), DEAD]
    assert main(arguments) == 3, "it was started"
    before.write_status(state="failed")
    assert main(arguments) == 2
    assert "is failed, and no job goes on with it" in capsys.readouterr().err


def test_values_of_python_become_overrides_that_mean_the_same() -> None:
    values = {
        "seed": 3,
        "trainer": {"optimizer": {"lr": 1e-6}},
        "slurm.time": "24:00:00",
        "name": "0123",
        "evaluation.k": [1, 8],
        "slurm.account": None,
        "model.path": Path("/models/a, b"),
    }
    cfg = load_config(None, [override_of(key, value) for key, value in values.items()])
    assert (cfg.seed, cfg.trainer.optimizer.lr, cfg.slurm.time, cfg.name) == (3, 1e-6, "24:00:00", "0123")
    assert (cfg.evaluation.k, cfg.slurm.account, cfg.model.path) == ([1, 8], None, "/models/a, b")


def test_a_notebook_starts_a_run_sees_its_figures_and_loads_neither_torch_nor_pandas_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    async def cell() -> Run:  # what runs in a notebook runs in an event loop
        run = Run.submit(
            SFT,
            run_dir=tmp_path / "run",
            on="local",
            trainer={"training": {"steps": 2}, "lr_scheduler": {"warmup_steps": 0}},
            **{"evaluation.num_prompts": 0},
        )
        assert await asyncio.to_thread(run.wait, 250) == "completed", run.logs()
        return run

    run = asyncio.run(cell())
    again = Run(tmp_path / "run")
    assert (again.state, again.status.step, again.job_id) == ("completed", 2, None)
    assert list(again.metrics().index) == [1, 2] and again.metrics()["loss"].notna().all()
    assert "forge_hpc.controller" in again.logs()
    with pytest.raises(UserError, match="no log trainer-7"):
        run.logs("trainer-7")
    assert not left_over(run.path)


NOTEBOOK = """
import sys
import forge_hpc
run = forge_hpc.Run.submit({config!r}, run_dir={run_dir!r}, on="local", **{{"slurm.setup": [{setup!r}]}})
assert not {{"torch", "pandas", "numpy", "vllm", "monarch"}} & sys.modules.keys()
print("started", flush=True)
sys.stdin.readline()
run.cancel()
print(run.state, flush=True)
"""


def notebook(tmp_path: Path, setup: str) -> subprocess.Popen[str]:
    code = NOTEBOOK.format(config=SFT, run_dir=str(tmp_path / "run"), setup=setup)
    environ = {**os.environ, "PYTHONPATH": str(PROJECT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], env=environ, text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    return process


def test_a_run_of_this_machine_is_cancelled_and_waited_for(tmp_path: Path) -> None:
    stops = f"trap 'echo interrupted; exit 130' INT; touch {tmp_path}/ready; while true; do sleep 0.05; done"
    process = notebook(tmp_path, stops)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
    out, _ = process.communicate("\n", timeout=60)
    assert out == "failed\n", "it was no run that could say that it was cancelled"
    assert (tmp_path / "run/logs/here.out").read_text() == "interrupted\n"
    assert json.loads((tmp_path / "run/status.json").read_text())["message"].startswith("the run's process ended")


def test_a_run_is_told_when_the_notebook_that_started_it_dies(tmp_path: Path) -> None:
    (tmp_path / "pipe").touch()
    tells = f"trap 'echo told > {tmp_path}/pipe; exit 0' TERM; touch {tmp_path}/ready; while true; do sleep 0.05; done"
    process = notebook(tmp_path, tells)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    while not (tmp_path / "pipe").read_text():
        pass


def test_what_is_no_run_is_not_taken_for_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        Run(tmp_path)
