"""How much of its GPUs' arithmetic training uses: model FLOPs utilisation (MFU).

MFU is the FLOPs that the model needs for a step, over what the GPUs could have done in that time. What is computed
again (activation checkpointing) counts once, and padding not at all: it is no use to the model. Definition: PaLM,
appendix B, https://arxiv.org/abs/2204.02311.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def step_flops(
    hf: dict[str, Any], lengths: Sequence[int], num_trained: int, *, vocab_size: int | None = None, lora: bool = False
) -> float:
    """FLOPs of forward and backward pass of a step on documents.

    A matrix takes 2 FLOPs a weight and token forward, and twice as much backward, of which half is the gradient of the
    weights: frozen ones (LoRA) have none. Causal attention takes 4 FLOPs for each dimension of the queries and each
    pair of a token and one that it sees, backward twice that. The embedding is a look-up, and the head's logits are
    wanted at trained tokens alone.

    Args:
        hf: the model's ``config.json``; of an MoE model the experts that a token visits count.
        lengths: slots of each document, tokens less 1.
        num_trained: tokens in the loss.
        vocab_size: outputs of the head, where they are not the vocabulary: 1 of a value head.
    """
    dim, num_layers, num_heads = hf["hidden_size"], hf["num_hidden_layers"], hf["num_attention_heads"]
    queries = num_heads * (hf.get("head_dim") or dim // num_heads)
    keys = queries // num_heads * (hf.get("num_key_value_heads") or num_heads)
    attention = 2 * dim * (queries + keys)
    if experts := hf.get("num_local_experts") or hf.get("num_experts"):
        mlp = dim * (3 * hf["moe_intermediate_size"] * hf["num_experts_per_tok"] + experts)
    else:
        mlp = 3 * dim * hf["intermediate_size"]
    slots = np.asarray(lengths, dtype=np.float64)
    head = dim * (hf["vocab_size"] if vocab_size is None else vocab_size)
    matrices = 2 * (num_layers * (attention + mlp) * slots.sum() + head * num_trained)
    pairs = (slots * (slots + 1) / 2).sum()
    return float(matrices * (2 if lora else 3) + 3 * 4 * num_layers * queries * pairs)
