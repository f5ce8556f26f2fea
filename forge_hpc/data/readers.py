"""Readers of data that are too large to hold: examples one after the other, from any place that was saved."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

from forge_hpc.config.schema import DataConfig
from forge_hpc.data.bad import BadExample
from forge_hpc.data.damage import naming_damage
from forge_hpc.data.examples import Example
from forge_hpc.data.hub_data import load_dataset
from forge_hpc.data.source import text_files
from forge_hpc.data.text_files import Place, TextFile, read_text_files


class Reader(Protocol):
    """Reads examples one after the other; places in it can be saved."""

    def read(self, count: int) -> list[Example | BadExample]:
        """The next ``count`` examples, fewer where the data end. Raises UserError where the data are damaged."""
        ...

    def rewind(self) -> None:
        """Go back to the beginning."""
        ...

    def tell(self) -> Any:
        """The place of the next example; JSON can hold it."""
        ...

    def seek(self, place: Any) -> None:
        """Go to a place."""
        ...


def open_reader(data: DataConfig) -> Reader:
    """What reads ``data.split`` of ``data.path`` as it is needed. Raises UserError."""
    files = text_files(data, data.split, streaming=True)
    return DatasetReader(data) if files is None else TextReader(files, data)


class TextReader:
    """Reads JSON or CSV files; a place in a JSONL file is reached at once, another by reading its file up to there."""

    def __init__(self, files: Sequence[TextFile], data: DataConfig) -> None:
        self._files = files
        self._data = data
        self._place = Place()

    def read(self, count: int) -> list[Example | BadExample]:
        found = list(itertools.islice(read_text_files(self._files, self._data, self._place), count))
        if found:
            self._place = found[-1][1]
        return [example for example, _ in found]

    def rewind(self) -> None:
        self._place = Place()

    def tell(self) -> list[int]:
        return list(self._place)

    def seek(self, place: Sequence[int]) -> None:
        self._place = Place(*place)


class DatasetReader:
    """Reads anything that ``datasets`` streams; a place is reached by reading its file up to there."""

    def __init__(self, data: DataConfig) -> None:
        self._path = data.path
        self._dataset = load_dataset(data, data.split, streaming=True)
        self._beginning = self._place = self._dataset.state_dict()
        self._iterator = iter(self._dataset)

    def read(self, count: int) -> list[Example | BadExample]:
        with naming_damage(self._path):
            examples = list(itertools.islice(self._iterator, count))
        self._place = self._dataset.state_dict()
        return examples

    def rewind(self) -> None:
        self.seek(self._beginning)

    def tell(self) -> dict[str, Any]:
        return self._place

    def seek(self, place: dict[str, Any]) -> None:
        self._place = place
        self._dataset.load_state_dict(place)
        self._iterator = iter(self._dataset)
