"""vLLM's sleep mode: what an engine does with its GPU memory while trainers use it.

    awake ──sleep()──► asleep ──make_room_for_weights()──► weights can be loaded ──wake()──► awake

Memory comes back at the addresses where it was, since vLLM's allocator maps other physical memory there: CUDA graphs
hold, and so do the copies of a recorded load. What was in it is gone, but for weights at level 1 and what vLLM keeps
itself: buffers, and the state beside the KV cache. vLLM's workers on the CPU have no such memory: they give up nothing,
and all else is as on a GPU.
"""

from __future__ import annotations

import logging
import time
from typing import Any, cast

import torch

from forge_hpc.config.errors import UserError

_GIB = 1 << 30
_DISCARDS_WEIGHTS = 2


class SleepingEngine:
    """Sleep and waking of a vLLM engine, from the one thread that steps it.

    Args:
        engine: a ``LLMEngine``, on a GPU with ``enable_sleep_mode``.
        level: vLLM's: 1 keeps the weights in host memory, 2 drops them.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, engine: Any, level: int, device: str) -> None:
        self._engine, self._level, self._has_gpu = engine, level, device == "cuda"
        self.is_asleep = False
        self.has_weights = True
        """What is in the weights' place are weights. Who loads them says so."""
        self._has_room_for_weights = True
        self._given_gib = 0.0  # and not taken back
        if not self._has_gpu:  # it warns every time
            logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)

    def sleep(self) -> str:
        """Give up the memory. No request may be under way; what was cached of prefixes is forgotten."""
        if self.is_asleep and not self._has_room_for_weights:
            return "asleep already"
        start, free = time.perf_counter(), self._free_gib()
        self._engine.sleep(level=self._level)
        self.is_asleep, self._has_room_for_weights = True, False
        self.has_weights = self.has_weights and self._level < _DISCARDS_WEIGHTS
        given = self._free_gib() - free
        self._given_gib += given
        return f"asleep after {time.perf_counter() - start:.2f} s, {given:.1f} GiB given up"

    def make_room_for_weights(self) -> None:
        """Before weights are loaded: see that they have memory. Nothing happens where they have it."""
        if self._has_room_for_weights:
            return
        free = self._free_gib()
        self._engine.wake_up(tags=["weights"])
        self._given_gib -= free - self._free_gib()
        self._has_room_for_weights = True

    def wake(self) -> str:
        """Take the memory back.

        Raises:
            ValueError: the weights were dropped and none have been loaded since.
            UserError: the trainers have left too little of it.
        """
        if not self.is_asleep:
            return "awake already"
        if not self.has_weights:
            raise ValueError("the engine has slept without its weights: a version has to be loaded before it wakes")
        start = time.perf_counter()
        self.make_room_for_weights()
        free = self._free_gib()
        if free < self._given_gib:
            raise UserError(
                f"cluster.colocate: a generator has given up {self._given_gib:.1f} GiB of its GPU's memory, and the "
                f"trainers have left it {free:.1f}",
                "lower generator.engine.gpu_memory_utilization",
            )
        if not self._engine.wake_up(tags=["kv_cache"]):
            raise RuntimeError("vLLM has not woken: some of its memory is still given up")
        self.is_asleep, self._given_gib = False, 0.0
        return f"awake after {time.perf_counter() - start:.2f} s, {free - self._free_gib():.1f} GiB taken"

    def _free_gib(self) -> float:
        """Of the first worker's GPU. A worker is asked: this process may have no context there."""
        return self._engine.collective_rpc(cast(Any, _free_bytes))[0] / _GIB if self._has_gpu else 0.0


def _free_bytes(worker: Any) -> int:
    del worker
    return torch.cuda.mem_get_info()[0]
