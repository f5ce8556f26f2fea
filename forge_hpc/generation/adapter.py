"""Adapters (LoRA) that an engine keeps beside the base model, in place of new weights (``trainer.lora.publish``).

The engine is built for one adapter, or for those of ``trainer.lora.sweep``. Each version replaces the one before: the
tensors are written as PEFT names them into a folder in shared memory, where vLLM 0.32 reads adapters from (it takes no
tensors), and the folder goes once they are read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from forge_hpc.cluster import folders
from forge_hpc.config.registry import LORA_LAYERS, VLLM_LORA_RANKS
from forge_hpc.config.schema import LoRAConfig
from forge_hpc.generation.checkpoint import check_shapes


def adapter_arguments(lora: LoRAConfig) -> dict[str, Any]:
    """Keyword arguments of ``vllm.EngineArgs`` for an engine that takes adapters; none for one that does not."""
    if not lora.sends_adapters:
        return {}
    rank = min(rank for rank in VLLM_LORA_RANKS if rank >= lora.rank)
    return {"enable_lora": True, "max_loras": len(lora.sweep) or 1, "max_lora_rank": rank}


def adapter_shapes(model: Mapping[str, tuple[int, ...]], lora: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """By PEFT's name the shapes of the adapters that a model has: A [rank, in] and B [out, rank] of each layer.

    Args:
        model: shape of every tensor by Hugging Face name.
    """
    layers = {layer for target in lora.target_modules for layer in LORA_LAYERS[target]}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in model.items():
        layer = name.removesuffix(".weight")
        if layer != name and layer.rpartition(".")[2] in layers:
            shapes[f"base_model.model.{layer}.lora_A.weight"] = (lora.rank, shape[1])
            shapes[f"base_model.model.{layer}.lora_B.weight"] = (shape[0], lora.rank)
    return shapes


def complete_adapter(
    named_tensors: Iterable[tuple[str, torch.Tensor]], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """The tensors by name. Raises ValueError that names what is missing, unknown or of another shape."""
    tensors = dict(named_tensors)
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected, tied_head=False)
    return tensors


@contextmanager
def staged_adapter(tensors: Mapping[str, torch.Tensor], lora: LoRAConfig, dtype: torch.dtype) -> Iterator[Path]:
    """A folder as PEFT writes it, in shared memory, readable by this user alone; removed when the context ends."""
    from safetensors.torch import save_file

    settings = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors}),
        "bias": "none",
    }
    with tempfile.TemporaryDirectory(prefix="forge-hpc-adapter-", dir=folders.folder()) as directory:
        copies = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
        save_file(copies, Path(directory) / "adapter_model.safetensors")
        (Path(directory) / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
        yield Path(directory)
