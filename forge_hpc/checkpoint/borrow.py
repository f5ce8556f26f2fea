"""Reading a checkpoint of a run that may be going on, and deletes the old ones meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forge_hpc.checkpoint.manifest import MANIFEST, read_manifest, verify
from forge_hpc.checkpoint.store import BORROWED, steps_in
from forge_hpc.config.errors import UserError
from forge_hpc.files import make_private_dir, reading
from forge_hpc.run_dir import RunDir

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV, errno.EROFS, errno.EACCES)


@contextmanager
def borrowed(run_dir: RunDir, step: int | None = None) -> Iterator[tuple[int, Path]]:
    """A complete checkpoint, by default the newest, and its step. It stays readable in the body, whatever
    ``checkpoint.keep`` deletes: its files have second names (hard links) there, which take no space.

    Where the file system knows no hard links it is read in its own place, and the run may delete it.

    Raises:
        UserError: there is none, or that of ``step`` is missing or damaged.
    """
    with reading(run_dir.checkpoints):
        found = steps_in(run_dir.checkpoints) if run_dir.checkpoints.is_dir() else []
    names = ", ".join(map(str, found)) or "none"
    if step is not None and step not in found:
        raise UserError(f"no checkpoint of step {step} in {run_dir.checkpoints}", f"there are those of steps: {names}")
    problems = []
    for candidate in reversed(found) if step is None else [step]:
        place, is_link = _link(run_dir.checkpoint(candidate))
        try:
            if (problem := verify(place)) is None:
                yield candidate, place
                return
            problems.append(f"step {candidate}: {problem}")
        finally:
            if is_link:
                shutil.rmtree(place, ignore_errors=True)
    if not found:
        hint = "the first one is written after checkpoint.interval steps"
        raise UserError(f"no checkpoint in {run_dir.checkpoints} yet", hint)
    raise UserError(
        f"no complete checkpoint in {run_dir.checkpoints}: {'; '.join(problems)}", f"there are those of steps: {names}"
    )


def _link(checkpoint: Path) -> tuple[Path, bool]:
    """The checkpoint under a name of ours, and whether there is one; what vanishes meanwhile does not verify."""
    place = checkpoint.with_name(f"{BORROWED}{checkpoint.name}.{uuid.uuid4().hex[:8]}")
    try:
        names = [*read_manifest(checkpoint)["files"], MANIFEST]
    except (OSError, ValueError):
        return checkpoint, False
    try:
        make_private_dir(place)
        for name in names:
            (place / name).parent.mkdir(exist_ok=True)
            os.link(checkpoint / name, place / name)
    except FileNotFoundError:
        return place, True
    except OSError as error:
        shutil.rmtree(place, ignore_errors=True)
        if error.errno not in _NO_LINKS:
            raise
        return checkpoint, False
    return place, True
