"""Files that are memory, ``/dev/shm``: a start has a folder of its own there, which its supervisor removes.

What is killed while it writes there leaves what it has written, and that is memory of the node until somebody removes
it, whichever job it was.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "FORGE_HPC_SHARED_MEMORY"
"""The start's folder, in the environment of its processes."""
_SHARED_MEMORY = Path("/dev/shm")


def make_folder() -> Path | None:
    """A new folder for a start, this user's alone; None where there can be none."""
    try:
        return Path(tempfile.mkdtemp(prefix="forge-hpc-", dir=_SHARED_MEMORY))
    except OSError:
        return None


def folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where this process puts such files; None, the usual place of temporary files, where there is no such memory."""
    if (own := environ.get(VARIABLE)) is not None and Path(own).is_dir():
        return Path(own)
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
