"""Writing small files so that only their owner reads them, and so that nobody sees half of one. No torch here."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EINVAL
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError


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
