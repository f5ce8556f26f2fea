#!/usr/bin/env bash
# torch's registry lets others take over parts of its flash attention, and what they do not take over stays with
# FlashAttention 2. torchtitan 0.3.0 has that add up keys in one piece (num_splits=1, against NaN, as its source says);
# one would guess that whoever adds an implementation for other calls does not change this. It goes by the name that is
# in use: as soon as there is one, of an implementation that takes over nothing too, FlashAttention 2 is told no number.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 torchtitan==0.3.0 triton==3.9.0

cat > splits.py <<'PYTHON'
from importlib.metadata import version

import torch
import torch._utils

torch._utils._get_available_device_type = lambda: "cpu"  # torchtitan takes "cuda" where torch has no accelerator
from torch.library import Library
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl
from torch.nn.attention import register_flash_attention_impl, restore_flash_attention_impl
from torchtitan.models.common.attention import VarlenAttention, VarlenMetadata

told = []


def kernel(q, k, v, *args, num_splits=None, **options):
    """Stands on the CPU, which has none, for torch's FlashAttention 2: it notes what it is told."""
    told.append(num_splits)
    empty = torch.empty(0)
    return torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0]), empty, empty, empty


class Nothing:
    """An implementation that takes over none of torch's operators."""

    def remove(self):
        pass


library = Library("aten", "IMPL")
library.impl("_flash_attention_forward", kernel, "CPU")
attention = VarlenAttention(VarlenAttention.Config())
bounds = torch.tensor([0, 3, 8], dtype=torch.int32)
qkv = [torch.randn(1, 8, 2, 64) for _ in range(3)]
masks = VarlenMetadata(bounds, bounds, 5, 5)
register_flash_attention_impl("one of our own", register_fn=Nothing)
for name in (None, "one of our own", None):
    if name:
        activate_flash_attention_impl(name)
    elif current_flash_attention_impl():
        restore_flash_attention_impl()
    attention(*qkv, attention_masks=masks)
    print(f"torchtitan {version('torchtitan')}, torch {torch.__version__}: in use {current_flash_attention_impl()!r}, "
          f"torch's own kernel is told num_splits={told[-1]}")
assert told == [1, None, 1], told
print("as seen: with another name in use the same kernel is told nothing")
PYTHON
venv/bin/python splits.py
