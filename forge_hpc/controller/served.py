"""The models of ``served``, from the controller's side: engines, each model's own, and an address for each model.

    rewards, environments, agents ──HTTP──► Endpoint (in this process) ──► Service ──► engines on nodes of their own

Engines are generators whose weights never change: one that dies is replaced as a generator is, and requests that it had
are made again. The address stays the same meanwhile, and as long as this process lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from forge_hpc.cluster.meshes import Cluster
from forge_hpc.config import Config
from forge_hpc.config.schema import ServedConfig
from forge_hpc.config.served import served_config
from forge_hpc.controller.generators import GeneratorPool
from forge_hpc.controller.recovery import Recoveries
from forge_hpc.data.hub import load_tokenizer
from forge_hpc.data.types import Prompt
from forge_hpc.endpoint import Endpoint, GeneratorSampler, tls_context
from forge_hpc.endpoint.conversations import NothingKept
from forge_hpc.endpoint.requests import Model
from forge_hpc.served import Served, announce, withdraw

logger = logging.getLogger(__name__)


class ServedModels:
    """All of a start of a run; they outlive the trainers.

    Args:
        on_node_lost: as for ``GeneratorPool``; served models move to no spare node.
        failed: resolved when an engine cannot be replaced.
        suffix: tells the processes of one run of this controller from those of another.
    """

    def __init__(
        self,
        config: Config,
        cluster: Cluster,
        log_dir: Path,
        recoveries: Recoveries,
        on_node_lost: Callable[[int, str], None],
        failed: asyncio.Future[Exception],
        suffix: str = "",
    ) -> None:
        self._models = [
            _ServedModel(config, number, one, cluster, log_dir, recoveries, on_node_lost, failed, suffix)
            for number, one in enumerate(config.served)
        ]

    def begin(self, model_dirs: Mapping[str, Path]) -> None:
        """Begin to start all engines on the weights in a directory by name, where that has not been begun."""
        for model in self._models:
            model.pool.begin(model_dirs[model.name])

    async def start(self, model_dirs: Mapping[str, Path]) -> None:
        """Wait until all models answer, and announce their addresses (``forge_hpc.served``). Raises what kept one from
        it; then the next call begins anew."""
        self.begin(model_dirs)
        async with asyncio.TaskGroup() as tasks:
            for model in self._models:
                tasks.create_task(model.start(model_dirs[model.name]))

    def lose_node(self, node: int, reason: str) -> None:
        """The node's worker has ended."""
        for model in self._models:
            model.pool.lose_node(node, reason)

    def metrics(self) -> dict[str, float]:
        """What has happened since the last call."""
        return {key: value for model in self._models for key, value in model.metrics().items()}

    async def close(self) -> None:
        """Answer no more, and end the engines in good order."""
        for model in self._models:
            await model.close()
            await model.pool.close()

    async def end(self) -> None:
        """End their processes too."""
        for model in self._models:
            await model.close()
            await model.pool.hand_over(None)


class _ServedModel:
    def __init__(
        self,
        config: Config,
        number: int,
        one: ServedConfig,
        cluster: Cluster,
        log_dir: Path,
        recoveries: Recoveries,
        on_node_lost: Callable[[int, str], None],
        failed: asyncio.Future[Exception],
        suffix: str,
    ) -> None:
        self.name = one.name
        self._config = served_config(config, one)
        if cluster.other_nodes:  # whose processes ask too
            self._config.environment.endpoint_host = cluster.address
        self._what = Model(
            name=one.name,
            what="the model that is served",
            limit=f"served.{number}.max_tokens",
            why_not="the model is sampled by temperature and top_p alone",
        )
        own = replace(cluster, placement=cluster.placement.with_served(number))
        self.pool = GeneratorPool(
            self._config, own, log_dir, recoveries, on_node_lost, role=f"served-{one.name}", suffix=suffix
        )
        self.pool.failed = failed
        self._kept = NothingKept()
        self._endpoint: Endpoint | None = None
        self._open = contextlib.ExitStack()

    async def start(self, model_dir: Path) -> None:
        service = await self.pool.start(model_dir)
        if self._endpoint is not None:
            return
        tls, ca = tls_context(self._config.environment.endpoint_host)
        tokenizer = await asyncio.to_thread(load_tokenizer, model_dir)
        sampler, warn = GeneratorSampler(service), logger.warning
        self._endpoint = await Endpoint(self._config, tokenizer, sampler, warn, tls, ca, self._what).start()
        key = self._open.enter_context(self._endpoint.open(Prompt(0, "", [], ""), 0))
        key.conversations = self._kept
        announce(self.name, Served(self._endpoint.base_url, key.key))
        logger.info("%s is served at %s", self.name, self._endpoint.base_url)

    def metrics(self) -> dict[str, float]:
        if self._endpoint is None:
            return {}
        counts, name = self._endpoint.metrics(), self.name
        num_prompt, num_generated = self._kept.take_counts()
        return {
            f"served/{name}/requests": counts["endpoint/requests"],
            f"served/{name}/refused": counts["endpoint/refused"],
            f"served/{name}/strangers": counts["endpoint/strangers"],
            f"served/{name}/prompt_tokens": float(num_prompt),
            f"served/{name}/generated_tokens": float(num_generated),
        }

    async def close(self) -> None:
        if self._endpoint is not None:
            self._open.close()
            withdraw(self.name)
            endpoint, self._endpoint = self._endpoint, None
            await endpoint.close()
