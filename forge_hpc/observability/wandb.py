"""Weights & Biases, for those who ask for it (``logging.wandb``): it neither holds up nor ends a training."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Mapping
from queue import SimpleQueue
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.files import atomic_write_text, is_there, sync_dir
from forge_hpc.run_dir import RunDir

logger = logging.getLogger(__name__)
START_S = 30.0
"""A run that has not trained yet waits so long to hear whether somebody is logged in."""
FINISH_S = 15.0
THREAD = "wandb"


class WandbWriter:
    """Sends scalars to one W&B run. Its random id is kept in the run directory, so that a restart continues it and no
    other run does, whatever the directories are called.

    W&B's own environment variables say where to (``WANDB_MODE=offline``, ``WANDB_PROJECT``, ``WANDB_API_KEY``). All
    calls are made in a thread of their own: one that fails or hangs is said once in the log, costs the curves there
    from then on, and nothing else. Nor does ``close`` wait: see ``finish_runs``.

    Raises:
        UserError: nothing was trained yet, and wandb is not installed or nobody is logged in.
    """

    def __init__(self, run_dir: RunDir, resume_step: int) -> None:
        self._run_dir = run_dir
        self._points: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        self._error: Exception | None = None
        self._started = threading.Event()
        earlier = _threads()
        self._thread = threading.Thread(target=self._send, args=(earlier,), name=THREAD, daemon=True)
        self._thread.start()
        if resume_step == 0:
            self._started.wait(START_S)
            if isinstance(self._error, UserError):
                raise self._error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each curve. W&B drops steps that it has already."""
        if self._thread.is_alive():
            self._points.put((step, dict(values)))

    def close(self) -> None:
        """Have the rest sent, beside whatever comes next."""
        self._points.put(None)

    def _send(self, earlier: list[threading.Thread]) -> None:
        try:
            for thread in earlier:  # of this run, before its trainers were lost: W&B has one writer at a time
                thread.join()
            run = self._start()
            self._started.set()
            for step, values in iter(self._points.get, None):
                run.log(values, step=step)
            run.finish()
        except Exception as error:
            self._error = error
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("nothing more is sent to W&B, the training goes on: %s", reason)
        finally:
            self._started.set()

    def _start(self) -> Any:
        try:
            import wandb
        except ImportError:
            raise UserError("logging.wandb is true, but wandb is not installed", "pip install wandb") from None
        path, name = self._run_dir.path, self._run_dir.name
        settings = wandb.Settings(console="off", silent=True)
        try:
            return wandb.init(id=_run_id(self._run_dir), name=name, dir=str(path), resume="allow", settings=settings)
        except wandb.errors.UsageError as error:
            raise UserError(f"wandb does not start: {error}", "wandb login, or set WANDB_MODE=offline") from None


def finish_runs(timeout_s: float = FINISH_S) -> None:
    """Wait until what was written and closed is at W&B, but no longer than ``timeout_s``. For the end of a process,
    when all that the run needs itself is saved."""
    deadline = time.monotonic() + timeout_s
    for thread in _threads():
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            logger.warning("W&B has not finished within %.0f s; `wandb sync` may send what is left", timeout_s)


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def _run_id(run_dir: RunDir) -> str:
    path = run_dir.path / "wandb-id"
    if not is_there(path):
        atomic_write_text(path, uuid.uuid4().hex + "\n")
        sync_dir(run_dir.path)
    return path.read_text(encoding="utf-8").strip()
