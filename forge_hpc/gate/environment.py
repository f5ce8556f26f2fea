"""Which Python, packages and forge_hpc a node runs: equal on all nodes, or the run's processes speak past each other.

Only names of folders and our own sources are read: no metadata of packages, and nothing is imported.
"""

from __future__ import annotations

import hashlib
import os
import platform
import site
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import forge_hpc


def environment() -> dict[str, str]:
    """Versions by name: of Python, of every package that is installed, and a checksum of forge_hpc's sources."""
    found: dict[str, str] = {}
    for folder in map(Path, _places()):
        if not folder.is_dir():
            continue
        for path in folder.glob("*.dist-info"):
            name, _, version = path.name.removesuffix(".dist-info").partition("-")
            found.setdefault(name.lower(), version)  # the first on the path is the one that is imported
    return found | {"python": platform.python_version(), "forge_hpc": _sources()}


def _places() -> list[str]:
    """Where packages are installed, in the order of ``sys.path``; not that itself, which packages extend on import
    (setuptools, by what it brings along), so that it depends on what a process has done."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    own = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [place for place in [*named, *own, *site.getsitepackages()] if place]


def _sources() -> str:
    root, digest = Path(forge_hpc.__file__).parent, hashlib.blake2b(digest_size=6)
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def differences(environments: Mapping[int, Mapping[str, str]]) -> dict[int, str]:
    """Nodes whose environment is another than that of most, each with what differs. Of two that are as many, the one
    of the lower node is the right one."""
    counts = Counter(tuple(sorted(found.items())) for _, found in sorted(environments.items()))
    if len(counts) < 2:
        return {}
    right = dict(counts.most_common(1)[0][0])
    wrong = {node: found for node, found in environments.items() if dict(found) != right}
    return {node: f"its environment is another: {_named(found, right)}" for node, found in wrong.items()}


def _named(found: Mapping[str, str], right: Mapping[str, str]) -> str:
    changed: Sequence[str] = sorted(name for name in {*found, *right} if found.get(name) != right.get(name))
    first = ("python", "forge_hpc")
    changed = sorted(changed, key=lambda name: name not in first)
    shown = [f"{name} {found.get(name, 'missing')}, elsewhere {right.get(name, 'missing')}" for name in changed[:3]]
    return "; ".join(shown) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
