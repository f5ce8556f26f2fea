"""Where a start of a run takes nodes that other jobs lend, and the records by which they speak (JSON, in its
rendezvous). Imports nothing heavy.

Cost with N lent nodes: each looks once every two seconds while it is used; the first node lists the rendezvous every
two seconds and the controller every second, whatever N is.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.files import asking, look
from forge_hpc.run_dir import RunDir

DOOR = "door"


@dataclass(frozen=True)
class _Record:
    @classmethod
    def of(cls, record: dict[str, Any]) -> Self:
        """Read it; what a later version has added is left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in record.items() if key in known})

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Door(_Record):
    """A start that takes lent nodes."""

    log_dir: str
    gpus: int
    """That each of the run's own nodes uses; 0 is the CPU."""
    environment: dict[str, str]
    """Versions that the run's nodes have (``gate.environment``)."""


@dataclass(frozen=True)
class Ask(_Record):
    """What a lent node says of itself."""

    job_id: str
    slurm_name: str
    address: str
    names: list[str]
    request: str
    """For a certificate, PEM; the key stays on the node."""
    gpus: int
    report: dict[str, Any]
    """Of ``gate.own.look_at_node``."""


@dataclass(frozen=True)
class Answer(_Record):
    """What the first node says to that."""

    refused: str = ""
    """Why it is not let in; empty: it is."""
    node: int = -1
    """Its number from now on: they go on after those of the run's own nodes."""
    ca: str = ""
    cert: str = ""


@dataclass(frozen=True)
class Lent(_Record):
    """A node that was let in."""

    job_id: str
    slurm_name: str


@dataclass(frozen=True)
class Over(_Record):
    """Nothing of a lent node is used any more."""

    message: str
    failed: bool = False
    """It is of no use to the run, and had better not ask again."""


def ask_name(name: str) -> str:
    return f"ask-{name}"


def answer_name(name: str) -> str:
    return f"answer-{name}"


def lent_name(node: int) -> str:
    return f"lent-{node}"


def leaving_name(node: int) -> str:
    return f"lent-{node}-leaving"


def over_name(node: int) -> str:
    return f"lent-{node}-over"


def records_of(node: int) -> list[str]:
    """All records of a lent node."""
    return [lent_name(node), leaving_name(node), over_name(node), f"worker-{node}"]


def open_door(run_dir: RunDir) -> tuple[Rendezvous, Door] | None:
    """The start that takes lent nodes now; None where there is none (yet, or any more).

    Raises:
        OSError: the file system fails.
    """
    with contextlib.suppress(FileNotFoundError):
        folders = asking(run_dir.rendezvous, lambda: [path for path in run_dir.rendezvous.iterdir() if path.is_dir()])
        for folder in sorted(folders, key=_age, reverse=True):
            # not Rendezvous(folder) first: it would make anew what a newer start has just removed
            if look(folder / f"{DOOR}.json") is None or look(folder / "outcome.json") is not None:
                continue
            rendezvous = Rendezvous(folder)
            if (record := rendezvous.look(DOOR)) is not None:
                return rendezvous, Door.of(record)
    return None


def _age(folder: Path) -> int:
    found = look(folder)
    return 0 if found is None else found.mtime_ns
