"""Whole runs on this machine: real vLLM, TorchTitan, Monarch and TorchStore, from the door to the export."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from runs import (
    PROJECT,
    REWARD,
    check_contract,
    left_over,
    processes,
    read,
    run_local,
    small_run,
    start_local,
    status,
    unexplained_metrics,
    wait_for,
)
from test_traces import events

from forge_hpc.checkpoint import verify

pytestmark = pytest.mark.timeout(900)
STEPS, TRACED = 30, 2
EXACT = ("step", "reward/mean", "loss", "grad_norm", "policy_version", "tokens/generated")
"""What must not differ by a bit between two synchronous runs of one configuration."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a synchronous run that ended well; one of its steps was traced."""
    directory = tmp_path_factory.mktemp("finished")
    # Not in pytest's directory: there may be 107 bytes in the path of a Unix socket.
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", scratch)
        result = run_local(directory / "run", small_run(directory, STEPS, REWARD, f"profile.steps=[{TRACED}]"))
        assert not list(Path(scratch).iterdir()), "left behind"
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"completed after {STEPS} steps" in result.stdout
    return directory / "run"


def test_a_finished_run_leaves_what_the_run_directory_promises(finished: Path) -> None:
    check_contract(finished, steps=STEPS)
    assert {record["step"] for record in read(finished, "evaluations.jsonl")} == {0, STEPS}


def test_trainer_and_generator_agree_on_the_sampled_tokens(finished: Path) -> None:
    assert all(0 < record["mismatch/logprob_abs_mean"] < 1e-5 for record in read(finished))
    assert all(record["staleness/max"] == 0 for record in read(finished))


def test_a_traced_step_leaves_what_each_process_did_in_it(finished: Path) -> None:
    [directory] = finished.glob("logs/*/profile-step-*")
    assert directory.name == f"profile-step-{TRACED}"
    found = {file.name: events(file) for file in directory.iterdir()}
    assert found.keys() == {"trainer-0.json.gz", "generator-0.json.gz", "controller.json.gz"}
    trainer, generator = ([event["name"] for event in found[f"{role}-0.json.gz"]] for role in ("trainer", "generator"))
    assert trainer.count("Optimizer.step#AdamW.step") == 1 and "MmBackward0" in trainer  # its optimizer step, alone
    assert "vllm::unified_attention_with_output" in generator and "MmBackward0" not in generator
    spans = found["controller.json.gz"]
    assert [span["name"] for span in spans] == ["publish", "save", "save_wait", "train_step"]
    assert all(one["ts"] + one["dur"] <= other["ts"] for one, other in pairwise(spans)) and spans[-1]["dur"] > 0


def test_the_export_loads_in_transformers_and_holds_the_trained_weights(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "export")
    tokenizer = AutoTokenizer.from_pretrained(finished / "export")
    start = AutoModelForCausalLM.from_pretrained(next((finished / "model").iterdir()))
    assert tokenizer("1+2=")["input_ids"]
    change = (model.lm_head.weight - start.lm_head.weight).abs().max()
    assert change > 1e-4


def test_the_model_of_a_checkpoint_is_the_export_to_the_last_bit(finished: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "forge_hpc.cli", "export", str(finished), "--output", str(tmp_path / "model")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'model'}\n"), done.stderr
    assert contents(tmp_path / "model") == contents(finished / "export")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_answers_of_an_evaluation_are_kept_with_their_verdicts(finished: Path) -> None:
    for evaluation in read(finished, "evaluations.jsonl"):
        answers = read(finished, f"evaluations/step-{evaluation['step']:08d}.jsonl")
        assert len({answer["position"] for answer in answers}) == len(answers) == evaluation["num_prompts"] == 20
        assert sum(answer["right"] for answer in answers) == pytest.approx(20 * evaluation["accuracy"])
        assert sum(answer["reward"] for answer in answers) == pytest.approx(20 * evaluation["reward"])
        for answer in answers:
            assert answer["reward"] == answer["rewards"]["length"] == pytest.approx(len(answer["response"]) / 6)
            assert answer["prompt"].endswith("=") and answer["target"].isdigit() and answer["sample"] is None
            assert answer["finish_reason"] in ("stop", "length") and answer["step"] == evaluation["step"]


def check_same(first: Path, second: Path) -> None:
    """Two runs took the same steps to the same weights."""
    one, other = ([[record[key] for key in EXACT] for record in read(run_dir)] for run_dir in (first, second))
    assert one == other
    weights = [(run_dir / "export/model.safetensors").read_bytes() for run_dir in (first, second)]
    assert weights[0] == weights[1]


def test_a_synchronous_run_repeats_exactly(finished: Path, tmp_path: Path) -> None:
    again = run_local(tmp_path / "run", small_run(tmp_path, STEPS))
    assert again.returncode == 0, again.stderr
    check_same(finished, tmp_path / "run")


def test_a_run_learns_the_same_however_often_it_evaluates(finished: Path, tmp_path: Path) -> None:
    options = ["evaluation.interval=1", "evaluation.samples=2", "evaluation.k=[1, 2]", "evaluation.temperature=0.7"]
    result = run_local(tmp_path / "run", small_run(tmp_path, STEPS, REWARD, *options))
    assert result.returncode == 0, result.stderr
    check_same(finished, tmp_path / "run")
    evaluations = read(tmp_path / "run", "evaluations.jsonl")
    assert [record["step"] for record in evaluations] == list(range(STEPS + 1))
    assert len({record["reward_sampled"] for record in evaluations[:5]}) > 1
    answers = read(tmp_path / "run", "evaluations/step-00000003.jsonl")
    assert [answer["sample"] for answer in answers] == [None, 0, 1] * 20
    for seldom in read(finished, "evaluations.jsonl"):
        often = evaluations[seldom["step"]]
        assert (often["accuracy"], often["reward"]) == (seldom["accuracy"], seldom["reward"])


def test_an_export_evaluated_by_itself_is_as_good_as_it_was_at_the_end(finished: Path, tmp_path: Path) -> None:
    options = [*small_run(tmp_path), f"model.path={finished / 'export'}", "evaluation.samples=2", "recipe=eval"]
    result = run_local(tmp_path / "run", options)
    assert result.returncode == 0, result.stderr
    assert "run: completed\n" in result.stdout and "| pass@1 " in result.stdout
    assert not unexplained_metrics(tmp_path / "run")
    [alone], at_the_end = read(tmp_path / "run", "evaluations.jsonl"), read(finished, "evaluations.jsonl")[-1]
    assert alone["num_prompts"] == 20 and alone["step"] == 0
    assert (alone["accuracy"], alone["reward"]) == (at_the_end["accuracy"], pytest.approx(at_the_end["reward"]))
    assert status(tmp_path / "run")["state"] == "completed"
    assert {path.stem for path in (tmp_path / "run/logs/local.0").glob("*.log")} == {
        "controller",
        "generator-0",
        "worker-0",
    }
    again = run_local(tmp_path / "run", options)
    assert again.returncode == 0 and "complete: nothing to do" in again.stdout


def test_a_run_that_was_interrupted_goes_on_as_if_nothing_had_happened(finished: Path, tmp_path: Path) -> None:
    options = small_run(tmp_path, STEPS, REWARD, "checkpoint.export_interval=10", "logging.num_groups_per_step=1")
    run = start_local(tmp_path / "run", options)
    try:
        wait_for(lambda: len(read(tmp_path / "run")) >= 3 or run.poll() is not None, "three steps")
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=120)
    finally:
        run.kill()
    assert status(tmp_path / "run")["state"] == "cancelled"
    assert len(read(tmp_path / "run")) < STEPS
    again = run_local(tmp_path / "run", options)
    assert again.returncode == 0, again.stderr
    assert "resuming after step" in (tmp_path / "run/logs/local.1/controller.log").read_text()
    check_contract(tmp_path / "run", steps=STEPS)
    check_same(finished, tmp_path / "run")
    for step, names in ((10, None), (20, None), (STEPS, contents(finished / "export"))):
        found = contents(tmp_path / f"run/exports/step-{step:08d}")
        assert found == names if names else "model.safetensors" in found
    rollouts = read(tmp_path / "run", "rollouts.jsonl")
    for step in range(1, STEPS + 1):
        whole = [r for r in rollouts if r["step"] == step and r["position"] == 16 * (step - 1)]
        assert [r["sample"] for r in whole] == list(range(len(whole))) and len(whole) > 1
        assert sum(r["advantage"] for r in whole) == pytest.approx(0, abs=1e-4)


def test_a_completed_directory_is_not_run_again(finished: Path, tmp_path: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    result = run_local(finished, small_run(finished.parent, STEPS))
    assert result.returncode == 0, result.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_directory_of_another_configuration_is_refused(finished: Path) -> None:
    result = run_local(finished, [*small_run(finished.parent, STEPS), "trainer.optimizer.lr=5e-4"])
    assert result.returncode == 2
    assert "trainer.optimizer.lr" in result.stderr and "Traceback" not in result.stderr


BAD_REWARD = """
def length(prompt, response, target, **fields):
    if len(response) == 1:
        raise ValueError("too short for me")
    if len(response) == 2:
        return float("nan")
    return len(response) / 6
"""


def test_an_asynchronous_run_on_several_processes_keeps_the_staleness_bound(tmp_path: Path) -> None:
    """Two trainer ranks, two generators, a reference for the KL, and a reward that fails for some completions."""
    result = run_local(
        tmp_path / "run",
        small_run(
            tmp_path,
            6,
            BAD_REWARD,
            "rollout.max_staleness=2",
            "rollout.window=2",
            "trainer.processes_per_node=2",
            "generator.replicas=2",
            "reference.enable=true",
            "algorithm.kl_coef=0.1",
        ),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    check_contract(tmp_path / "run", steps=6)
    metrics = read(tmp_path / "run")
    assert 0 < max(record["staleness/max"] for record in metrics) <= 2
    assert all(record["episodes/stale"] == 0 for record in metrics)
    assert all(record["kl/mean"] >= 0 for record in metrics) and metrics[-1]["kl/mean"] > 1e-6
    assert sum(record["episodes/failed"] for record in metrics) > 0


NO_SIGNAL = """
def length(prompt, response, target, **fields):
    return 1.0
"""


def test_a_run_without_a_learning_signal_says_so_and_fails(tmp_path: Path) -> None:
    result = run_local(tmp_path / "run", small_run(tmp_path, 50, NO_SIGNAL, "algorithm.max_steps_without_signal=3"))
    assert result.returncode == 1
    assert "no learning signal" in result.stderr.splitlines()[-1]
    assert status(tmp_path / "run")["state"] == "failed"


def test_ctrl_c_saves_says_how_to_go_on_and_ends_everything(tmp_path: Path) -> None:
    run = start_local(tmp_path / "run", small_run(tmp_path, 2000))
    try:
        wait_for(lambda: len(read(tmp_path / "run")) >= 2 or run.poll() is not None, "two steps")
        run.send_signal(signal.SIGINT)
        assert not left_over(tmp_path / "run", within_s=60)
        _, errors = run.communicate(timeout=20)
    finally:
        run.kill()
    assert run.returncode == 130
    found = status(tmp_path / "run")
    assert found["state"] == "cancelled" and len(read(tmp_path / "run")) == found["step"]
    assert verify(tmp_path / f"run/checkpoints/step-{found['step']:08d}") is None
    assert "Ctrl-C again ends at once" in errors and f"after step {found['step']}, which is saved" in errors
    assert f"forge-hpc resume {tmp_path / 'run'}" in errors and "forge-hpc export" in errors


def test_a_killed_supervisor_takes_its_processes_with_it(tmp_path: Path) -> None:
    run = start_local(tmp_path / "run", small_run(tmp_path, 2000))
    try:
        wait_for(lambda: len(read(tmp_path / "run")) >= 1 or run.poll() is not None, "one step")
        [controller] = processes(tmp_path / "run", "forge_hpc.controller")
        controller.parent().kill()
        assert not left_over(tmp_path / "run", within_s=15)
        run.communicate(timeout=10)
    finally:
        run.kill()
    assert run.returncode != 0
