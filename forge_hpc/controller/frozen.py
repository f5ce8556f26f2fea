"""Frozen models in processes of their own, from the controller's side.

They hold nothing that is not in a directory: lost ones are loaded again, and what they were asked is asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_hpc.actors.frozen import Frozen
from forge_hpc.cluster.deadlines import SPAWN_S
from forge_hpc.cluster.meshes import Cluster
from forge_hpc.config import Config
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.split import frozen_apart
from forge_hpc.controller.generators import STOP_S, NodeLost, why_not_spawned
from forge_hpc.controller.ranks import Ranks
from forge_hpc.controller.recovery import Recoveries
from forge_hpc.controller.service import ActorLost, reason_of, started
from forge_hpc.data.types import Document

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)


class FrozenProcesses:
    """The processes of one start of a run, all of them one mesh; they outlive the trainers beside them.

    Args:
        on_node_lost: called with a node on which they cannot be started again, and the reason.
    """

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        log_dir: Path,
        recoveries: Recoveries,
        on_node_lost: Callable[[int, str], None],
    ) -> None:
        self.models = frozenset(frozen_apart(config, needs_of(config)))
        """Names of the models that are here."""
        self._config = config
        self._cluster = cluster
        self._log_dir = log_dir
        self._recoveries = recoveries
        self._on_node_lost = on_node_lost
        self._procs: Any = None
        self._name = ""
        self._num_starts = 0
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # of the newest start
        self._serving: asyncio.Task[Ranks] | None = None  # its result are its ranks

    async def start(self, model_dirs: Mapping[str, Path]) -> None:
        """Wait until they serve. Raises what kept them from it; then the next call begins anew."""
        self._model_dirs = model_dirs
        if self._serving is None or (self._serving.done() and self._serving.exception() is not None):
            self._serving = asyncio.create_task(self._start())
        await asyncio.shield(self._serving)

    async def logprobs(self, documents: Sequence[Document], model: str) -> list[np.ndarray]:
        """As ``Trainers.logprobs``."""
        return await self._call("logprobs", documents, model)

    async def values(self, documents: Sequence[Document], model: str) -> list[np.ndarray]:
        """As ``Trainers.values``."""
        return await self._call("values", documents, model)

    def lose_node(self, node: int, reason: str) -> None:
        """The node's worker has ended."""
        if node in self._cluster.placement.frozen_nodes:
            self._lose(self._lost, f"node {node}: {reason}")

    async def close(self) -> None:
        """End a start under way, or the models in good order."""
        if (serving := self._serving) is None:
            return
        if serving.done() and not self._lost.done():
            await serving.result().ask("leave", timeout_s=10)
        serving.cancel()

    async def end(self) -> None:
        """End their processes too."""
        with contextlib.suppress(Exception):  # what counts is that they end
            await self.close()
        await self._end()

    async def _call(self, endpoint: str, *args: Any) -> Any:
        """What rank 0 answers, of these processes or of those that take their place.

        Raises:
            ActorLost: they are lost again and again. NodeLost: so is their node.
            Exception: a rank's error; see ``Ranks.ask``.
        """
        assert self._serving is not None, "start() comes first"
        while True:
            ranks = await asyncio.shield(self._serving)
            lost = self._lost
            try:
                return (await ranks.ask(endpoint, *args, timeout_s=self._config.trainer.timeout_s))[0]
            except ActorLost as error:
                self._lose(lost, reason_of(error))
                self._recoveries.call_retried()

    def _lose(self, lost: asyncio.Future[str], reason: str) -> None:
        """Those whose future this is are gone: others take their place, unless they were still starting."""
        if lost.done():
            return
        lost.set_result(reason)
        if self._serving is not None and self._serving.done():
            logger.error("the frozen models are lost: %s", reason)
            self._serving = asyncio.create_task(self._replace(reason))

    async def _replace(self, reason: str) -> Ranks:
        start = time.monotonic()
        while True:
            self._recoveries.use_retry("frozen", "frozen models", f"frozen models: {reason}")
            try:
                ranks = await self._start()
                logger.info("the frozen models are replaced after %.1f s", time.monotonic() - start)
                return ranks
            except NodeLost as error:
                self._on_node_lost(error.node, str(error))
                raise
            except ActorLost as error:
                reason = reason_of(error)

    async def _start(self) -> Ranks:
        """Spawn them and load the models. Raises NodeLost, ActorLost, or what loading raises."""
        await self._end()
        nodes, faults = self._cluster.placement.frozen_nodes, self._cluster.faults
        for node in nodes:
            if node in faults.ended_nodes:
                raise NodeLost(node, "its Monarch worker has ended")
        lost = self._lost = asyncio.get_running_loop().create_future()
        suffix = f"r{self._num_starts}" if self._num_starts else ""
        self._name, self._num_starts = f"frozen{suffix}", self._num_starts + 1
        faults.watch(self._name, lambda reason: self._lose(lost, reason))
        self._procs = self._cluster.spawn_frozen(self._name)
        try:
            await started(self._procs, SPAWN_S, self._name, lost)
        except Exception as error:
            raise await why_not_spawned(self._cluster, nodes, "frozen models", error) from error
        mesh = self._procs.spawn(self._name, Frozen, self._cluster.told(self._config), self._log_dir)
        ranks, file_store = Ranks(mesh, "the frozen models", lost), self._log_dir / f"process-group-{self._name}"
        try:
            await ranks.ask("start", self._model_dirs, file_store, timeout_s=self._config.cluster.start_timeout_s)
        except Exception as error:
            if not lost.done():  # one has failed, or they are silent: the others may wait for each other
                lost.set_result(reason_of(error))
            raise
        return ranks

    @property
    def _is_stuck(self) -> bool:
        serving = self._serving
        return serving is not None and serving.done() and not serving.exception() and serving.result().is_stuck

    async def _end(self) -> None:
        """End what is left of the last start, so that its memory is free."""
        self._cluster.faults.forget(self._name)
        procs, self._procs = self._procs, None
        if procs is None or self._cluster.faults.ended_nodes & {*self._cluster.placement.frozen_nodes}:
            return
        if self._lost.done() or self._is_stuck:
            self._cluster.end_at_once(self._name)
        with contextlib.suppress(Exception):  # whether others can be started is what matters
            await asyncio.wait_for(procs.stop(), STOP_S)
