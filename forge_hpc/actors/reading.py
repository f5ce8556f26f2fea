"""How a generator takes the versions of one policy: out of the trainers' memory where it can, else from the store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING

from forge_hpc.cluster import folders
from forge_hpc.config import Config

if TYPE_CHECKING:
    from forge_hpc.generation import GenerationEngine
    from forge_hpc.weights import Brief, LinkReader, Offer, RemoteReader, StoreSpec
    from forge_hpc.wire.tls import Certificates

logger = logging.getLogger(__name__)


class PolicyReader:
    """Reads the versions of a policy into an engine.

    Args:
        adapter: which of the engine's policies it is.
    """

    def __init__(self, engine: GenerationEngine, config: Config, log_dir: Path, adapter: int = 0) -> None:
        from forge_hpc.weights import Known

        self._engine = engine
        self._config = config
        self._log_dir = log_dir
        self._adapter = adapter
        self._links: LinkReader | None = None
        self._unopened: Hashable = None  # trainers of this host whose memory could not be opened,
        self._unlinked: Hashable = None  # and those with which NCCL did not work
        self._remote: RemoteReader | None = None
        self._loading = asyncio.Lock()  # what was received is read before the next is
        self._reads = self._is_closed = False
        self._proven: Hashable = None  # the trainers whose offers could be read,
        self._unreachable: Hashable = None  # and those whose could not
        self._places = Known()
        self._waits = False  # for the whole offer, or for the store

    async def load(self, store: StoreSpec | None, version: int, told: Offer | Brief | None, again: bool) -> str | None:
        """As ``Generator.load``."""
        from forge_hpc.weights import UNKNOWN, Unreachable, pull, reads_shared_memory

        if again and not self._waits:
            return ""
        if told is None:
            assert store is not None, "what is not offered is in the store"
            tensors = await pull(store, version)
            await self._engine.load_weights(version, tensors.items(), self._adapter)
            self._waits = False
            return "shared memory" if reads_shared_memory(store) else "messages"
        self._waits = True
        if (offer := self._places.offer(told)) is None:
            return UNKNOWN
        origin = offer.places.origin
        try:
            if self._unreachable == origin:
                return None
            async with self._loading:
                way = await self._load_offer(offer)
        except Unreachable as error:
            logger.warning("the trainers' memory cannot be read from here, the store serves: %s", error)
            if origin != self._proven:
                self._unreachable = origin
            return None
        self._proven = origin
        self._waits = False
        return way

    async def _load_offer(self, offer: Offer) -> str:
        """Raises Unreachable."""
        from forge_hpc.models.device import device_type
        from forge_hpc.weights import Unreachable

        if offer.is_within_reach(device_type()) and self._unopened != offer.places.origin:
            try:
                await self._load_here(offer)
                return "CUDA IPC" if device_type() == "cuda" else "shared memory"
            except Unreachable as error:
                if not offer.has_streams:
                    raise
                logger.warning("the trainers' memory cannot be opened from here, TLS streams serve: %s", error)
                self._unopened = offer.places.origin
        if not offer.has_streams:
            raise Unreachable("another host or device")
        local, way = await asyncio.to_thread(self._receive, offer)
        is_good, self._reads = False, True
        try:
            await self._load_here(local)
            is_good = True
        finally:
            self._reads = False
            if self._remote is not None:
                self._remote.has_read(is_good)
            if self._is_closed:
                self.close()
        return way

    def _receive(self, offer: Offer) -> tuple[Offer, str]:
        """Bring an offer of another host here, and how. Raises Unreachable."""
        from forge_hpc.weights import Unreachable
        from forge_hpc.wire.tls import Certificates

        if (certificates := Certificates.from_environment()) is None:
            raise Unreachable("another host, and no certificates here")
        start = time.perf_counter()
        local, num_bytes, way = self._bring(offer, certificates)
        duration, whole = time.perf_counter() - start, sum(handle.num_bytes for handle in local.places.handles)
        figures = offer.version, num_bytes / 1e6, whole / 1e6, duration, way
        logger.info("version %d: %.1f of %.1f MB came in %.3f s by %s", *figures)
        return local, way

    def _bring(self, offer: Offer, certificates: Certificates) -> tuple[Offer, int, str]:
        """Raises Unreachable."""
        from forge_hpc.weights import LinkReader, RemoteReader, Unreachable, links_dir

        if self._is_closed:
            raise Unreachable("its reader has been closed")
        if self._config.generator.weight_transport == "nccl" and self._unlinked != offer.places.origin:
            from forge_hpc.models.device import local_device

            if self._links is None:
                self._links = LinkReader(certificates, links_dir(self._log_dir), local_device())
            try:
                return *self._links.receive(offer), "NCCL"
            except Unreachable as error:
                logger.warning("no weights over NCCL, TLS streams serve: %s", error)
                self._unlinked = offer.places.origin
        if self._remote is None:
            self._remote = RemoteReader(certificates, folders.own_folder())
        return *self._remote.receive(offer), "TLS streams"

    async def _load_here(self, offer: Offer) -> None:
        """Raises Unreachable."""
        from forge_hpc.models.device import device_type
        from forge_hpc.weights import opened

        if device_type() == "cuda" and not self._config.trainer.lora.sends_adapters:
            await self._engine.load_offer(offer)
            return
        with opened(offer) as weights:
            weights.verify()
            tensors = {name: weights.tensor(name) for name in offer.shapes}
            await self._engine.load_weights(offer.version, tensors.items(), self._adapter)

    def close(self) -> None:
        """Close what is open to the trainers, once what has been received is loaded."""
        self._is_closed = True
        if self._reads:
            return
        for reader in (self._links, self._remote):
            if reader is not None:
                reader.close()
