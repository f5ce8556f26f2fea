"""Recipes of one's own that raise what means something else, or leave something undone: the run says so at once."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import PROJECT, read, run_local, status

from forge_hpc.actors.errors import ForeignError
from forge_hpc.checkpoint.store import steps_in
from forge_hpc.config import Config, UserError
from forge_hpc.controller.recipe_run import run_recipe
from forge_hpc.controller.service import ActorLost, is_loss
from forge_hpc.controller.session import Session

OWN = """
import asyncio
from dataclasses import dataclass

from forge_hpc.recipes import ModelNeed, Needs, Recipe


@dataclass
class Options:
    slip: str = ""


class Own(Recipe):
    Args = Options

    def needs(self, config):
        return Needs({"policy": ModelNeed(loss="sft")}, "none", "examples", rewards=False, environments=False)

    async def run(self, session):
        documents = await session.documents()
        await session.start()
        slip = self.args.slip
        for step in session.remaining_steps():
            metrics = await session.train_step(step, documents.take(16))
            if slip == "not ended":
                return
            if slip == "text":
                metrics["note"] = "well"
            if slip == "slow" and step == 2:
                async with asyncio.timeout(0.01):
                    await asyncio.sleep(60)
            if slip == "exits" and step == 2:
                raise SystemExit("enough of it")
            state = documents.state_dict() if slip == "place" else {"documents": documents.state_dict()}
            if slip == "skips" and step == 1:
                continue
            if slip == "not json" and step == 3:
                state["x"] = object()
            await session.end_step(step + (slip == "counts"), metrics, state)
        if slip != "not finished":
            await session.finish()
"""


def own_run(tmp_path: Path, slip: str) -> tuple[int, str, Path]:
    (tmp_path / "own.py").write_text(OWN)
    options = [f"recipe={tmp_path / 'own.py'}:Own", f"recipe_args.slip={slip!r}", "model.path=builtin:qwen3-tiny"]
    options += ["trainer.training.steps=3", "trainer.lr_scheduler.warmup_steps=0", "checkpoint.interval=0"]
    options += ["evaluation.num_prompts=0"]
    run_dir = tmp_path / "run"
    done = run_local(run_dir, options, config=PROJECT / "configs/sft/demo.yaml")
    return done.returncode, done.stdout + done.stderr, run_dir


@pytest.mark.training
@pytest.mark.parametrize(
    ("slip", "said", "steps", "saved"),
    [
        ("not ended", "error: the recipe has trained step 1, and returned without ending it", 0, []),
        ("not finished", "error: the recipe has returned after step 3 without finishing the run", 3, [3]),
        ("counts", "error: the recipe ends step 2 after step 0", 0, []),
        ("skips", "error: the recipe trains step 2 after step 0", 0, []),
        ("text", "error: the figure 'note' of step 1 is 'well', which is no number", 0, []),
        ("slow", "error: TimeoutError (", 1, []),
        ("exits", "error: SystemExit: enough of it (", 1, []),
    ],
)
def test_a_run_whose_recipe_slips_fails_at_once_and_says_where(
    tmp_path: Path, slip: str, said: str, steps: int, saved: list[int]
) -> None:
    code, err, run_dir = own_run(tmp_path, slip)
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and line.startswith(said), err
    assert said[-1] != "(" or line[len(said) :].startswith(f"{tmp_path / 'own.py'}:"), line
    assert len(read(run_dir)) == steps and steps_in(run_dir.joinpath("checkpoints")) == saved
    assert status(run_dir)["state"] == "failed"
    [log] = run_dir.glob("logs/*/controller.log")
    assert "recovering" not in log.read_text()


@pytest.mark.training
def test_a_resumed_recipe_that_has_kept_no_place_in_the_data_does_not_begin_them_again(tmp_path: Path) -> None:
    code, err, run_dir = own_run(tmp_path, "place")
    assert code == 0, err
    command = [sys.executable, "-m", "forge_hpc.cli", "resume", str(run_dir), "trainer.training.steps=5"]
    environ = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    said = "error: the recipe's state after step 3 does not say where the data go on: it has no 'documents'"
    assert done.returncode == 1 and said in done.stderr, done.stderr


@pytest.mark.training
def test_a_last_state_that_cannot_be_saved_leaves_the_model_and_says_why(tmp_path: Path) -> None:
    code, err, run_dir = own_run(tmp_path, "not json")
    why = "Object of type object is not JSON serializable"
    assert f"warning: the checkpoint of step 3 failed, there is none before it: {why}" in err
    where = f"the state after step 3 cannot be saved in {run_dir / 'checkpoints'}: {why}; its model is in"
    assert code == 1 and f"error: RuntimeError: {where} {run_dir / 'export'}" in err
    assert (run_dir / "export/model.safetensors").exists()


class Raises:
    """Recipes of this file."""

    def __init__(self, error: BaseException, ours: bool = False) -> None:
        self.error, self.ours = error, ours

    async def run(self, session: Any) -> None:
        if self.ours:
            await session.fails(self.error)
        raise self.error


def raised(recipe: Raises) -> BaseException:
    from forge_hpc.controller import service

    async def fails(error: BaseException) -> None:
        call = asyncio.get_running_loop().create_future()
        call.set_exception(error)
        await service.answer(call, asyncio.get_running_loop().create_future(), 10, "the trainers, train_step()")

    async def scenario() -> BaseException:
        session: Any = SimpleNamespace(recipe=recipe, fails=fails)
        with pytest.raises(BaseException) as caught:
            await run_recipe(session)
        return caught.value

    return asyncio.run(scenario())


@pytest.mark.parametrize("error", [TimeoutError("late"), ConnectionResetError("away"), KeyboardInterrupt()])
def test_what_a_recipe_raises_itself_is_no_loss_of_processes(error: BaseException) -> None:
    found = raised(Raises(error))
    assert isinstance(found, ForeignError) and not is_loss(found)
    assert str(found).startswith(type(error).__name__) and f"({__file__}:" in str(found)
    if isinstance(error, Exception):
        assert isinstance(raised(Raises(ExceptionGroup("several", [error]))), ForeignError)


def test_what_the_session_raises_in_it_stays_what_it_is() -> None:
    found = raised(Raises(ConnectionResetError("by peer"), ours=True))
    assert isinstance(found, ActorLost) and is_loss(found)
    error = ValueError("a bug")
    assert raised(Raises(error)) is error


def test_a_recipe_that_forgets_the_weights_does_not_wait_for_ever() -> None:
    config = Config()
    for staleness, last in ((0, 1), (2, 3)):
        config.rollout.max_staleness = staleness
        session: Any = SimpleNamespace(config=config, _published=0, step=last - 1)
        Session._check_published(session, last)
        Session._check_published(session, last + 1)  # asked for before the step is ended: it may yet publish
        session.step = last
        with pytest.raises(UserError, match="has brought the generators none since that after step 0") as refused:
            Session._check_published(session, last + 1)
        assert refused.value.hint == "after each step: await session.publish(step)"
        session._published = 1
        Session._check_published(session, last + 1)
