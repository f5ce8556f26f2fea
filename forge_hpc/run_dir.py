"""The run directory: the one place on a shared file system that holds everything that a run is.

Every command takes it, a restarted job knows what to do from it alone, and its names are public. No torch here.

Example:
    run_dir = RunDir("runs/demo").create()
    with run_dir.lock(job_id="123"):
        run_dir.write_status(state="running", step=0)
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from forge_hpc.config.errors import UserError
from forge_hpc.files import Look, is_there, look, read_text, reading, refuse_newer, try_writing
from forge_hpc.files import atomic_write_json as atomic_write_json  # known here to all who write into a run directory
from forge_hpc.files import atomic_write_text as atomic_write_text
from forge_hpc.files import make_private_dir as make_private_dir
from forge_hpc.files import open_private as open_private
from forge_hpc.run_lock import LOCK_STALE_S, Record, RunDirLock, Signs, is_locked, read_record

STATES = ("pending", "starting", "running", "saving", "preempted", "completed", "failed", "cancelled")
TERMINAL_STATES = ("completed", "failed", "cancelled")
STATUS_FORMAT = 1
"""Of ``status.json``; one without it counts as 1."""


@dataclass(frozen=True, slots=True)
class Status:
    """The content of ``status.json``."""

    state: str
    step: int = 0
    """Optimizer steps done."""
    policy_version: int = 0
    restarts: int = 0
    job_id: str | None = None
    heartbeat: float = 0.0
    """Unix time in seconds of the last write."""
    message: str = ""
    total_steps: int | None = None
    """Optimizer steps of the whole run, 0 where it trains nothing; None where that is not known yet."""
    lead_s: float = 0.0
    """Seconds that the run needs to finish a step, save and leave; measured, 0 before it was."""
    lent: int = 0
    """Generators that other jobs lend it now (docs/join.md)."""

    @property
    def is_terminal(self) -> bool:
        """Nothing will happen any more without a new submission."""
        return self.state in TERMINAL_STATES


class RunDir:
    """Paths and small state of one run. Making the object touches nothing; ``create`` does."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    def __str__(self) -> str:
        return str(self.path)

    # ------------------------------------------------------------------------------------------------ paths
    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def answers(self) -> Path:
        """``step-N.jsonl`` each: the answers of an evaluation."""
        return self.path / "evaluations"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def exports(self) -> Path:
        """Models of steps on the way, by ``forge-hpc export`` and ``checkpoint.export_interval``."""
        return self.path / "exports"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def warmstart(self) -> Path:
        return self.path / "warmstart"

    @property
    def adapters(self) -> Path:
        """The run directories of several adapters on one base (docs/one-base.md), as those of a sweep."""
        return self.path / "adapters"

    @property
    def one_base(self) -> RunDir | None:
        """The run of several adapters on one base that this is one of; None where it is a run of its own."""
        parent = RunDir(self.path.parent.parent)
        return parent if self.path.parent == parent.adapters and parent.has_config else None

    @property
    def tls(self) -> Path:
        return self.path / "tls"

    @property
    def rendezvous(self) -> Path:
        return self.path / "rendezvous"

    @property
    def lent(self) -> Path:
        """``JOB_submission.sh`` and ``lender-JOB.out`` of the jobs that lend it nodes."""
        return self.path / "lent"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def export_of(self, step: int) -> Path:
        return self.exports / f"step-{step:08d}"

    def log_dir(self, job_id: str | None, restart: int) -> Path:
        """``logs/JOB_ID.RESTART``; ``logs/local.RESTART`` outside Slurm (``job_id`` None)."""
        return self.logs / f"{job_id or 'local'}.{restart}"

    def latest_log_dir(self) -> Path | None:
        """The log directory of the newest start, by modification time."""
        with reading(self.path):
            if not is_there(self.logs):
                return None
            starts = [path for path in self.logs.iterdir() if re.fullmatch(r".+\.\d+", path.name) and path.is_dir()]
            return max(starts, key=lambda path: (path.stat().st_mtime, path.name), default=None)

    # ------------------------------------------------------------------------------------------------ creation
    @property
    def exists(self) -> bool:
        with reading(self.path):
            return is_there(self.path) and self.path.is_dir()

    @property
    def has_config(self) -> bool:
        """Whether it is the directory of a run."""
        with reading(self.path):
            return is_there(self.config)

    def create(self) -> Self:
        """Create the directory (mode 0700) where it is missing, and see that it can be written.

        Raises:
            UserError: it cannot be created or written.
        """
        hint = "choose another with --run-dir, on a file system that every node can write"
        try:
            make_private_dir(self.path)
            mode = stat.S_IMODE(self.path.stat().st_mode)
            if mode & 0o077 and (self.config.exists() or not any(self.path.iterdir())):
                self.path.chmod(0o700)
            try_writing(self.path)
        except FileExistsError:
            raise UserError(f"cannot create the run directory {self.path}: a file is in the way", hint) from None
        except OSError as error:
            raise UserError(f"cannot write the run directory {self.path}: {error.strerror}", hint) from None
        return self

    def next_restart(self, job_id: str | None = None) -> int:
        """The number of the next start under ``job_id``: 0 for the first, else one more than the newest log directory.

        Ask on one node only and hand the answer on: the log directory, once made, changes it.
        """
        prefix = f"{job_id or 'local'}."
        names = [path.name for path in self.logs.iterdir()] if is_there(self.logs) else []
        numbers = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)

    def create_log_dir(self, job_id: str | None, restart: int) -> Path:
        """Create ``log_dir`` (0700) where it is missing."""
        make_private_dir(self.logs)
        return make_private_dir(self.log_dir(job_id, restart))

    # ------------------------------------------------------------------------------------------------ status
    def read_status(self) -> Status | None:
        """The status, or None before the first ``write_status``.

        Raises:
            UserError: ``status.json`` is not one that this project wrote, is another user's, or a newer version's.
        """
        try:
            with reading(self.path):
                value = json.loads(read_text(self.status))
            refuse_newer(self.status, value.get("format"), STATUS_FORMAT)
            known = {field.name for field in fields(Status)}
            return Status(**{key: item for key, item in value.items() if key in known})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, AttributeError) as error:
            hint = "remove it: the run writes it anew, or forge-hpc resume does"
            raise UserError(f"{self.status} is damaged: {error}", hint) from None

    def write_status(
        self,
        *,
        state: str | None = None,
        step: int | None = None,
        policy_version: int | None = None,
        restarts: int | None = None,
        job_id: str | None = None,
        message: str | None = None,
        total_steps: int | None = None,
        lead_s: float | None = None,
        lent: int | None = None,
    ) -> Status:
        """Replace ``status.json`` atomically; what is not given stays as it was, the heartbeat becomes now.

        A new ``state`` without a ``message`` clears the old message, an empty ``job_id`` the old job.
        The first write needs a ``state``. On a full disk the time of modification moves all the same (``heartbeat``).

        Raises:
            OSError: it cannot be written.
            ValueError: ``state`` is not one of ``STATES``.
        """
        if state is not None and state not in STATES:
            raise ValueError(f"unknown state {state!r}; one of {', '.join(STATES)}")
        old = self.read_status()
        if old is None:
            if state is None:
                raise ValueError("the first status needs a state")
            old = Status(state=state)
        if state is not None and state != old.state and message is None:
            message = ""
        given: dict[str, Any] = {
            "state": state,
            "step": step,
            "policy_version": policy_version,
            "restarts": restarts,
            "job_id": job_id,
            "message": message,
            "total_steps": total_steps,
            "lead_s": lead_s,
            "lent": lent,
        }
        new = replace(old, heartbeat=time.time(), **{key: item for key, item in given.items() if item is not None})
        new = replace(new, job_id=new.job_id or None)
        try:
            atomic_write_json(self.status, {"format": STATUS_FORMAT} | asdict(new))
        except OSError:
            with suppress(OSError):
                os.utime(self.status)
            raise
        return new

    def heartbeat(self) -> Look | None:
        """Changes whenever somebody writes the status, or tries to on a full disk; None before the first write.

        Asked of the file server, without opening anything: those who watch read the status when this has moved.
        """
        return look(self.status)

    # ------------------------------------------------------------------------------------------------ lock
    def lock(
        self,
        job_id: str | None = None,
        *,
        requeues: int = 0,
        stop: Callable[[], None] | None = None,
        stale_s: float = LOCK_STALE_S,
    ) -> RunDirLock:
        """Take the directory for this process; a context manager. See ``RunDirLock``.

        Raises:
            UserError: a live job holds it.
        """
        return RunDirLock(self.path, job_id, requeues=requeues, stop=stop, stale_s=stale_s)

    def lock_holder(self) -> Record | None:
        """The record of who holds, or held and died with, the lock: job_id, restart, host, pid, heartbeat (unix s)."""
        return read_record(self.path)

    def is_locked(self) -> bool:
        """Whether a live process holds it: at once for one on this machine, within 11 s for one on another."""
        return is_locked(self.path)

    def lock_beat(self) -> int | None:
        """Moves every few seconds while a process holds it; None where none ever did."""
        return Signs(self.path).beat()
