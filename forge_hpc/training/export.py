"""Writing a model in Hugging Face format, from weights that may be sharded over ranks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

_MAX_SHARD_BYTES = 5 * 10**9
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json", "*.gguf")


def export_hf(
    state: Mapping[str, torch.Tensor],
    source_dir: Path,
    directory: Path,
    dtype: torch.dtype,
    ends: Sequence[int] = (),
) -> None:
    """Write weights, ``config.json`` and the tokenizer's files to a directory that transformers and vLLM load.

    A collective call: every rank takes part in gathering, one tensor at a time; rank 0 writes. The directory appears
    whole or not at all, and replaces one of that name.

    Args:
        state: weights by Hugging Face name, tensors or DTensors, without a tied ``lm_head.weight``.
        source_dir: the model that training started from; all its small files are copied.
        dtype: of the weights written.
        ends: tokens that the model has learned to end an answer with. Generators stop at them, and at those that the
            model had: all stand in ``generation_config.json``.
    """
    is_writer = dist.get_rank() == 0
    tmp = directory.with_name(f".{directory.name}.tmp")
    if is_writer:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        _copy_small_files(source_dir, tmp, dtype, is_tied="lm_head.weight" not in state)
        _add_ends(tmp, ends)
    shards = _plan_shards(state, dtype)
    for index, names in enumerate(shards):
        tensors = {}
        for name in names:
            tensor = state[name].detach()
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if is_writer:
                tensors[name] = full.to("cpu", dtype).contiguous()
        if is_writer:
            path = tmp / _shard_name(index, len(shards))
            save_file(tensors, path, metadata={"format": "pt"})
            _sync(path)
    if is_writer:
        if len(shards) > 1:
            _write_index(shards, state, dtype, tmp)
        _replace(tmp, directory)
    dist.barrier()


def _plan_shards(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size_bytes = 0
    for name, tensor in state.items():
        num_bytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size_bytes + num_bytes > _MAX_SHARD_BYTES:
            shards.append([])
            size_bytes = 0
        shards[-1].append(name)
        size_bytes += num_bytes
    return shards


def _shard_name(index: int, num_shards: int) -> str:
    return "model.safetensors" if num_shards == 1 else f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"


def _copy_small_files(source_dir: Path, target: Path, dtype: torch.dtype, is_tied: bool) -> None:
    for path in sorted(source_dir.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)
    config = json.loads((target / "config.json").read_text())
    config.pop("torch_dtype", None)  # the name before transformers 5
    config["dtype"] = str(dtype).removeprefix("torch.")
    if not is_tied and config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False  # the model's file had a head of its own, which its config denied
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _add_ends(target: Path, ends: Sequence[int]) -> None:
    path = target / "generation_config.json"
    model = json.loads((target / "config.json").read_text())
    options = json.loads(path.read_text()) if path.exists() else {}
    known = options.get("eos_token_id", model.get("eos_token_id"))
    known = [] if known is None else known if isinstance(known, list) else [known]
    if set(ends) <= set(known):
        return
    stops = list(dict.fromkeys([*ends, *known]))
    options["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    path.write_text(json.dumps(options, indent=2) + "\n")


def _write_index(shards: list[list[str]], state: Mapping[str, torch.Tensor], dtype: torch.dtype, target: Path) -> None:
    weight_map = {name: _shard_name(i, len(shards)) for i, names in enumerate(shards) for name in names}
    total_bytes = sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _replace(tmp: Path, directory: Path) -> None:
    if directory.exists():
        old = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        tmp.rename(directory)
        shutil.rmtree(old)
    else:
        tmp.rename(directory)
