"""The pages are true: their files are written as they say, and their commands run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from runs import PROJECT, left_over, read, small_run, status

DOCS = PROJECT / "docs"
FILE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(page for page in DOCS.glob("*.md") if FILE.search(page.read_text(encoding="utf-8")))
STEPS = 3


def test_the_pages_on_ones_own_code_have_files_to_run():
    assert {"own-loss.md", "own-recipe.md"} <= {page.name for page in PAGES}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
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


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_every_page_is_in_the_index(page: Path):
    assert page.name == "README.md" or f"({page.name})" in (DOCS / "README.md").read_text(encoding="utf-8")
