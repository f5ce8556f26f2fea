"""The lock of a run directory: one start of one job works in it, whatever has become of the others.

    .lock       a POSIX lock: ends with the process that holds it, however that dies, and on most shared file systems
                reaches over hosts; some mounts keep it to one host, or have none. Its time of modification is the
                heartbeat: it moves every LOCK_HEARTBEAT_S while the holder lives
    lock.json   the holder's record: who it is, and its term, which is larger than that of all before it. A holder that
                ends leaves it behind as released (a tombstone): a record that is not there was taken away

    what a new start finds                                  what it does
    no record, or a released one                            takes the directory if the POSIX lock is free
    a record of this machine (same boot id)                 takes it if the POSIX lock is free: that is certain here
    a record of an earlier start of the same Slurm job      claims it, and takes it once the earlier start has gone
    any other record                                        takes it once it has not moved for LOCK_STALE_S, and for
                                                            LOCK_DEAD_S where the POSIX lock is not free

    what a holder finds at a beat                           what it does
    its own record                                          goes on
    one of a smaller term                                   writes its own again: that was a late write of a dead holder
    any other, or none; its POSIX lock given to another     has lost the directory

Nothing depends on a time of day: a holder counts as alive when something of it *moves*, by the looker's own monotonic
clock, in which a look that the file server held up counts for one look.
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
from forge_hpc.files import Look, atomic_write_json, in_thread, look, open_private, read_text, reading

LOCK_HEARTBEAT_S = 5.0
LOCK_STALE_S = 20.0
"""Longer than a beat and what a holder that has lost the directory takes to end its processes."""
LOCK_DEAD_S = 100.0
"""Longer than any lease (90 s on Linux servers): a holder on another machine that has not moved for so long is dead, or
cut off from the file server, whatever becomes of its POSIX lock. NFS v3 keeps that until the dead machine boots."""
LOCK_TAKEOVER_S = 150.0
"""An earlier start of the same job that still moves then is not waited for any longer."""

logger = logging.getLogger(__name__)
Record = dict[str, Any]


class RunDirLock:
    """Excludes a second job from a run directory, outlives a dead holder, and fences off earlier starts of its own job.

    A node that is cut off keeps its processes although Slurm has started the job again elsewhere. The later start (same
    job, larger ``requeues``) writes its record over the earlier one's. That one sees it at its next beat and sets
    ``lost``, and its supervisor ends what it runs. The later start goes on when the earlier has gone: when a POSIX lock
    that was refused is granted, or, where the lock may not reach the other host, when nothing of the earlier has moved
    for ``stale_s``. An earlier start that can still write has by then seen the claim; one that takes no notice is an
    error after ``LOCK_TAKEOVER_S``. A claim that is given up puts the record back that it found.

    ``lost`` is set if another process took the directory over: a later start of this job, or any job after this
    process stood still, or was cut off, for too long. Whoever holds the lock must then end its work and write nothing.

    The file system is used by threads alone: where it hangs, ``stop`` is called all the same.

    Args:
        path: the run directory.
        job_id: of Slurm; None for a run outside it, which no other start supersedes.
        requeues: how often Slurm has started this job again.
        stop: called several times a second while waiting; what it raises ends the wait.
        stale_s: how long a holder on another machine must not have moved to count as dead.

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
        self._signs = Signs(path)
        self._beat_ns = 0
        self._count = 0
        self._warned = False
        self._has_posix_lock = False
        self._claimed_from: Record | None = None
        self._record: Record = {
            "job_id": job_id,
            "restart": requeues,
            "host": socket.gethostname(),
            "boot_id": boot_id(),
            "pid": os.getpid(),
            "token": uuid.uuid4().hex,
            "term": 1,
        }
        if path in self._held:
            raise self._busy(read_record(path) or self._record)
        self._given_up = threading.Event()  # by who waits for us
        self._answered = threading.Event()
        self._take(stale_s, stop or (lambda: None))
        self._held.add(path)
        self._stop = threading.Event()
        loops = (self._beat_until_released, self._ask_for_the_lock_until_released)
        self._threads = [threading.Thread(target=loop, name="run-dir-lock", daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the directory back. A second call does nothing."""
        if self._path not in self._held:
            return
        self._stop.set()

        def leave() -> None:
            for thread in self._threads:
                thread.join()
            try:
                if not self.lost.is_set():
                    self._withdraw(self._record | {"released": True})
            finally:
                os.close(self._fd)

        with suppress(OSError, UserError):  # a full or vanished file system must not hide why the run ends
            in_thread(leave, within_s=2 * LOCK_STALE_S)
        self._held.discard(self._path)

    def confirm(self, within_s: float) -> bool:
        """Whether it is still ours, asked now; what the last beat has said where the file system does not answer."""
        with suppress(OSError, UserError):
            in_thread(self._look_for_others, within_s=within_s)
        return not self.lost.is_set()

    # ---- taking it

    def _take(self, stale_s: float, stop: Callable[[], None]) -> None:
        """Return when the directory is ours. Beside a thread that may hang in the file system."""
        began, warned = time.monotonic(), False

        def watch() -> None:
            nonlocal warned
            stop()
            if not warned and not self._answered.is_set() and time.monotonic() - began > LOCK_HEARTBEAT_S:
                logger.warning(
                    "the file server does not answer in %s; where it waits for a host that died, it does after the "
                    "lease (about 90 s)",
                    self._path,
                )
                warned = True

        finished = threading.Event()

        def take() -> None:
            try:
                self._open_and_acquire(stale_s)
            finally:
                finished.set()

        try:
            in_thread(take, watch)
        except OSError as error:
            raise UserError(f"cannot lock the run directory {self._path}: {error.strerror}") from error
        finally:
            self._given_up.set()
            finished.wait(2.0)

    def _open_and_acquire(self, stale_s: float) -> None:
        # For writing alone: one that may read too gets a delegation, for which the next start would have to wait
        # should this host die.
        self._fd = open_private(self._path / ".lock", os.O_WRONLY)
        try:
            self._acquire(stale_s)
            self._write_record()
            if (record := self._signs.record()) is None or not self._is_own(record):  # another was as fast
                raise self._busy(record)
            self._beat()
            if self._given_up.is_set():
                raise InterruptedError
        except BaseException:
            with suppress(OSError, UserError):
                self._withdraw(self._claimed_from or self._record | {"released": True})
            os.close(self._fd)
            raise

    def _acquire(self, stale_s: float) -> None:
        """Return when nobody else works in the directory."""
        pause, dead_s = min(1.0, stale_s / 10), max(LOCK_DEAD_S, stale_s)
        waited = quiet = since_claim = 0.0
        reaches = False  # a lock that was refused and then granted tells that its holder has gone, wherever it was
        seen: tuple[Record | None, int | None] | None = None
        looked = time.monotonic()
        while not self._given_up.is_set():
            posix = self._try_posix_lock()
            record, beat = self._signs.record(), self._signs.beat()
            self._answered.set()
            # Time for which the file server kept us waiting is no silence: the holder may have waited as well.
            now = time.monotonic()
            passed, looked = min(now - looked, 2 * pause), now
            waited, quiet, since_claim = waited + passed, quiet + passed, since_claim + passed
            ours = record is not None and self._is_own(record)
            sign = (None if ours else record, beat)
            moved, seen, is_first_look = sign != seen, sign, seen is None
            if moved:
                quiet = 0.0
            reaches = reaches or posix is False
            holder = self._claimed_from if ours else record
            is_here = holder is not None and holder.get("boot_id") == self._record["boot_id"]
            has_gone = posix and (is_here or (ours and reaches))
            if record is None or record.get("released"):
                if posix is not False or quiet >= stale_s:  # else somebody begins or ends, or has died elsewhere
                    return
            elif has_gone or (posix is not False and quiet >= stale_s) or (quiet >= dead_s and not is_here):
                return
            elif not ours and self._supersedes(record):
                self._claim(record)
                quiet = since_claim = 0.0
            elif not ours and (self._claimed_from or (posix is False and is_here) or (moved and not is_first_look)):
                raise self._busy(record)
            elif not ours and is_first_look:
                limit_s = dead_s if posix is False else stale_s
                logger.warning("waiting up to %.0f s to see whether %s still runs", limit_s, _describe(record))
            elif ours and since_claim >= LOCK_HEARTBEAT_S:  # others must see that this start lives
                self._write_record()
                since_claim = 0.0
            if self._claimed_from is not None and waited > max(LOCK_TAKEOVER_S, 2 * stale_s):
                raise self._does_not_let_go(self._claimed_from)
            self._given_up.wait(pause)
        raise InterruptedError("given up")

    def _claim(self, record: Record) -> None:
        """Tell an earlier start of our job that it is over."""
        if self._claimed_from is None:
            logger.warning("taking %s over from an earlier start: %s", self._path, _describe(record))
            self._claimed_from = record
        self._write_record()

    def _try_posix_lock(self) -> bool | None:
        """True if it is ours, False if another process has it, None where the file system has no locks."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (EAGAIN, EACCES):
                return False
            if error.errno not in (ENOLCK, ENOSYS, EOPNOTSUPP):
                raise
            if not self._warned:
                logger.warning("%s has no file locks: the lock relies on heartbeats alone", self._path)
                self._warned = True
            return None
        self._has_posix_lock = True
        return True

    def _busy(self, holder: Record | None) -> UserError:
        who = _describe(holder) if holder else "another process"
        return UserError(
            f"the run directory {self._path} is in use by {who}",
            "wait for it or cancel it (forge-hpc cancel), or choose another with --run-dir",
        )

    def _does_not_let_go(self, earlier: Record) -> UserError:
        return UserError(
            f"an earlier start of job {earlier.get('job_id')} still works in {self._path} and does not let go: "
            f"host {earlier.get('host')}, pid {earlier.get('pid')}",
            "end that process, or have its node drained, and submit again",
        )

    # ---- holding it

    def _is_own(self, record: Record) -> bool:
        return record.get("token") == self._record["token"]

    def _supersedes(self, record: Record) -> bool:
        """Whether the record is of an earlier start of our Slurm job."""
        same_job = self._record["job_id"] is not None and record.get("job_id") == self._record["job_id"]
        return same_job and record.get("restart", 0) < self._record["restart"]

    def _write_record(self) -> None:
        """Leave our record, of a larger term than the one that stands."""
        record = self._signs.record()
        if record is not None and not self._is_own(record):
            self._record["term"] = max(self._record["term"], record.get("term", 0) + 1)
        self._count += 1  # so that each time is a change
        atomic_write_json(self._path / "lock.json", self._record | {"heartbeat": time.time(), "written": self._count})

    def _withdraw(self, instead: Record) -> None:
        """Put another record in the place of ours, if it is still ours."""
        record = self._signs.record()
        if record is not None and self._is_own(record):
            atomic_write_json(self._path / "lock.json", instead)

    def _beat(self) -> None:
        """Move the time of ``.lock``, by a second at least whatever our clock does: some file systems keep no less.

        No name is written, and nobody ever opens the file to read it: neither a full disk nor what a server has
        promised to readers holds this up.
        """
        self._beat_ns = max(time.time_ns(), self._beat_ns + 10**9)
        os.utime(self._fd, ns=(self._beat_ns, self._beat_ns))

    def _beat_until_released(self) -> None:
        while not self._stop.wait(LOCK_HEARTBEAT_S) and not self.lost.is_set():
            for part in (self._beat, self._look_for_others):
                try:
                    part()
                except (OSError, UserError) as error:  # a full disk, a pause of the file system: the next may work
                    logger.warning("no heartbeat in %s: %s", self._path, error)

    def _look_for_others(self) -> None:
        """Set ``lost`` if the directory is another's."""
        record = self._signs.record()
        if record is not None and self._is_own(record):
            return
        # What a dead or an earlier holder had under way may land late: it is not it that takes over.
        if record is not None and (record.get("term", 0) < self._record["term"] or self._supersedes(record)):
            self._write_record()
            return
        by = "somebody removed its record" if record is None else f"taken over by {_describe(record)}"
        logger.error("%s is lost: %s", self._path, by)
        self.lost.set()

    def _ask_for_the_lock_until_released(self) -> None:
        """A server that did not hear of this host for long forgets its locks. In a thread of its own: after the server
        has been down it may wait for minutes until locks are granted again."""
        while not self._stop.wait(LOCK_HEARTBEAT_S) and not self.lost.is_set():
            had = self._has_posix_lock
            try:
                posix = self._try_posix_lock()
            except OSError as error:
                logger.warning("the lock of %s cannot be asked for: %s", self._path, error)
                continue
            if posix is False and had:
                logger.error("%s is lost: its lock was given to another", self._path)
                self.lost.set()


class Signs:
    """What there is to see of a holder, asked of the file server; the record is opened only when it has moved.

    Raises:
        UserError: another user's, or not a record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: Look | None = None
        self._record: Record | None = None

    def record(self) -> Record | None:
        """Who holds, held and died with, or released the lock."""
        file = self._path / "lock.json"
        with reading(self._path):
            found = look(file)
            if found is None:
                self._seen = self._record = None
            elif found != self._seen:
                self._record = _read(file)
                self._seen = found
        return self._record

    def beat(self) -> int | None:
        """The holder's heartbeat, Unix time in nanoseconds by its own clock; None where there never was one."""
        with reading(self._path):
            found = look(self._path / ".lock")
        return None if found is None else found.mtime_ns

    def moving(self) -> tuple[Record | None, int | None]:
        """Changes as long as the holder lives."""
        return self.record(), self.beat()


def boot_id() -> str:
    """Names this machine from boot to shutdown."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else socket.gethostname()


def _read(file: Path) -> Record | None:
    try:
        record = json.loads(read_text(file))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}", "remove it if the run is not going on") from None
    if not isinstance(record, dict):
        raise UserError(f"{file} is damaged: not a record", "remove it if the run is not going on")
    return record


def read_record(path: Path) -> Record | None:
    """Who holds, or held and died with, the lock of the run directory ``path``: job_id, restart, host, pid, heartbeat,
    …; None where nobody does, or it was given back.

    Raises:
        UserError: another user's, or not a record.
    """
    signs = Signs(path)
    record = signs.record()
    if record is None or record.get("released"):
        return None
    beat_ns = signs.beat()
    return record if beat_ns is None else record | {"heartbeat": max(beat_ns / 1e9, record.get("heartbeat", 0.0))}


def is_locked(path: Path, watch_s: float = 2 * LOCK_HEARTBEAT_S + 1) -> bool:
    """Whether a live process holds the run directory ``path``.

    At once for a holder on this machine. One on another is watched for a beat for at most ``watch_s``, in which a look
    that the file server held up counts for one look: its POSIX lock may not reach here, or outlive it.
    """
    signs = Signs(path)
    holder = signs.record()
    if holder is None or holder.get("released"):
        return False
    if path in RunDirLock._held:
        return True
    if holder.get("boot_id") == boot_id() and (taken := _posix_lock_is_taken(path / ".lock")) is not None:
        return taken
    seen, pause, watched, looked = signs.moving(), min(0.5, watch_s / 10), 0.0, time.monotonic()
    while watched < watch_s:
        time.sleep(pause)
        now = time.monotonic()
        watched, looked = watched + min(now - looked, 2 * pause), now
        if (moved := signs.moving()) != seen:
            return moved[0] is not None and not moved[0].get("released")
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
