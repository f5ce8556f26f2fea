"""Writing one rank's part of a checkpoint: in several files at once, each hashed while it is written."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan
from torch.utils.serialization import config as serialization

from forge_hpc.checkpoint import FileRecord

BYTES_A_THREAD = 1 << 28
"""A thread for less of it costs more, in files to bring to the disk, than it gains."""
MAX_THREADS = 8


def threads_for(num_bytes: int) -> int:
    """How many files a rank writes its bytes into: hashing runs at some 1 GB/s a core, and ranks share their host's."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_THREADS, cores, num_bytes // BYTES_A_THREAD))


class _Hashed(io.RawIOBase):
    """A file that is written from its beginning to its end, and hashed on the way."""

    def __init__(self, file: io.IOBase) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)  # type: ignore[attr-defined]
        self._sha256.update(view)
        self._num_bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._num_bytes

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def record(self) -> FileRecord:
        return {"bytes": self._num_bytes, "sha256": self._sha256.hexdigest()}


class _HashedFiles(FileSystem):
    """Keeps what each file holds, and what went wrong with any: the writer's own threads tell nobody."""

    def __init__(self) -> None:
        self.records: dict[Path, FileRecord] = {}
        self.failures: list[Exception] = []

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        try:
            with super().create_stream(path, mode) as file:
                hashed = _Hashed(file)
                yield hashed
                file.flush()
                os.fsync(file.fileno())
                self.records[Path(path)] = hashed.record()
        except Exception as error:
            self.failures.append(error)
            raise

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path)] = self.records.pop(Path(path))


class CheckpointWriter(dcp.FileSystemWriter):
    """Writes and hashes a rank's files. Costs one pass over its bytes, at once in each of its threads.

    Tells what went wrong on this rank to all: the system's error where torch.save hides it behind its own, and a
    ``failure`` from before, since a rank that stayed away would leave the others waiting for it.

    Args:
        num_threads: so many files at once; ``threads_for``.
    """

    def __init__(self, directory: Path, failure: Exception | None, num_threads: int, **options: Any) -> None:
        super().__init__(directory, thread_count=num_threads, sync_files=False, **options)  # _HashedFiles does
        self.fs = self._files = _HashedFiles()
        self._failure = failure

    @property
    def records(self) -> dict[Path, FileRecord]:
        """Of the files that this rank has written, which are on the disk."""
        return self._files.records

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if self._failure is not None:
            raise self._failure
        return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        try:
            with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]  # the manifest's SHA-256 says more
                written = super().write_data(plan, planner)
            if self._files.failures:  # of a thread
                raise self._files.failures[0]
            return written
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None
