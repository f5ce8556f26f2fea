"""Examples: from the embedded task, text files, or anything that ``datasets`` loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from forge_hpc.config.errors import UserError
from forge_hpc.config.registry import DATA
from forge_hpc.config.schema import DataConfig
from forge_hpc.config.user_code import load_user_code
from forge_hpc.data.bad import FIRST, BadExample
from forge_hpc.data.damage import naming_damage
from forge_hpc.data.examples import Example, check_example
from forge_hpc.data.hub_data import find_text_files, load_dataset
from forge_hpc.data.text_files import TextFile, read_text_files

BUILTIN_PREFIX = "builtin:"
JSONL_SUFFIXES = (".jsonl", ".json")
FILE_SUFFIXES = (*JSONL_SUFFIXES, ".csv", ".parquet")


def load_examples(data: DataConfig, split: str, seed: int) -> Sequence[Example | BadExample]:
    """The examples of a split; each holds ``data.prompt_field``, ``data.target_field`` and whatever else the data has.

    ``data.path`` is ``builtin:addition``, a JSONL file (one JSON object a line), a Parquet or CSV file, a directory
    with SPLIT.jsonl files, or a name or directory for ``datasets.load_dataset``. A file is its own split. Raises
    UserError where there is no such data, a line of a JSONL file is broken (with its number), or most examples that it
    begins with are bad; other bad examples stand in their place.
    """
    if data.path.startswith(BUILTIN_PREFIX):
        if data.path not in DATA:
            raise UserError(f"unknown data {data.path}", f"there is {', '.join(DATA)}")
        examples: Sequence[Example | BadExample] = load_user_code(DATA[data.path], "data")(split, seed)
        check_example(examples[0], data, data.path)
        return examples
    texts = _read_texts(data, split)
    if texts is not None:
        examples = texts
        if bad := next((e for e in examples if isinstance(e, BadExample)), None) if is_jsonl(data, split) else None:
            raise bad
    else:
        examples = load_dataset(data, split, streaming=False)
    if len(examples) == 0:
        raise UserError(f"no examples in {data.path}, split {split}", "check data.path and data.split")
    _check_first(examples, data)
    return examples


def _read_texts(data: DataConfig, split: str) -> list[Example | BadExample] | None:
    """The examples in text files of a split, or of parts of splits as ``datasets`` names them (``train[:10%]+test``);
    None where they are in other files."""
    examples: list[Example | BadExample] = []
    for part in [split] if is_one_split(data.path) else split.split("+"):
        name, is_part, _ = part.strip().partition("[")
        files = text_files(data, name, streaming=False)
        if files is None:
            return None
        found = [example for example, _ in read_text_files(files, data)]
        if is_part:
            from datasets import ReadInstruction

            [places] = ReadInstruction.from_spec(part.strip()).to_absolute({name: len(found)})
            found = found[places.from_ : places.to]
        examples += found
    return examples


def _check_first(examples: Sequence[Example | BadExample], data: DataConfig) -> None:
    """Raise a UserError where most of the first examples are bad: here, and not in the run."""
    bad: list[BadExample] = []
    num = min(FIRST, len(examples))
    for index in range(num):
        try:
            check_example(examples[index], data, f"{data.path}, example {index}")
        except BadExample as error:
            bad.append(error)
    if len(bad) == num:
        raise bad[0]
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
        return _stream(held_out, data.eval_split)
    return load_examples(held_out, data.eval_split, seed)


def _stream(data: DataConfig, split: str) -> Iterator[Example | BadExample]:
    files = text_files(data, split, streaming=True)
    if files is not None:
        yield from (example for example, _ in read_text_files(files, data))
        return
    dataset = load_dataset(data, split, streaming=True)
    with naming_damage(data.path):
        yield from dataset


def is_one_split(path: str) -> bool:
    """Whether the data are a single file, which has no other split to hold out."""
    return Path(path).suffix in FILE_SUFFIXES


def text_files(data: DataConfig, split: str, *, streaming: bool) -> list[TextFile] | None:
    """The JSON or CSV files that hold the split; None where only ``datasets`` can read it. Raises UserError."""
    path = Path(data.path).expanduser()
    if is_jsonl(data, split):
        return [TextFile(str(path if path.suffix in JSONL_SUFFIXES else path / f"{split}.jsonl"))]
    if path.suffix == ".csv":
        return [TextFile(str(path), {})]
    return None if path.suffix == ".parquet" else find_text_files(data, split, streaming=streaming)


def is_jsonl(data: DataConfig, split: str) -> bool:
    """Whether one JSONL file holds the split, which is then looked through line by line before the run."""
    path = Path(data.path).expanduser()
    return path.suffix in JSONL_SUFFIXES or (path / f"{split}.jsonl").is_file()
