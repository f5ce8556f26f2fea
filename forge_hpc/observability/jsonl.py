"""JSON Lines that a crash neither tears nor doubles."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from forge_hpc.files import asking, atomic_write_text, is_there, open_private, replace, sync_dir, temporary_for


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of ``path`` in order; nothing where it is missing. A last line still being written is left out."""
    try:
        file = asking(path, lambda: path.open("rb"))
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        yield from read_lines(file)


def read_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects on the whole ones of ``lines``."""
    for line in lines:
        record = _parse(line)
        if record is not None:
            yield record


class JsonlWriter:
    """Appends objects with a ``step``; on opening, forgets all after ``resume_step``.

    A torn last line (the process or its host died while writing) and the lines of steps after ``resume_step`` (the run
    goes back to a checkpoint and will do them again) are dropped. The rest is copied to a new file, which takes the
    name of the old: an earlier start that was cut off, and comes back, writes into a file without a name. Over NFS its
    late append is a whole page, and would put zeros over the lines of its successor. Each append is one write and
    reaches the disk before it returns, so a step whose checkpoint is committed afterwards is never missing.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        self.last_step: int | None = None
        """Step of the last line, None where there is none."""
        temporary = temporary_for(path)
        self._fd = open_private(temporary, os.O_WRONLY | os.O_APPEND | os.O_EXCL)
        try:
            if is_there(path):
                self.last_step = _copy(path, self._fd, resume_step)
            os.fsync(self._fd)
            replace(temporary, path)
            sync_dir(path.parent)
        except BaseException:
            self.close()
            temporary.unlink(missing_ok=True)
            raise

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


def _copy(path: Path, fd: int, resume_step: int) -> int | None:
    """Copy all but torn lines and lines after ``resume_step``; returns the last step kept."""
    last_step = None
    with path.open("rb") as old, os.fdopen(os.dup(fd), "wb") as new:
        for line in old:
            record = _parse(line)
            if record is not None and record["step"] <= resume_step:
                new.write(line)
                last_step = record["step"]
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
