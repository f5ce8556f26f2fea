"""Checkpoints of a run: written beside, then renamed; complete if and only if the manifest verifies.

checkpoints/step-00000010/
    trainer/            model, optimizer, lr scheduler, sharded over the ranks (torch.distributed.checkpoint)
    controller.json     step, policy version, position in the data
    …                   what else the recipe gives to ``commit``
    manifest.json       size and SHA-256 of every other file; its presence and agreement make the checkpoint complete

Names that begin with a dot are not checkpoints: ``.step-N.TOKEN`` is being written, ``.gone-N.TOKEN`` being deleted,
``.old-N`` is a complete one whose successor of the same step is about to take its name, ``.read-step-N.TOKEN`` holds
second names of the files of one that is being read from outside (``borrow``).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from forge_hpc.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    FileRecord,
    describe,
    read_manifest,
    verify,
    write_manifest,
)
from forge_hpc.config.errors import UserError
from forge_hpc.files import (
    atomic_write_json,
    make_private_dir,
    open_private,
    reading,
    refuse_newer,
    sync_dir,
    try_writing,
)
from forge_hpc.run_dir import RunDir

CONTROLLER = "controller.json"
BEST = "best.json"
logger = logging.getLogger(__name__)
BORROWED = ".read-"
_BORROWED_S = 86400.0
"""What a reader has borrowed for longer belongs to one that was killed."""
_NAME = re.compile(r"step-(\d{8})")


class CheckpointStore:
    """The checkpoints of one run. Only the controller uses it, one call at a time; every call blocks on the disk.

    ``begin``, then the trainers write, then ``commit``, or ``abandon`` where something failed. A failed save takes
    nothing away: the newest complete checkpoint is deleted only when a newer one is on the disk.

    Raises:
        UserError: the directory cannot be read or written.
    """

    def __init__(self, run_dir: RunDir, keep: int) -> None:
        self._dir = run_dir.checkpoints
        self._keep = keep
        self._staged: dict[int, Path] = {}
        self._damaged: set[int] = set()  # as ``newest`` found them
        self._last_bytes = 0
        if self._dir.is_symlink() and not self._dir.exists():
            raise UserError(
                f"{self._dir} is a link to {self._dir.readlink()}, which does not exist", "make it, or remove the link"
            )
        try:
            make_private_dir(self._dir)
            self._tidy()
            try_writing(self._dir)
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints into {self._dir}: {error.strerror}",
                "make it writable and free some space, or link it to a file system that every node can write",
            ) from None

    def _tidy(self) -> None:
        """Remove what killed writers left, and finish a replacement that was cut short."""
        for path in self._dir.glob(".old-*"):
            with suppress(OSError):  # the name is taken: by the successor
                path.rename(self._path(int(path.name.removeprefix(".old-"))))
        for pattern in (".step-*", ".gone-*", ".old-*"):
            for path in self._dir.glob(pattern):
                _delete(path)
        for path in self._dir.glob(f"{BORROWED}*"):
            with suppress(FileNotFoundError):  # its reader has just removed it
                if time.time() - path.stat().st_mtime > _BORROWED_S:
                    _delete(path)

    # ---- the best one

    def best(self) -> dict[str, Any] | None:
        """What ``mark_best`` wrote last: ``step``, ``figure`` and ``value``; None where nothing is marked."""
        return read_best(self._dir)

    def mark_best(self, step: int, figure: str, value: float) -> None:
        """Keep the checkpoint of ``step``, which is there, until another one is marked."""
        atomic_write_json(self._dir / BEST, {"step": step, "figure": figure, "value": value})

    # ---- reading

    def steps(self) -> list[int]:
        """Steps that have a directory under their final name, oldest first."""
        return steps_in(self._dir)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that verifies, with the controller's state. Says which ones it passes over, and why.

        Raises:
            UserError: one that would do is of a newer version of this project, or may not be read.
        """
        with reading(self._dir):
            for step in reversed(self.steps()):
                path = self._path(step)
                if (problem := verify(path)) is None:
                    try:
                        state = json.loads((path / CONTROLLER).read_text(encoding="utf-8"))
                        self._last_bytes = _total_bytes(path)
                    except FileNotFoundError as error:  # it verified: somebody deletes it
                        problem = f"{Path(error.filename).name} is missing"
                    else:
                        refuse_newer(path / CONTROLLER, state.pop("format", None), FORMAT)
                        return path, state
                logger.warning("passing over %s: %s", path, problem)
                self._damaged.add(step)
        if self._damaged:
            logger.error("no checkpoint in %s is complete", self._dir)
        return None

    # ---- writing

    def begin(self, step: int) -> Path:
        """The directory to write step ``step`` into.

        Its name is this call's alone: a writer that was cut off and comes back writes into no one else's.

        Raises:
            CheckpointError: it cannot be made, or there is less space than the last checkpoint took.
        """
        self.abandon(step)
        path = self._dir / f".step-{step:08d}.{_token()}"
        with self._errors(step):
            disk = shutil.disk_usage(self._dir)
            if disk.total and disk.free < self._last_bytes:
                raise CheckpointError(
                    f"cannot save step {step}: {self._dir} has {_gb(disk.free)} free, the last checkpoint took "
                    f"{_gb(self._last_bytes)}"
                )
            self._staged[step] = make_private_dir(path)
        return path

    def commit(
        self,
        step: int,
        controller_state: Mapping[str, Any],
        files: Mapping[str, FileRecord] | None = None,
        extra: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Seal what was written since ``begin``, give it its name, and delete the oldest beyond ``keep``.

        With B bytes of trainer state on R ranks, the ranks have hashed B / R bytes each, all at once and beside the
        training; this hashes the controller's own small files and looks at the size of R others. Without ``files`` it
        hashes all B bytes itself, at 1.5 GB/s: fine for a test, 260 s for the 390 GB of a 32 B model.

        Args:
            controller_state: JSON; ``newest`` gives it back.
            files: what all ranks wrote, by path below ``begin``'s directory. They are on the disk.
            extra: further files by name; ``load_extra`` gives them back.

        Raises:
            CheckpointError: the disk is full or failing, or what is there is not what ``files`` says. What was written
                is gone then, and the space that it took is free.
        """
        source, target = self._staged[step], self._path(step)
        try:
            with self._errors(step):
                records = self._seal(source, step, controller_state, files, extra or {})
                self._publish(source, target)
        except BaseException:
            self.abandon(step)
            raise
        del self._staged[step]
        self._last_bytes = sum(record["bytes"] for record in records.values())
        self._damaged.discard(step)
        self._delete_old(step)
        return target

    def abandon(self, step: int) -> None:
        """Delete what was written since ``begin``, so that a full disk gets its space back. Nothing there is fine."""
        path = self._staged.pop(step, None)
        if path is not None:
            _delete(path)

    # ---- details

    def _path(self, step: int) -> Path:
        return self._dir / f"step-{step:08d}"

    @contextmanager
    def _errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = error.filename or self._dir
            raise CheckpointError(f"cannot save step {step}: {error.strerror or error}: {where}") from error

    def _seal(
        self,
        source: Path,
        step: int,
        controller_state: Mapping[str, Any],
        files: Mapping[str, FileRecord] | None,
        extra: Mapping[str, bytes],
    ) -> dict[str, FileRecord]:
        """Write the controller's files and the manifest, and bring all to the disk."""
        assert "format" not in controller_state
        atomic_write_json(source / CONTROLLER, {"format": FORMAT, **controller_state})
        for name, content in extra.items():
            assert Path(name).name == name and name not in (CONTROLLER, MANIFEST, "trainer"), name
            with os.fdopen(open_private(source / name, os.O_WRONLY | os.O_EXCL), "wb") as file:
                file.write(content)
        found = {str(path.relative_to(source)): path for path in sorted(source.rglob("*")) if path.is_file()}
        records: dict[str, FileRecord] = {}
        for name, path in found.items():
            if files is None or name == CONTROLLER or name in extra:
                records[name] = describe(path)
            elif name not in files:
                raise CheckpointError(f"cannot save step {step}: {path} is of no trainer rank")
            elif (size := path.stat().st_size) != files[name]["bytes"]:
                raise CheckpointError(
                    f"cannot save step {step}: {path} has {size} bytes, its rank wrote {files[name]['bytes']}"
                )
            else:
                records[name] = files[name]
        if missing := sorted((files or {}).keys() - records.keys()):
            raise CheckpointError(f"cannot save step {step}: {source / missing[0]} is missing, a rank wrote it")
        write_manifest(source, step, records)
        for directory in {path.parent for path in found.values()} | {source}:
            sync_dir(directory)
        return records

    def _publish(self, source: Path, target: Path) -> None:
        """Give ``source`` its name, durably. A complete checkpoint of that name gives way only to a complete one."""
        old = target.with_name(f".old-{target.name.removeprefix('step-')}")
        _delete(old)
        if target.exists():  # it did not verify, or the run was saved again before it did another step
            target.rename(old)
        try:
            source.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        sync_dir(self._dir)
        _delete(old)

    def _delete_old(self, step: int) -> None:
        """Keep the newest ``keep`` up to ``step``, which is on the disk and good.

        What ``newest`` found damaged counts for nothing and goes once something newer is good. Later steps that did
        not verify stay until then: there may be a way to mend them.
        """
        try:
            earlier = [other for other in self.steps() if other <= step]
        except OSError as error:
            logger.warning("cannot list %s: %s", self._dir, error)
            return
        sound = [other for other in earlier if other not in self._damaged]
        kept = {*sound[-self._keep :], (self.best() or {}).get("step")}
        for other in sorted({*earlier} - kept):
            gone = self._dir / f".gone-{other:08d}.{_token()}"
            try:
                self._path(other).rename(gone)  # so that a half deleted one has no checkpoint's name
            except OSError as error:
                logger.warning("cannot delete %s: %s", self._path(other), error)
            else:
                _delete(gone)
                self._damaged.discard(other)


def steps_in(directory: Path) -> list[int]:
    """Steps that have a directory under their final name in ``checkpoints/``, oldest first."""
    names = (path.name for path in directory.iterdir())
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def read_best(directory: Path) -> dict[str, Any] | None:
    """As ``CheckpointStore.best``, of ``RUN_DIR/checkpoints``. What cannot be read counts for nothing."""
    try:
        best = json.loads((directory / BEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return best if isinstance(best, dict) and isinstance(best.get("step"), int) else None


def load_extra(path: Path, name: str) -> bytes | None:
    """A file that was handed to ``commit`` as extra, from a checkpoint that ``newest`` gave; None if it has none."""
    try:
        return (path / name).read_bytes()
    except FileNotFoundError:
        return None


def _delete(path: Path) -> None:
    """Delete a tree, a file or a link, as far as that goes: what is left is in nobody's way, and the next start tries
    again."""
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("cannot delete %s: %s", path, error)


def _total_bytes(path: Path) -> int:
    return sum(record["bytes"] for record in read_manifest(path)["files"].values())


def _token() -> str:
    return uuid.uuid4().hex[:8]


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB ({num_bytes} bytes)"
