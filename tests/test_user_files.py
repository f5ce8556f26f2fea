"""A run knows the user's own files that it began with, and goes on with no others unless it is told to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from forge_hpc.cli import main
from forge_hpc.config import Config, UserError, load_config, save_config
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.starts import StartLog
from forge_hpc.user_files import check_files, keep_files, kept_files, named_files, restore_kept

REWARD = "import helper\n\ndef score(prompt, response, target, **fields):\n    return helper.points(response)\n"
HELPER = "def points(text):\n    return len(text) / 6\n"


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's directory, which is the current one."""
    code = tmp_path / "code"
    (code / "mine").mkdir(parents=True)
    (code / "reward.py").write_text(REWARD)
    (code / "helper.py").write_text(HELPER)
    (code / "mine/__init__.py").write_text("")
    (code / "mine/loss.py").write_text("from . import parts\nimport torch\nfrom forge_hpc.losses import PPOLoss\n")
    (code / "mine/parts.py").write_text("import os\n")
    (code / "env.sh").write_text("export A=1\n")
    monkeypatch.chdir(code)
    return code


def configuration(code: Path) -> Config:
    return load_config(
        None,
        [
            f"reward=[{{name: {code / 'reward.py'}:score}}, {{name: length}}]",
            "algorithm.loss=mine.loss:MyLoss",
            f"slurm.setup=['module load cuda', 'source {code / 'env.sh'}']",
        ],
    )


@pytest.fixture
def run_dir(tmp_path: Path, code: Path) -> RunDir:
    """A run that has learned something with these files."""
    run_dir = RunDir(tmp_path / "run").create()
    cfg = configuration(code)
    save_config(cfg, run_dir.config)
    keep_files(cfg, run_dir)
    run_dir.checkpoint(5).mkdir(parents=True)
    return run_dir


def test_files_that_a_configuration_names_are_found_with_those_beside_them_that_they_import(code: Path) -> None:
    found = [(file.key, file.name) for file in named_files(configuration(code))]
    assert found == [
        ("reward.0.name", "reward.py"),
        ("reward.0.name", "helper.py"),
        ("algorithm.loss", "mine/loss.py"),
        ("algorithm.loss", "mine/__init__.py"),
        ("algorithm.loss", "mine/parts.py"),
        ("slurm.setup", "env.sh"),
    ]


def test_they_are_kept_as_they_were_for_the_owner_alone(code: Path, run_dir: RunDir) -> None:
    copies = {path.name.rpartition("-")[0]: path for path in (run_dir.path / "code").glob("*-*")}
    assert set(copies) == {"reward", "helper", "loss", "__init__", "parts", "env"}
    assert copies["reward"].read_text() == REWARD
    assert {path.stat().st_mode & 0o777 for path in (run_dir.path / "code").iterdir()} == {0o600}
    assert check_files(configuration(code), run_dir) == []
    empty = RunDir(run_dir.path.parent / "other").create()
    keep_files(Config(), empty)
    assert check_files(Config(), empty) == [] and not (empty.path / "code").exists()


@pytest.mark.parametrize("name", ["reward.py", "helper.py", "mine/parts.py"])
def test_other_code_is_refused_once_something_was_learned_and_accepted_where_that_is_asked_for(
    code: Path, run_dir: RunDir, name: str
) -> None:
    cfg, file = configuration(code), code / name
    before = file.read_text()
    file.write_text(before + "x = 2\n")
    with pytest.raises(UserError, match=rf"{file} is not what it was when the run began \(.*/code/") as refused:
        check_files(cfg, run_dir)
    assert refused.value.hint and "--accept-changes" in refused.value.hint
    [line] = check_files(cfg, run_dir, accept=True)
    assert str(file) in line and " -> " in line
    run_dir.checkpoint(5).rmdir()
    assert check_files(cfg, run_dir) == [line]
    run_dir.checkpoint(5).mkdir()
    keep_files(cfg, run_dir)
    assert check_files(cfg, run_dir) == []
    file.write_text(before)
    with pytest.raises(UserError, match="is not what it was"):
        check_files(cfg, run_dir)


def test_what_an_adapter_on_one_base_has_saved_is_learned_too(code: Path, run_dir: RunDir) -> None:
    run_dir.checkpoint(5).rmdir()
    (code / "reward.py").write_text("x = 2\n" + REWARD)
    assert check_files(configuration(code), run_dir)
    RunDir(run_dir.adapters / "1").checkpoint(5).mkdir(parents=True)
    with pytest.raises(UserError, match="is not what it was"):
        check_files(configuration(code), run_dir)


def test_comments_and_lines_of_the_shell_are_told_of_and_not_refused(code: Path, run_dir: RunDir) -> None:
    (code / "reward.py").write_text("# why\n" + REWARD)
    (code / "env.sh").write_text("export A=2\n")
    lines = check_files(configuration(code), run_dir)
    assert [line.partition(":")[0] for line in lines] == ["reward.0.name", "slurm.setup"]


def test_a_file_that_is_gone_is_named_with_its_copy(code: Path, run_dir: RunDir) -> None:
    for name in ("reward.py", "helper.py"):
        content = (code / name).read_text()
        (code / name).unlink()
        with pytest.raises(UserError, match=rf"{code / name}, which reward\.0\.name needs, is gone") as gone:
            check_files(configuration(code), run_dir)
        assert gone.value.hint is not None
        _, _, command = gone.value.hint.partition("cp ")
        shutil.copyfile(*command.split())
        assert (code / name).read_text() == content
    assert check_files(configuration(code), run_dir) == []


def test_a_file_that_came_to_be_imported_is_told_of(code: Path, run_dir: RunDir) -> None:
    (code / "torch.py").write_text("")  # stands before what is installed, or not: somebody wants to know
    [line] = check_files(configuration(code), run_dir)
    assert line.startswith(f"algorithm.loss: {code / 'torch.py'} none -> ")


def test_what_was_kept_can_be_put_back(code: Path, run_dir: RunDir) -> None:
    before = kept_files(run_dir)
    (code / "reward.py").write_text("x = 1\n" + REWARD)
    keep_files(configuration(code), run_dir)
    restore_kept(run_dir, before)
    with pytest.raises(UserError, match="is not what it was"):
        check_files(configuration(code), run_dir)
    restore_kept(run_dir, None)
    assert check_files(configuration(code), run_dir) == []


def test_a_node_keeps_the_files_of_a_run_that_was_made_before_and_refuses_others_later(
    code: Path, run_dir: RunDir
) -> None:
    from forge_hpc.controller.conduct import take_user_files

    cfg = configuration(code)
    shutil.rmtree(run_dir.path / "code")
    take_user_files(cfg, run_dir)
    (code / "env.sh").write_text("export A=2\n")
    take_user_files(cfg, run_dir)
    take_user_files(cfg, run_dir)
    [record] = StartLog(run_dir).read()
    assert record["event"] == "changed" and record["changes"][0].startswith("slurm.setup: ")
    (code / "reward.py").write_text(REWARD.replace("/ 6", "/ 7") + "x = 1\n")
    with pytest.raises(UserError, match="is not what it was"):
        take_user_files(cfg, run_dir)


def test_resume_refuses_other_code_and_can_be_told_to_go_on(
    code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = RunDir(tmp_path / "r")
    reward = f"reward=[{{name: {code / 'reward.py'}:score}}]"
    local = ["--cluster", "local", "--run-dir", str(run_dir)]
    assert main(["submit", *local, reward, "slurm.setup=['exit 5']", "model.path=builtin:qwen3-tiny"]) == 5
    assert (run_dir.path / "code/files.json").exists()
    run_dir.checkpoint(5).mkdir(parents=True)
    (code / "helper.py").write_text(HELPER.replace("6", "7"))
    resume = ["resume", str(run_dir), "--cluster", "local"]
    capsys.readouterr()
    assert main(resume) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert "helper.py is not what it was" in error and "--accept-changes" in hint
    assert main([*resume, "--accept-changes", "cluster.max_restarts=7"]) == 5
    assert "helper.py" in capsys.readouterr().err
    [changed] = [record["changes"] for record in StartLog(run_dir).read() if record["event"] == "changed"]
    assert changed[0] == "cluster.max_restarts: 3 -> 7" and "helper.py" in changed[1]
    assert main(resume) == 5
    (code / "reward.py").unlink()
    assert main(resume) == 2
    assert "reward.py, which reward.0.name needs, is gone" in capsys.readouterr().err
