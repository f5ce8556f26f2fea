"""Checkpoints of a run: written beside, then renamed; complete if and only if the manifest verifies.

checkpoints/step-00000010/
    trainer/            TorchTitan's CheckpointManager: model, optimizer, lr scheduler, sharded (DCP)
    controller.json     step, policy version, position in the data
    manifest.json       size and SHA-256 of every other file; its presence and agreement make the checkpoint complete
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forge_hpc.run_dir import RunDir, atomic_write_json, make_private_dir

logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8})")
_MANIFEST = "manifest.json"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != _MANIFEST)


def verify(directory: Path) -> str | None:
    """None if the checkpoint is complete, else what is wrong with it."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
        for name, expected in manifest["files"].items():
            path = directory / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _digest(path) != expected["sha256"]:
                return f"{name} is damaged: its checksum differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError) as error:
        return f"cannot be read: {error}"
    return None


class CheckpointStore:
    """The checkpoints of one run. Only the controller uses it."""

    def __init__(self, run_dir: RunDir, keep: int) -> None:
        self._run_dir = run_dir
        self._keep = keep
        make_private_dir(run_dir.checkpoints)
        for path in run_dir.checkpoints.glob(".step-*"):  # of a writer that was killed
            shutil.rmtree(path)

    def steps(self) -> list[int]:
        """Steps that have a directory under their final name, oldest first."""
        names = (path.name for path in self._run_dir.checkpoints.iterdir())
        return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that verifies, with the controller's state. Says which ones it passes over, and why."""
        for step in reversed(self.steps()):
            path = self._run_dir.checkpoint(step)
            if (problem := verify(path)) is None:
                return path, json.loads((path / "controller.json").read_text())
            logger.warning("passing over %s: %s", path, problem)
        return None

    def begin(self, step: int) -> Path:
        """The directory to write step ``step`` into."""
        path = self._run_dir.checkpoints / f".step-{step:08d}"
        shutil.rmtree(path, ignore_errors=True)
        return make_private_dir(path)

    def commit(self, step: int, controller_state: dict[str, Any]) -> Path:
        """Seal what was written since ``begin``, give it its name, and delete the oldest beyond ``keep``."""
        source, target = self._run_dir.checkpoints / f".step-{step:08d}", self._run_dir.checkpoint(step)
        atomic_write_json(source / "controller.json", controller_state)
        files = {}
        for path in _files(source):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[str(path.relative_to(source))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        atomic_write_json(source / _MANIFEST, {"step": step, "files": files})
        if target.exists():  # of a start that went further than the checkpoint which this one resumed from
            shutil.rmtree(target)
        source.rename(target)
        fd = os.open(self._run_dir.checkpoints, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        for old in [other for other in self.steps() if other <= step][: -self._keep]:  # later ones did not verify
            shutil.rmtree(self._run_dir.checkpoint(old))
        return target
