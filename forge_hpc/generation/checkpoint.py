"""Which tensors a model's checkpoint holds, so that an update of the weights can be checked for completeness."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

TIED_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def checkpoint_shapes(model_dir: str | Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the safetensors files of a directory, by Hugging Face name. Reads headers only.

    Raises FileNotFoundError where the directory has none.
    """
    files = sorted(Path(model_dir).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {model_dir}")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes))
        shapes.update({name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"})
    return shapes


def checkpoint_tensors(model_dir: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a directory's safetensors files by Hugging Face name, on the CPU, one after the other."""
    from safetensors import safe_open

    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def model_files(model_dir: str | Path) -> dict[str, str]:
    """SHA-256 of each file of a directory that says what the model is, but for its weights, by name: its shape, its
    tokenizer, its chat template."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(model_dir).iterdir())
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and "index" not in path.name
    }


def complete_weights(
    named_tensors: Iterable[tuple[str, torch.Tensor]], expected: Mapping[str, tuple[int, ...]], tied_head: bool
) -> list[tuple[str, torch.Tensor]]:
    """The tensors as a list, checked to be exactly those of the checkpoint.

    With tied embeddings the head is always passed too, as a copy of the embedding: vLLM 0.32 restores the two as
    separate parameters when it reloads, and on the CPU the head keeps its old weights unless it is given them.

    Raises ValueError that names what is missing, unknown or of another shape; nothing has been loaded by then.
    """
    tensors = dict(named_tensors)
    if tied_head and EMBEDDING in tensors:
        tensors[TIED_HEAD] = tensors[EMBEDDING]
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected, tied_head)
    return list(tensors.items())


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], tied_head: bool
) -> None:
    """Raises ValueError where these are not the tensors of the checkpoint; it names what is missing, unknown or of
    another shape. A tied head may be there or not."""
    wanted = dict(expected)
    if tied_head and TIED_HEAD in shapes:
        wanted[TIED_HEAD] = wanted[EMBEDDING]
    elif tied_head:
        wanted.pop(TIED_HEAD, None)
    missing = sorted(wanted.keys() - shapes.keys())
    unknown = sorted(shapes.keys() - wanted.keys())
    reshaped = sorted(name for name in wanted.keys() & shapes.keys() if tuple(shapes[name]) != wanted[name])
    if missing or unknown or reshaped:
        found = {"missing": missing, "unknown": unknown, "of another shape": reshaped}
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
            for what, names in found.items()
            if names
        ]
        raise ValueError("these weights do not match the model's checkpoint: " + ", ".join(parts))
