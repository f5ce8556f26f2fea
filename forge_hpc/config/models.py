"""What can be known of a model directory without torch: its dimensions, and whether its files are whole."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError

KNOWN_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""``model_type`` of config.json that TorchTitan and vLLM both have."""
_NO_GEMMA = "TorchTitan has it by its transformers backend alone, whose flex attention trains on no CPU"
_WHY_NOT = {
    "deepseek_v3": "its attention (MLA) was not compared with transformers on packed documents",
    "gpt_oss": "TorchTitan 0.3.0's names for its experts miss their weights, which would stay random",
    "qwen3_5": "TorchTitan 0.3.0 computes its linear attention by the package fla, which is not installed here",
    "qwen3_5_text": "TorchTitan 0.3.0 computes its linear attention by the package fla, which is not installed here",
    "qwen3_5_moe": "TorchTitan 0.3.0 computes its linear attention by the package fla, which is not installed here",
    "gemma3": _NO_GEMMA,
    "gemma3_text": _NO_GEMMA,
}
"""Families that people ask for, and what keeps them out (docs/models.md)."""

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


def check_family(kind: str | None, where: str) -> None:
    """Raise a UserError unless models of a ``model_type`` can be trained here."""
    if kind in KNOWN_MODEL_TYPES:
        return
    reason = f": {_WHY_NOT[kind]}" if kind in _WHY_NOT else ""
    raise UserError(f"{where} is of model_type {kind!r}{reason}", f"supported: {', '.join(KNOWN_MODEL_TYPES)}")


def check_invariant(config: dict[str, Any], where: str) -> None:
    """Raise a UserError unless ``model.batch_invariant`` is for a model of this ``config.json``."""
    if num_experts_of(config):
        raise UserError(
            f"model.batch_invariant, and {where} has experts, which vLLM and trainers have other kernels for",
            "leave it off; algorithm.routing_replay has trainers take the experts that generators took",
        )
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if head_dim not in INVARIANT_HEADS:  # FlashAttention 3 adds up keys of others in other pieces where they are paged
        raise UserError(
            f"model.batch_invariant, and {where} has heads of {head_dim} values; it is for {INVARIANT_HEADS}",
            "leave it off",
        )


INVARIANT_HEADS = (64, 128)


def num_experts_of(config: dict[str, Any]) -> int:
    """Experts of a layer; 0 of a dense model. They have another name since transformers 5."""
    return config.get("num_local_experts") or config.get("num_experts") or 0


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
