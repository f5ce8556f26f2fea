"""The directory of a sweep: ``sweep.json`` says what it varies, and ``0``, ``1``, … are run directories."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from forge_hpc.config.errors import UserError
from forge_hpc.files import atomic_write_json, is_there, read_text, refuse_newer
from forge_hpc.run_dir import RunDir

SWEEP_FORMAT = 1


class SweepDir:
    """Paths of a sweep. Making the object touches nothing; ``write`` does."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()

    def __str__(self) -> str:
        return str(self.path)

    @property
    def file(self) -> Path:
        return self.path / "sweep.json"

    @property
    def exists(self) -> bool:
        """Whether it is the directory of a sweep."""
        return is_there(self.file)

    def run(self, number: int) -> RunDir:
        """Of the run that is task ``number`` of the array."""
        return RunDir(self.path / str(number))

    @property
    def runs(self) -> list[RunDir]:
        return [self.run(number) for number in range(len(self.overrides()))]

    def overrides(self) -> list[list[str]]:
        """What each run varies, as ``key=value``, in the order of their numbers.

        Raises:
            UserError: ``sweep.json`` is not one that this project wrote, or a newer version's.
        """
        try:
            value = json.loads(read_text(self.file))
            refuse_newer(self.file, value.get("format"), SWEEP_FORMAT)
            return [list(run) for run in value["runs"]]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{self.file} is damaged: {error}") from None

    def write(self, overrides: Sequence[Sequence[str]]) -> None:
        """Say what each run varies."""
        atomic_write_json(self.file, {"format": SWEEP_FORMAT, "runs": [list(run) for run in overrides]})
