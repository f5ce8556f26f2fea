"""The run directory: the one place on a shared file system that holds everything that a run is.

Every command takes it, a restarted job knows what to do from it alone, and its names are public. No torch here.

Example:
    run_dir = RunDir("runs/demo").create()
    with run_dir.lock(job_id="123"):
        run_dir.write_status(state="running", step=0)
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from errno import EACCES, EAGAIN, ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Any, ClassVar, Self

from forge_hpc.config.errors import UserError

STATES = ("pending", "starting", "running", "saving", "preempted", "completed", "failed", "cancelled")
TERMINAL_STATES = ("completed", "failed", "cancelled")
LOCK_HEARTBEAT_S = 5.0
LOCK_STALE_S = 20.0

logger = logging.getLogger(__name__)


def make_private_dir(path: Path) -> Path:
    """Create ``path`` with mode 0700 whatever the umask; parents get default modes. An existing one is left alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        path.chmod(0o700)
    return path


def open_private(path: Path, flags: int) -> int:
    """``os.open`` that creates with mode 0600 whatever the umask; the descriptor is not inherited."""
    fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if stat.S_IMODE(os.fstat(fd).st_mode) != 0o600:
        os.fchmod(fd, 0o600)
    return fd


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What another user's permissions forbid to read below ``path`` is a UserError."""
    try:
        yield
    except PermissionError as error:
        where = error.filename or path
        raise UserError(
            f"no permission to read {where}", "a run directory is its owner's alone; name another"
        ) from None


def atomic_write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8, mode 0600): a reader, and a crash, see the old or the new content only."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    fd = open_private(temporary, os.O_WRONLY | os.O_EXCL)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_json(path: Path, value: Any) -> None:
    """``atomic_write_text`` of ``value`` as JSON."""
    atomic_write_text(path, json.dumps(value, indent=2) + "\n")


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
    lead_s: float = 0.0
    """Seconds that the run needs to finish a step, save and leave; measured, 0 before it was."""

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
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def warmstart(self) -> Path:
        return self.path / "warmstart"

    @property
    def tls(self) -> Path:
        return self.path / "tls"

    @property
    def rendezvous(self) -> Path:
        return self.path / "rendezvous"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def log_dir(self, job_id: str | None, restart: int) -> Path:
        """``logs/JOB_ID.RESTART``; ``logs/local.RESTART`` outside Slurm (``job_id`` None)."""
        return self.logs / f"{job_id or 'local'}.{restart}"

    def latest_log_dir(self) -> Path | None:
        """The log directory of the newest start, by modification time."""
        with reading(self.path):
            if not self.logs.is_dir():
                return None
            starts = [path for path in self.logs.iterdir() if re.fullmatch(r".+\.\d+", path.name) and path.is_dir()]
            return max(starts, key=lambda path: (path.stat().st_mtime, path.name), default=None)

    # ------------------------------------------------------------------------------------------------ creation
    @property
    def exists(self) -> bool:
        with reading(self.path):
            return self.path.is_dir()

    @property
    def has_config(self) -> bool:
        """Whether it is the directory of a run."""
        with reading(self.path):
            return self.config.exists()

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
            probe = self.path / f".write-test-{uuid.uuid4().hex[:12]}"
            os.close(open_private(probe, os.O_WRONLY | os.O_EXCL))
            probe.unlink()
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
        names = [path.name for path in self.logs.iterdir()] if self.logs.is_dir() else []
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
            UserError: ``status.json`` is not one that this project wrote, or is another user's.
        """
        try:
            with reading(self.path):
                value = json.loads(self.status.read_text(encoding="utf-8"))
            known = {field.name for field in fields(Status)}
            return Status(**{key: item for key, item in value.items() if key in known})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{self.status} is damaged: {error}", "remove it; the run writes it anew") from None

    def write_status(
        self,
        *,
        state: str | None = None,
        step: int | None = None,
        policy_version: int | None = None,
        restarts: int | None = None,
        job_id: str | None = None,
        message: str | None = None,
        lead_s: float | None = None,
    ) -> Status:
        """Replace ``status.json`` atomically; what is not given stays as it was, the heartbeat becomes now.

        A new ``state`` without a ``message`` clears the old message, an empty ``job_id`` the old job.
        The first write needs a ``state``.

        Raises:
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
            "lead_s": lead_s,
        }
        new = replace(old, heartbeat=time.time(), **{key: item for key, item in given.items() if item is not None})
        new = replace(new, job_id=new.job_id or None)
        atomic_write_json(self.status, asdict(new))
        return new

    # ------------------------------------------------------------------------------------------------ lock
    def lock(self, job_id: str | None = None, stale_s: float = LOCK_STALE_S) -> RunDirLock:
        """Take the directory for this process; a context manager. See ``RunDirLock``.

        Raises:
            UserError: a live job holds it.
        """
        return RunDirLock(self, job_id, stale_s)

    def lock_holder(self) -> dict[str, Any] | None:
        """The record of who holds, or held and died with, the lock: job_id, host, pid, heartbeat (unix s)."""
        try:
            with reading(self.path):
                return json.loads((self.path / "lock.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None


class RunDirLock:
    """Excludes a second job from a run directory, and outlives a dead holder.

    Two parts. A POSIX lock on ``.lock`` ends with the process that holds it, however that dies, and on NFS reaches
    over hosts. Some mounts keep such locks to one host, or have none, so the holder also beats in ``lock.json``.
    A record left by another machine counts as dead once it has not changed for ``stale_s`` by our own clock
    (clocks of hosts differ); one of the same machine (same boot id), or an earlier start of the same Slurm job, is
    dead as soon as the POSIX lock is ours.

    ``lost`` is set if another process took the directory over, which happens only to one that stood still for long.
    """

    _held: ClassVar[set[Path]] = set()  # POSIX locks do not exclude the own process

    def __init__(self, run_dir: RunDir, job_id: str | None, stale_s: float) -> None:
        self.lost = threading.Event()
        self._run_dir = run_dir
        self._record_path = run_dir.path / "lock.json"
        boot_id = Path("/proc/sys/kernel/random/boot_id")
        self._record = {
            "job_id": job_id,
            "host": socket.gethostname(),
            "boot_id": boot_id.read_text().strip() if boot_id.exists() else socket.gethostname(),
            "pid": os.getpid(),
            "token": uuid.uuid4().hex,
        }
        if run_dir.path in self._held:
            raise self._busy(run_dir.lock_holder() or self._record)
        try:
            self._fd = open_private(run_dir.path / ".lock", os.O_RDWR)
        except OSError as error:
            raise UserError(f"cannot lock the run directory {run_dir}: {error.strerror}") from None
        try:
            posix = self._take_posix_lock()
            self._wait_for_dead_holder(posix, stale_s)
            self._beat()
        except BaseException:
            os.close(self._fd)
            raise
        self._held.add(run_dir.path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_released, name="run-dir-lock", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the directory back. A second call does nothing."""
        if self._run_dir.path not in self._held:
            return
        self._stop.set()
        self._thread.join()
        with suppress(OSError, UserError):  # a full or vanished file system must not hide why the run ends
            if self._is_ours():
                self._record_path.unlink(missing_ok=True)
        os.close(self._fd)
        self._held.discard(self._run_dir.path)

    def _take_posix_lock(self) -> bool:
        """True if the lock is ours, False if the file system has none."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (EAGAIN, EACCES):
                raise self._busy(self._run_dir.lock_holder()) from None
            if error.errno not in (ENOLCK, ENOSYS, EOPNOTSUPP):
                raise
            logger.warning("%s has no file locks: the lock relies on heartbeats alone", self._run_dir)
            return False
        return True

    def _wait_for_dead_holder(self, posix: bool, stale_s: float) -> None:
        holder = self._run_dir.lock_holder()
        if holder is None:
            return
        same_machine = holder["boot_id"] == self._record["boot_id"]
        same_job = holder["job_id"] is not None and holder["job_id"] == self._record["job_id"]
        if posix and (same_machine or same_job):
            return
        logger.info("waiting up to %.0f s to see whether %s still runs", stale_s, _describe(holder))
        deadline = time.monotonic() + stale_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, stale_s / 10))
            now = self._run_dir.lock_holder()
            if now is None:
                return
            if now != holder:
                raise self._busy(now)

    def _busy(self, holder: dict[str, Any] | None) -> UserError:
        who = _describe(holder) if holder else "another process"
        return UserError(
            f"the run directory {self._run_dir} is in use by {who}",
            "wait for it or cancel it (forge-hpc cancel), or choose another with --run-dir",
        )

    def _is_ours(self) -> bool:
        holder = self._run_dir.lock_holder()
        return holder is None or holder["token"] == self._record["token"]

    def _beat(self) -> None:
        atomic_write_json(self._record_path, self._record | {"heartbeat": time.time()})

    def _beat_until_released(self) -> None:
        while not self._stop.wait(LOCK_HEARTBEAT_S):
            try:
                if not self._is_ours():
                    logger.error("%s was taken over by %s", self._run_dir, self._run_dir.lock_holder())
                    self.lost.set()
                    return
                self._beat()
            except (
                OSError,
                UserError,
            ) as error:  # a full disk or an NFS pause: the next beat may work, the POSIX lock stays
                logger.warning("no heartbeat in %s: %s", self._record_path, error)


def _describe(holder: dict[str, Any]) -> str:
    job = f"job {holder['job_id']}" if holder.get("job_id") else "a local run"
    return f"{job} (host {holder.get('host')}, pid {holder.get('pid')})"
