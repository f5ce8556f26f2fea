"""Several adapters on one base (``trainer.lora.sweep``): a session for each, on the processes of one run.

    RUN_DIR/adapters/0  session ─┐           ┌─► trainers: the base once, the adapters in turn
    RUN_DIR/adapters/1  session ─┼─ OneBase ─┤
    …                           ─┘           └─► generators: the base once, a LoRA request for each adapter

Each is a run as it would be alone, with rollouts, an optimizer, figures, evaluations, checkpoints and an export of its
own, and goes at its own pace: while one trains another generates. Where runs are synchronous a generator answers one
adapter's batch at a time, so that each learns what it would alone, to the last bit; above that they are mixed.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from forge_hpc.config import Config, read_config, save_config
from forge_hpc.config.adapters import adapter_configs, total_steps
from forge_hpc.config.load import with_overrides
from forge_hpc.controller.generators import NodeLost
from forge_hpc.controller.ranks import Standstill
from forge_hpc.controller.recipe_run import run_recipe
from forge_hpc.controller.service import cause_of, is_loss, reason_of
from forge_hpc.controller.session import OneBase, Session, background
from forge_hpc.data.hub import resolve_model
from forge_hpc.hub.pins import FILE, Pins, pin_all
from forge_hpc.observability.logs import Terminal
from forge_hpc.run_dir import RunDir
from forge_hpc.status_writer import StatusWriter
from forge_hpc.supervisor.starts import newest_step
from forge_hpc.sweep_dir import SweepDir
from forge_hpc.user_files import keep_files

if TYPE_CHECKING:
    from pathlib import Path

    from forge_hpc.cluster.meshes import Cluster
    from forge_hpc.controller.generators import GeneratorPool
    from forge_hpc.controller.recovery import Leave, Recoveries
    from forge_hpc.observability.phases import StartPhases

logger = logging.getLogger("forge_hpc.controller")
HEARTBEAT_S = 5.0


class AdapterFailed(RuntimeError):
    """An adapter could not be trained to its end; the others could."""


class _AdapterStatus(StatusWriter):
    """The status of one adapter, of which that of the run is told."""

    def __init__(self, run_dir: RunDir, sessions: AdapterSessions, number: int) -> None:
        super().__init__(run_dir)
        self._sessions, self._number = sessions, number

    def update(self, **status: Any) -> None:
        super().update(**status)
        self._sessions.tell(self._number, status)


class AdapterSessions:
    """One attempt at a run of several adapters: what ``controller.conduct`` does with a session it does with all."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        log_dir: Path,
        cluster: Cluster,
        pool: GeneratorPool,
        recoveries: Recoveries,
        leave: Leave,
        attempt: int,
        status: StatusWriter,
    ) -> None:
        self.config = config
        self.cluster = cluster
        self.phases: StartPhases | None = None
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """As ``Session.lost``, of all."""
        self._run_dir = run_dir
        self._where = log_dir, cluster, pool, recoveries, leave, attempt
        self._status = status
        self._sweep = SweepDir(run_dir.adapters)
        self._configs, self._total = adapter_configs(config), total_steps(config)
        self._sessions: list[Session] = []
        self._statuses = [_AdapterStatus(self._sweep.run(number), self, number) for number in range(len(self._configs))]
        self._tasks: list[asyncio.Task[None]] = []
        self._preparing = asyncio.Lock()  # transformers cannot be imported by two threads at once
        self._standstill = Standstill()
        self._failed: dict[int, Exception] = {}
        self._done: set[int] = set()
        self._steps: dict[int, int] = {}
        self._lead_s: dict[int, float] = {}

    async def run(self, terminal: Terminal) -> None:
        """Train all of them to their ends, each from its newest checkpoint.

        One that fails by itself, of a loss that is not finite say, keeps no other from its end.

        Raises:
            AdapterFailed: some failed.
            Exception: what failed all of them, such as a lost process.
        """
        await self._prepare()
        self._status.update(state="running", total_steps=self._total, message="")
        try:
            async with AsyncExitStack() as stack:
                for status in self._statuses:
                    await stack.enter_async_context(background(_heartbeat(status)))
                async with asyncio.TaskGroup() as tasks:
                    self._tasks = [tasks.create_task(self._run(n, terminal)) for n in range(len(self._sessions))]
        except BaseExceptionGroup as errors:
            # Calls of the others may have been refused before the one that led to a standstill was over.
            raise (self._standstill.error or cause_of(errors)) from errors
        if self._failed:
            number, error = next(iter(self._failed.items()))
            if len(self._failed) == len(self._sessions):
                raise error
            others = f", and {len(self._failed) - 1} more have failed" if len(self._failed) > 1 else ""
            raise AdapterFailed(
                f"adapter {number} ({self.config.trainer.lora.sweep[number]}): {reason_of(error)}{others}; "
                f"{len(self._done)} of {len(self._sessions)} are trained"
            ) from error

    async def _prepare(self) -> None:
        """Find the base, and make the directories of the adapters."""
        config, place = self.config, self._run_dir.path
        pins = await asyncio.to_thread(pin_all, config, place)
        if config.model.path == "warmstart":
            model_dir = RunDir(self._run_dir.warmstart).export
        else:
            path = pins.named(config.model.path)
            model_dir = await asyncio.to_thread(resolve_model, path, config.seed, place / "model")
        base = OneBase(model_dir)
        base.lost, base.standstill = self.lost, self._standstill
        self._configs = [self._with_base(own, model_dir) for own in self._configs]
        await asyncio.to_thread(self._make, pins)
        for number, (own, status) in enumerate(zip(self._configs, self._statuses, strict=True)):
            session = Session(own, self._sweep.run(number), *self._where, status, base=base, adapter=number)
            self._sessions.append(session)
        self._sessions[0].phases = self.phases

    def _with_base(self, own: Config, model_dir: Path) -> Config:
        """What was made in the run's directory is named there, so that the adapter's directory says all."""
        if own.model.path == "warmstart" or own.model.path.startswith("builtin:"):
            return replace(own, model=replace(own.model, path=str(model_dir)))
        return own

    def _make(self, pins: Pins) -> None:
        for number, own in enumerate(self._configs):
            directory = self._sweep.run(number).create()
            if directory.has_config and newest_step(directory) > own.trainer.training.steps:
                # It has gone on alone, and further than this run would take it: as far as it was to go then.
                steps = read_config(directory.config).trainer.training.steps
                own = self._configs[number] = with_overrides(own, [f"trainer.training.steps={steps}"])
            save_config(own, directory.config)
            if pins.path.exists() and not (directory.path / FILE).exists():
                shutil.copyfile(pins.path, directory.path / FILE)
            keep_files(own, directory)
        overrides = [[item] for item in self.config.trainer.lora.sweep]
        if not self._sweep.exists or self._sweep.overrides() != overrides:
            self._sweep.write(overrides)

    async def _run(self, number: int, terminal: Terminal) -> None:
        session, status = self._sessions[number], self._statuses[number]
        status.update(state="starting")
        try:
            async with self._preparing:
                await session.prepare()
            with await asyncio.to_thread(session.open_records, terminal.stdout):
                total = session.config.trainer.training.steps
                status.update(state="running", step=session.step, policy_version=session.step, total_steps=total)
                await run_recipe(session)
        except Exception as error:
            if is_loss(error) or isinstance(cause_of(error), NodeLost):
                raise
            if session.is_stuck:  # and so are the others' trainers, in the same processes
                raise
            logger.exception("adapter %d has failed", number)
            self._failed[number] = error
            status.update(state="failed", message=reason_of(error))
            await session.end_requests()
            return
        self._done.add(number)
        status.update(state="completed", message="")

    def tell(self, number: int, status: Mapping[str, Any]) -> None:
        """What one adapter's status says is a part of the run's."""
        if "lead_s" in status:
            self._lead_s[number] = status["lead_s"]
            self._status.update(lead_s=sum(self._lead_s.values()))  # they save one after another
        if status.get("message"):
            self._status.update(message=f"adapter {number}: {status['message']}")
        if "step" in status:
            self._steps[number] = status["step"]
        if "step" in status or "state" in status:
            going = [n for n in range(len(self._configs)) if not self._is_over(n)]
            if self._steps and all(n in self._steps for n in going):  # before, where the others stand is not known
                slowest = min((self._steps[n] for n in going), default=max(self._steps.values()))
                step = min(slowest, self._total)  # one that went further alone does not count beyond
                self._status.update(step=step, policy_version=step)

    def _is_over(self, number: int) -> bool:
        """Whether the adapter takes no further step."""
        total = self._configs[number].trainer.training.steps
        return number in self._done or number in self._failed or self._steps.get(number, -1) >= total

    # ---- leaving, as ``Session`` does

    @property
    def _good(self) -> list[Session]:
        return [session for number, session in enumerate(self._sessions) if number not in self._failed]

    def lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)

    async def between_steps(self) -> None:
        for session, task in zip(self._sessions, self._tasks, strict=False):
            boundary = asyncio.ensure_future(session.between_steps())
            await asyncio.wait({boundary, task}, return_when=asyncio.FIRST_COMPLETED)
            boundary.cancel()

    @property
    def is_between_steps(self) -> bool:
        return all(session.is_between_steps for session in self._good)

    async def save_to_leave(self) -> bool:
        saved = [await session.save_to_leave() for session in self._good]
        for number, status in enumerate(self._statuses):
            if number not in self._failed and number not in self._done:
                status.update(state="preempted")
        return all(saved)

    async def abandon(self) -> None:
        for session in reversed(self._sessions):
            await session.abandon()

    async def hand_over(self) -> None:
        await self.abandon()

    async def close(self) -> None:
        for session in reversed(self._sessions):
            await session.close()


async def _heartbeat(status: StatusWriter) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_S)
        status.update()
