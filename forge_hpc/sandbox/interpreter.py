"""The Python that programs run on, and what of it they get to see."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from forge_hpc.config.errors import UserError

_SYSTEM_PYTHON = "/usr/bin/python3"
_QUERY = """
import json, os, site, sys
base = getattr(sys, "_base_executable", sys.executable)
print(json.dumps({
    "version": sys.version_info[:2], "executable": os.path.realpath(base), "prefix": os.path.realpath(sys.base_prefix),
    "packages": list(filter(os.path.isdir, site.getsitepackages())),
    "base_packages": list(filter(os.path.isdir, site.getsitepackages([os.path.realpath(sys.base_prefix)]))),
}))
"""


@dataclass(frozen=True)
class Interpreter:
    executable: Path
    prefix: Path
    """Where its standard library lies."""
    packages: tuple[Path, ...]
    """Folders of packages that programs may import, beside the standard library."""
    hidden: tuple[Path, ...]
    """Folders of packages within the prefix that they may not see."""


@functools.cache
def find_interpreter(python: str | None) -> Interpreter:
    """The interpreter that ``sandbox.python`` means, asked once.

    Without one it is that of this process; as root, which gives its rights up before it starts a sandbox, the system's
    where others may not read that one. Raises UserError.
    """
    if python is not None:
        return _ask(python, with_packages=True)
    # One on a node's own disk (forge_hpc.staging) finds its library by a variable that no program gets to see.
    own = _ask(os.environ.get("FORGE_HPC_SHARED_PYTHON", sys.executable), with_packages=False)
    if os.geteuid() != 0 or all(readable_by_all(path) for path in (own.executable, own.prefix)):
        return own
    if not os.access(_SYSTEM_PYTHON, os.X_OK):
        raise UserError(
            f"sandbox: programs are not run as root, and only root can read {own.executable}",
            "set sandbox.python to a Python that every user can read",
        )
    return _ask(_SYSTEM_PYTHON, with_packages=False)


def readable_by_all(path: Path) -> bool:
    """Every user may go to `path` and read it."""
    return bool(path.stat().st_mode & 0o004) and all(parent.stat().st_mode & 0o001 for parent in path.parents)


def _ask(python: str, with_packages: bool) -> Interpreter:
    key = "sandbox.python" if with_packages else "sandbox"
    try:
        done = subprocess.run([python, "-I", "-c", _QUERY], capture_output=True, text=True, timeout=60, check=True)
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise UserError(f"{key}: {python} does not run as Python: {error}") from None
    if tuple(found["version"]) < (3, 10):
        raise UserError(
            f"{key}: {python} is Python {'.'.join(map(str, found['version']))}",
            "3.10 or newer is needed: sandbox.python",
        )
    packages = [Path(folder) for folder in found["packages"]] if with_packages else []
    return Interpreter(
        executable=Path(found["executable"]),
        prefix=Path(found["prefix"]),
        packages=tuple(packages),
        hidden=tuple(Path(folder) for folder in found["base_packages"] if Path(folder) not in packages),
    )
