"""Whole runs whose rewards misbehave, or run programs that do."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

import pytest
from runs import check_contract, read, run_local, small_run
from sandboxes import needs_bubblewrap, nothing_is_left

from forge_hpc.rewards import RewardError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 5

BAD_REWARD = """
import os, signal, time, zlib
from pathlib import Path

KINDS = ("timeout", "raised", "not_finite", "died")

def length(prompt, response, target, *, share, **fields):
    number = zlib.crc32(f"{prompt}|{response}".encode()) % 10_000 / (10_000 * share) if share else 1
    if number < 1:
        kind = KINDS[int(4 * number)]
        with Path(__file__).with_name("book").open("a") as file:
            print(kind, file=file)
        match kind:
            case "timeout": time.sleep(3600)
            case "raised": raise KeyError("nothing there")
            case "not_finite": return float("nan")
            case "died": os.kill(os.getpid(), signal.SIGKILL)
    return len(response) / 6
"""


def test_a_run_goes_on_with_rewards_that_hang_raise_give_nan_and_die(tmp_path: Path) -> None:
    """For some six of a hundred completions. How much slower the steps are is printed, not judged."""
    seconds = {}
    for name, share in (("good", 0.0), ("bad", 0.06)):
        directory = tmp_path / name
        directory.mkdir()
        reward = f"reward=[{{name: {directory}/reward.py:length, args: {{share: {share}}}}}]"
        options = small_run(directory, STEPS, BAD_REWARD, reward, "evaluation.num_prompts=0")
        result = run_local(directory / "run", options)
        assert result.returncode == 0, result.stdout + result.stderr
        check_contract(directory / "run", STEPS)
        seconds[name] = statistics.median(record["time/step_s"] for record in read(directory / "run"))
    metrics = read(tmp_path / "bad/run")
    failed = {kind: sum(record[f"rewards/failed_{kind}"] for record in metrics) for kind in RewardError.KINDS}
    done = Counter((tmp_path / "bad/book").read_text().split())
    assert failed["timeout"] >= done.pop("timeout")  # on a busy machine a quick call may be late too
    assert {kind: num for kind, num in failed.items() if num and kind != "timeout"} == done
    assert len([kind for kind, num in failed.items() if num]) == 4
    assert sum(record["episodes/failed"] for record in metrics) == sum(failed.values())
    assert not (tmp_path / "good/book").exists()
    log = (tmp_path / "bad/run/logs/local.0/controller.log").read_text()
    assert all(log.count(f"(rewards/failed_{kind})") == 1 for kind in ("timeout", "raised", "not_finite", "died"))
    print(f"failed: {failed}; median step: {seconds['bad']:.2f} s, without bad rewards {seconds['good']:.2f} s")


def test_a_run_trains_to_its_end_beside_hostile_programs(tmp_path: Path) -> None:
    needs_bubblewrap()
    reward = Path(__file__).with_name("hostile_reward.py")
    book = tmp_path / "book"
    options = [item for item in small_run(tmp_path, STEPS) if not item.startswith("reward=")]
    result = run_local(tmp_path / "run", [*options, f"reward=[{{name: {reward}:Hostile, args: {{book: {book}}}}}]"])
    assert result.returncode == 0, result.stdout + result.stderr
    check_contract(tmp_path / "run", STEPS)
    assert sum(record["episodes/failed"] for record in read(tmp_path / "run")) == 0
    ends = Counter(line.split(" ", 1)[1] for line in book.read_text().splitlines())
    assert ends.total() >= 10 and len(ends) >= 2, ends
    assert nothing_is_left()
    print(f"{ends.total()} hostile programs: {dict(ends)}")
