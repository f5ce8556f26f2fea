"""What makes a checkpoint complete: a manifest that names every other file with its size and SHA-256, and agrees."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

from forge_hpc.files import atomic_write_json, refuse_newer

MANIFEST = "manifest.json"
FORMAT = 1
"""Of checkpoints. One that says nothing of its format has this one; one with a larger number is refused."""
NO_OPTIMIZER = "no-optimizer"
"""A file of a checkpoint that a run begins with: the optimizer's state is not taken from it."""
MAX_THREADS = 16


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written; says where and why. The checkpoints before it stand as they were."""


class FileRecord(TypedDict):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def describe(path: Path) -> FileRecord:
    """Bring a file that was just written to the disk, and measure it. Costs one read, mostly from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def write_manifest(directory: Path, step: int, files: Mapping[str, FileRecord]) -> None:
    """Write the manifest of a directory whose other files are all on the disk."""
    atomic_write_json(directory / MANIFEST, {"format": FORMAT, "step": step, "files": dict(files)})


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no manifest.
        UserError: a newer version of this project wrote it.
    """
    path = directory / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{MANIFEST} lists no files")
    refuse_newer(path, manifest.get("format"), FORMAT)
    return manifest


def verify(directory: Path) -> str | None:
    """None if the checkpoint is complete, else what is wrong with it.

    Reads every byte: B / min(t * 1.5 GB/s, what the file system gives), with one thread a file and at most
    t = 16 (SHA-256 with the CPU's instructions for it; it releases the GIL). The files are one a trainer rank.

    Raises:
        PermissionError: it belongs to somebody else.
        UserError: a newer version of this project wrote it.
    """
    try:
        files: dict[str, FileRecord] = read_manifest(directory)["files"]
        for name, expected in files.items():
            if (size := (directory / name).stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
        threads = ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0))))
        try:
            for name, digest in zip(files, threads.map(lambda name: _digest(directory / name), files), strict=True):
                if digest != files[name]["sha256"]:
                    return f"{name} is damaged: its checksum differs"
        finally:
            threads.shutdown(cancel_futures=True)
    except PermissionError:
        raise
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read: {error}"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
