"""A new run that begins with a checkpoint of another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from runs import REWARD, left_over, read, run_local, small_run
from test_resume import configuration, prepared, saved

from forge_hpc.checkpoint import describe, verify
from forge_hpc.checkpoint.manifest import NO_OPTIMIZER
from forge_hpc.cli import main
from forge_hpc.config import read_config, save_config
from forge_hpc.fork import parse_source
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.starts import StartLog


def test_a_run_and_a_step_are_told_apart(tmp_path: Path) -> None:
    assert parse_source("runs/a@12") == (Path("runs/a"), 12)
    assert parse_source("runs/a") == (Path("runs/a"), None)
    assert parse_source("runs/me@home") == (Path("runs/me@home"), None)
    (tmp_path / "a@12").mkdir()
    assert parse_source(f"{tmp_path}/a@12") == (tmp_path / "a@12", None)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run with checkpoints of steps 3 and 5, as far as the controller is concerned."""
    monkeypatch.chdir(tmp_path)
    run_dir = RunDir(tmp_path / "source").create()
    cfg = configuration("slurm.setup=['exit 5']")
    save_config(cfg, run_dir.config)
    run_dir.write_status(state="completed", step=5)
    for step in (3, 5):
        saved(run_dir, cfg, step)
    return run_dir


def fork(*arguments: str) -> int:
    return main(["resume", "--cluster", "local", "--run-dir", "new", *arguments])


def test_a_new_run_begins_with_the_step_that_is_named_and_its_own_options(
    source: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat() for path in source.path.rglob("*")}
    assert fork("--from", f"{source}@3", "trainer.optimizer.lr=1e-3", "--name", "other") == 5
    said = capsys.readouterr().err
    assert f"Beginning with step 3 of {source}" in said and "trainer.optimizer.lr: 1e-06 -> 0.001" in said
    new = RunDir("new")
    cfg = read_config(new.config)
    assert (cfg.name, cfg.trainer.optimizer.lr) == ("other", 1e-3)
    assert verify(new.checkpoint(3)) is None and not (new.checkpoint(3) / NO_OPTIMIZER).exists()
    session = prepared(new, cfg)
    assert (session.step, session.state) == (3, {})
    [record] = [record for record in StartLog(new).read() if record["event"] == "forked"]
    assert (record["from"], record["step"], record["optimizer"]) == (str(source), 3, True)
    assert "name: grpo -> other" in record["changes"]
    after = {path: path.stat() for path in source.path.rglob("*")}
    assert {path: stat.st_mtime_ns for path, stat in before.items() if path.is_file()} == {
        path: stat.st_mtime_ns for path, stat in after.items() if path.is_file()
    }
    shutil.rmtree(source.path)
    assert verify(new.checkpoint(3)) is None


def test_the_newest_checkpoint_is_taken_and_its_optimizer_left_on_request(source: RunDir) -> None:
    assert fork("--from", str(source), "--no-optimizer") == 5
    new = RunDir("new")
    assert (new.checkpoint(5) / NO_OPTIMIZER).exists() and verify(new.checkpoint(5)) is None
    assert new.read_status().step == 5


def test_the_place_in_the_data_is_kept_where_the_data_are_the_same(source: RunDir) -> None:
    checkpoint = source.checkpoint(5)
    state = json.loads((checkpoint / "controller.json").read_text())
    state["recipe"] = {"documents": {"position": 7}}
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "controller.json").write_text(json.dumps(state))
    manifest["files"]["controller.json"] = describe(checkpoint / "controller.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    for option, kept in [("trainer.optimizer.lr=1e-3", {"documents": {"position": 7}}), ("data.shuffle=false", {})]:
        assert fork("--from", str(source), option) == 5
        found = json.loads((RunDir("new").checkpoint(5) / "controller.json").read_text())
        assert found["recipe"] == kept
        shutil.rmtree("new")


def test_a_built_in_model_stays_that_of_the_old_seed(source: RunDir) -> None:
    prepared(source, read_config(source.config))  # which writes it
    assert fork("--from", str(source), "seed=7") == 5
    new = RunDir("new")
    cfg = read_config(new.config)
    assert (cfg.seed, cfg.model.path) == (7, str(new.path / "model" / "qwen3-tiny-seed42"))
    shutil.rmtree(source.path)
    assert prepared(new, cfg).step == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "nowhere"], ["no run in"]),
        (["--from", "source@4"], ["no checkpoint of step 4", "3, 5"]),
        (["--from", "source", "trainer.training.steps=5"], ["of step 5 already", "RUN_DIR@STEP"]),
        (["--from", "source", "model.path=Qwen/Qwen3-0.6B"], ["of another model: model.path"]),
        (["--from", "source", "trainer.lora.enable=true"], ["of another model: trainer.lora.enable"]),
        (["--from", "source", "recipe=ppo"], ["hold policy, and recipe=ppo trains critic and policy"]),
        (["--from", "source", "trainer.optimizer.lr=0"], ["must be greater than 0"]),
        (["source", "--from", "source"], ["two runs"]),
        (["source"], ["--from RUN_DIR[@STEP]"]),
    ],
)
def test_what_cannot_be_begun_is_named_in_one_line_and_leaves_nothing(
    source: RunDir, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fork(*arguments) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and all(word in said for word in words), said
    assert not Path("new").exists()
    assert not [path for path in source.checkpoints.iterdir() if path.name.startswith(".")]


def test_a_new_run_does_not_begin_in_the_directory_of_another(
    source: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", "--cluster", "local", "--from", "source@3", "--run-dir", "source"]) == 2
    assert "is a run already" in capsys.readouterr().err
    assert source.read_status().step == 5


@pytest.mark.training  # two whole runs; what a fork begins with is tested above
@pytest.mark.timeout(900)
def test_a_fork_without_changes_learns_what_the_run_learned_to_the_last_bit(tmp_path: Path) -> None:
    first = run_local(tmp_path / "run", small_run(tmp_path, 4, REWARD, "evaluation.num_prompts=0"))
    assert first.returncode == 0, first.stderr
    whole = [record for record in read(tmp_path / "run") if record["step"] > 2]
    new = RunDir(tmp_path / "new")
    assert main(["resume", "--cluster", "local", "--from", f"{tmp_path / 'run'}@2", "--run-dir", str(new)]) == 0
    assert not left_over(new.path)
    shutil.rmtree(tmp_path / "run")
    records = read(new.path)
    assert [record["step"] for record in records] == [3, 4]

    def learned(record: dict[str, float]) -> dict[str, float]:
        return {
            key: value
            for key, value in record.items()
            if not key.startswith(("time/", "perf/", "wall_time", "memory/"))
        }

    assert list(map(learned, records)) == list(map(learned, whole))
    assert (new.export / "model.safetensors").exists()
