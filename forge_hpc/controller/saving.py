"""Saving a run: its checkpoints, and the models that are exported on the way.

trainers stage their state ──► training goes on ──► all ranks have written ──► the commit, with the recipe's state
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from forge_hpc.checkpoint import CheckpointStore, FileRecord
from forge_hpc.checkpoint.episodes import EPISODES, dump_groups
from forge_hpc.cluster.hangs import write_stacks
from forge_hpc.config import Config, config_text
from forge_hpc.controller.recovery import Recoveries
from forge_hpc.controller.service import ActorLost, reason_of
from forge_hpc.controller.trainers import Trainers
from forge_hpc.data.types import Group
from forge_hpc.run_dir import RunDir
from forge_hpc.status_writer import StatusWriter
from forge_hpc.supervisor.lead import measured_lead_s

logger = logging.getLogger(__name__)
CONFIG = "config.yaml"
"""In a checkpoint: the configuration that it was made with."""


class Saver:
    """Saves the run beside the training, and counts what fails: a run goes on from one good checkpoint to the next.

    Args:
        finished_groups: rollouts of later steps that are to be kept.
        warn: shows the user a line.
        lose: says why this attempt is over, where trainers are lost while they save.
    """

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        recoveries: Recoveries,
        status: StatusWriter,
        finished_groups: Callable[[], list[Group]],
        warn: Callable[[str], None],
        lose: Callable[[str], None],
    ) -> None:
        self.checkpoints = CheckpointStore(run_dir, config.checkpoint.keep)
        self.saved_step = 0
        """Of the newest checkpoint."""
        self.begun_step = 0
        """Of the newest one that is complete, or on its way there."""
        self.num_failed = 0
        """Saves of the run that have failed."""
        self.why_failed = ""
        """Of the last one of them."""
        self._config = config
        self._config_text = config_text(config).encode()
        self._run_dir = run_dir
        self._recoveries = recoveries
        self._status = status
        self._finished_groups = finished_groups
        self._warn = warn
        self._lose = lose
        self._saving: asyncio.Task[None] | None = None
        self._staged = asyncio.Event()
        self._staged.set()
        self._train_s: deque[float] = deque(maxlen=20)
        self._save_s: deque[float] = deque(maxlen=5)

    def trained(self, seconds: float) -> None:
        """A step has taken so long."""
        self._train_s.append(seconds)

    def is_due(self, step: int) -> bool:
        """Every ``checkpoint.interval`` steps, and at the last one."""
        interval = self._config.checkpoint.interval
        return step == self._config.trainer.training.steps or (interval > 0 and step % interval == 0)

    async def save(self, trainers: Trainers, step: int, state: Mapping[str, Any]) -> None:
        """Begin to save the run as of ``step``; it goes on beside what comes next. Trainers do nothing else while they
        stage their state (``staged``), and train while it is written.

        A save that fails is reported and counted.
        """
        await self.saved()
        start = time.perf_counter()
        groups = self._finished_groups()
        record = {"step": step, "policy_version": step, "recipe": state}
        record |= {"recoveries": self._recoveries.state_dict(), "failed_saves": self.num_failed}

        async def commit() -> None:
            try:
                await trainers.save(directory / "trainer")
            finally:
                self._staged.set()
            files = await trainers.saved()
            await asyncio.to_thread(self._commit, step, record, files, groups)

        try:
            directory = await asyncio.to_thread(self.checkpoints.begin, step)
        except Exception as error:
            await self._save_failed(step, error)
            return
        self.begun_step = step
        self._staged.clear()
        self._saving = asyncio.create_task(self._complete(commit(), step, start))
        await asyncio.sleep(0)  # so that it has told the trainers before anybody asks them for something else

    async def staged(self) -> None:
        """Wait until the trainers have staged what is to be saved, or failed to."""
        await self._staged.wait()

    async def saved(self) -> None:
        """Wait until the save that runs beside the training is over."""
        if (saving := self._saving) is not None:
            await asyncio.shield(saving)  # who waits may be cancelled, and the save goes on
            self._saving = None

    async def _complete(self, commit: Awaitable[None], step: int, start: float) -> None:
        try:
            await commit
        except ActorLost as error:
            self._lose(reason_of(error))
            raise
        except Exception as error:
            await self._save_failed(step, error)
        else:
            self.saved_step = step
            self._save_s.append(time.perf_counter() - start)
            lead_s = measured_lead_s(max(self._save_s), max(self._train_s, default=0.0))
            self._status.update(lead_s=lead_s)

    def _commit(
        self, step: int, record: Mapping[str, Any], files: Mapping[str, FileRecord], groups: Sequence[Group]
    ) -> None:
        extra = {CONFIG: self._config_text} | ({EPISODES: dump_groups(groups)} if groups else {})
        self.checkpoints.commit(step, record, files, extra)

    async def _save_failed(self, step: int, error: Exception) -> None:
        await asyncio.to_thread(self.checkpoints.abandon, step)
        self.begun_step = self.saved_step
        self.num_failed += 1
        self.why_failed = " ".join(str(error).split()) or type(error).__name__
        before = f"that of step {self.saved_step} stands" if self.saved_step else "there is none before it"
        self._warn(f"the checkpoint of step {step} failed, {before}: {self.why_failed}")

    def better_step(self) -> int | None:
        """The step of the best checkpoint, where that is another one than the newest."""
        best = self.checkpoints.best()
        return best["step"] if best is not None and best["step"] != self.saved_step else None

    async def export_best(self) -> None:
        """Put the model of the best checkpoint into RUN_DIR/export, in a process of its own, which needs no GPU.

        Raises:
            RuntimeError: it failed; what was exported before is still there.
            ActorLost: it was not done within ``trainer.timeout_s``: then stacks have been written.
        """
        new = self._run_dir.exports / ".best"
        await asyncio.to_thread(shutil.rmtree, new, ignore_errors=True)
        command = [sys.executable, "-m", "forge_hpc.cli", "export", str(self._run_dir), "--step", "best"]
        process = await asyncio.create_subprocess_exec(
            *command, "--output", str(new), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        try:
            _, errors = await asyncio.wait_for(process.communicate(), self._config.trainer.timeout_s)
        except TimeoutError:
            late = "the model of the best checkpoint was not exported within trainer.timeout_s"
            late += await write_stacks(late)
            process.kill()  # what hangs in C code hears no SIGTERM
            raise ActorLost(late) from None
        finally:
            if process.returncode is None:
                process.terminate()
        if process.returncode:
            lines = errors.decode(errors="replace").split("\n")
            reason = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
            raise RuntimeError(f"the model of the best checkpoint is not exported: {reason}")
        await asyncio.to_thread(shutil.rmtree, self._run_dir.export, ignore_errors=True)
        await asyncio.to_thread(new.rename, self._run_dir.export)

    async def export_if_due(self, trainers: Trainers, step: int, *, leaving: bool) -> None:
        """Write the model every ``checkpoint.export_interval`` steps. One that fails is reported; the run goes on."""
        interval = self._config.checkpoint.export_interval
        if not interval or step % interval:
            return
        if leaving:
            logger.warning("no time to export step %d: forge-hpc export writes it from its checkpoint", step)
            return
        try:
            await trainers.export(self._run_dir.export_of(step))
        except ActorLost:
            raise
        except Exception as error:
            self._warn(f"the model of step {step} is not exported: {reason_of(error)}")
