"""Traces of single steps (``profile.steps``), for Perfetto: one file a process, ``logs/…/profile-step-N/ROLE.json.gz``.

Trainers trace their optimizer step, generators all that they do from the end of the training of the step before, and
the controller writes spans of what it waits for. Nothing here costs anything in other steps.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forge_hpc.run_dir import make_private_dir

logger = logging.getLogger(__name__)
_profiler: Any = None


def trace_dir(log_dir: Path, step: int) -> Path:
    """Where the traces of a step are."""
    return log_dir / f"profile-step-{step}"


def start_trace(worker: Any = None) -> None:
    """Begin to trace this process: the calls of this thread, and what runs on the GPU. ``worker`` is vLLM's."""
    from torch.profiler import ProfilerActivity, profile, supported_activities

    del worker
    global _profiler
    if _profiler is None:
        wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA}
        _profiler = profile(activities=list(wanted & supported_activities()))
        _profiler.start()


def stop_trace(worker: Any, file: Path) -> None:
    """End it, in the same thread, and write it; of a tensor-parallel worker of vLLM with its rank in the name."""
    global _profiler
    profiler, _profiler = _profiler, None
    if profiler is None:
        return
    profiler.stop()
    if worker is not None and worker.parallel_config.tensor_parallel_size > 1:
        file = file.with_name(file.name.replace(".json", f"-worker-{worker.rank}.json"))
    try:
        make_private_dir(file.parent)
        profiler.export_chrome_trace(str(file))
    except (OSError, RuntimeError) as error:  # a full disk, say: the step matters more
        logger.warning("the trace %s cannot be written: %s", file, error)


@contextlib.contextmanager
def traced(file: Path | None) -> Iterator[None]:
    """Trace the body in this thread; where ``file`` is None nothing happens."""
    if file is None:
        yield
        return
    start_trace()
    try:
        yield
    finally:
        stop_trace(None, file)


class Spans:
    """What the controller does in a step, as a Chrome trace; recorded where ``begin`` was called."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] | None = None

    @property
    def is_recording(self) -> bool:
        return self._events is not None

    def begin(self) -> None:
        """Record from now on."""
        self._events = []

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """The body's duration."""
        start = time.time()
        try:
            yield
        finally:
            if self._events is not None:
                duration = time.time() - start
                self._events.append(
                    {"name": name, "ph": "X", "ts": 1e6 * start, "dur": 1e6 * duration, "pid": "controller", "tid": 0}
                )

    def end(self, file: Path) -> None:
        """Write what has been recorded. Blocks for a small file."""
        events, self._events = self._events, None
        try:
            make_private_dir(file.parent)
            file.write_bytes(gzip.compress(json.dumps({"traceEvents": events or []}).encode()))
        except OSError as error:
            logger.warning("the trace %s cannot be written: %s", file, error)
