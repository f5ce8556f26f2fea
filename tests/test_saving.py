"""A save goes on beside what comes after its step; training waits for what it stages, and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_resume import configuration

from forge_hpc.checkpoint import CheckpointError
from forge_hpc.controller.recovery import Recoveries
from forge_hpc.controller.saving import Saver
from forge_hpc.controller.service import ActorLost
from forge_hpc.run_dir import RunDir
from forge_hpc.status_writer import StatusWriter


class Trainers:
    """They stage and write as they are told to."""

    def __init__(self, fails: str = "") -> None:
        self.may_stage, self.may_write = asyncio.Event(), asyncio.Event()
        self.told: list[str] = []
        self._fails = fails

    async def save(self, directory: Path) -> None:
        self.told.append("save")
        await self.may_stage.wait()
        if self._fails == "stage":
            raise CheckpointError("no memory left")
        if self._fails == "lost":
            raise ActorLost("trainer-0 has died")
        directory.mkdir(parents=True)

    async def export(self) -> None:
        self.told.append("export")

    async def saved(self) -> Mapping[str, Any]:
        await self.may_write.wait()
        return {}


async def is_waiting(*tasks: asyncio.Task[None]) -> bool:
    """Whether they still wait, once all that can go on has gone on."""
    for _ in range(20):
        await asyncio.sleep(0)
    return not any(task.done() for task in tasks)


def saver(run_dir: RunDir, told: list[str]) -> Saver:
    config, status = configuration("recipe=grpo"), StatusWriter(run_dir)
    return Saver(config, run_dir, Recoveries(0), status, list, told.append, lambda why: told.append(f"lost: {why}"))


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run").create()
    run_dir.write_status(state="running")
    return run_dir


def test_a_save_holds_up_nobody_but_who_trains_and_that_until_the_state_is_staged(run_dir: RunDir) -> None:
    async def saved() -> None:
        told: list[str] = []
        trainers, saves = Trainers(), saver(run_dir, told)
        await saves.staged()  # nothing has been begun
        await saves.save(trainers, 5, {"at": 5})  # type: ignore[arg-type]
        await trainers.export()
        assert trainers.told == ["save", "export"]  # in the order in which they do it
        assert (saves.begun_step, saves.saved_step) == (5, 0)
        staged, complete = asyncio.create_task(saves.staged()), asyncio.create_task(saves.saved())
        assert await is_waiting(staged, complete)
        trainers.may_stage.set()
        await staged
        assert await is_waiting(complete)
        trainers.may_write.set()
        await complete
        assert saves.saved_step == 5 and not told

    asyncio.run(saved())


def test_who_trains_goes_on_where_the_state_cannot_be_staged_and_it_is_told(run_dir: RunDir) -> None:
    async def saved() -> None:
        told: list[str] = []
        trainers, saves = Trainers(fails="stage"), saver(run_dir, told)
        await saves.save(trainers, 5, {})  # type: ignore[arg-type]
        trainers.may_stage.set()
        await saves.staged()
        await saves.saved()
        assert (saves.begun_step, saves.saved_step, saves.num_failed) == (0, 0, 1)
        assert told == ["the checkpoint of step 5 failed, there is none before it: no memory left"]

    asyncio.run(saved())


def test_trainers_that_are_lost_while_they_stage_end_the_attempt_at_once(run_dir: RunDir) -> None:
    async def saved() -> None:
        told: list[str] = []
        trainers, saves = Trainers(fails="lost"), saver(run_dir, told)
        await saves.save(trainers, 5, {})  # type: ignore[arg-type]
        trainers.may_stage.set()
        await saves.staged()
        with pytest.raises(ActorLost):
            await saves.saved()
        assert told == ["lost: trainer-0 has died"] and saves.saved_step == 0

    asyncio.run(saved())
