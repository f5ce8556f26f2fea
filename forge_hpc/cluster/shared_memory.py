"""A start's own folders on a node, which its supervisor removes: for files that are memory, in ``/dev/shm``, and for
temporary ones.

What is killed while it writes there leaves what it has written, and in ``/dev/shm`` that is memory of the node until
somebody removes it, whichever job it was. A supervisor that is killed itself leaves the whole folder: it has locked it
(flock, which ends with its process), and the next start on the node removes this user's folders that nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "FORGE_HPC_SHARED_MEMORY"
"""The start's folder, in the environment of its processes."""
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "forge-hpc-start-"
"""Of these folders alone: other temporary ones are beside them, and nobody locks those."""


class Folder:
    """A start's folder, this user's alone, and its lock.

    Args:
        parent: where it is made; None: where temporary files are.

    Raises:
        OSError: there can be none.
    """

    def __init__(self, parent: Path | None = None) -> None:
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            try:
                self._lock = _lock(self.path)
            except FileNotFoundError:
                continue
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
        with contextlib.suppress(OSError):  # a link, another user's, or gone by now
            if (lock := _lock(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)
                removed.append(str(path))
    return removed


def _lock(path: Path) -> int | None:
    """The descriptor that holds the lock of a folder; None where another has it, or the folder is not this user's
    alone. Raises OSError where it is no folder, or cannot be locked."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(fd)
        if found.st_uid == os.geteuid() and not found.st_mode & 0o077:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
    except BlockingIOError:
        pass
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return None


def folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where this process puts such files; None, the usual place of temporary files, where there is no such memory."""
    if (own := environ.get(VARIABLE)) is not None and Path(own).is_dir():
        return Path(own)
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
