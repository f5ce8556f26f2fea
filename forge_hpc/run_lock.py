"""The lock of a run directory: one start of one job works in it, whatever has become of the others.

    .lock       a POSIX lock: ends with the process that holds it, however that dies, and on most shared file systems
                reaches over hosts; some mounts keep it to one host, or have none
    lock.json   the holder's record: who it is, and a count that moves every LOCK_HEARTBEAT_S while it lives

    what a new start finds                                  what it does
    no record                                               takes the directory
    a record of this machine (same boot id)                 takes it if the POSIX lock is free: that is certain here
    a record of an earlier start of the same Slurm job      claims it, and takes it once the earlier start has gone
    any other record                                        takes it once it has not changed for LOCK_STALE_S

Nothing depends on a time of day: a record counts as alive when it *changes*, by the looker's own monotonic clock.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from errno import EACCES, EAGAIN, ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Any, ClassVar, Self

from forge_hpc.config.errors import UserError
from forge_hpc.files import atomic_write_json, open_private, reading

LOCK_HEARTBEAT_S = 5.0
LOCK_STALE_S = 20.0
"""Longer than a beat and what a holder that has lost the directory takes to end its processes."""
LOCK_TAKEOVER_S = 60.0
"""An earlier start of the same job that has not gone by then is not waited for any longer."""

logger = logging.getLogger(__name__)
Record = dict[str, Any]


class RunDirLock:
    """Excludes a second job from a run directory, outlives a dead holder, and fences off earlier starts of its own job.

    A node that is cut off keeps its processes although Slurm has started the job again elsewhere. The later start (same
    job, larger ``requeues``) writes its record over the earlier one's. That one sees it at its next beat and sets
    ``lost``, and its supervisor ends what it runs. The later start goes on when the earlier has gone: when a POSIX lock
    that was refused is granted, or, where the lock may not reach the other host, when its claim has stood for
    ``stale_s``. An earlier start that can still write has by then seen the claim or beaten over it; from one that beats
    over it the directory is claimed again, and one that has not gone after ``LOCK_TAKEOVER_S`` is an error.

    ``lost`` is set if another process took the directory over: a later start of this job, or any job after this
    process stood still for longer than ``stale_s``. Whoever holds the lock must then end its work and write nothing.

    Args:
        path: the run directory.
        job_id: of Slurm; None for a run outside it, which no other start supersedes.
        requeues: how often Slurm has started this job again.
        stop: called at every look while waiting, at least once a second; what it raises ends the wait.
        stale_s: how long a record of another machine must not have changed to count as dead.

    Raises:
        UserError: a live job holds the directory, or it cannot be locked.
    """

    _held: ClassVar[set[Path]] = set()  # POSIX locks do not exclude the own process

    def __init__(
        self,
        path: Path,
        job_id: str | None,
        *,
        requeues: int = 0,
        stop: Callable[[], None] | None = None,
        stale_s: float = LOCK_STALE_S,
    ) -> None:
        self.lost = threading.Event()
        self._path = path
        self._beats = 0
        self._record: Record = {
            "job_id": job_id,
            "restart": requeues,
            "host": socket.gethostname(),
            "boot_id": boot_id(),
            "pid": os.getpid(),
            "token": uuid.uuid4().hex,
        }
        if path in self._held:
            raise self._busy(read_record(path) or self._record)
        try:
            self._fd = open_private(path / ".lock", os.O_RDWR)
        except OSError as error:
            raise UserError(f"cannot lock the run directory {path}: {error.strerror}") from None
        try:
            self._acquire(stale_s, stop or (lambda: None))
            self._beat()
        except BaseException as error:
            with suppress(OSError, UserError):
                self._withdraw()
            os.close(self._fd)
            if isinstance(error, OSError):
                raise UserError(f"cannot lock the run directory {path}: {error.strerror}") from error
            raise
        self._held.add(path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_released, name="run-dir-lock", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the directory back. A second call does nothing."""
        if self._path not in self._held:
            return
        self._stop.set()
        self._thread.join()
        with suppress(OSError, UserError):  # a full or vanished file system must not hide why the run ends
            self._withdraw()
        os.close(self._fd)
        self._held.discard(self._path)

    # ---- taking it

    def _acquire(self, stale_s: float, stop: Callable[[], None]) -> None:
        """Return when nobody else works in the directory."""
        began = quiet_since = claimed = time.monotonic()
        reaches = False  # a lock that was refused and then granted tells that its holder has gone, wherever it was
        warned = False
        seen: Record | None = None
        earlier: Record | None = None  # the start that we have claimed from
        while True:
            posix = self._try_posix_lock()
            if posix is None and not warned:
                logger.warning("%s has no file locks: the lock relies on heartbeats alone", self._path)
                warned = True
            reaches = reaches or posix is False
            record = read_record(self._path)
            now = time.monotonic()
            if record is None:
                if posix is not False:
                    return
                if earlier is None and now - began > LOCK_HEARTBEAT_S:  # longer than a start or an end takes
                    raise self._busy(None)
            elif not self._is_own(record):
                if posix and record.get("boot_id") == self._record["boot_id"]:
                    return
                if self._supersedes(record):
                    if earlier is None:
                        logger.warning("taking %s over from an earlier start: %s", self._path, _describe(record))
                    earlier, quiet_since, claimed = record, now, now
                    self._beat()
                elif earlier is not None or posix is False or (seen is not None and record != seen):
                    raise self._busy(record)
                elif seen is None:
                    logger.info("waiting up to %.0f s to see whether %s still runs", stale_s, _describe(record))
                    seen, quiet_since = record, now
            elif now - claimed >= LOCK_HEARTBEAT_S:  # ours: others must see that this start lives
                claimed = now
                self._beat()
            if posix and earlier is not None and (reaches or earlier.get("boot_id") == self._record["boot_id"]):
                return
            if posix is not False and now - quiet_since >= stale_s:
                return
            if earlier is not None and now - began > max(LOCK_TAKEOVER_S, 2 * stale_s):
                raise UserError(
                    f"an earlier start of job {earlier.get('job_id')} still works in {self._path} and does not let go: "
                    f"host {earlier.get('host')}, pid {earlier.get('pid')}",
                    "end that process, or have its node drained, and submit again",
                )
            stop()
            time.sleep(min(1.0, stale_s / 10))

    def _try_posix_lock(self) -> bool | None:
        """True if it is ours, False if another process has it, None where the file system has no locks."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (EAGAIN, EACCES):
                return False
            if error.errno not in (ENOLCK, ENOSYS, EOPNOTSUPP):
                raise
            return None
        return True

    def _busy(self, holder: Record | None) -> UserError:
        who = _describe(holder) if holder else "another process"
        return UserError(
            f"the run directory {self._path} is in use by {who}",
            "wait for it or cancel it (forge-hpc cancel), or choose another with --run-dir",
        )

    # ---- holding it

    def _is_own(self, record: Record) -> bool:
        return record.get("token") == self._record["token"]

    def _supersedes(self, record: Record) -> bool:
        """Whether the record is of an earlier start of our Slurm job."""
        same_job = self._record["job_id"] is not None and record.get("job_id") == self._record["job_id"]
        return same_job and record.get("restart", 0) < self._record["restart"]

    def _beat(self) -> None:
        self._beats += 1
        # The time is for people; the count makes every beat a change, whatever the clock does.
        atomic_write_json(self._path / "lock.json", self._record | {"heartbeat": time.time(), "beats": self._beats})

    def _withdraw(self) -> None:
        """Remove our record, if it is still ours."""
        record = read_record(self._path)
        if record is not None and self._is_own(record):
            (self._path / "lock.json").unlink(missing_ok=True)

    def _beat_until_released(self) -> None:
        while not self._stop.wait(LOCK_HEARTBEAT_S):
            try:
                record = read_record(self._path)
                # A beat of an earlier start may land late: it is not it that takes over.
                if record is not None and not self._is_own(record) and not self._supersedes(record):
                    logger.error("%s was taken over by %s", self._path, _describe(record))
                    self.lost.set()
                    return
                self._beat()
            except (OSError, UserError) as error:  # a full disk, a pause of the file system: the next beat may work
                logger.warning("no heartbeat in %s: %s", self._path / "lock.json", error)


def boot_id() -> str:
    """Names this machine from boot to shutdown."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else socket.gethostname()


def read_record(path: Path) -> Record | None:
    """Who holds, or held and died with, the lock of the run directory ``path``: job_id, restart, host, pid, …

    Raises:
        UserError: another user's, or not a record.
    """
    file = path / "lock.json"
    try:
        with reading(path):
            record = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}", "remove it if the run is not going on") from None
    if not isinstance(record, dict):
        raise UserError(f"{file} is damaged: not a record", "remove it if the run is not going on")
    return record


def is_locked(path: Path, watch_s: float = 2 * LOCK_HEARTBEAT_S + 1) -> bool:
    """Whether a live process holds the run directory ``path``.

    At once for a holder on this machine. For one on another, whose POSIX lock may not reach here, its record is watched
    for a beat for at most ``watch_s``.
    """
    holder = read_record(path)
    if holder is None:
        return False
    if path in RunDirLock._held:
        return True
    taken = _posix_lock_is_taken(path / ".lock")
    if taken or (taken is False and holder.get("boot_id") == boot_id()):
        return bool(taken)
    deadline = time.monotonic() + watch_s
    while time.monotonic() < deadline:
        time.sleep(min(0.5, watch_s / 10))
        now = read_record(path)
        if now != holder:
            return now is not None
    return False


def _posix_lock_is_taken(path: Path) -> bool | None:
    """Asks without taking it, so that a real start is never in its way. None where there is no answer."""
    flock = "hhqqi4x"  # struct flock of Linux on 64-bit machines
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        answer = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack(flock, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return None
    finally:
        os.close(fd)
    return struct.unpack(flock, answer)[0] != fcntl.F_UNLCK


def _describe(holder: Record) -> str:
    job = f"job {holder['job_id']}" if holder.get("job_id") else "a local run"
    return f"{job} (host {holder.get('host')}, pid {holder.get('pid')})"
