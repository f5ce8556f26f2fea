"""What a start of a run takes over from the checkpoint of another, and what it does meanwhile."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import PROJECT, REWARD, left_over, read, small_run, start_local, status, wait_for

from forge_hpc.checkpoint import CheckpointStore, describe, verify
from forge_hpc.config import Config, UserError, load_config, read_config, save_config, validate
from forge_hpc.controller.recovery import Leave, Recoveries
from forge_hpc.controller.saving import CONFIG
from forge_hpc.controller.session import Session
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.starts import StartLog

DEADLINE_S = 60


class NoTrainers:
    """Trainers that have nothing to save."""

    async def save(self, directory: Path) -> None: ...

    async def saved(self) -> dict[str, Any]:
        return {}


def configuration(*overrides: str) -> Config:
    return load_config(None, ["model.path=builtin:qwen3-tiny", "recipe=sft", "trainer.training.steps=10", *overrides])


def make_session(run_dir: RunDir, config: Config, pool: Any = None) -> Session:
    """A start of the run, without actors. Within an event loop."""
    return Session(config, run_dir, run_dir.path, SimpleNamespace(), pool, Recoveries(1), Leave())


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run").create()
    run_dir.write_status(state="running")
    return run_dir


def saved(run_dir: RunDir, config: Config, step: int) -> None:
    """A start that ends with a checkpoint."""

    async def start() -> None:
        session = make_session(run_dir, config)
        session._trainers = NoTrainers()  # type: ignore[assignment]
        session.step = step
        await session._saver.save(session.trainers, step, {})
        assert await session.save_to_leave()
        session._status.flush(DEADLINE_S)  # its thread writes no more when the next start looks

    asyncio.run(start())


def prepared(run_dir: RunDir, config: Config) -> Session:
    """The next start, before it has any actor."""

    async def start() -> Session:
        session = make_session(run_dir, config)
        await session.prepare()
        return session

    return asyncio.run(start())


def changes(run_dir: RunDir) -> list[list[str]]:
    return [record["changes"] for record in StartLog(run_dir).read() if record["event"] == "changed"]


def test_a_configuration_that_was_edited_by_hand_is_compared_with_the_checkpoints(run_dir: RunDir) -> None:
    saved(run_dir, configuration(), 5)
    assert prepared(run_dir, configuration()).step == 5
    with pytest.raises(
        UserError, match=r"is not the configuration of step-00000005: seed \(42 there, 7 now\)"
    ) as refused:
        prepared(run_dir, configuration("seed=7"))
    assert refused.value.hint and str(run_dir.checkpoint(5) / CONFIG) in refused.value.hint
    with pytest.raises(UserError, match="the run has done 5 steps already"):
        prepared(run_dir, configuration("trainer.training.steps=4"))
    assert changes(run_dir) == []
    assert read_config(run_dir.checkpoint(5) / CONFIG) == configuration()


def test_safe_changes_are_recorded_once_whoever_made_them(run_dir: RunDir) -> None:
    saved(run_dir, configuration(), 5)
    more = ("trainer.training.steps=20", "cluster.nodes=3")  # nodes are the allocation's
    for _ in range(2):
        assert prepared(run_dir, configuration(*more)).step == 5
    assert changes(run_dir) == [["trainer.training.steps: 10 -> 20"]]
    StartLog(run_dir).changed(["trainer.training.steps: 20 -> 30"])  # as submit does
    prepared(run_dir, configuration("trainer.training.steps=30", "checkpoint.keep=4"))
    assert changes(run_dir)[2:] == [["checkpoint.keep: 2 -> 4"]]


def test_a_checkpoint_without_a_configuration_and_one_that_cannot_be_read_are_accepted(run_dir: RunDir) -> None:
    store = CheckpointStore(run_dir, keep=2)
    for step, extra in [(1, {}), (2, {CONFIG: b"a_key_of_former_times: 1\n"})]:
        store.begin(step)
        store.commit(step, {"step": step, "recipe": {}}, extra=extra)
        assert prepared(run_dir, configuration("seed=7")).step == step


def test_generators_start_while_a_checkpoint_is_verified(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(run_dir, configuration("recipe=grpo"), 5)
    started, newest = threading.Event(), CheckpointStore.newest

    def verify_slowly(store: CheckpointStore) -> Any:
        assert started.wait(DEADLINE_S), "nothing was started meanwhile"
        return newest(store)

    class Pool:
        def begin(self, model_dir: Path) -> None:
            started.set()

    async def start() -> None:
        session = make_session(run_dir, configuration("recipe=grpo"), Pool())
        await session.prepare()
        assert session.step == 5

    monkeypatch.setattr(CheckpointStore, "newest", verify_slowly)
    asyncio.run(start())


@pytest.mark.parametrize("recipe", ["grpo", "sft"])
def test_data_that_takes_long_to_load_does_not_stop_the_event_loop(
    recipe: str, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the heartbeat stops, and nobody hears that the run is to leave."""
    beat = threading.Event()

    def open_slowly(config: Config) -> None:
        assert beat.wait(DEADLINE_S), "the event loop stood still"
        raise UserError("no such data")

    async def start() -> None:
        session = make_session(run_dir, configuration(f"recipe={recipe}"))
        session.tokenizer = None
        work = asyncio.create_task(session.recipe.run(session))
        await asyncio.sleep(0)
        beat.set()
        with pytest.raises(UserError, match="no such data"):
            await work

    monkeypatch.setattr("forge_hpc.controller.session.open_sources", open_slowly)
    asyncio.run(start())


def test_the_checkpoint_that_is_best_by_a_figure_of_the_evaluations_is_saved_and_kept(run_dir: RunDir) -> None:
    async def start() -> None:
        options = ("checkpoint.best=accuracy", "evaluation.interval=1", "evaluation.num_prompts=4", "checkpoint.keep=1")
        session = make_session(run_dir, configuration(*options))
        session._trainers = NoTrainers()  # type: ignore[assignment]
        for step, accuracy in [(0, 0.9), (1, 0.5), (2, 0.75), (3, 0.75), (4, 0.25)]:
            session.step = step
            await session._keep_best(step, {"accuracy": accuracy, "num_prompts": 4})
        session.step = 5
        assert await session.save_to_leave()
        with session.open_records(told):
            await session._keep_best(5, {"loss": 1.0, "num_documents": 4})  # of one whose answers nobody could grade
        store = CheckpointStore(run_dir, keep=1)
        assert store.best() == {"step": 2, "figure": "accuracy", "value": 0.75}
        assert store.steps() == [2, 5]
        # an evaluation that was written, and a start that ended before its checkpoint was marked
        with session.open_records(told):
            session.metrics.log_evaluation(5, {"accuracy": 0.8})
            assert await session.evaluate(5) == {}
        assert store.best() == {"step": 5, "figure": "accuracy", "value": 0.8}
        # another figure than before: nothing is the best yet
        session.config.checkpoint.best = "loss"
        with pytest.raises(UserError, match="'loss', and an evaluation has no such figure") as refused:
            await session._keep_best(5, {"accuracy": 1.0, "num_documents": 4})
        assert refused.value.hint == "it has accuracy"
        await session._keep_best(5, {"loss": 1.0})
        assert store.best() == {"step": 5, "figure": "loss", "value": 1.0}

    told = io.StringIO()
    asyncio.run(start())
    assert "the evaluation of step 5 has no accuracy, which checkpoint.best goes by" in told.getvalue()
    with pytest.raises(UserError, match=r"checkpoint\.best=accuracy compares evaluations"):
        validate(configuration("checkpoint.best=accuracy"))


WANDB = """
import pathlib, threading, types

class errors:
    class UsageError(Exception): ...

class Settings:
    def __init__(self, **options): ...

def init(*, id, dir, **options):
    file = pathlib.Path(dir) / "sent"
    is_first = not file.exists()
    def log(values, step):
        with file.open("a") as lines:
            lines.write(f"{id} {step}\\n")
    def finish():
        if is_first:
            threading.Event().wait()
    return types.SimpleNamespace(log=log, finish=finish)
"""


def requeued(run_dir: Path) -> subprocess.CompletedProcess[str]:
    """A start as Slurm makes it: of what is in the run directory, without submit."""
    command = [sys.executable, "-m", "forge_hpc.run", "--run-dir", str(run_dir)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    result = subprocess.run(command, cwd=run_dir.parent, env=env, text=True, capture_output=True, timeout=400)
    assert not left_over(run_dir)
    return result


def rewrite_state(checkpoint: Path, **counts: int) -> None:
    """Let a checkpoint say that more has gone wrong before it."""
    file, manifest = checkpoint / "controller.json", checkpoint / "manifest.json"
    state = json.loads(file.read_text())
    state["failed_saves"] = counts["failed_saves"]
    assert state["recipe"]["stale_episodes"] == 0 and state["recipe"]["steps_without_signal"] >= 0
    state["recipe"]["stale_episodes"] = counts["stale_episodes"]
    file.write_text(json.dumps(state))
    files = json.loads(manifest.read_text())
    files["files"][file.name] = describe(file)
    manifest.write_text(json.dumps(files))
    assert verify(checkpoint) is None


@pytest.mark.timeout(900)
def test_a_preempted_run_saves_though_wandb_hangs_and_goes_on_with_its_counts_and_its_own_configuration_only(
    tmp_path: Path,
) -> None:
    steps, run_dir = 20, tmp_path / "run"
    (tmp_path / "wandb.py").write_text(WANDB)
    options = ["logging.wandb=true", "checkpoint.interval=1000", "evaluation.num_prompts=0"]
    run = start_local(run_dir, small_run(tmp_path, steps, REWARD, *options))
    try:
        wait_for(lambda: read(run_dir) or run.poll() is not None, "a step")
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=120)
    finally:
        run.kill()
    state = status(run_dir)
    assert (run.returncode, state["state"]) == (75, "preempted"), err
    assert f"hint: forge-hpc resume {run_dir} goes on after step {state['step']}\n" in err
    checkpoint = RunDir(run_dir).checkpoint(state["step"])
    assert verify(checkpoint) is None, "the last step is saved"
    assert 1 <= state["step"] < steps

    config = read_config(run_dir / "config.yaml")
    config.seed = 7
    save_config(config, run_dir / "config.yaml")
    refused = requeued(run_dir)
    assert refused.returncode not in (0, 75)
    assert status(run_dir)["state"] == "failed" and "seed (42 there, 7 now)" in status(run_dir)["message"]
    assert "Traceback" not in refused.stderr

    (run_dir / "config.yaml").write_bytes((checkpoint / CONFIG).read_bytes())
    rewrite_state(checkpoint, failed_saves=2, stale_episodes=5)
    result = requeued(run_dir)
    assert result.returncode == 0, result.stderr
    records = read(run_dir)
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    after = [record for record in records if record["step"] > state["step"]]
    assert {(record["checkpoint/failed"], record["episodes/stale"]) for record in after} == {(2, 5)}
    sent = [line.split() for line in (run_dir / "sent").read_text().splitlines()]
    assert len({id for id, _ in sent}) == 1
    assert [int(step) for _, step in sent] == list(range(1, steps + 1))
