"""``forge-hpc env``: an environment played by hand."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from forge_hpc.cli import main
from forge_hpc.data.types import HELD_OUT

WORDS = """
import random
from forge_hpc.environments import Step

class Words:
    def __init__(self, honest=True):
        self.honest = honest

    async def reset(self, prompt):
        self.target = prompt.target
        return f"{prompt.question} {0 if self.honest else random.random()}"

    async def step(self, response):
        if response == "raise":
            raise ValueError("no such word")
        lines = response.split("\\n")
        reward = None if lines[0] == "?" else 0.5
        return Step(f"{len(lines)} lines", reward, done=lines[-1] == "end", info={"n": 1})

    async def close(self):
        pass
"""


def play(monkeypatch: pytest.MonkeyPatch, responses: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(responses))
    return main(["env", *arguments])


@pytest.fixture
def words(tmp_path: Path) -> str:
    (tmp_path / "words.py").write_text(WORDS)
    return f"environment.name={tmp_path / 'words.py'}:Words"


def test_responses_are_read_from_the_input_and_observations_rewards_and_info_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    assert play(monkeypatch, '?\n"""\none\nend\n"""\nnever read\n', words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "--- prompt 0, seed 0"
    assert shown[2:4] == ['--- user, reward none, info {"n": 1}', "1 lines"]
    assert shown[4:] == ['--- user, reward 0.5, info {"n": 1}', "2 lines", "done: reward 0.5, 2 turns"]


def test_the_input_may_end_first_and_a_held_out_prompt_has_its_own_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    assert play(monkeypatch, "a\n", words, "--held-out", "--prompt", "2") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"--- prompt {HELD_OUT + 2}, seed ")
    assert shown.endswith("end of the input: reward 0.5, not done\n")


def test_an_environment_that_opens_differently_each_time_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    assert play(monkeypatch, "", words, "environment.args={honest: false}") == 0
    assert "a second episode of this prompt opens differently" in capsys.readouterr().out


def test_what_the_environment_raises_is_said_and_costs_the_episode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    assert play(monkeypatch, "raise\n", words) == 1
    assert "error: ValueError: no such word" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no environment"),
        (["environment.name=guesing"], "did you mean guessing"),
        (["environment.name=/no/such.py:Game"], "no such file"),
        (["environment.name=guessing", "--prompt", "-1"], "--prompt is -1"),
        (["environment.name=guessing", "environment.args={hi: 3}"], "unexpected keyword argument 'hi'"),
        (["environment.name=guessing", "--held-out", "--prompt", "999999"], "none with number 999999"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert play(monkeypatch, "", *arguments) == 2
    assert message in capsys.readouterr().err


def test_it_loads_no_torch() -> None:
    code = (
        "import sys, forge_hpc.environments.play; sys.exit(any(m in sys.modules for m in ('torch', 'vllm', 'monarch')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
