"""How much memory this node still has for the run: what the kernel has to give, within the limits of the job's cgroup.

Slurm ends what passes the job's ``--mem`` (ConstrainRAMSpace), however much the node has; a container may have a limit
of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class _Files:
    """What a version of cgroups calls a group's limit and what it uses, and the names in ``memory.stat`` of what the
    kernel takes back before it ends anybody."""

    limit: str
    usage: str
    reclaimable: tuple[str, ...]


_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def available_memory() -> int:
    """Bytes that this process, and what it starts, can still have without swapping."""
    import psutil

    most = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no cgroups here, or none that are known
        most = min([most, *cgroup_rooms(OWN.read_text(), CGROUPS)])
    return most


def memory_limit() -> tuple[int, bool]:
    """Bytes that this process, and what it starts, can have at most, swap included, whoever else has some of it now;
    and whether that is the limit of a cgroup rather than all of the machine's."""
    import psutil

    total, swap = int(psutil.virtual_memory().total), int(psutil.swap_memory().total)
    least = total
    with contextlib.suppress(OSError, ValueError):  # no cgroups here, or none that are known
        least = min([total, *cgroup_limits(OWN.read_text(), CGROUPS)])
    return least + swap, least < total


def cgroup_rooms(own: str, root: Path) -> Iterator[int]:
    """Bytes that are left in each group above a process that has a limit.

    Args:
        own: the process's ``/proc/PID/cgroup``.
        root: where cgroups are mounted: version 2 itself, and version 1's controller in ``memory``.
    """
    for folder, files in _groups(own, root):
        with contextlib.suppress(OSError, ValueError):  # "max", or the group has no such file
            yield _room(folder, files)


def cgroup_limits(own: str, root: Path) -> Iterator[int]:
    """Bytes of each such limit, whatever is used of it."""
    for folder, files in _groups(own, root):
        with contextlib.suppress(OSError, ValueError):
            yield int((folder / files.limit).read_text())


def _groups(own: str, root: Path) -> Iterator[tuple[Path, _Files]]:
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            files, top = _V1, root / "memory"
        elif not controllers:
            files, top = _V2, root
        else:
            continue
        # In a container the path may be the host's, of which nothing is mounted here but its own group, as the top.
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            yield folder, files
            if folder == top:
                break


def _room(folder: Path, files: _Files) -> int:
    limit, used = (int((folder / name).read_text()) for name in (files.limit, files.usage))
    stat = dict(line.partition(" ")[::2] for line in (folder / "memory.stat").read_text().splitlines())
    return max(0, limit - used + sum(int(stat.get(name, 0)) for name in files.reclaimable))
