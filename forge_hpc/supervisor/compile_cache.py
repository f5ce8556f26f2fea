"""Where a node keeps what torch, Triton and vLLM have compiled, so that the next start there has it already.

By default they keep it in the temporary directory, which goes with each start, and in the home directory, which is a
network's on most clusters. It is code that is loaded, so a folder that anybody else could have written is not taken.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

UNUSED_S = 30 * 86400.0
"""What no start has used for so long is deleted by the next one."""
_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "VLLM_CACHE_ROOT": "vllm"}


def compile_cache(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment variables for a node's processes: those that say where caches lie, without what the user has set.

    Empty where the folder cannot be had, or is not this user's alone: then each start compiles anew.
    """
    root = Path(tempfile.gettempdir(), f"forge-hpc-cache-{os.getuid()}")
    directory = root / "-".join(f"{name}{_version(name)}" for name in ("torch", "vllm"))
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            return {}
        directory.mkdir(mode=0o700, exist_ok=True)
        os.utime(directory)
        for other in root.iterdir():
            if time.time() - other.stat().st_mtime > UNUSED_S:
                shutil.rmtree(other, ignore_errors=True)
    except OSError:
        return {}
    return {name: str(directory / folder) for name, folder in _VARIABLES.items() if name not in environ}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "0"
