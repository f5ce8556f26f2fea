"""A start's own folders on a node, which its supervisor removes: for files that are memory, in ``/dev/shm``, and for
temporary ones.

What is killed while it writes there leaves what it has written, and in ``/dev/shm`` that is memory of the node until
somebody removes it, whichever job it was. A supervisor that is killed itself leaves the whole folder: it has locked it
(flock, which ends with its process), and the next start on the node removes this user's folders that nobody holds.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "FORGE_HPC_SHARED_MEMORY"
"""The start's folder, in the environment of its processes."""
_SHARED_MEMORY = Path("/dev/shm")
_HOST = base64.b32encode(hashlib.sha256(os.uname().nodename.encode()).digest())[:6].decode().lower()
_PREFIX = f"fhpc{_HOST}-"
"""Of these folders alone: other temporary ones are beside them, and nobody locks those. Where hosts share a directory a
lock may be one of a host alone, so each looks at its own. It is short, since names of sockets in there have 107
characters in all."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Said by a file system that has none."""


class Folder:
    """A start's folder, this user's alone, and its lock.

    Args:
        parent: where it is made; None: where temporary files are.

    Raises:
        OSError: there can be none.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._lock: int | None = None
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            try:
                self._lock = _lock(self.path)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                return  # who cannot lock it leaves it alone, too
            if self._lock is not None and self.path.is_dir():
                return
            self._unlock()  # another start has taken it for one that nobody holds

    def remove(self) -> None:
        """With all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def make_folder() -> Folder | None:
    """A new folder in memory for a start; None where there can be none."""
    try:
        return Folder(_SHARED_MEMORY)
    except OSError:
        return None


def remove_left_over() -> list[str]:
    """Remove this user's folders whose supervisor is dead; their paths."""
    removed = []
    parents = {_SHARED_MEMORY, Path(tempfile.gettempdir())}
    for path in itertools.chain.from_iterable(parent.glob(f"{_PREFIX}*") for parent in parents):
        with contextlib.suppress(OSError):  # gone by now, or on a file system without locks
            if _is_ours_alone(path) and (lock := _lock(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)
                removed.append(str(path))
    return removed


def _is_ours_alone(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _lock(path: Path) -> int | None:
    """The descriptor that holds the lock of a folder; None where another has it. Raises OSError where it is no folder,
    or cannot be locked."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:
        os.close(fd)
        raise
    return fd


def folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where this process puts such files; None, the usual place of temporary files, where there is no such memory."""
    if (own := own_folder(environ)) is not None:
        return own
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None


def own_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The start's folder on this node; None where this process has none."""
    own = environ.get(VARIABLE)
    return Path(own) if own is not None and Path(own).is_dir() else None
