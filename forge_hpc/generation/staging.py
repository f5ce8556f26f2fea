"""Weights on their way into an engine whose workers are processes of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from forge_hpc.cluster import folders

_SHARD_BYTES = 4 << 30


@contextmanager
def staged_checkpoint(named_tensors: Sequence[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[Path]:
    """A directory in shared memory with the tensors as safetensors files, readable by this user alone.

    Tensor-parallel workers each read the whole checkpoint from it and keep their shard; nothing is pickled. It is
    removed when the context ends.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="forge-hpc-weights-", dir=folders.folder()) as directory:
        shard: dict[str, torch.Tensor] = {}
        num_shards = num_bytes = 0
        for name, tensor in named_tensors:
            # A copy of its own: safetensors refuses tensors that share memory, as a tied head does.
            shard[name] = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
            num_bytes += shard[name].nbytes
            if num_bytes >= _SHARD_BYTES or name == named_tensors[-1][0]:
                save_file(shard, Path(directory) / f"model-{num_shards:05d}.safetensors")
                shard, num_bytes, num_shards = {}, 0, num_shards + 1
        yield Path(directory)
