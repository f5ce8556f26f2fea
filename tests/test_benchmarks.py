"""The table of `make bench`: what scripts hand over, what is met, and what a script that fails leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from runs import PROJECT

sys.path.append(str(PROJECT / "benchmarks"))
import bench
import gpu_check
import rows
from rows import Row, Script


def script(directory: Path, name: str, text: str) -> Script:
    (directory / "benchmarks").mkdir(exist_ok=True)
    (directory / "benchmarks" / name).write_text(text)
    return Script(name)


def test_a_table_has_the_rows_of_all_scripts_and_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "PROJECT", tmp_path)
    place = (
        f"import sys; sys.path.append({str(PROJECT / 'benchmarks')!r})\nfrom rows import row\nprint('other output')\n"
    )
    scripts = [
        script(tmp_path, "good.py", place + "row('speed', 98.0, 100.0, target=0.97, unit='tokens/s', peer='theirs')"),
        script(tmp_path, "bad.py", place + "row('share', 0.2, target=0.01, better='less')\nsys.exit(3)"),
        script(tmp_path, "raises.py", place + "row('rate', 2.0, target=1.0)\nraise RuntimeError('no more')"),
        script(tmp_path, "promise.py", place + "row('part', 0.2, target=0.1, better='less')\nsys.exit(4)"),
        Script("gone.py"),
        Script("good.py", limit_s=0.0),
    ]
    assert rows.run(scripts, 60, tmp_path / "out.json", about={"cores": 2}) == 1
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["cores"] == 2
    speed, share, bad, good, raised, part, gone, late = written["rows"]
    assert (speed["ratio"], speed["met"]) == (0.98, True)
    assert (share["ratio"], share["met"]) == (None, False)
    assert (good["met"], part["met"]) == (True, False)
    notes = [each["note"] for each in (bad, raised, gone, late)]
    assert notes == ["exit code 3", "exit code 1", "is not here", "no time was left"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].split() == ["speed", "98", "tokens/s", "100", "theirs", "0.98", "≥", "0.97", "met"]
    assert "MISSED" in shown[3]


@pytest.mark.parametrize(
    "text, code",
    [
        ("row('speed', 2.0, target=1.0)", 0),
        ("row('speed', 0.5, target=1.0)", 1),
        ("row('speed', 0.5, target=1.0, known='the wire bounds it')", 0),
        ("row('speed', 0.5, target=1.0, known='the wire bounds it')\nraise SystemExit('it has not come back')", 1),
        ("row('speed', 2.0, target=1.0)\nraise SystemExit('it has not come back')", 1),
        ("row('speed', 2.0, target=1.0)\nraise SystemExit(4)", 1),
        ("row('speed', 0.5, target=1.0, known='the wire bounds it')\nraise SystemExit(4)", 0),
        ("row('speed', None, target=1.0)", 1),
    ],
)
def test_what_is_missed_for_a_known_reason_is_no_failure_and_what_ends_early_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, code: int
) -> None:
    monkeypatch.setattr(rows, "PROJECT", tmp_path)
    place = f"import sys; sys.path.append({str(PROJECT / 'benchmarks')!r})\nfrom rows import row\n"
    assert rows.run([script(tmp_path, "one.py", place + text)], 60, tmp_path / "out.json", about={}) == code
    assert ("missed, as is known: the wire bounds it" in capsys.readouterr().out) == ("known" in text)


def test_a_script_that_takes_too_long_is_ended_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "PROJECT", tmp_path)
    row = rows.MARK + json.dumps({"what": "one", "ours": 1.0})
    script(tmp_path, "slow.py", f"import time; print({row!r}, flush=True); time.sleep(600)")
    one, note = rows._rows_of(Script("slow.py", limit_s=3.0), 3.0)
    assert one == Row("one", 1.0) and note.note == "took longer than 3 s"


@pytest.mark.parametrize("num_gpus", [0, 1, 2, 4, 8])
def test_every_script_of_the_tables_is_there_and_every_part_has_one(num_gpus: int) -> None:
    parts = gpu_check.parts(num_gpus)
    several = {"long", "experts", "together", "together-faults", "peer-async"}
    left_out = {0: {"peer", "peer-async"}, 1: several}.get(num_gpus, set())
    assert list(parts) == [part for part in gpu_check.PARTS if part not in left_out] and all(parts.values())
    named = [each.file for each in (*bench.SCRIPTS, *(one for part in parts.values() for one in part))]
    assert all((PROJECT / "benchmarks" / file).exists() for file in named)


@pytest.mark.parametrize(("num_gpus", "most"), [(2, "2"), (3, "2"), (4, "4"), (8, "8"), (16, "8")])
def test_what_goes_over_several_gpus_goes_over_as_many_as_there_are(num_gpus: int, most: str) -> None:
    parts = gpu_check.parts(num_gpus)
    assert [parts[part][0].arguments[-1] for part in ("ranks", "experts")] == [most, most]
