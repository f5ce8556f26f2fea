"""Examples: from the embedded task, JSONL files, or anything that ``datasets`` loads."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import DataConfig
from forge_hpc.data.bad import FIRST, BadExample

BUILTIN_PREFIX = "builtin:"
JSONL_SUFFIXES = (".jsonl", ".json")
_BUILDERS = {".parquet": "parquet", ".csv": "csv"}  # files that ``datasets`` reads, each a split of its own
_FIELDS = "name the fields with prompt_field and target_field of data, or of the source in data.sources"

Example = Mapping[str, Any]


def load_examples(data: DataConfig, split: str, seed: int) -> Sequence[Example]:
    """The examples of a split; each holds ``data.prompt_field``, ``data.target_field`` and whatever else the data has.

    ``data.path`` is ``builtin:addition``, a JSONL file (one JSON object a line), a Parquet or CSV file, a directory
    with SPLIT.jsonl files, or a name or directory for ``datasets.load_dataset``. A file is its own split. Raises
    UserError where there is no such data, a line is broken (with its number), a field is missing, or most examples that
    it begins with are bad.
    """
    if data.path.startswith(BUILTIN_PREFIX):
        name = data.path.removeprefix(BUILTIN_PREFIX)
        if name != "addition":
            raise UserError(f"unknown data {data.path}", f"there is {BUILTIN_PREFIX}addition")
        from forge_hpc.data.builtin import addition_examples

        examples: Sequence[Example] = addition_examples(split, seed)
        check_example(examples[0], data, data.path)
        return examples
    if (file := jsonl_file(data, split)) is not None:
        lines = [example for example, _ in read_jsonl(file, data)]
        if bad := next((line for line in lines if isinstance(line, BadExample)), None):
            raise bad
        if not lines:
            raise UserError(f"no examples in {file}", "each line must be one JSON object")
        return [line for line in lines if not isinstance(line, BadExample)]
    dataset = load_dataset(data, split, streaming=False)
    if len(dataset) == 0:
        raise UserError(f"{data.path} has no examples in split {split}", "check data.split")
    _check_first(dataset, data)
    return dataset


def _check_first(dataset: Any, data: DataConfig) -> None:
    """Raise a UserError where fields are missing or most of the first examples are bad: here, and not in the run."""
    _check_fields(dataset.column_names, data, data.path)
    bad: list[BadExample] = []
    num = min(FIRST, len(dataset))
    for index in range(num):
        try:
            check_example(dataset[index], data, f"{data.path}, example {index}")
        except BadExample as error:
            bad.append(error)
    if len(bad) > num / 2:
        raise UserError(f"{len(bad)} of the first {num} examples are bad: {bad[0].message}", bad[0].hint)


def load_eval_examples(data: DataConfig, seed: int) -> Iterable[Example | BadExample]:
    """The held-out examples: ``data.eval_split`` of ``data.eval_path``, which is ``data.path`` where it is null.

    With ``data.streaming`` they are read as they are iterated over. Raises UserError as ``load_examples``, and where
    the held-out prompts would be those that are trained on.
    """
    if data.eval_path is None and (data.sources or is_one_split(data.path)):
        what = "data.sources are" if data.sources else f"{data.path} holds one split, which is"
        raise UserError(
            f"{what} trained on: there are no held-out prompts",
            "set data.eval_path to other data, or evaluation.num_prompts=0",
        )
    held_out = replace(data, path=data.eval_path or data.path)
    if data.streaming and not held_out.path.startswith(BUILTIN_PREFIX):
        file = jsonl_file(held_out, data.eval_split)
        if file is not None:
            return (example for example, _ in read_jsonl(file, held_out))
        return _stream(held_out, data.eval_split)
    return load_examples(held_out, data.eval_split, seed)


def _stream(data: DataConfig, split: str) -> Iterator[Example]:
    dataset = load_dataset(data, split, streaming=True)
    with naming_damage(data.path):
        yield from dataset


def is_one_split(path: str) -> bool:
    """Whether the data are a single file, which has no other split to hold out."""
    return Path(path).suffix in (*JSONL_SUFFIXES, *_BUILDERS)


def jsonl_file(data: DataConfig, split: str) -> Path | None:
    """The JSONL file that holds the split, where it is one."""
    path = Path(data.path).expanduser()
    if path.suffix in JSONL_SUFFIXES:
        return path
    file = path / f"{split}.jsonl"
    return file if file.is_file() else None


class Place(NamedTuple):
    """A place in a JSONL file."""

    offset: int = 0
    """Bytes before it."""
    line: int = 0
    """Lines before it."""


def read_jsonl(
    path: Path,
    data: DataConfig,
    start: Place = Place(),  # noqa: B008
) -> Iterator[tuple[Example | BadExample, Place]]:
    """The objects of a JSONL file, each with the place after it; blank lines are left out. In place of a bad one stands
    what is bad about it, with the number of its line.

    Raises:
        UserError: no such file.
    """
    if not path.is_file():
        raise UserError(f"no such data file: {path}", "give data.path")
    with path.open("rb") as file:
        file.seek(start.offset)
        end = start
        for text in file:
            end = Place(end.offset + len(text), end.line + 1)
            if not text.strip():
                continue
            try:
                example = _parse(text, data, f"{path}, line {end.line}")
            except BadExample as error:
                yield error, end
            else:
                yield example, end


def _parse(line: bytes, data: DataConfig, where: str) -> Example:
    try:
        example = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadExample(f"{where}: not JSON: {error}", "each line must be one JSON object") from None
    if not isinstance(example, dict):
        raise BadExample(f"{where}: not a JSON object", "each line must be one JSON object")
    return check_example(example, data, where)


def check_example(example: Example | BadExample, data: DataConfig, where: str) -> Example:
    """The example. Raises BadExample unless it holds a prompt and, where ``data`` names its field, a target."""
    if isinstance(example, BadExample):
        raise example
    _check_fields(example, data, where)
    prompt = example[data.prompt_field]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
        for message in prompt:
            if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise BadExample(
                    f"{where}: a message in {data.prompt_field!r} is not {{role: text, content: text}}",
                    "each message has a role (system, user, assistant) and a content, both text",
                )
    elif not isinstance(prompt, str):
        raise BadExample(
            f"{where}: the field {data.prompt_field!r} is neither a string nor a list of messages", _FIELDS
        )
    if data.target_field is not None and not isinstance(example[data.target_field], str | int | float):
        raise BadExample(f"{where}: the field {data.target_field!r} is no string or number", _FIELDS)
    return example


def _check_fields(names: Iterable[str], data: DataConfig, where: str) -> None:
    for name in (data.prompt_field, data.target_field):
        if name is not None and name not in names:
            raise BadExample(f"{where}: no field {name!r} (there is: {', '.join(names)})", _FIELDS)


def load_dataset(data: DataConfig, split: str, *, streaming: bool) -> Any:
    """A ``datasets.Dataset``, or an ``IterableDataset`` that reads as it goes. Raises UserError.

    Images, audio and video stay as they are stored, bytes and path.
    """
    import datasets
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    path = Path(data.path).expanduser()
    source, name, files = (str(path) if path.exists() else data.path), data.name, None
    if path.suffix in _BUILDERS:
        if not path.is_file():
            raise UserError(f"no such data file: {path}", "give data.path")
        source, name, files, split = _BUILDERS[path.suffix], None, str(path), "train"
    try:
        with naming_damage(data.path):
            dataset = datasets.load_dataset(source, name, data_files=files, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load {data.path} (name {data.name}, split {split}): {first_line}",
            "check path, name and split of the data; a JSONL file needs the suffix .jsonl",
        ) from None
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError, httpx.TransportError) as error:
        raise UserError(
            f"{data.path} is not in the local cache and the hub cannot be reached ({type(error).__name__})",
            f"where there is a network, run `hf download --repo-type dataset {data.path} --local-dir DIR`, and set "
            "data.path=DIR",
        ) from None
    for column, feature in (dataset.features or {}).items():
        if getattr(feature, "decode", False):
            dataset = dataset.cast_column(column, replace(feature, decode=False))
    return dataset


@contextmanager
def naming_damage(path: str) -> Iterator[None]:
    """Raise a UserError for what ``datasets`` raises where a file is damaged, or is not what its suffix says."""
    import datasets

    try:
        yield
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise (_damaged(path, cause) if not isinstance(cause, OSError) or _is_damage(cause) else cause) from None
    except Exception as error:
        if _is_damage(error):
            raise _damaged(path, error) from None
        raise


def _is_damage(error: BaseException) -> bool:
    """Whether it tells of what is in a file, and not of a network, a disk or a name."""
    import pandas
    import pyarrow

    kinds = (pyarrow.ArrowException, pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError)
    of_compression = type(error) in (OSError, gzip.BadGzipFile, EOFError, zlib.error)
    return isinstance(error, kinds) or (of_compression and getattr(error, "errno", None) is None)


def _damaged(path: str, error: BaseException) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"cannot read {path}: {reason}",
        "the file is damaged, or is not what its suffix says: write it or download it again, or leave it out",
    )
