"""The one table of endings: its parts agree, and the pages show it as it is."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from runs import PROJECT

from forge_hpc.config import UserError, load_config, print_error
from forge_hpc.run_dir import STATES, TERMINAL_STATES, RunDir
from forge_hpc.slurm.preemption import RETURNS
from forge_hpc.supervisor import lead
from forge_hpc.supervisor.ending import EXITS, FAILURES, RULES, Cause, ControllerExit, Exit, Return
from forge_hpc.supervisor.starts import StartLog

PAGE = (PROJECT / "docs" / "endings.md").read_text(encoding="utf-8")


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without its head."""
    text = page.split(f"\n{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert lines is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def test_every_cause_has_a_rule_and_every_state_of_a_rule_an_exit_code() -> None:
    assert list(RULES) == list(Cause)
    states = {state for rule in RULES.values() for state in (rule.state, rule.state_alone) if state}
    assert states == EXITS.keys() == {*TERMINAL_STATES, "preempted"} and states <= set(STATES)
    for cause, rule in RULES.items():
        ends = rule.state in ("", *TERMINAL_STATES)
        assert ends == (rule.comes_back is Return.NEVER), cause  # what comes back is not over, and the other way round
        assert not (ends and rule.counts), cause


def test_the_page_shows_the_rules_as_they_are() -> None:
    shown = {cause.strip("`"): cells for cause, when, *cells in table(PAGE, "## Causes")}
    expected = {}
    for cause, rule in RULES.items():
        state = f"`{rule.state}`" if rule.state else "the other start's"
        alone = rule.state_left(comes_back=False)
        code = EXITS.get(rule.state, Exit.FAILED)
        counts, same = "yes" if rule.counts else "no", alone == rule.state
        cells = [state, str(int(code)), counts, rule.comes_back.value, "the same" if same else f"`{alone}`"]
        expected[cause.value] = cells
    assert shown == expected


def test_what_happens_when_names_causes_that_exist_all_of_them_and_the_states_that_follow() -> None:
    named = set()
    for what, does, causes, _ in table(PAGE, "## What happens when"):
        found = [Cause(cause) for cause in re.findall(r"`([^`]+)`", causes)]
        named |= set(found)
        said = {word for word in re.findall(r"`(\w+)`", does) if word in STATES}
        if found:
            states = {RULES[cause].state for cause in found} | {RULES[cause].state_alone for cause in found}
            assert said <= states, what
    assert named == set(Cause) - {Cause.COMPLETED}


def test_the_page_names_all_exit_codes() -> None:
    assert [int(code) for code, _ in table(PAGE, "## Exit codes")] == sorted(Exit)
    assert print_error(UserError("x")) == Exit.USAGE
    # the outcome of the controller is read by nodes whose own code follows from it
    assert (ControllerExit.DONE, ControllerExit.FAILED) == (Exit.DONE, Exit.FAILED)
    assert {ControllerExit.STOPPED, ControllerExit.LEFT}.isdisjoint(Exit)


def test_the_page_on_slurm_shows_how_a_preempted_job_comes_back_as_it_is() -> None:
    page = (PROJECT / "docs" / "slurm.md").read_text(encoding="utf-8")
    rows = table(page, "So this is what a run does, as soon as it has saved:")
    words = {
        Return.REQUEUE: "requeues itself",
        Return.SLURM: "leaves, and Slurm starts it again",
        Return.SUCCESSOR: "queues a successor",
    }
    for mode, cells in (("REQUEUE", rows[0]), ("CANCEL", rows[1]), ("", rows[2])):
        assert mode in cells[0]
        for (_, ways), cell in zip(RETURNS, cells[1:], strict=True):
            assert cell.startswith(words[ways[mode]]), (mode, cell)
    releases = [since for since, _ in RETURNS]
    assert all(older < newer for older, newer in pairwise(releases))


@pytest.mark.parametrize("cause", Cause)
def test_what_counts_as_a_failure_is_read_from_the_log_of_starts(cause: Cause, tmp_path: Path) -> None:
    starts = StartLog(RunDir(tmp_path).create())
    starts.begin(job_id="31", restart=0, nodes=1)
    starts.end(state=RULES[cause].state, cause=cause, message="")
    assert f'"cause": "{cause.value}"' in (tmp_path / "starts.jsonl").read_text()
    assert starts.failures_without_progress() == (cause in FAILURES)


def test_causes_of_another_version_count_for_nothing(tmp_path: Path) -> None:
    starts = StartLog(RunDir(tmp_path).create())
    starts.end(state="preempted", cause="of a later version", message="")
    assert starts.failures_without_progress() == 0


@pytest.mark.parametrize(
    ("keys", "measured_s", "expected"),
    [
        (["slurm.time=24:00:00"], 0.0, 300),
        (["slurm.time=24:00:00"], 81.2, 82),
        (["slurm.time=24:00:00"], 4000.0, 4000),
        (["slurm.time=5"], 0.0, 150),
        (["slurm.time=5"], 4000.0, 150),
        (["slurm.time=UNLIMITED"], 0.0, 300),
        (["slurm.time=0"], 4000.0, 4000),  # no limit
        (["slurm.time=24:00:00", "slurm.signal_lead_s=40"], 4000.0, 40),
    ],
)
def test_the_lead_is_the_users_or_the_measured_one_or_the_default_and_at_most_half(
    tmp_path: Path, keys: list[str], measured_s: float, expected: int
) -> None:
    config, run_dir = load_config(None, keys), RunDir(tmp_path / "run")
    if measured_s:
        run_dir.create().write_status(state="running", lead_s=measured_s)
    assert lead.lead_s(config, run_dir) == expected


def test_the_lead_is_measured_from_the_longest_save_and_step_twice() -> None:
    assert lead.measured_lead_s(10.0, 5.04) == 60.1


def test_the_vocabulary_is_light_and_needs_nothing_of_the_house_but_the_configuration() -> None:
    code = "import sys, forge_hpc.supervisor.ending; print(*(n for n in sys.modules if n.startswith('forge_hpc.')))"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=PROJECT, text=True).split()
    assert {name.split(".")[1] for name in loaded} <= {"config", "supervisor"}


def test_no_other_file_has_a_cause_as_text() -> None:
    causes = "|".join(re.escape(cause.value) for cause in Cause)
    pattern = re.compile(rf'cause"?\]?(?:=| ?[!=]= |: )"(?:{causes})"')
    files = [path for room in ("forge_hpc", "launchers") for path in (PROJECT / room).rglob("*.py")]
    assert not [path.name for path in files if pattern.search(path.read_text(encoding="utf-8"))]
