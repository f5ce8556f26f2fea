"""vLLM's FlashAttention, which adds up alike for one query and for many. vLLM imports it by its name."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionMetadataBuilder


class Builder(FlashAttentionMetadataBuilder):
    """Keys in one piece, whatever the batch: sums of their parts would depend on how many parts there are."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.aot_schedule = False  # it plans for parts

    def build(self, *args: Any, **options: Any) -> Any:
        metadata = super().build(*args, **options)
        metadata.max_num_splits = 1
        return metadata

    def use_cascade_attention(self, *args: Any, **options: Any) -> bool:
        return False  # keys that prompts share, and those after them, by themselves


class Backend(FlashAttentionBackend):
    @staticmethod
    def get_builder_cls() -> Any:
        return Builder
