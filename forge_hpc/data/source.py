"""Examples: from the embedded task, JSONL files, or anything that ``datasets`` loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import DataConfig

BUILTIN_PREFIX = "builtin:"


def load_examples(data: DataConfig, split: str, seed: int) -> Sequence[Mapping[str, Any]]:
    """The examples of a split; each holds ``data.prompt_field``, ``data.target_field`` and whatever else the data has.

    ``data.path`` is ``builtin:addition``, a JSONL file (one JSON object a line; it is its own split), a directory with
    SPLIT.jsonl files, or a name or directory for ``datasets.load_dataset``. Raises UserError where there is no such
    data, a line is broken (with its number), or a field is missing.
    """
    path = Path(data.path).expanduser()
    if data.path.startswith(BUILTIN_PREFIX):
        name = data.path.removeprefix(BUILTIN_PREFIX)
        if name != "addition":
            raise UserError(f"unknown data {data.path}", f"there is {BUILTIN_PREFIX}addition")
        from forge_hpc.data.builtin import addition_examples

        examples: Sequence[Mapping[str, Any]] = addition_examples(split, seed)
        _check_fields(examples[0], data, data.path)
        return examples
    if path.suffix in (".jsonl", ".json"):
        return read_jsonl(path, data)
    if (path / f"{split}.jsonl").is_file():
        return read_jsonl(path / f"{split}.jsonl", data)
    return _load_dataset(data, split)


def load_eval_examples(data: DataConfig, seed: int) -> Sequence[Mapping[str, Any]]:
    """The held-out examples: ``data.eval_split`` of ``data.eval_path``, which is ``data.path`` where it is null.

    Raises UserError as ``load_examples``, and where a single JSONL file would be trained on and held out at once.
    """
    if data.eval_path is None and Path(data.path).suffix in (".jsonl", ".json"):
        raise UserError(
            f"{data.path} holds one split, so there are no held-out prompts",
            "set data.eval_path to another file, or evaluation.num_prompts=0",
        )
    return load_examples(replace(data, path=data.eval_path or data.path), data.eval_split, seed)


def read_jsonl(path: Path, data: DataConfig) -> list[dict[str, Any]]:
    """The objects of a JSONL file; blank lines are left out. Raises UserError with the number of the first bad line."""
    if not path.is_file():
        raise UserError(f"no such data file: {path}", "give data.path")
    examples: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                example = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{where}: not JSON: {error}", "each line must be one JSON object") from None
            if not isinstance(example, dict):
                raise UserError(f"{where}: not a JSON object", "each line must be one JSON object")
            _check_fields(example, data, where)
            examples.append(example)
    if not examples:
        raise UserError(f"no examples in {path}", "each line must be one JSON object")
    return examples


def _check_fields(example: Mapping[str, Any], data: DataConfig, where: str) -> None:
    for key, name in (("prompt_field", data.prompt_field), ("target_field", data.target_field)):
        if name not in example:
            raise UserError(f"{where}: no field {name!r} (there is: {', '.join(example)})", f"set data.{key}")
    if not isinstance(example[data.prompt_field], str):
        raise UserError(f"{where}: the field {data.prompt_field!r} is not a string", "set data.prompt_field")
    if not isinstance(example[data.target_field], str | int | float):
        raise UserError(f"{where}: the field {data.target_field!r} is no string or number", "set data.target_field")


def _load_dataset(data: DataConfig, split: str) -> Sequence[Mapping[str, Any]]:
    import datasets
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    source = str(Path(data.path).expanduser()) if Path(data.path).expanduser().exists() else data.path
    try:
        dataset = datasets.load_dataset(source, data.name, split=split)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load {data.path} (name {data.name}, split {split}): {first_line}",
            "check data.path, data.name and data.split; a JSONL file needs the suffix .jsonl",
        ) from None
    except (OfflineModeIsEnabled, ConnectionError, HfHubHTTPError, httpx.TransportError) as error:
        raise UserError(
            f"{data.path} is not in the local cache and the hub cannot be reached ({type(error).__name__})",
            "load it once where there is a network, with the same HF_HOME, or set data.path to a JSONL file",
        ) from None
    if len(dataset) == 0:
        raise UserError(f"{data.path} has no examples in split {split}", "check data.split")
    _check_fields(dataset[0], data, data.path)
    return dataset
