"""JSON Lines that a crash neither tears nor doubles."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from forge_hpc.files import atomic_write_text, open_private


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of ``path`` in order; nothing where it is missing. A last line still being written is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


class JsonlWriter:
    """Appends objects with a ``step``; on opening, forgets all after ``resume_step``.

    A torn last line (the process or its host died while writing) and the lines of steps after ``resume_step`` (the run
    goes back to a checkpoint and will do them again) are dropped, by an atomic rewrite. Each append is one write and
    reaches the disk before it returns, so a step whose checkpoint is committed afterwards is never missing.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        self.last_step = _rewind(path, resume_step) if path.exists() else None
        """Step of the last line, None where there is none."""
        self._fd = open_private(path, os.O_WRONLY | os.O_APPEND)

    def write(self, *records: Mapping[str, Any]) -> None:
        """Append ``records``, all of one step, as one write. Numbers that JSON has not (NaN, infinities) become null.

        Raises:
            OSError: the disk is full, …; the file is then as before.
        """
        if not records:
            return
        data = _lines(records)
        size = os.fstat(self._fd).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, size)
            raise
        self.last_step = records[-1]["step"]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def replace_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file at once: a reader, and a crash, see all of it or what was there before."""
    atomic_write_text(path, _lines(records).decode())


def _lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """One line each. Numbers that JSON has not (NaN, infinities) become null."""
    text = "".join(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    return text.encode("utf-8", errors="replace")


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object on a whole line that has a step; None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _rewind(path: Path, resume_step: int) -> int | None:
    """Drop torn lines and lines after ``resume_step``; returns the last step kept."""
    last_step, dirty = None, False
    with path.open("rb") as file:
        for line in file:
            record = _parse(line)
            if record is None or record["step"] > resume_step:
                dirty = True
            else:
                last_step = record["step"]
    if dirty:
        temporary = path.with_name(f".{path.name}.tmp")
        fd = open_private(temporary, os.O_WRONLY | os.O_TRUNC)
        with path.open("rb") as old, os.fdopen(fd, "wb") as new:
            for line in old:
                record = _parse(line)
                if record is not None and record["step"] <= resume_step:
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
        temporary.replace(path)
    return last_step


def _finite(value: Any) -> Any:
    """``value`` with every NaN and infinity replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
