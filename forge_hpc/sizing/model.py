"""How many parameters a model has, by its ``config.json``, and the memory of a token's keys and values."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.hub_cache import cached_snapshot
from forge_hpc.config.models import KNOWN_MODEL_TYPES, looks_local, read_model_config


@dataclass(frozen=True)
class ModelSize:
    """What is known of a model before it is loaded."""

    num_params: int
    hf: dict[str, Any] | None
    """Its ``config.json``; None where the name alone says how large it is (``Qwen3-8B``)."""

    @property
    def active_params(self) -> int:
        """Parameters that a token visits: of an MoE model those of its experts alone."""
        return self.num_params if self.hf is None else num_params(self.hf, active=True)

    def kv_bytes(self, itemsize: int, tensor_parallel: int = 1) -> int:
        """Keys and values of a token on each GPU of a replica."""
        assert self.hf is not None
        num_heads = self.hf["num_attention_heads"]
        head_dim = self.hf.get("head_dim") or self.hf["hidden_size"] // num_heads
        kv_heads = self.hf.get("num_key_value_heads") or num_heads
        return int(2 * self.hf["num_hidden_layers"] * max(1, kv_heads // tensor_parallel) * head_dim * itemsize)


def model_size(path: str) -> ModelSize | None:
    """The size of the model that ``path`` names; None where it can only be known on a node."""
    directory = Path(path).expanduser() if looks_local(path) else cached_snapshot(path)
    if directory is not None and directory.is_dir():
        try:
            hf = read_model_config(directory)
            if "quantization_config" in hf:  # what its weights take is a matter of the method
                return None
            return ModelSize(num_params(hf), hf)
        except (UserError, KeyError, TypeError, ZeroDivisionError):
            return None  # a broken model is told of where the configuration is validated
    said = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)[bB](?![a-zA-Z0-9])", path.rpartition("/")[2].replace("_", "-"))
    return ModelSize(int(float(said[-1]) * 1e9), None) if said and not path.startswith("builtin:") else None


def sizes_with(policy: str) -> Callable[[str | None], ModelSize | None]:
    """`model_size` of any path, and of the policy's, by None; each is looked at once."""
    return cache(lambda path: model_size(path or policy))


def num_params(hf: dict[str, Any], *, active: bool = False) -> int:
    """Parameters of a Llama, Qwen2, Qwen3 or Qwen3-MoE, of ``active`` experts alone.

    Raises KeyError: a config.json of something else."""
    kind = hf["model_type"]
    if kind not in KNOWN_MODEL_TYPES:
        raise KeyError(kind)
    dim, num_heads = hf["hidden_size"], hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or dim // num_heads
    queries, keys = num_heads * head_dim, 2 * (hf.get("num_key_value_heads") or num_heads) * head_dim
    attention = dim * (2 * queries + keys) + 2 * dim  # and the two norms of a layer
    if kind == "qwen2":
        attention += queries + keys  # biases
    elif kind.startswith("qwen3"):
        attention += 2 * head_dim  # norms of queries and keys
    if experts := hf.get("num_local_experts") or hf.get("num_experts"):
        visited = hf["num_experts_per_tok"] if active else experts
        mlp = visited * 3 * dim * hf["moe_intermediate_size"] + experts * dim
    else:
        mlp = 3 * dim * hf["intermediate_size"]
    embeddings = hf["vocab_size"] * dim * (1 if hf.get("tie_word_embeddings") else 2)
    return int(embeddings + hf["num_hidden_layers"] * (attention + mlp) + dim)
