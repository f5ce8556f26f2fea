"""Nodes find each other through small files in the run directory: no port is agreed on before it was bound.

Cost with N nodes: each node writes one file and polls one; the first node reads N files. Polling backs off to one
look a second, so that a shared file system sees at most N small operations a second during the start; afterwards each
node looks for the end every two seconds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from forge_hpc.files import read_text
from forge_hpc.run_dir import atomic_write_json


class RendezvousTimeout(RuntimeError):
    """Some nodes did not appear in time; the message names them."""


class Rendezvous:
    """A directory of JSON records, each written once, atomically, for one start of a job."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def publish(self, name: str, record: Any) -> None:
        atomic_write_json(self.directory / f"{name}.json", record)

    def look(self, name: str) -> Any | None:
        """The record, or None where nobody has published it yet."""
        file = self.directory / f"{name}.json"
        os.close(os.open(self.directory, os.O_RDONLY))  # NFS would remember that the name was absent; see files.ask
        try:
            return json.loads(read_text(file))
        except FileNotFoundError:
            return None

    def withdraw(self, *names: str) -> None:
        """Remove records; nothing happens where one is not there."""
        for name in names:
            (self.directory / f"{name}.json").unlink(missing_ok=True)

    def names(self, prefix: str) -> list[str]:
        """Names of the records that begin with ``prefix``."""
        return sorted(path.stem for path in self.directory.glob(f"{prefix}*.json"))

    def wait(self, names: Sequence[str], timeout_s: float, stop: Callable[[], None] | None = None) -> list[Any]:
        """Wait until all records are there and return them in the order of ``names``.

        ``stop`` is called at each look and may raise, so that a signal ends the wait. A look that the file system fails
        has seen nothing. Raises RendezvousTimeout, and FileNotFoundError where a newer start has removed the directory.
        """
        found = self.gather(names, timeout_s, stop)
        if missing := [name for name in names if name not in found]:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise RendezvousTimeout(f"after {timeout_s:.0f} s still missing in {self.directory}: {shown}")
        return [found[name] for name in names]

    def gather(
        self,
        names: Sequence[str],
        timeout_s: float,
        stop: Callable[[], None] | None = None,
        without: Callable[[], Collection[str]] = tuple,
    ) -> dict[str, Any]:
        """Wait for the records as ``wait`` does, but for those that ``without()`` names; after the timeout go on with
        those that are there."""
        found: dict[str, Any] = {}

        def look() -> bool:
            for name in names:
                if name not in found and (record := self.look(name)) is not None:
                    found[name] = record
            return found.keys() | set(without()) >= set(names)

        _poll(look, timeout_s, stop)
        return found

    def wait_for_any(self, names: Sequence[str], timeout_s: float, stop: Callable[[], None] | None = None) -> Any:
        """Wait for the first of the records. Otherwise as ``wait``."""
        found: list[Any] = []

        def look() -> bool:
            for name in names:
                if (record := self.look(name)) is not None:
                    found.append(record)
                    return True
            return False

        if not _poll(look, timeout_s, stop):
            raise RendezvousTimeout(f"after {timeout_s:.0f} s none of {', '.join(names)} in {self.directory}")
        return found[0]


def _poll(done: Callable[[], bool], timeout_s: float, stop: Callable[[], None] | None) -> bool:
    deadline, pause = time.monotonic() + timeout_s, 0.02
    while True:
        try:
            if done():
                return True
        except FileNotFoundError:  # the directory was removed: it is another start's time
            raise
        except OSError:  # a pause of the file server
            pass
        if stop is not None:
            stop()
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 1.0)
