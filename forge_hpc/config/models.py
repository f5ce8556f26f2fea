"""What can be known of a model directory without torch: its dimensions, and whether its files are whole."""

from __future__ import annotations

import json
import re
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

ARCHITECTURES = (
    *("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
    *("Qwen2ForCausalLM", "MistralForCausalLM", "LlamaForCausalLM"),
)
"""Their models."""
_OTHER_MODELS = (
    *("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config", "mlp_only_layers"),
    "dual_chunk_attention_config",
)
"""Options of config.json that make another model of one."""
VALUE_HEAD = "score.weight"
"""The weight of a sequence classifier of one label, as transformers calls it."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PLAIN = ("F64", "F32", "F16", "BF16")
"""Types of tensors whose shapes are those of the model."""
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


def architecture_of(config: dict[str, Any]) -> str:
    """The model's class, of a language model also where this one is a reward model."""
    return str(config["architectures"][0]).replace("ForSequenceClassification", "ForCausalLM")


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says of rotary embeddings, with a ``rope_type``: transformers 5 writes ``rope_parameters``,
    earlier versions ``rope_theta`` and ``rope_scaling``."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0)} | (config.get("rope_scaling") or {})
    rope |= config.get("rope_parameters") or {}
    return rope | {"rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def check_trainable(config: dict[str, Any], where: str) -> None:
    """Raise a UserError unless trainers and generators compute what a model of this ``config.json`` is.

    Args:
        where: what messages call the model.
    """
    if not config.get("architectures"):
        raise UserError(f"config.json of {where} names no architectures", "save the model with transformers")
    if (architecture := architecture_of(config)) not in ARCHITECTURES:
        raise UserError(
            f"{where} is a {architecture}, which cannot be trained here",
            f"supported architectures: {', '.join(ARCHITECTURES)}",
        )
    for option in _OTHER_MODELS:
        if config.get(option):
            raise UserError(f"{where} has {option}, which is not supported", "choose another model")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"{where} has the activation {activation}", "only silu is supported")
    rope = rope_of(config)
    if rope["rope_type"] not in ("default", "llama3"):
        raise UserError(
            f"{where} has rotary embeddings of type {rope['rope_type']}, which are not supported",
            "supported types: default, llama3",
        )
    if (rotated := rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))) not in (None, 1):
        raise UserError(f"{where} rotates {rotated} of each head, which is not supported", "choose another model")
    if num_experts_of(config) and (config.get("decoder_sparse_step", 1) != 1 or not config.get("norm_topk_prob")):
        raise UserError(
            f"{where} has not experts in every layer and normalised routing weights, as a Qwen3 MoE must have here",
            "their config.json has decoder_sparse_step: 1 and norm_topk_prob: true",
        )
    check_generated(config, where)


def check_generated(config: dict[str, Any], where: str) -> None:
    """Raise a UserError where vLLM would compute another model than that of this ``config.json``, and not say so."""
    sizes = [config.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim")]
    dim, heads, head_dim = (size if isinstance(size, int) else 0 for size in sizes)
    if config.get("model_type") != "qwen2" or not (dim and heads and head_dim):
        return
    if (theirs := dim // heads) != head_dim:
        raise UserError(
            f"{where} has heads of {head_dim} values, and vLLM 0.32 gives those of a Qwen2 hidden_size / "
            f"num_attention_heads = {theirs}, whatever config.json says: it would take the first rows of its weights",
            "choose another model",
        )


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


def check_weights(directory: Path) -> set[str]:
    """The names of a model's weights.

    Raises:
        UserError: safetensors are missing, not as long as their headers say, or of other dimensions than its
            ``config.json`` says: of larger ones vLLM takes the first rows and columns, and does not say so.
    """
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
        files = [directory / name for name in sorted(names)]  # others are nobody's
    elif not files:
        raise UserError(f"no weights (*.safetensors) in the model directory {directory}", "fetch the model again")
    config = read_model_config(directory)
    expected = _shapes_of(config) if config.get("model_type") in KNOWN_MODEL_TYPES else {}
    found: set[str] = set()
    for file in files:
        for name, shape in _check_safetensors(file).items():
            found.add(name)
            kind = re.sub(r"\.\d+\.", ".*.", name)
            if shape is not None and expected.get(kind, shape) != shape:
                raise UserError(
                    f"the weight {name} in {directory} has shape {shape}, config.json implies {expected[kind]}",
                    "config.json and the weights belong to different models",
                )
    return found


def check_tokenizer(directory: Path) -> None:
    """Raise UserError unless the model directory holds a tokenizer."""
    if not any((directory / name).exists() for name in _TOKENIZERS):
        raise UserError(
            f"no tokenizer ({', '.join(_TOKENIZERS)}) in the model directory {directory}",
            "save the tokenizer into the same directory: tokenizer.save_pretrained(DIR)",
        )


def token_ids(directory: Path) -> dict[str, int]:
    """The ids of a tokenizer's tokens, as far as its ``tokenizer.json`` has them: none without one."""
    try:
        tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # tokens with their scores, in order
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        return vocabulary | {added["content"]: added["id"] for added in tokenizer.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _shapes_of(config: dict[str, Any]) -> dict[str, list[int]]:
    """The shapes of weights by their names, a ``*`` in place of the layer's number; none of a quantised model's, nor of
    experts."""
    try:
        dim, num_heads, vocab_size = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
        head_dim = config.get("head_dim") or dim // num_heads
        queries, keys = num_heads * head_dim, (config.get("num_key_value_heads") or num_heads) * head_dim
        inner = None if num_experts_of(config) else config["intermediate_size"]
    except (KeyError, TypeError, ZeroDivisionError):  # no model of its family: told of by others
        return {}
    if config.get("quantization_config"):
        return {}
    layer = {"q_proj": [queries, dim], "k_proj": [keys, dim], "v_proj": [keys, dim], "o_proj": [dim, queries]}
    shapes = {f"self_attn.{name}": shape for name, shape in layer.items()}
    if inner is not None:
        shapes |= {"mlp.gate_proj": [inner, dim], "mlp.up_proj": [inner, dim], "mlp.down_proj": [dim, inner]}
    shapes = {f"model.layers.*.{name}.weight": shape for name, shape in shapes.items()}
    return shapes | {"model.embed_tokens.weight": [vocab_size, dim], "lm_head.weight": [vocab_size, dim]}


def _check_safetensors(file: Path) -> dict[str, list[int] | None]:
    """The shapes of its tensors, None of one whose numbers are packed.

    The format opens with the header's length (8 bytes, little endian), then JSON with shapes and offsets of all.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        shapes = {name: [*tensor["shape"]] if tensor["dtype"] in _PLAIN else None for name, tensor in tensors.items()}
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
    return shapes
