"""Runs that are stopped, and whose processes are killed: they go on as if nothing had happened.

The same on a real Slurm cluster, with preemption, walltime, dead nodes and full disks, is `make chaos`; what of it
every change must show is in test_slurm_runs.py.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import REWARD, check_contract, processes, read, run_local, small_run, start_local, status, wait_for
from test_end_to_end import check_same

from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.starts import StartLog

pytestmark = pytest.mark.timeout(1800)
STEPS = 40
PATIENT = "algorithm.max_steps_without_signal=1000"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a synchronous run that nobody disturbed."""
    directory = tmp_path_factory.mktemp("undisturbed")
    result = run_local(directory / "run", small_run(directory, STEPS, REWARD, PATIENT))
    assert result.returncode == 0, result.stderr
    return directory / "run"


def reach(run: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Wait until a run has done so many steps, or has ended; then a moment, somewhere in the next step."""
    wait_for(lambda: len(read(run_dir)) >= step or run.poll() is not None, f"step {step}")
    time.sleep(random.Random(step).random() * 0.4)


def recovered(run_dir: Path, kind: str) -> float:
    """How many losses of a kind had been mended by the last step."""
    return max((record[f"recoveries/{kind}"] for record in read(run_dir)[-1:]), default=0.0)


def ends(run_dir: Path) -> list[dict[str, object]]:
    return [record for record in StartLog(RunDir(run_dir)).read() if record["event"] == "end"]


def test_preempted_and_killed_a_synchronous_run_takes_the_same_steps_to_the_last_bit(
    undisturbed: Path, tmp_path: Path
) -> None:
    """Also where its trainers and generators take turns on the same hardware, for some of its starts."""
    run_dir, in_turns = tmp_path / "run", "cluster.colocate=true"
    overrides = small_run(tmp_path, STEPS, REWARD, PATIENT, "checkpoint.interval=1")
    (tmp_path / "reward.py").write_text((undisturbed.parent / "reward.py").read_text())
    starts: list[tuple[int, list[str], bool]] = [(3, [], True), (7, ["generator-0"], False), (12, ["trainer-0"], False)]
    starts.append((18, ["generator-0", "trainer-0"], True))
    for start, (step, roles, takes_turns) in enumerate(starts):
        run = start_local(run_dir, [*overrides, in_turns] if takes_turns else overrides)
        try:
            reach(run, run_dir, step)
            for role in roles:  # it goes on by itself, and is preempted later
                victim, *_ = processes(run_dir, f"{role}.log")
                victim.kill()
                done = len(read(run_dir))
                wait_for(lambda: len(read(run_dir)) > done + 1 or run.poll() is not None, "recovery")  # noqa: B023
            run.send_signal(signal.SIGTERM)
            run.communicate(timeout=120)
        finally:
            run.kill()
        assert run.returncode == 75, status(run_dir)
        state = status(run_dir)
        assert state["state"] == "preempted"
        assert (run_dir / f"checkpoints/step-{state['step']:08d}").is_dir(), "the last step is saved"
        assert len(ends(run_dir)) == start + 1
    result = run_local(run_dir, overrides)
    assert result.returncode == 0, result.stderr
    check_contract(run_dir, steps=STEPS)
    records = read(run_dir)
    assert records[-1]["recoveries/generators"] == 2 and records[-1]["recoveries/trainers"] == 2
    assert ["time/sleep_s" in records[step - 1] for step in (1, 8, 19, STEPS)] == [True, False, True, False]
    assert {record["step"] for record in read(run_dir, "evaluations.jsonl")} == {0, STEPS}
    check_same(undisturbed, run_dir)


def test_an_asynchronous_run_skips_and_repeats_no_prompt(tmp_path: Path) -> None:
    """It loses one of its two trainer ranks, whose peer then stands in a collective, and mends that by itself; then it
    is preempted, loses its controller, and a generator while it leaves."""
    run_dir, steps, prompts = tmp_path / "run", 20, 16
    overrides = small_run(
        tmp_path,
        steps,
        REWARD,
        "rollout.max_staleness=2",
        "trainer.processes_per_node=2",
        "generator.replicas=2",
        "checkpoint.interval=1",
        f"logging.num_rollouts_per_step={prompts}",
        PATIENT,
    )
    for step, word in [(3, "trainer-1.log"), (8, "forge_hpc.controller"), (13, "generator-1.log")]:
        run = start_local(run_dir, overrides)
        try:
            reach(run, run_dir, step)
            victim, *_ = processes(run_dir, word)
            victim.kill()
            if word == "trainer-1.log":
                wait_for(lambda: recovered(run_dir, "trainers") or run.poll() is not None, "new trainers")  # noqa: B023
            if word != "forge_hpc.controller":
                run.send_signal(signal.SIGTERM)
            run.communicate(timeout=120)
        finally:
            run.kill()
        if word == "forge_hpc.controller":
            assert status(run_dir)["state"] == "failed" and "SIGKILL" in status(run_dir)["message"]
        else:
            assert run.returncode == 75, status(run_dir)
    result = run_local(run_dir, overrides)
    assert result.returncode == 0, result.stderr
    check_contract(run_dir, steps=steps)
    metrics, rollouts = read(run_dir), read(run_dir, "rollouts.jsonl")
    for step in range(1, steps + 1):
        positions = [record["position"] for record in rollouts if record["step"] == step]
        assert positions == list(range((step - 1) * prompts, step * prompts)), step
    assert recovered(run_dir, "trainers") == 1
    assert max(record["staleness/max"] for record in metrics) <= 2
    assert all(record["episodes/stale"] == 0 and record["episodes/failed"] == 0 for record in metrics)


# Half of the groups have nothing to compare. Special tokens, with the longest texts, would soon be all that is sampled.
HALF = """
import re

def length(prompt, response, target, **fields):
    return len(re.sub("<[a-z]+>", "", response)) / 6 if int(target) % 2 else 0.0
"""


@pytest.mark.parametrize("max_staleness", [pytest.param(0, marks=pytest.mark.training), 2])
def test_with_dynamic_sampling_every_step_is_full_and_no_prompt_is_lost_or_repeated(
    max_staleness: int, tmp_path: Path
) -> None:
    steps, prompts = 12, 16
    options = ["algorithm.dynamic_sampling=true", f"rollout.max_staleness={max_staleness}", "checkpoint.interval=1"]
    options += ["logging.num_rollouts_per_step=500", "generator.replicas=2"]
    run_dir = tmp_path / "run"
    overrides = small_run(tmp_path, steps, HALF, *options)
    run = start_local(run_dir, overrides)
    try:
        reach(run, run_dir, 5)
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 75, status(run_dir)
    result = run_local(run_dir, overrides)
    assert result.returncode == 0, result.stderr
    check_contract(run_dir, steps=steps)
    metrics, rollouts = read(run_dir), read(run_dir, "rollouts.jsonl")
    assert all(record["groups/drawn"] - record["groups/zero_signal"] == prompts for record in metrics)
    assert all(record["staleness/max"] <= max_staleness for record in metrics)
    positions = [record["position"] for record in rollouts]
    assert positions == list(range(sum(int(record["groups/drawn"]) for record in metrics)))
    if max_staleness == 0:
        again = run_local(tmp_path / "undisturbed", overrides)
        assert again.returncode == 0, again.stderr
        check_same(tmp_path / "undisturbed", run_dir)


def test_a_stuck_generator_is_replaced(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = small_run(tmp_path, 10, REWARD, PATIENT, "generator.timeout_s=15")
    run = start_local(run_dir, overrides)
    try:
        reach(run, run_dir, 3)
        victim, *_ = processes(run_dir, "generator-0.log")
        victim.send_signal(signal.SIGSTOP)
        _, err = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 0, err
    assert read(run_dir)[-1]["recoveries/generators"] == 1
    check_contract(run_dir, steps=10)


def start_log(tmp_path: Path, *records: tuple[str, int]) -> StartLog:
    """Starts that ended by so many causes, each at a checkpoint."""
    run_dir = RunDir(tmp_path).create()
    log = StartLog(run_dir)
    for cause, step in records:
        run_dir.checkpoint(step).mkdir(parents=True, exist_ok=True)
        log.begin(job_id="1", restart=0, nodes=1)
        log.end(state="preempted", cause=cause, message="")
    return log


def test_failures_count_until_there_is_progress_and_preemptions_do_not(tmp_path: Path) -> None:
    crash, taken = "crash", "preempted"
    assert start_log(tmp_path / "a", (crash, 1), (crash, 1)).failures_without_progress() == 2
    assert start_log(tmp_path / "b", (crash, 1), (crash, 2)).failures_without_progress() == 1
    assert start_log(tmp_path / "c", *[(taken, 3)] * 50).failures_without_progress() == 0
    assert start_log(tmp_path / "d", (crash, 3), (taken, 3), (crash, 3)).failures_without_progress() == 2
    with (tmp_path / "d/starts.jsonl").open("a") as file:
        file.write('{"event": "end", "sta')  # killed while it wrote
    log = start_log(tmp_path / "d", (crash, 3))
    assert log.failures_without_progress() == 3
    assert all(json.dumps(record) for record in log.read())
