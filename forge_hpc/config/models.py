"""What can be known of a model directory without torch: its dimensions, and whether its files are whole."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError

KNOWN_MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""``model_type`` of config.json that TorchTitan and vLLM both have."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MAX_HEADER_BYTES = 100_000_000


def looks_local(path: str) -> bool:
    """Whether `path` can only be a local path, not a name on the Hugging Face hub (``name`` or ``owner/name``)."""
    return path.startswith(("/", "./", "../", "~")) or path.partition("@")[0].count("/") > 1 or Path(path).exists()


def read_model_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a model in Hugging Face format. Raises UserError where it is missing or broken."""
    file = directory / "config.json"
    hint = "model.path must be a model in Hugging Face format: config.json, *.safetensors and the tokenizer's files"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config.json in the model directory {directory}", hint) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}", hint) from None
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no JSON object", hint)
    return config


def check_weights(directory: Path) -> None:
    """Raise UserError unless the safetensors of a model directory are there and as long as their headers say."""
    index = directory / "model.safetensors.index.json"
    files = sorted(directory.glob("*.safetensors"))
    if index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"cannot read {index}: {error!r}", "fetch the model again") from None
        missing = sorted(name for name in names if not (directory / name).exists())
        if missing:
            raise UserError(
                f"the model directory {directory} lacks {len(missing)} of {len(names)} weight files: {missing[0]}",
                "fetch the model again",
            )
    elif not files:
        raise UserError(f"no weights (*.safetensors) in the model directory {directory}", "fetch the model again")
    for file in files:
        _check_safetensors(file)


def check_tokenizer(directory: Path) -> None:
    """Raise UserError unless the model directory holds a tokenizer."""
    if not any((directory / name).exists() for name in _TOKENIZERS):
        raise UserError(
            f"no tokenizer ({', '.join(_TOKENIZERS)}) in the model directory {directory}",
            "save the tokenizer into the same directory: tokenizer.save_pretrained(DIR)",
        )


def _check_safetensors(file: Path) -> None:
    """The format opens with the header's length (8 bytes, little endian), then JSON with the offsets of all tensors."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(
            f"{file} is not a safetensors file: {error}",
            "a Git LFS pointer or a broken download: fetch the model again",
        ) from None
    if 8 + length + end != size:
        raise UserError(
            f"{file} has {size} bytes, its header promises {8 + length + end}",
            "a broken download: fetch the model again",
        )
