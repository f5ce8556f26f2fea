"""TensorBoard event files without torch or TensorFlow: one continuous curve across restarts.

On opening, events after ``resume_step`` are removed from the files of earlier starts, and the new file begins with a
session start, which tells a TensorBoard that has read them already to forget them too. The newest of those files is
copied in any case: an earlier start that was cut off, and comes back, writes into one without a name. Each step reaches
the disk before ``write`` returns, as in ``metrics.jsonl``: no step of a checkpoint is missing, even where a node is
lost.
"""

from __future__ import annotations

import os
import re
import struct
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from forge_hpc.files import replace
from forge_hpc.run_dir import make_private_dir, open_private


class TensorBoardWriter:
    """Writes scalars to ``directory``; readers may follow it live."""

    def __init__(self, directory: Path, resume_step: int) -> None:
        make_private_dir(directory)
        newest = 0
        earlier = sorted(directory.glob("events.out.tfevents.*"))
        for path in earlier:
            _rewind(path, resume_step, renew=path == earlier[-1])
            if match := re.match(r"events\.out\.tfevents\.(\d+)", path.name):
                newest = max(newest, int(match[1]))
        # Readers take files in order of their names, so the number grows even if the hosts' clocks disagree.
        number = max(int(time.time()), newest + 1)
        path = directory / f"events.out.tfevents.{number:010d}.forge-hpc.{os.getpid()}"
        self._file = os.fdopen(open_private(path, os.O_WRONLY | os.O_APPEND), "ab")
        self._writer = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self._sync()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to the curve of each tag."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))
        self._sync()

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _records(data: bytes) -> Iterator[bytes]:
    """The whole records of an event file, framing included: length (8 bytes), its CRC (4), event, its CRC (4)."""
    start = 0
    while start + 12 <= len(data):
        length, crc = struct.unpack_from("<QI", data, start)
        end = start + 12 + length + 4
        if end > len(data) or crc != masked_crc32c(data[start : start + 8]):
            return
        yield data[start:end]
        start = end


def _rewind(path: Path, resume_step: int, renew: bool) -> None:
    """Remove a torn last record and all events after ``resume_step``. Where there is nothing to remove the file is
    only rewritten to ``renew`` it."""
    data = path.read_bytes()
    kept = b"".join(record for record in _records(data) if _keep(Event.FromString(record[12:-4]), resume_step))
    if kept == data and not renew:
        return
    temporary = path.with_name(f".rewind.{uuid.uuid4().hex[:12]}.tmp")  # readers take any name with "tfevents"
    with os.fdopen(open_private(temporary, os.O_WRONLY | os.O_EXCL), "wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    replace(temporary, path)


def _keep(event: Event, resume_step: int) -> bool:
    return event.step <= resume_step or event.HasField("session_log")
