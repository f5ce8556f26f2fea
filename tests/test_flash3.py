"""Attention's forward pass by a kernel of vLLM's arguments, as torch's own attention of packed rows takes it.

The kernel itself is for GPUs (`make gpu-check`, mismatch); here plain attention stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.library import Library
from torch.nn.attention.varlen import varlen_attn

from forge_hpc.config import UserError
from forge_hpc.models import flash3
from forge_hpc.models.attention import DocumentAttention, document_batches

LENGTHS = (1, 13, 6)


def plain(**given: Any) -> list[torch.Tensor]:
    """Causal attention of each document, the last query to all keys, as FlashAttention has it."""
    q, k, v = (given[name].float() for name in "qkv")
    assert given["is_causal"] and given["num_splits"] == 1
    assert all(given[name].stride(-1) == 1 for name in "qkv")
    assert (given["window_size_left"], given["window_size_right"]) == (-1, 0)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    outs, sums = [], []
    bounds = given["cu_seqlens_q"].tolist(), given["cu_seqlens_k"].tolist()
    for start, end, first, last in zip(*(each[i:] for each in bounds for i in (0, 1)), strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[first:last]) * given["softmax_scale"]
        seen = torch.ones(end - start, last - first, dtype=torch.bool).tril(last - first - (end - start))
        scores = scores.masked_fill(~seen, -math.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[first:last]))
        sums.append(scores.logsumexp(-1))
    return [torch.cat(outs).to(given["q"].dtype), torch.cat(sums, dim=1), torch.empty(0), torch.empty(0)]


@pytest.fixture
def before() -> Iterator[list[str]]:
    """Notes of what went to the kernel that was there before ours; the CPU has none of itself."""
    went: list[str] = []

    def other(q: torch.Tensor, *_: Any, **options: Any) -> Any:
        went.append(f"heads of {q.shape[-1]}, {options.get('num_splits')}")
        empty = torch.empty(0)
        return torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0]), empty, empty, empty

    library = Library("aten", "IMPL")
    library.impl("_flash_attention_forward", other, "CPU")
    ours = flash3.Override("CPU", plain)
    yield went
    ours.remove()
    del library


def rows(dim: int, num_keys: tuple[int, ...] = LENGTHS) -> tuple[list[torch.Tensor], list[Any]]:
    """Queries, keys and values of random documents, and their bounds and longest ones."""
    torch.manual_seed(0)
    sizes = [(sum(LENGTHS), 4), (sum(num_keys), 2), (sum(num_keys), 2)]
    bounds = [torch.tensor([0, *np.cumsum(num)], dtype=torch.int32) for num in (LENGTHS, num_keys)]
    return [torch.randn(*size, dim) for size in sizes], [*bounds, max(LENGTHS), max(num_keys)]


def test_packed_rows_go_to_it_with_what_they_mean(before: list[str]) -> None:
    qkv, bounds = rows(64)
    out = varlen_attn(*qkv, *bounds, window_size=(-1, 0), enable_gqa=True, scale=0.2)
    positions = np.concatenate([np.arange(length) for length in LENGTHS])[None]
    masks = document_batches(positions, torch.device("cpu"))
    plainly = DocumentAttention(DocumentAttention.Config())(
        *(x[None] for x in qkv), attention_masks=masks, scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(out, plainly[0])
    assert before == []


def test_pieces_with_fewer_queries_than_keys(before: list[str]) -> None:
    longer = (1, 20, 9)
    qkv, bounds = rows(128, longer)
    out = varlen_attn(*qkv, *bounds, window_size=(-1, 0), enable_gqa=True)
    q, k, v = (x[-size:] for x, size in zip(qkv, (6, 9, 9), strict=True))
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    last = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=torch.ones(6, 9, dtype=torch.bool).tril(3)
    )
    torch.testing.assert_close(out[-6:], last[0].transpose(0, 1))
    assert before == []


def test_what_it_is_not_for_goes_where_it_went_before(before: list[str]) -> None:
    qkv, bounds = rows(32)
    varlen_attn(*qkv, *bounds, window_size=(-1, 0), enable_gqa=True)
    assert before == ["heads of 32, 1"]  # FlashAttention 2 has to be told the number of splits
    before.clear()
    dense = [torch.randn(1, 5, 2, 64) for _ in range(3)]
    torch.ops.aten._flash_attention_forward(*dense, None, None, 5, 5, 0.0, True, False)
    qkv, bounds = rows(64)
    forward = torch.ops.aten._flash_attention_forward
    forward(*qkv, *bounds, 0.1, True, False)  # dropout
    forward(*qkv, *bounds, 0.0, True, False, seqused_k=torch.tensor([1, 5, 3], dtype=torch.int32))
    forward(qkv[0], qkv[1], torch.randn(*qkv[2].shape[:2], 128), *bounds, 0.0, True, False)
    assert before == ["heads of 64, None", *["heads of 64, 1"] * 3]


def test_heads_that_lie_apart_in_memory(before: list[str]) -> None:
    qkv, bounds = rows(64)
    apart = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in qkv]
    out = [varlen_attn(*each, *bounds, window_size=(-1, 0), enable_gqa=True) for each in (qkv, apart)]
    assert torch.equal(*out) and before == []


def test_one_that_is_removed_gives_back_what_was_there(before: list[str]) -> None:
    qkv, bounds = rows(64)
    asked: list[str] = []
    another = flash3.Override("CPU", lambda **given: asked.extend(given) or plain(**given))
    expected = varlen_attn(*qkv, *bounds, window_size=(-1, 0), enable_gqa=True)
    assert "softmax_scale" in asked
    asked.clear()
    another.remove()
    assert torch.equal(varlen_attn(*qkv, *bounds, window_size=(-1, 0), enable_gqa=True), expected)
    assert asked == before == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this vLLM may have it")
def test_a_vllm_without_it_is_told_in_a_line() -> None:
    assert not flash3.serves()
    with pytest.raises(UserError, match=r"model\.batch_invariant takes .*: the installed vLLM does not"):
        flash3.activate()
