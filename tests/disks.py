"""File systems for the tests of what disks do to a run: small ones, read-only ones. Root only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True, text=True)


@contextmanager
def small_disk(path: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of its own at ``path``. Skips the test where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    path.mkdir(parents=True, exist_ok=True)
    try:
        mount("-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", path)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount here: {getattr(error, 'stderr', error)}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)  # whoever still has a file open in it


def set_read_only(path: Path, read_only: bool = True) -> None:
    """Of a ``small_disk``."""
    mount("-o", f"remount,{'ro' if read_only else 'rw'}", path)
