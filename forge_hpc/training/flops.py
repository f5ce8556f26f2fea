"""How much of its GPUs' arithmetic training uses: model FLOPs utilisation (MFU).

MFU is the FLOPs that the model needs for a step, over what the GPUs could have done in that time. What is computed
again (activation checkpointing) counts once, and padding not at all: it is no use to the model. Definition: PaLM,
appendix B, https://arxiv.org/abs/2204.02311.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
}
"""Dense 16-bit FLOP/s (without sparsity) by a part of the name that CUDA gives a GPU; of its maker's data sheets."""


@cache
def peak_flops(gpu: str) -> float | None:
    """Dense 16-bit FLOP/s of a GPU by its name; None where it is not in the table, which is logged once."""
    words = gpu.replace("-", " ").split()
    for name, flops in PEAK_FLOPS.items():
        if all(word in words for word in name.split()):
            return flops
    logger.info("the peak FLOP/s of a %s are not known here (training/flops.py): there is no perf/mfu", gpu)
    return None


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
