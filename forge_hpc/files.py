"""Writing small files so that only their owner reads them, and so that nobody sees half of one; and reading what
another host has written, whatever the file system here remembers of it (docs/nfs.md). No torch here."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EINVAL, ENOSYS, EPERM, ESTALE, ETIMEDOUT
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from forge_hpc.config.errors import UserError

T = TypeVar("T")
POLL_S = 0.1
"""How often ``in_thread`` looks."""


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


def try_writing(directory: Path) -> None:
    """Raise OSError where no file can be made in ``directory``. Permissions alone do not tell."""
    probe = directory / f".write-test-{uuid.uuid4().hex[:12]}"
    os.close(open_private(probe, os.O_WRONLY | os.O_EXCL))
    probe.unlink()


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


def temporary_for(path: Path) -> Path:
    """A name beside ``path`` that is this call's alone."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def replace(temporary: Path, path: Path) -> None:
    """Give ``temporary`` the name ``path``, whatever has it."""
    # An NFS server first calls back what readers may keep of the file that goes (read delegations), from a reader that
    # has died for as long as its lease. A rename would wait for that with the whole directory locked on this host.
    with suppress(OSError):
        path.chmod(0o600)
    temporary.replace(path)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8, mode 0600): a reader, and a crash, see the old or the new content only."""
    temporary = temporary_for(path)
    fd = open_private(temporary, os.O_WRONLY | os.O_EXCL)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_json(path: Path, value: Any) -> None:
    """``atomic_write_text`` of ``value`` as JSON."""
    atomic_write_text(path, json.dumps(value, indent=2) + "\n")


def sync_dir(path: Path) -> None:
    """Bring the names in a directory to the disk: what was created, renamed or removed in it stays so."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != EINVAL:  # some network file systems know no fsync of a directory
            raise
    finally:
        os.close(fd)


def refuse_newer(what: Path | str, found: object, known: int) -> None:
    """Raise UserError where the format that a file says it has is above the one ``known`` here."""
    if isinstance(found, int) and found > known:
        raise UserError(
            f"{what} was written by a newer forge_hpc (format {found}, this one knows {known})",
            "update forge_hpc, or choose another --run-dir",
        )


# ---- what another host writes

_statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
_AT_FDCWD, _AT_EMPTY_PATH, _AT_STATX_FORCE_SYNC, _STATX_BASIC_STATS = -100, 0x1000, 0x2000, 0x7FF


class Look(NamedTuple):
    """What tells one content of a file from another."""

    inode: int
    size: int
    mtime_ns: int


def ask(path: Path) -> None:
    """Have the names on the way to ``path`` asked of the file server again.

    An NFS client remembers for up to a minute that a name was absent. Opening the directory ends that.
    """
    for directory in path.absolute().parents:
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            return
        try:
            _look(fd)  # opening alone does not ask for the root of a mount
        finally:
            os.close(fd)
        return


def asking(path: Path, call: Callable[[], T]) -> T:
    """What ``call`` returns, which uses ``path``: where it finds nothing (FileNotFoundError), or what is no longer
    there (ESTALE), it is called once more with the names asked anew."""
    try:
        return call()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != ESTALE:
            raise
    ask(path)
    return call()


def is_there(path: Path) -> bool:
    """``path.exists()`` that asks before it says no."""
    if path.exists():
        return True
    ask(path)
    return path.exists()


def read_text(path: Path) -> str:
    """The text (UTF-8) of a file that another host may just have made or replaced."""
    return asking(path, lambda: path.read_text(encoding="utf-8"))


def look(path: Path | int) -> Look | None:
    """The file as it is now, asked of the file server without opening it; None where it is missing.

    For those who watch: an NFS server promises whoever has opened a file (a read delegation) that it does not change
    behind their back, and makes the file's writer wait should they die.

    Args:
        path: or a descriptor, whose reads then see what has been appended.
    """
    if isinstance(path, int):
        return _look(path)

    def ask_and_look() -> Look:
        ask(path)
        return _look(path)

    try:
        return asking(path, ask_and_look)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _look(path: Path | int) -> Look:
    if _statx is not None:
        name, fd = (b"", path) if isinstance(path, int) else (os.fsencode(path), _AT_FDCWD)
        buffer = ctypes.create_string_buffer(256)
        flags = _AT_STATX_FORCE_SYNC | (0 if name else _AT_EMPTY_PATH)
        if _statx(fd, name, flags, _STATX_BASIC_STATS, buffer) == 0:
            inode, size = struct.unpack_from("QQ", buffer, 32)
            seconds, nanoseconds = struct.unpack_from("qI", buffer, 112)
            return Look(inode, size, seconds * 10**9 + nanoseconds)
        code = ctypes.get_errno()
        if code not in (ENOSYS, EPERM, EINVAL):  # of a kernel, or a container, without it
            raise OSError(code, os.strerror(code), None if isinstance(path, int) else str(path))
    found = os.stat(path)  # noqa: PTH116
    return Look(found.st_ino, found.st_size, found.st_mtime_ns)


def in_thread(work: Callable[[], T], stop: Callable[[], None] | None = None, within_s: float | None = None) -> T:
    """What ``work`` returns or raises. A file system that hangs holds up a thread of its own, and not who called.

    Args:
        stop: called several times a second meanwhile; what it raises ends the wait. The thread goes on.
        within_s: seconds after which it is not waited for any longer.

    Raises:
        TimeoutError: ``within_s`` is over.
    """
    done = threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="file-system", daemon=True).start()
    until = None if within_s is None else time.monotonic() + within_s
    while not done.wait(POLL_S):
        if stop is not None:
            stop()
        if until is not None and time.monotonic() > until:
            raise TimeoutError(ETIMEDOUT, f"the file system has not answered for {within_s:.0f} s")
    if errors:
        raise errors[0]
    return results[0]
