"""The end of a run: the last save, and the model that is exported beside it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_resume import configuration, make_session

from forge_hpc.checkpoint import CheckpointError
from forge_hpc.controller.session import Session
from forge_hpc.run_dir import RunDir

STEPS = 10


class Trainers:
    """They do what they are told one thing after the other, but for the writing of a save.

    Args:
        room: how many of a save and a model the disk holds.
    """

    def __init__(self, run_dir: RunDir, room: int) -> None:
        self.export_dir, self.room = run_dir.export, room
        self.told: list[str] = []
        self.warned: list[str] = []
        self.num_saved = 0
        self.alone, self.has_exported = asyncio.Lock(), asyncio.Event()

    async def save(self, directory: Path) -> None:
        async with self.alone:
            self.told.append("save")

    async def saved(self) -> dict[str, Any]:
        await asyncio.wait_for(self.has_exported.wait(), 60)  # it takes longer than the model
        if self.export_dir.exists() and self.room < 2:
            raise CheckpointError("no space left")
        self.num_saved += 1
        return {}

    async def export(self, directory: Path) -> None:
        async with self.alone:
            self.told.append("export")
            self.has_exported.set()
            if self.num_saved >= self.room:
                raise OSError("no space left for the model")
            directory.mkdir()


def finished(
    run_dir: RunDir, room: int, *, saves: bool, kind: type[Trainers] = Trainers
) -> tuple[Session, Trainers, list[str]]:
    """A session that is at its end, with or without a save under way; what it told the generators' pool."""
    told: list[str] = []

    async def finish() -> tuple[Session, Trainers]:
        pool = SimpleNamespace(turns=None, retire=lambda: told.append("retire"))
        session = make_session(run_dir, configuration("recipe=grpo"), pool)
        trainers = kind(run_dir, room)
        session._trainers = trainers  # type: ignore[assignment]
        session.metrics = SimpleNamespace(warn=trainers.warned.append)  # type: ignore[assignment]
        session.step = STEPS
        if saves:
            await session._saver.save(session.trainers, STEPS, {})
        try:
            await session.finish()
        except (OSError, RuntimeError) as error:
            told.append(str(error))
        session._status.flush(60)
        return session, trainers

    return *asyncio.run(finish()), told


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run").create()
    run_dir.write_status(state="running")
    return run_dir


@pytest.mark.parametrize("saves", [True, False])
def test_the_model_is_exported_beside_the_last_save_and_never_before_it(run_dir: RunDir, saves: bool) -> None:
    session, trainers, told = finished(run_dir, 2, saves=saves)
    assert trainers.told == ["save", "export"] and told == ["retire"]
    assert session._saver.saved_step == STEPS and run_dir.export.exists()


def test_a_disk_that_holds_one_of_the_two_holds_the_state(run_dir: RunDir) -> None:
    session, trainers, told = finished(run_dir, 1, saves=True)
    assert trainers.told == ["save", "export", "save", "export"]
    assert told == ["retire", "no space left for the model"]
    assert session._saver.saved_step == STEPS and session._saver.num_failed == 1
    assert trainers.warned == ["the checkpoint of step 10 failed, there is none before it: no space left"]
    assert [path.name for path in run_dir.checkpoints.iterdir() if not path.name.startswith(".")]


def test_a_disk_that_holds_no_state_holds_the_model_all_the_same(run_dir: RunDir) -> None:
    class NoRoom(Trainers):
        async def saved(self) -> dict[str, Any]:
            raise CheckpointError("no space left")

    session, trainers, told = finished(run_dir, 2, saves=False, kind=NoRoom)
    assert trainers.told == ["save", "export", "save", "export"] and run_dir.export.exists()
    where = f"cannot be saved in {run_dir.checkpoints}: no space left; its model is in {run_dir.export}"
    assert told == ["retire", f"the state after step 10 {where}"] and session._saver.num_failed == 2
