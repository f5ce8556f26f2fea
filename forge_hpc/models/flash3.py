"""Attention's forward pass by vLLM's FlashAttention 3, on GPUs that it is for; torch has FlashAttention 2 in itself.

It is the quicker one, and comes to the bits that vLLM comes to. vLLM brings no backward pass: torch's goes on from its
output and sums, which mean the same. To torch this is a flash attention implementation of its registry
(``torch.nn.attention``), which TorchTitan's ``VarlenAttention`` and ``varlen_attn`` take without knowing whose it is.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchtitan.tools.utils
from torch.library import Library, get_kernel
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    register_flash_attention_impl,
)

from forge_hpc.config.errors import UserError
from forge_hpc.config.models import INVARIANT_HEADS

logger = logging.getLogger(__name__)
NAME = "vLLM's FA3"
"""Its name in torch's registry."""
CAPABILITY = 9
"""Compute capability, its first number, of the GPUs that the kernels are built for."""
HEAD_DIMS = INVARIANT_HEADS
"""Sizes of heads that they are used for, as they were compared; torch's kernels serve others."""
_UNUSED = (
    *("k_new", "v_new", "q_v", "out", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table", "kv_batch_idx"),
    *("leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale"),
    *("scheduler_metadata", "pack_gqa", "s_aux", "cp_tot_seqused_k"),
)


def serves() -> bool:
    """Whether this process's GPU and vLLM have it."""
    is_right = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == CAPABILITY
    return is_right and not _lacks()


def activate() -> None:
    """Use it for all attention of packed rows in this process, also where another FlashAttention 3 is installed.

    Raises:
        UserError: this vLLM does not have it, or not for this torch.
    """
    if lack := _lacks():
        raise UserError(
            f"model.batch_invariant takes attention from vLLM's FlashAttention 3: {lack}",
            "install vLLM's build for CUDA, or leave model.batch_invariant off",
        )
    torchtitan.tools.utils.get_cuda_flash_attention_impl = lambda: NAME  # what its attention activates, once built
    if current_flash_attention_impl() != NAME:
        activate_flash_attention_impl(NAME)


@cache
def _lacks() -> str:
    """Load it. Why it cannot be had, or nothing."""
    # Without `import vllm`, which is for generators: it has all of this process compile in one thread.
    found = importlib.util.find_spec("vllm")
    places = (found.submodule_search_locations if found else None) or ()
    file = next((file for place in places for file in Path(place).glob("vllm_flash_attn/_vllm_fa3_C*.so")), None)
    if file is None:
        return "the installed vLLM does not have it (vllm_flash_attn/_vllm_fa3_C*.so)"
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        logger.warning("attention goes by torch's FlashAttention 2: %s", error)
        return f"it does not load: {error}"
    return ""


class Override:
    """Has torch's flash attention of packed rows go to a kernel with the arguments of vLLM's, on devices of a dispatch
    key, until it is removed. What the kernel is not for (dropout, other heads, rows that are not packed, key caches)
    goes where it went before."""

    def __init__(self, key: str, kernel: Any) -> None:
        before = get_kernel("aten::_flash_attention_forward", key)

        def forward(keys: Any, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int,
                    dropout: float, is_causal: bool, is_debug: bool, **options: Any) -> Any:  # fmt: skip
            others = {name for name, value in options.items() if value is not None} - {"scale", "num_splits"}
            others -= {"window_size_left", "window_size_right"}
            is_packed = cu_q is not None and cu_k is not None
            is_of_size = q.shape[-1] == v.shape[-1] and q.shape[-1] in HEAD_DIMS
            if not is_packed or dropout or is_debug or others or not is_of_size:
                # Who sees another kernel than FlashAttention 2 in use does not tell it what it has to be told there.
                options |= {"num_splits": 1} if is_packed and options.get("num_splits") is None else {}
                given = q, k, v, cu_q, cu_k, max_q, max_k, dropout, is_causal, is_debug
                return before.call_boxed(keys, *given, **options)
            scale, left, right = (options.get(name) for name in ("scale", "window_size_left", "window_size_right"))
            out, log_sums, *_ = kernel(
                **dict.fromkeys(_UNUSED),
                **{name: x if x.stride(-1) == 1 else x.contiguous() for name, x in (("q", q), ("k", k), ("v", v))},
                cu_seqlens_q=cu_q,
                cu_seqlens_k=cu_k,
                max_seqlen_q=max_q,
                max_seqlen_k=max_k,
                softmax_scale=q.shape[-1] ** -0.5 if scale is None else scale,
                is_causal=is_causal,
                window_size_left=-1 if left is None else left,
                window_size_right=-1 if right is None else right,
                softcap=0.0,
                is_rotary_interleaved=True,
                num_splits=1,  # keys in one piece: sums of their parts would depend on how many there are
                sm_margin=0,
                cp_world_size=1,
                cp_rank=0,
            )
            seed, offset = (q.new_zeros(shape, dtype=torch.uint64) for shape in ((2,), ()))  # of dropout: none
            return out, log_sums.contiguous(), seed, offset, q.new_empty(0)

        self._library: Library | None = Library("aten", "IMPL")
        self._library.impl("_flash_attention_forward", forward, key, with_keyset=True)

    def remove(self) -> None:
        self._library = None


def _register() -> Override:
    assert not _lacks()
    logger.info("attention: forward by FlashAttention 3, which vLLM brings")
    return Override("CUDA", torch.ops._vllm_fa3_C.fwd)


register_flash_attention_impl(NAME, register_fn=_register)
