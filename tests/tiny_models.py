"""Tiny Hugging Face models and documents for the tests of the trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from forge_hpc.data.types import Document

VOCAB_SIZE = 67  # not a multiple of anything

_DIMS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,  # far from uniform, so that a wrong position or mask shows
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # short, so that scaled, kept and blended frequencies all occur
}


def write_model(
    directory: Path,
    family: str,
    *,
    tied: bool = False,
    seed: int = 0,
    head_dim: int = 16,
    num_experts: int = 4,
    num_hidden_layers: int = 2,
) -> PreTrainedModel:
    """Write a random model of a family (qwen2, qwen3, llama, mistral, qwen3_moe) in float32 and return it."""
    torch.manual_seed(seed)
    dims = _DIMS | {"tie_word_embeddings": tied, "head_dim": head_dim, "hidden_size": 4 * head_dim}
    dims |= {"num_hidden_layers": num_hidden_layers}
    model: PreTrainedModel
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**dims))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**dims))
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):  # zero at first
                torch.nn.init.normal_(weight, std=0.5)
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**dims, rope_parameters=_LLAMA3_ROPE))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**dims, sliding_window=None))
    else:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **dims,
                num_experts=num_experts,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
                norm_topk_prob=True,
            )
        )
    model.save_pretrained(directory)
    return model.eval()


def random_documents(num: int, *, seed: int = 0, max_tokens: int = 24, with_logprobs: bool = True) -> list[Document]:
    """Documents of 5 to `max_tokens` tokens with a prompt of 3."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(num):
        num_tokens = int(rng.integers(5, max_tokens + 1))
        mask = np.arange(num_tokens) >= 3
        logprobs = np.where(mask, rng.uniform(-5.0, -3.0, num_tokens), 0).astype(np.float32) if with_logprobs else None
        documents.append(
            Document(
                token_ids=rng.integers(0, VOCAB_SIZE, num_tokens).astype(np.int32),
                loss_mask=mask,
                generator_logprobs=logprobs,
                advantage=float(rng.normal()),
                ref_logprobs=None if logprobs is None else np.where(mask, logprobs + 0.1, 0).astype(np.float32),
            )
        )
    return documents
