"""The pages are true: their files are written as they say, and their commands run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import user_session
from _pytest.mark import ParameterSet
from runs import PROJECT, left_over, read, small_run, status
from sandboxes import needs_bubblewrap

from forge_hpc.commands import COMMANDS as COMMANDS_OF_THE_TOOL
from forge_hpc.config import load_config, validate
from forge_hpc.data.builtin import char_tokenizer

DOCS = PROJECT / "docs"
FILE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = {kind: re.compile(rf"^```{kind}\n(.*?)^```$", re.MULTILINE | re.DOTALL) for kind in ("jsonl", "yaml", "python")}
PAGES = sorted(page for page in DOCS.glob("*.md") if FILE.search(page.read_text(encoding="utf-8")))
RECIPES = [DOCS / f"{name}.md" for name in ("ppo", "dpo", "reward_model", "distillation", "best_of_n")]
"""Of shipped recipes, whose commands run on shipped configurations."""
STEPS = 3


def test_the_pages_on_ones_own_code_have_files_to_run():
    assert {"own-loss.md", "own-recipe.md"} <= {page.name for page in PAGES}


def as_cases(pages: list[Path]) -> list[ParameterSet]:
    """Some only where they also learn (tests/test_recipes_learn.py), which takes minutes."""
    heavy = {name: [pytest.mark.training] for name in ("distillation", "dpo", "reward_model", "best_of_n")}
    return [pytest.param(page, id=page.stem, marks=heavy.get(page.stem, [])) for page in pages]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", as_cases([*PAGES, *RECIPES]))
def test_what_a_page_shows_runs(page: Path, tmp_path: Path):
    """With the tiny model, a few steps, and a reward that random weights can earn."""
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    text = page.read_text(encoding="utf-8")
    for name, content in FILE.findall(text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    commands = [line for block in COMMANDS.findall(text) for line in block.splitlines() if line]
    assert commands, f"{page} shows files and no command"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "forge-hpc"
        command_line = [sys.executable, "-m", "forge_hpc.cli", *arguments, *small_run(tmp_path, STEPS)]
        result = subprocess.run(command_line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
        run_dir = tmp_path / arguments[arguments.index("--run-dir") + 1]
        assert not left_over(run_dir)
        assert status(run_dir)["state"] == "completed"
        assert [record["step"] for record in read(run_dir)] == [1, 2, 3]
        assert (run_dir / "export/model.safetensors").exists()


def write_blocks(page: str, directory: Path) -> str:
    """Write the page's JSON lines and YAML to the files that it speaks of; returns its Python."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = {kind: BLOCK[kind].findall(text) for kind in BLOCK}
    for name, lines in zip(("problems", "chats"), blocks["jsonl"], strict=False):
        (directory / f"{name}.jsonl").write_text(lines)
    if blocks["jsonl"]:
        (directory / "held-out.jsonl").write_text(blocks["jsonl"][0])
    for number, content in enumerate(blocks["yaml"]):
        (directory / f"{number}.yaml").write_text(content)
    [code] = blocks["python"]
    return code


@pytest.mark.parametrize("page", ["data.md", "sandbox.md"])
def test_the_configurations_of_a_page_are_valid(page: str, tmp_path: Path):
    write_blocks(page, tmp_path)
    files = sorted(tmp_path.glob("*.yaml"))
    assert files
    for file in files:
        validate(load_config(file))


def test_the_page_on_data_shows_what_is_learned_of_a_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    code = write_blocks("data.md", tmp_path)
    (tmp_path / "2.yaml").rename(tmp_path / "chats.yaml")
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "MODEL_DIR")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out == "u:1+1=<eos>a:2<eos>\n2<eos>\n"


def test_the_page_on_the_sandbox_runs_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    needs_bubblewrap()
    exec(write_blocks("sandbox.md", tmp_path), {})
    assert re.fullmatch(r"0 egrof\n None\n0\.5 AssertionError.*\n1\.0\n", capsys.readouterr().out)


def test_what_flows_through_a_run_is_imported_from_the_package_without_torch():
    code = "import sys; from forge_hpc.data import Completion, Episode, Group; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(PROJECT)}, timeout=60)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_every_page_is_in_the_index(page: Path):
    assert page.name == "README.md" or f"({page.name})" in (DOCS / "README.md").read_text(encoding="utf-8")


def test_the_session_shows_every_command_with_output_and_no_path_of_the_machine_that_it_was_run_on():
    page = (DOCS / "session.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"^\$ (.*)$", page, re.MULTILINE))
    assert {*COMMANDS_OF_THE_TOOL} <= {*re.findall(r"forge-hpc ([a-z]+)", lines)}, "make session writes the page"
    assert not re.search(r"(?<![\w.~])/(?:root|wt|var)/|fhpc", page)


class Typed(user_session.Session):
    """What a user says, writes and types in a session; nothing is run."""

    def __init__(self, home: Path) -> None:
        self.home, self.page, self.env = home, [], {}

    def __call__(self, line: str, code: int = 0, timeout_s: float = 0) -> str:
        self._show(line, "")
        return "job NUMBER"

    def at_a_terminal(self, line: str, *typed: str, timeout_s: float = 0) -> str:
        self._show(line, "")
        return ""

    def wait_for(self, condition: Callable[[], object], timeout_s: float = 0) -> None:
        """At once."""

    def steps(self, run: str) -> int:
        return 10**9

    def _add(self, text: str) -> None:
        self.page.append(text.strip().removesuffix("\n```") if text.startswith("\n```console") else text.strip())


@pytest.mark.parametrize("title", user_session.PARTS)
def test_a_section_of_the_session_has_what_its_script_types_now(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its order, and no other commands: a section that is older than the script fails. Numbers of jobs and steps are
    those of that day."""
    monkeypatch.setattr(user_session, "HubServer", MagicMock())
    monkeypatch.setattr(user_session, "small_disk", lambda *_: nullcontext())
    monkeypatch.setattr(user_session, "subprocess", MagicMock())
    user_session.PARTS[title](typed := Typed(tmp_path))
    section = user_session.sections((DOCS / "session.md").read_text(encoding="utf-8"))[title]
    inner = tmp_path / "lines.sh"  # commands that are given within one
    expected = typed.page + re.findall(r"^echo '(\$ .*)'$", inner.read_text() if inner.exists() else "", re.MULTILINE)
    at = 0
    for text in expected:
        pattern = re.escape(text).replace("NUMBER", r"\d+").replace(str(10**9 + 2), r"\d+")
        found = re.compile(rf"^{pattern}$", re.MULTILINE).search(section, at)
        assert found, f"make session ARGS='--only \"{title}\"' writes the section, which has not, or not here:\n{text}"
        at = found.end()
    assert section.count("\n```console\n") == sum(text.startswith("```console") for text in expected)


def test_the_session_begins_as_its_script_says() -> None:
    assert (DOCS / "session.md").read_text(encoding="utf-8").startswith(user_session.HEAD)
