"""JSON and CSV files: what they hold is read as it is written, and nothing is guessed from other lines.

``datasets`` finds one type for each column of such files, and makes numbers of texts, days of dates and floats of large
integers on the way; it is asked only which files a split has.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import DataConfig
from forge_hpc.data.bad import BadExample
from forge_hpc.data.damage import naming_damage
from forge_hpc.data.examples import Example, check_example

_ROWS = 1000
"""Rows of a CSV file that are parsed together."""


class Place(NamedTuple):
    """A place in the files of a split."""

    offset: int = 0
    """Bytes before it in its file."""
    line: int = 0
    """Lines, rows or items before it in its file."""
    file: int = 0
    """Files before it."""


class TextFile(NamedTuple):
    """A file of JSON objects, or a table of text."""

    path: str
    """A path, or an address that ``datasets`` opens."""
    csv: dict[str, Any] | None = None
    """Of a table: keyword arguments of ``pandas.read_csv``."""


def read_text_files(
    files: Sequence[TextFile],
    data: DataConfig,
    start: Place = Place(),  # noqa: B008
) -> Iterator[tuple[Example | BadExample, Place]]:
    """The examples of the files, each with the place after it; blank lines are left out. In place of a bad one stands
    what is bad about it, with the number of its line.

    Raises:
        UserError: a file is not there, or is damaged.
    """
    for number in range(start.file, len(files)):
        file = files[number]
        begin = start if number == start.file else Place(file=number)
        read = _read_json if file.csv is None else _read_csv
        with naming_damage(file.path):
            for example, where, place in read(file, begin):
                yield _checked(example, data, where), place


def _checked(example: Any, data: DataConfig, where: str) -> Example | BadExample:
    try:
        if not isinstance(example, dict | BadExample):
            raise BadExample(f"{where}: not a JSON object", "each line must be one JSON object")
        return check_example(example, data, where)
    except BadExample as error:
        return error


def _read_json(file: TextFile, start: Place) -> Iterator[tuple[Any, str, Place]]:
    """One object a line, or all of them in one array."""
    with _opened(file.path) as stream:
        if start.offset:
            stream.seek(start.offset)
        end = start
        for line in stream:
            if end.offset == 0 and line.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                yield from _read_array(file, line + stream.read(), start)
                return
            end = end._replace(offset=end.offset + len(line), line=end.line + 1)
            if line.strip():
                where = f"{file.path}, line {end.line}"
                yield _parsed(line, where), where, end


def _read_array(file: TextFile, text: bytes, start: Place) -> Iterator[tuple[Any, str, Place]]:
    items = _parsed(text, file.path)
    if isinstance(items, BadExample):
        raise UserError(items.message, "a JSON file holds one object a line, or one array of objects")
    for index in range(start.line, len(items)):
        yield items[index], f"{file.path}, item {index}", start._replace(offset=0, line=index + 1)


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # bytes that are no UTF-8, too
        return BadExample(f"{where}: not JSON: {error}", "each line must be one JSON object")


def _read_csv(file: TextFile, start: Place) -> Iterator[tuple[Any, str, Place]]:
    """A cell is its text, and nothing where it is empty."""
    import pandas

    with _opened(file.path) as stream:
        options = {**(file.csv or {}), "dtype": object, "na_filter": False, "chunksize": _ROWS}
        tables = pandas.read_csv(stream, **options)
        rows = itertools.chain.from_iterable(_rows(table, file) for table in tables)
        for line, row in itertools.islice(enumerate(rows, 1), start.line, None):
            yield row, f"{file.path}, row {line}", start._replace(line=line)


def _rows(table: Any, file: TextFile) -> Iterator[dict[str, str | None]]:
    if not (file.csv or {}).get("index_col") and type(table.index).__name__ != "RangeIndex":
        # pandas takes the first cells for the names of rows, and the others for the columns before theirs
        raise UserError(f"cannot read {file.path}: its rows have more cells than its header", "mend one of them")
    names = [str(name) for name in table.columns]
    for cells in table.itertuples(index=False, name=None):
        yield {name: cell if isinstance(cell, str) and cell else None for name, cell in zip(names, cells, strict=True)}


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    if "://" not in path:
        if not Path(path).is_file():
            raise UserError(f"no such data file: {path}", "give data.path")
        with Path(path).open("rb") as file:
            yield file
        return
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:
        yield file
